"""What the publisher costs its engine, and what its writes cost the others who use the index."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count, islice
from typing import Any

import msgspec
import uvloop
import zmq

from gateway.bench.index_fleet import (
    BLOCK_SIZE,
    INCARNATION,
    LEASE_MS,
    POOL,
    Fleet,
    conversation,
    conversing_fleet,
    fleet_of,
    latencies_ms,
    percentile,
    random_from,
    random_hashes,
    reader_of,
    select,
    the_prompt,
    worker,
)
from gateway.bench.peers import peer
from gateway.bench.radix_tree import reference, stores_per_s
from kvindex.config import IndexConfig, publisher_config
from kvindex.contents import EngineContents
from kvindex.event_source import ZmqEventSource
from kvindex.events import BlockRemoved, BlockStored, EngineEvent, decode_batch
from kvindex.figures import Figure
from kvindex.index import MAX_BATCH
from kvindex.publisher import LoadReport, Publisher
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Batch, Load, SlotState

WRITTEN_BLOCKS_PER_S = 40_000
ENGINE_BLOCKS_PER_S = 1_000
ENGINE_STEPS_PER_S = 50
_EVENTS_ENDPOINT = "inproc://bench-events"
_RESYNCED = 1_000
"""The worker that is published by a process of its own."""


def store(num_blocks: int) -> list[Figure]:
    """From the engine's bytes, one block an event, to Redis' answer."""
    payloads = [
        _payload(BlockStored([n], n - 1 if n else None, [n] * BLOCK_SIZE, BLOCK_SIZE))
        for n in range(num_blocks)
    ]
    with fleet_of(0) as fleet:
        config = publisher_config({"kvlane.redis_url": fleet.config.redis_url, "kvlane.redis_timeout_s": 10})
        writer, source = _Watched(config, num_blocks), _Said(payloads)
        rank = worker(_RESYNCED)
        contents = EngineContents(rank, source)
        publisher = Publisher(rank, config, writer, contents, lambda: LoadReport(Load()))
        cpu_before_s, began_s = fleet.redis.cpu_s(), time.perf_counter()
        own_cpu_before_s = time.process_time()
        publisher.start()
        writer.is_full.wait()
        took_s, cpu_s = time.perf_counter() - began_s, fleet.redis.cpu_s() - cpu_before_s
        own_cpu_s = time.process_time() - own_cpu_before_s
        publisher.stop()
    beside, value = reference(", stores only", stores_per_s, num_blocks // 4)
    return [
        Figure("index.store_blocks_per_s", num_blocks / took_s, "1/s", ">= 50000", beside, value),
        Figure("index.store_blocks_per_redis_core", num_blocks / cpu_s, "1/s"),
        Figure("index.store_blocks_per_publisher_core", num_blocks / own_cpu_s, "1/s"),
    ]


class _Watched(RedisIndexWriter):
    """A writer that tells when its slot holds so many blocks."""

    def __init__(self, config: IndexConfig, num_blocks: int) -> None:
        super().__init__(config)
        self._num_blocks = num_blocks
        self.is_full = threading.Event()

    def apply(self, *args: Any, **options: Any) -> SlotState:  # noqa: ANN401 - handed on
        """See `IndexWriter`."""
        return self._look(super().apply(*args, **options))

    def heartbeat(self, *args: Any, **options: Any) -> SlotState:  # noqa: ANN401 - handed on
        """See `IndexWriter`."""
        return self._look(super().heartbeat(*args, **options))

    def _look(self, state: SlotState) -> SlotState:
        if state.num_blocks >= self._num_blocks:
            self.is_full.set()
        return state


class _Said:
    """An engine whose messages have all come."""

    MESSAGES_A_POLL = 256

    def __init__(self, payloads: Sequence[bytes]) -> None:
        self._payloads = iter(payloads)

    def open(self) -> None:
        """Nothing to open."""

    def poll(self, timeout_s: float) -> list[EngineEvent]:
        """Return what the next messages say."""
        payloads = list(islice(self._payloads, self.MESSAGES_A_POLL))
        if not payloads:
            time.sleep(timeout_s)
        return [event for payload in payloads for event in decode_batch(payload)]

    def close(self) -> None:
        """Nothing to close."""


def select_under_write(num_calls: int) -> Figure:
    """Match and reserve while another worker writes."""
    prompt, numbers = the_prompt(), count()

    async def measure() -> list[float]:
        async with reader_of(fleet) as reader:
            return await latencies_ms(lambda: select(reader, prompt, str(next(numbers))), num_calls)

    with conversing_fleet(8, conversation) as fleet:
        quiet_ms = uvloop.run(measure())
        with peer(_write_for_ever, fleet.config.redis_url):
            uvloop.run(_until_held(fleet, 1))
            busy_ms = uvloop.run(measure())
    return Figure(
        "index.select_p99_ms_under_write",
        percentile(busy_ms, 99),
        "ms",
        "<= 3",
        "the same while nothing is written",
        percentile(quiet_ms, 99),
    )


def _write_for_ever(url: str) -> None:
    """Store fresh blocks and remove old ones at a steady rate, as a worker of its own."""
    writer = RedisIndexWriter(IndexConfig(redis_url=url, redis_timeout_s=10))
    slot = writer.open_slot(worker(_RESYNCED), lease_ms=LEASE_MS)
    rng = random_from(2)
    half = MAX_BATCH // 2
    former: tuple[int, ...] = ()
    began_s = time.perf_counter()
    for sequence in count(1):
        fresh = tuple(random_hashes(rng, half))
        writer.apply(POOL, slot, INCARNATION, Batch(sequence=sequence, stored=fresh, removed=former))
        former = fresh
        due_s = began_s + sequence * MAX_BATCH / WRITTEN_BLOCKS_PER_S
        time.sleep(max(0.0, due_s - time.perf_counter()))


def resync(num_blocks: int) -> list[Figure]:
    """A worker's slot is lost, and its publisher sends all it knows while others go on."""
    prompt, numbers = the_prompt(), count()

    def select_one(reader: RedisIndexReader) -> Callable[[], Awaitable[None]]:
        return lambda: select(reader, prompt, str(next(numbers)))

    async def measure() -> tuple[float, list[float], list[float]]:
        async with reader_of(fleet) as reader:
            quiet_ms = await latencies_ms(
                lambda: select(reader, prompt, str(next(numbers))), num_blocks // 1_000
            )
            before = await _slot_of(reader)
            fleet.writer.close_slot(POOL, before, INCARNATION)
            began_s, busy_ms = time.perf_counter(), []
            while await _num_held(reader) < num_blocks:
                busy_ms += await latencies_ms(select_one(reader), 50)
            return time.perf_counter() - began_s, quiet_ms, busy_ms

    with (
        conversing_fleet(8, conversation) as fleet,
        peer(_publish_for_ever, fleet.config.redis_url, num_blocks),
    ):
        uvloop.run(_until_held(fleet, num_blocks))
        took_s, quiet_ms, busy_ms = uvloop.run(measure())
    return [
        Figure("index.resync_1m_s", took_s, "s", "<= 15"),
        Figure(
            "index.select_p99_ms_under_resync",
            percentile(busy_ms, 99),
            "ms",
            "<= 5",
            "the same while nothing is written",
            percentile(quiet_ms, 99),
        ),
    ]


