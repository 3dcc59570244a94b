"""Reads a vLLM engine's KV event stream, in process or over TCP, and notices what is missing.

Source: vLLM 0.32 and 0.24 `vllm/distributed/kv_events.py`, ZmqEventPublisher. Each message is
(topic, sequence, payload). A replay request is 8 bytes, the first sequence wanted; the answers carry the
sequence and the payload last, and a sequence of -1 ends them.
"""

from __future__ import annotations

import time
from typing import Protocol

import zmq

from kvindex.errors import EventsLost, MalformedEvent
from kvindex.events import EngineEvent, decode_batch

_RECEIVE_QUEUE_MESSAGES = 100_000
_MOST_MESSAGES_A_POLL = 256
_END_OF_REPLAY = -1
_NUM_FRAMES = 3


class EventSource(Protocol):
    """Where a publisher's events come from. Used from one thread, the publisher's."""

    def open(self) -> None:
        """Start to listen; events before this moment may be lost. Idempotent."""

    def poll(self, timeout_s: float) -> list[EngineEvent]:
        """Return the events that arrived, in order; wait for the first of them at most `timeout_s`.

        Raises:
            EventsLost: events are missing between those returned so far and those to come.
        """

    def close(self) -> None:
        """Stop listening. Idempotent."""


class ZmqEventSource:
    """Subscribes to one engine rank's events.

    A gap is filled from the engine's replay buffer where there is one. The subscription is opened by the
    thread that polls it, because a ZeroMQ socket belongs to one thread; the context is the process's
    shared one, without which `inproc://` does not reach the engine in the same process.

    Args:
        endpoint: what to connect to, `inproc://name` or `tcp://host:port`.
        replay_endpoint: the engine's replay socket, or None.
        replay_timeout_s: longest wait for the next message of a replay.
        recheck_s: how long a silence lasts before the replay socket is asked whether it is one.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None = None,
        *,
        replay_timeout_s: float = 1.0,
        recheck_s: float = 2.0,
    ) -> None:
        self._endpoint = endpoint
        self._replay_endpoint = replay_endpoint
        self._replay_timeout_ms = int(replay_timeout_s * 1000)
        self._recheck_s = recheck_s
        self._recheck_at_s = 0.0
        self._socket: zmq.Socket[bytes] | None = None
        self._expected = 0
        self._last_live = -1
        self._kept: list[tuple[int, bytes]] = []

    def open(self) -> None:
        """Subscribe, and begin with the replay buffer, so that an engine's past is known where it can be."""
        if self._socket is not None:
            return
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.set_hwm(_RECEIVE_QUEUE_MESSAGES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(self._endpoint)
        self._kept = self._replay(0)
        self._recheck_at_s = time.monotonic() + self._recheck_s

    def poll(self, timeout_s: float) -> list[EngineEvent]:
        """Return the events that arrived, as `EventSource.poll` says."""
        messages, self._kept = self._kept, []
        if not messages:
            messages = self._receive(timeout_s)
        now_s = time.monotonic()
        if not messages and now_s >= self._recheck_at_s:
            # The last messages before a silence may be lost too, and those before the subscription took hold.
            messages = self._replay(self._expected)
        if messages or now_s >= self._recheck_at_s:
            self._recheck_at_s = now_s + self._recheck_s
        events: list[EngineEvent] = []
        for position, (sequence, payload) in enumerate(messages):
            if sequence != self._expected:
                self._kept = messages[position:]
                if events:
                    return events
                expected, self._expected = self._expected, sequence
                raise EventsLost(f"expected KV events number {expected}, got number {sequence}")
            self._expected = sequence + 1
            try:
                events += decode_batch(payload)
            except MalformedEvent as error:
                self._kept = messages[position + 1 :]
                raise EventsLost(str(error)) from error
        return events

    def close(self) -> None:
        """Unsubscribe."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _receive(self, timeout_s: float) -> list[tuple[int, bytes]]:
        """Return what the subscription has, without what a replay delivered already, gaps replayed."""
        assert self._socket is not None  # noqa: S101 - open() comes first
        messages: list[tuple[int, bytes]] = []
        timeout_ms = int(timeout_s * 1000)
        while len(messages) < _MOST_MESSAGES_A_POLL and self._socket.poll(timeout_ms):
            timeout_ms = 0
            frames = self._socket.recv_multipart()
            if len(frames) != _NUM_FRAMES:
                continue  # not vLLM's; were it an event, the next one's sequence would tell
            _, packed_sequence, payload = frames
            sequence = int.from_bytes(packed_sequence, "big")
            restarted = sequence <= self._last_live
            self._last_live = sequence
            following = messages[-1][0] + 1 if messages else self._expected
            if restarted:
                # A new engine counts from 0; what it did before this message may still be had.
                return [*messages, *(self._replay(0) or [(sequence, payload)])]
            if sequence > following:
                messages += self._replay(following)
                following = messages[-1][0] + 1 if messages else following
            if sequence >= following:
                messages.append((sequence, payload))
        return messages

    def _replay(self, first: int) -> list[tuple[int, bytes]]:
        """Return what the engine still has from sequence `first` on; nothing if it cannot be asked."""
        messages: list[tuple[int, bytes]] = []
        if self._replay_endpoint is None:
            return messages
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        with socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._replay_endpoint)
            socket.send_multipart((b"", first.to_bytes(8, "big")))
            while socket.poll(self._replay_timeout_ms):
                frames = socket.recv_multipart()
                if len(frames) < _NUM_FRAMES - 1:
                    break  # whoever answers is no engine
                *_, packed_sequence, payload = frames
                sequence = int.from_bytes(packed_sequence, "big", signed=True)
                if sequence == _END_OF_REPLAY:
                    break
                messages.append((sequence, payload))
        return messages
