"""What a holder has, followed event by event, and the contents of an engine's device cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Protocol

import msgspec
import structlog

from kvindex import metrics
from kvindex.block_state import BlockState
from kvindex.blocks import BlockHash
from kvindex.errors import EventsLost
from kvindex.event_source import EventSource
from kvindex.events import AllBlocksCleared, BlockRemoved, BlockStored, EngineEvent
from kvindex.worker import Worker

# Skipped blocks that somebody should know of: nothing of this kind will ever be routed to.
_ALARMING = {
    "block_size": "the engine's KV events are about blocks of another size",
    "attention": "no KV cache group of the engine has attention over the whole prefix",
    "shape": "the engine's KV events do not carry one block of tokens for each block",
}

_log = structlog.get_logger(__name__)


class Change(msgspec.Struct, frozen=True):
    """Blocks that appeared and blocks that went away."""

    stored: Sequence[BlockHash] = ()
    removed: Sequence[BlockHash] = ()
    is_cleared: bool = False
    """Everything went away before."""


class Contents(Protocol):
    """The blocks of one holder. Used from one thread, the publisher's."""

    @property
    def hashes(self) -> Collection[BlockHash]:
        """The blocks present, after all changes that were returned; a live view."""

    def open(self) -> None:
        """Start to follow the holder. Idempotent."""

    def poll(self, timeout_s: float) -> list[Change]:
        """Return what changed, in order; wait for the first change at most `timeout_s`.

        Raises:
            EventsLost: what the holder has is not known any more: it counts as empty.
        """

    def close(self) -> None:
        """Stop following. Idempotent."""


class EngineContents:
    """`Contents` of an engine's device cache, from its KV events.

    Args:
        worker: the engine's rank.
        source: its events; owned from now on.
    """

    def __init__(self, worker: Worker, source: EventSource) -> None:
        self._worker = worker
        self._source = source
        self._state = BlockState(worker.model, worker.block_size)
        self._alarmed: set[str] = set()
        self._log = _log.bind(worker=worker.worker_id, incarnation=worker.incarnation)

    @property
    def hashes(self) -> Collection[BlockHash]:
        """See `Contents`."""
        return self._state.hashes

    def open(self) -> None:
        """See `Contents`."""
        self._source.open()

    def poll(self, timeout_s: float) -> list[Change]:
        """See `Contents`."""
        try:
            changes = [self._change(event) for event in self._source.poll(timeout_s)]
        except EventsLost:
            self._state.clear()
            raise
        if self._state.skipped:
            self._count_skipped()
        return changes

    def close(self) -> None:
        """See `Contents`."""
        self._source.close()

    def _change(self, event: EngineEvent) -> Change:
        match event:
            case BlockStored():
                return Change(stored=self._state.store(event))
            case BlockRemoved():
                return Change(removed=self._state.remove(event))
            case AllBlocksCleared():
                self._state.clear()
                return Change(is_cleared=True)

    def _count_skipped(self) -> None:
        skipped, self._state.skipped = self._state.skipped, Counter()
        for reason, num_blocks in skipped.items():
            metrics.BLOCKS_SKIPPED.labels(self._worker.worker_id, reason).inc(num_blocks)
        # Beside a group that is followed, a hybrid model has others.
        usual = {"attention"} if self._state.is_following else set()
        for reason in skipped.keys() & _ALARMING.keys() - self._alarmed - usual:
            self._alarmed.add(reason)
            self._log.error(f"{_ALARMING[reason]}: they are not indexed", block_size=self._worker.block_size)