async def _until_held(fleet: Fleet, num_blocks: int) -> None:
    async with reader_of(fleet) as reader:
        while await _num_held(reader) < num_blocks:  # noqa: ASYNC110 (what is awaited is another process)
            await asyncio.sleep(0.05)


async def _num_held(reader: RedisIndexReader) -> int:
    _, workers = await reader.workers(POOL)
    return sum(
        each.num_indexed_blocks for each in workers if each.worker.endpoint == worker(_RESYNCED).endpoint
    )


async def _slot_of(reader: RedisIndexReader) -> int:
    _, workers = await reader.workers(POOL)
    return next(each.slot for each in workers if each.worker.endpoint == worker(_RESYNCED).endpoint)


class _Filling:
    """An engine that has filled its cache and says no more."""

    def __init__(self, num_blocks: int) -> None:
        self._events = self._runs(num_blocks)

    def open(self) -> None:
        """Nothing to open."""

    def poll(self, timeout_s: float) -> list[EngineEvent]:
        """Return the next run of blocks."""
        event = next(self._events, None)
        if event is None:
            time.sleep(timeout_s)
        return [event] if event else []

    def close(self) -> None:
        """Nothing to close."""

    def _runs(self, num_blocks: int) -> Iterator[EngineEvent]:
        for first in range(0, num_blocks, MAX_BATCH):
            yield _stored(first, min(MAX_BATCH, num_blocks - first))


