"""The subscriber against a publisher that speaks vLLM's protocol."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest
import zmq

from kvindex.errors import EventsLost
from kvindex.event_source import ZmqEventSource
from kvindex.events import BlockRemoved, EngineEvent

PATIENCE_S = 5.0
NAMES = itertools.count()


def payload(number: int) -> bytes:
    return msgspec.msgpack.encode((0.0, [{"type": "BlockRemoved", "block_hashes": [number]}], 0))


def numbers(events: list[EngineEvent]) -> list[object]:
    return [event.block_hashes[0] for event in events if isinstance(event, BlockRemoved)]


class Engine:
    """vLLM's end of the stream: a PUB socket and, unless `replay` is off, a ROUTER that answers replays.

    `with_topic` frames replays as 0.32 does; 0.24 leaves the topic out.
    """

    def __init__(self, *, replay: bool = True, with_topic: bool = True, tcp: bool = False) -> None:
        self._context = zmq.Context.instance()
        self._with_topic = with_topic
        self._publisher = self._context.socket(zmq.XPUB)
        self._publisher.setsockopt(zmq.LINGER, 0)
        self.endpoint = f"inproc://events-{next(NAMES)}"
        if tcp:
            port = self._publisher.bind_to_random_port("tcp://127.0.0.1")
            self.endpoint = f"tcp://127.0.0.1:{port}"
        else:
            self._publisher.bind(self.endpoint)
        self.buffer: list[tuple[int, bytes]] = []
        self.replay_endpoint: str | None = None
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        if replay:
            router = self._context.socket(zmq.ROUTER)
            port = router.bind_to_random_port("tcp://127.0.0.1")
            self.replay_endpoint = f"tcp://127.0.0.1:{port}"
            self._threads.append(threading.Thread(target=self._answer, args=(router,)))
            self._threads[-1].start()

    def wait_for_subscriber(self) -> None:
        assert self._publisher.poll(PATIENCE_S * 1000)
        assert self._publisher.recv() == b"\x01"

    def publish(self, sequence: int, content: bytes | None = None, *, lose: bool = False) -> None:
        content = payload(sequence) if content is None else content
        self.buffer.append((sequence, content))
        if not lose:
            self._publisher.send_multipart((b"topic", sequence.to_bytes(8, "big"), content))

    def send(self, frames: list[bytes]) -> None:
        self._publisher.send_multipart(frames)

    def _answer(self, router: zmq.Socket[bytes]) -> None:
        topic = (b"topic",) if self._with_topic else ()
        while not self._closing.is_set():
            if router.poll(20):
                client, _, first = router.recv_multipart()
                for sequence, content in self.buffer:
                    if sequence >= int.from_bytes(first, "big"):
                        frames = (client, b"", *topic, sequence.to_bytes(8, "big"), content)
                        router.send_multipart(frames)
                end = (-1).to_bytes(8, "big", signed=True)
                router.send_multipart((client, b"", *topic[:0], *(b"" for _ in topic), end, b""))
        router.close(linger=0)

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join()
        self._publisher.close()


@pytest.fixture(params=["inproc", "tcp"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with closing(Engine(replay=False, tcp=request.param == "tcp")) as engine:
        yield engine


def opened(engine: Engine, **options: float) -> ZmqEventSource:
    source = ZmqEventSource(engine.endpoint, engine.replay_endpoint, **options)
    source.open()
    engine.wait_for_subscriber()
    return source


def drain(source: ZmqEventSource, num_events: int) -> list[object]:
    """Return the next `num_events` events as numbers."""
    seen: list[object] = []
    while len(seen) < num_events:
        # A poll may end early with nothing: what came was no event.
        deadline_s = time.monotonic() + PATIENCE_S
        while not (events := source.poll(PATIENCE_S)):
            assert time.monotonic() < deadline_s, f"nothing came after {seen}"
        seen += numbers(events)
    return seen


def test_events_arrive_in_order(engine: Engine):
    with closing(opened(engine)) as source:
        for sequence in range(5):
            engine.publish(sequence)
        assert drain(source, 5) == [0, 1, 2, 3, 4]
        assert source.poll(0) == []


def test_subscribing_before_the_engine_binds_loses_nothing():
    """The connector is made before vLLM's publisher."""
    endpoint = f"inproc://late-{next(NAMES)}"
    with closing(ZmqEventSource(endpoint)) as source:
        source.open()
        publisher = zmq.Context.instance().socket(zmq.PUB)
        with publisher:
            publisher.bind(endpoint)
            for sequence in range(3):
                publisher.send_multipart((b"", sequence.to_bytes(8, "big"), payload(sequence)))
            assert drain(source, 3) == [0, 1, 2]


