"""What the index was told of a slot, and what it has yet to be told. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Set
from itertools import islice

from kvindex.index import MAX_BATCH
from kvindex.worker import Batch, SlotPart, SlotState

_BATCHES_AT_ONCE = 8
_TOLD_PARTS = 1024


class Outbox:
    """Turns a stream of changes into the sequenced batches of one slot.

    Changes that cancel out before they are sent are never sent, so it holds at most one entry for each
    block that the index or the engine has, however long the index is away.

    Args:
        blocks: what the slot shall hold to begin with; the slot itself is empty.
    """

    def __init__(self, blocks: Iterable[int] = ()) -> None:
        self._unsent = dict.fromkeys(blocks, True)
        self._in_flight: tuple[Batch, ...] = ()
        self._sequence = 0
        self._num_told = 0
        self._digest_told = 0
        self._told: dict[int, set[int]] = {}  # by remainder, so that a part is compared without the rest

    def __len__(self) -> int:
        """Return the number of changes that the index may not know yet."""
        in_flight = sum(len(batch.stored) + len(batch.removed) for batch in self._in_flight)
        return len(self._unsent) + in_flight

    @property
    def is_fresh(self) -> bool:
        """Whether nothing was ever sent, so that the slot is still empty."""
        return self._sequence == 0

    @property
    def is_repeating(self) -> bool:
        """Whether batches were handed out whose fate is unknown."""
        return bool(self._in_flight)

    @property
    def told(self) -> SlotState:
        """What the slot must hold after every confirmed batch."""
        return SlotState(num_blocks=self._num_told, digest=self._digest_told)

    def change(self, *, stored: Iterable[int] = (), removed: Iterable[int] = ()) -> None:
        """Note that absent blocks were stored and present blocks removed."""
        for blocks, present in ((stored, True), (removed, False)):
            for block in blocks:
                # Stores and removals of a block alternate, so a second change takes the first one back.
                if self._unsent.pop(block, None) is None:
                    self._unsent[block] = present

    def next_batches(self) -> tuple[Batch, ...]:
        """Return what to send: the same again until it is confirmed; nothing if all is told."""
        if not self.is_repeating:
            num_batches = min(-(-len(self._unsent) // MAX_BATCH), _BATCHES_AT_ONCE)
            self._in_flight = tuple(self._take_batch() for _ in range(num_batches))
        return self._in_flight

    def _take_batch(self) -> Batch:
        blocks = list(islice(self._unsent, MAX_BATCH))
        changes = [(block, self._unsent.pop(block)) for block in blocks]
        self._sequence += 1
        return Batch(
            sequence=self._sequence,
            stored=tuple(block for block, present in changes if present),
            removed=tuple(block for block, present in changes if not present),
        )

    def confirm(self) -> None:
        """Note that the index has applied what `next_batches` returned."""
        batches, self._in_flight = self._in_flight, ()
        for batch in batches:
            self._num_told += len(batch.stored) - len(batch.removed)
            for block in batch.stored:
                self._digest_told ^= block
                self._told.setdefault(block % _TOLD_PARTS, set()).add(block)
            for block in batch.removed:
                self._digest_told ^= block
                self._told[block % _TOLD_PARTS].remove(block)

    def differences(self, found: SlotPart) -> tuple[Set[int], Set[int]]:
        """Return which blocks of a part of the slot the index has lost, and which it was never told of.

        To be asked while nothing is in flight.
        """
        told: set[int] = set()
        for remainder in range(found.part % _TOLD_PARTS, _TOLD_PARTS, found.num_parts):
            told |= self._told.get(remainder, set())
        if found.num_parts > _TOLD_PARTS:
            told = {block for block in told if block % found.num_parts == found.part}
        return told - found.blocks, found.blocks - told