def _publish_for_ever(url: str, num_blocks: int) -> None:
    config = publisher_config({"kvlane.redis_url": url, "kvlane.redis_timeout_s": 10})
    rank = worker(_RESYNCED)
    contents = EngineContents(rank, _Filling(num_blocks))
    publisher = Publisher(rank, config, RedisIndexWriter(config), contents, lambda: LoadReport(Load()))
    publisher.start()
    threading.Event().wait()


def publisher_cpu(duration_s: float) -> Figure:
    """CPU of a process that emits an engine's events, with and without the publisher's thread in it."""
    with fleet_of(0) as fleet, multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as process:
        alone_s = process.apply(_engine_cpu_s, (None, duration_s))
        both_s = process.apply(_engine_cpu_s, (fleet.config.redis_url, duration_s))
    return Figure(
        "index.publisher_cpu_pct",
        100 * (both_s - alone_s) / duration_s,
        "% of a core",
        "<= 2",
        f"the engine's event stream alone, {ENGINE_BLOCKS_PER_S} blocks/s in {ENGINE_STEPS_PER_S} batches/s",
        100 * alone_s / duration_s,
    )


def _engine_cpu_s(url: str | None, duration_s: float) -> float:
    """Emit events as vLLM's publisher does, on its wire; return the CPU seconds of this process."""
    num_steps = round(duration_s * ENGINE_STEPS_PER_S)
    payloads = [_payload(*_step(number)) for number in range(num_steps)]
    with ExitStack() as stack:
        stream: zmq.Socket[bytes] = stack.enter_context(zmq.Context.instance().socket(zmq.PUB))
        stream.bind(_EVENTS_ENDPOINT)
        loads = count()
        if url is not None:
            config = publisher_config({"kvlane.redis_url": url})
            rank = worker(_RESYNCED)
            publisher = Publisher(
                rank,
                config,
                RedisIndexWriter(config),
                EngineContents(rank, ZmqEventSource(_EVENTS_ENDPOINT)),
                lambda: LoadReport(Load(running_tokens=next(loads))),
            )
            publisher.start()
            stack.callback(publisher.stop)
        time.sleep(0.5)
        cpu_before_s, began_s = time.process_time(), time.perf_counter()
        for number, payload in enumerate(payloads):
            stream.send_multipart((b"", number.to_bytes(8, "big"), payload))
            time.sleep(max(0.0, began_s + (number + 1) / ENGINE_STEPS_PER_S - time.perf_counter()))
        return time.process_time() - cpu_before_s


def _step(number: int) -> Sequence[EngineEvent]:
    """One step: a chunk of a prompt, a block each of some requests that decode, and as many evictions."""
    num_blocks = ENGINE_BLOCKS_PER_S // ENGINE_STEPS_PER_S
    first, num_decoding = number * num_blocks, num_blocks // 4
    events: list[EngineEvent] = [_stored(first + index, 1) for index in range(num_decoding)]
    events.append(_stored(first + num_decoding, num_blocks - num_decoding))
    if first >= ENGINE_BLOCKS_PER_S:
        evicted = range(first - ENGINE_BLOCKS_PER_S, first - ENGINE_BLOCKS_PER_S + num_blocks)
        events.append(BlockRemoved(list(evicted), medium="GPU"))
    return events


def _stored(first: int, num_blocks: int) -> BlockStored:
    """Store consecutive blocks, each named by its number and full of it."""
    names = range(first, first + num_blocks)
    tokens = [name for name in names for _ in range(BLOCK_SIZE)]
    return BlockStored(list(names), None, tokens, BLOCK_SIZE, medium="GPU")


def _payload(*events: EngineEvent) -> bytes:
    return msgspec.msgpack.encode((0.0, events, 0))