def test_a_gap_without_replay_is_reported_once_and_the_stream_goes_on(engine: Engine):
    with closing(opened(engine)) as source:
        engine.publish(0)
        assert drain(source, 1) == [0]
        engine.publish(1, lose=True)
        engine.publish(2)
        with pytest.raises(EventsLost, match="expected KV events number 1, got number 2"):
            source.poll(PATIENCE_S)
        engine.publish(3)
        assert drain(source, 2) == [2, 3]


@pytest.mark.parametrize("with_topic", [True, False])
def test_a_gap_is_filled_from_the_replay_buffer(with_topic: bool):
    with closing(Engine(with_topic=with_topic)) as engine, closing(opened(engine)) as source:
        engine.publish(0)
        assert drain(source, 1) == [0]
        engine.publish(1, lose=True)
        engine.publish(2, lose=True)
        engine.publish(3)
        engine.publish(4)
        engine.publish(5)
        assert drain(source, 5) == [1, 2, 3, 4, 5]
        assert source.poll(0) == []


def test_messages_lost_before_a_silence_are_found():
    with closing(Engine()) as engine, closing(opened(engine, recheck_s=0.05)) as source:
        engine.publish(0)
        assert drain(source, 1) == [0]
        engine.publish(1, lose=True)
        seen: list[object] = []
        deadline_s = time.monotonic() + PATIENCE_S
        while not seen and time.monotonic() < deadline_s:
            seen = numbers(source.poll(0.02))
        assert seen == [1]
        engine.publish(2)
        assert drain(source, 1) == [2]


def test_a_late_subscriber_begins_with_the_replay_buffer():
    with closing(Engine()) as engine:
        engine.publish(0, lose=True)
        engine.publish(1, lose=True)
        with closing(opened(engine)) as source:
            engine.publish(2)
            assert drain(source, 3) == [0, 1, 2]


def test_a_replay_buffer_that_is_too_short_is_a_loss():
    with closing(Engine()) as engine, closing(opened(engine)) as source:
        engine.publish(0)
        assert drain(source, 1) == [0]
        for sequence in (1, 2, 3):
            engine.publish(sequence, lose=True)
        del engine.buffer[:3]
        engine.publish(4)
        with pytest.raises(EventsLost):
            source.poll(PATIENCE_S)
        assert drain(source, 2) == [3, 4]


def test_a_replay_that_nobody_answers_is_a_loss(engine: Engine):
    source = ZmqEventSource(engine.endpoint, "tcp://127.0.0.1:1", replay_timeout_s=0.05)
    with closing(source):
        source.open()
        engine.wait_for_subscriber()
        engine.publish(3)
        with pytest.raises(EventsLost):
            source.poll(PATIENCE_S)
        assert drain(source, 1) == [3]


@pytest.mark.parametrize("replay", [True, False])
def test_a_restarted_engine_is_a_loss_and_its_own_past_is_read(replay: bool):
    with closing(Engine(replay=replay)) as engine, closing(opened(engine)) as source:
        for sequence in range(4):
            engine.publish(sequence)
        assert drain(source, 4) == [0, 1, 2, 3]
        engine.buffer.clear()
        engine.publish(0, payload(100), lose=True)
        engine.publish(1, payload(101))
        with pytest.raises(EventsLost):
            source.poll(PATIENCE_S)
        engine.publish(2, payload(102))
        assert drain(source, 3 if replay else 2) == ([100, 101, 102] if replay else [101, 102])


@pytest.mark.parametrize("frames", [[b""], [b"topic", b"more"], [b"a", b"b", b"c", b"d"]])
def test_messages_that_are_not_vllms_are_passed_over(engine: Engine, frames: list[bytes]):
    with closing(opened(engine)) as source:
        engine.send(frames)
        engine.publish(0)
        assert drain(source, 1) == [0]


def test_an_unreadable_message_is_a_loss(engine: Engine):
    with closing(opened(engine)) as source:
        engine.publish(0, b"\xff")
        engine.publish(1)
        with pytest.raises(EventsLost, match="cannot read"):
            source.poll(PATIENCE_S)
        assert drain(source, 1) == [1]
