"""What happened in a pool, as the index remembers it for a while: plain values without I/O."""

from __future__ import annotations

import enum

import msgspec

from kvindex.blocks import BlockHash


class EventKind(enum.StrEnum):
    """What happened to a slot."""

    OPENED = "opened"
    """A process registered."""
    RESYNC = "resync"
    """A process that lost events, or that the index lost track of, sends its whole state again."""
    CLEARED = "cleared"
    """The engine reset its prefix cache, so that its blocks were dropped with their slot."""
    DRIFT = "drift"
    """The index held something else than it was told; the whole state is sent again."""
    FENCED = "fenced"
    """The slot was taken out of every answer: its owner has another one, or was silent for too long."""
    CLOSED = "closed"
    """The owner took its slot out of every answer."""
    SWEPT = "swept"
    """The slot's entries are gone, and its number is free."""


class Opening(msgspec.Struct, frozen=True):
    """Why a slot is opened: OPENED, RESYNC, CLEARED or DRIFT."""

    kind: EventKind = EventKind.OPENED
    detail: str = ""
    """One line for people: what differed, what was lost."""


class PoolEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a pool's log."""

    event_id: str
    """Place in the log; events that follow can be asked for by it."""
    at_ms: int
    """Unix time on the index's clock."""
    kind: EventKind
    slot: int
    worker_id: str
    """Empty where the slot has no owner any more."""
    incarnation: str
    detail: str


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks that an engine evicted, as one batch told the index."""

    event_id: str
    at_ms: int
    slot: int
    incarnation: str
    blocks: tuple[BlockHash, ...]
