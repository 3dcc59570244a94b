"""Reads what the scripts of the index answer. Pure: bytes in, values out."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec

from kvindex.blocks import HASH_BYTES
from kvindex.errors import SlotLost
from kvindex.keys import FLEET_HEAD, LIVE_ROW, PENDING_HEAD, PENDING_SAMPLE, RESERVATION, SLOT, STEP
from kvindex.pending import Pending, Sample
from kvindex.worker import Load, SlotState, WorkerState


class Row(NamedTuple):
    """What a slot's row of the live table says."""

    expires_ms: float
    lease_ms: int
    epoch: int
    state: WorkerState


class _Rows(NamedTuple):
    """Of all slots that are not fenced."""

    by_slot: dict[int, Row]
    states: tuple[WorkerState, ...]
    first_expiry_ms: float


@functools.lru_cache(maxsize=4096)
def _read_row(slot: int, packed: bytes) -> Row:
    """Most rows are the same as in the answer before."""
    expires_ms, lease_ms, epoch, tokens, requests, *load = LIVE_ROW.unpack(packed)
    state = WorkerState(
        slot=slot,
        load=Load(**dict(zip(Load.__struct_fields__, load, strict=True))),
        charged_tokens=tokens,
        charged_requests=requests,
    )
    return Row(expires_ms, lease_ms, epoch, state)


@functools.lru_cache(maxsize=64)
def _read_rows(packed: bytes) -> _Rows:
    """Many answers in a row are about the same fleet in the same state."""
    by_slot = {}
    for slot, at in enumerate(range(0, len(packed), LIVE_ROW.size)):
        row = _read_row(slot, packed[at : at + LIVE_ROW.size])
        if row.epoch:
            by_slot[slot] = row
    return _Rows(
        by_slot,
        tuple([row.state for row in by_slot.values()]),
        min((row.expires_ms for row in by_slot.values()), default=math.inf),
    )


class Fleet:
    """The live workers in an answer, by slot in ascending order."""

    def __init__(self, head: bytes, packed: bytes, expired: bytes) -> None:
        self.now_ms, self.counter = FLEET_HEAD.unpack(head)
        rows = _read_rows(packed)
        self.rows = rows.by_slot
        self.states = rows.states
        lapsed: list[int] = []
        if rows.first_expiry_ms <= self.now_ms or expired:
            lapsed = [slot for slot, row in self.rows.items() if row.expires_ms <= self.now_ms]
            self.rows = {slot: row for slot, row in self.rows.items() if row.expires_ms > self.now_ms}
            for slot, epoch, tokens in RESERVATION.iter_unpack(expired):
                if slot in self.rows and self.rows[slot].epoch == epoch:
                    self._discharge(slot, tokens)
            self.states = tuple([row.state for row in self.rows.values()])
        # The counter tells of slots opened and fenced; a lease that ends is no write, so it is added here.
        self.version = hash((self.counter, *lapsed))

    def pending(self, packed: bytes) -> tuple[Pending, ...]:
        """Return what the live workers of this answer have been asked to compute."""
        found = []
        at = 0
        while at < len(packed):
            slot, epoch, expires_ms, num_samples = PENDING_HEAD.unpack_from(packed, at)
            first = at + PENDING_HEAD.size
            at = first + num_samples * PENDING_SAMPLE.size
            row = self.rows.get(slot)
            if row is not None and row.epoch == epoch and expires_ms > self.now_ms:
                found.append(Pending(slot, _read_sample(packed[first:at])))
        return tuple(found)

    def _discharge(self, slot: int, tokens: int) -> None:
        row = self.rows[slot]
        state = msgspec.structs.replace(
            row.state,
            charged_tokens=row.state.charged_tokens - tokens,
            charged_requests=row.state.charged_requests - 1,
        )
        self.rows[slot] = row._replace(state=state)


def pack_sample(sample: Sample) -> bytes:
    """Return what `reserve` takes."""
    return b"".join(map(PENDING_SAMPLE.pack, sample.depths, sample.hashes))


@functools.lru_cache(maxsize=1024)
def _read_sample(packed: bytes) -> Sample:
    """Every answer tells of the same ones while they last."""
    depths, hashes = zip(*PENDING_SAMPLE.iter_unpack(packed), strict=True)
    return Sample(depths, hashes)


def read_overlaps(packed: bytes) -> Iterator[tuple[int, int]]:
    """Yield each slot that holds the first probe, with the number of leading probes that it holds."""
    going_on = -1
    for (num_probes, holders), (_, following) in pairwise((*_read_steps(packed), (0, 0))):
        going_on &= holders
        for slot in slots_of(going_on & ~following):
            yield slot, num_probes


def _read_steps(packed: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(packed):
        num_probes, num_bytes = STEP.unpack_from(packed, at)
        at += STEP.size + num_bytes
        yield num_probes, read_set(packed[at - num_bytes : at])


@functools.lru_cache(maxsize=4096)
def read_set(packed: bytes) -> int:
    """Return a set of slots as a bitmap; `prelude.lua` tells its two forms."""
    if len(packed) % 2:
        return int.from_bytes(packed, "little")
    return sum(1 << slot for (slot,) in SLOT.iter_unpack(packed))


@functools.lru_cache(maxsize=4096)
def slots_of(bitmap: int) -> tuple[int, ...]:
    """Return the members of a set that `read_set` made, in ascending order."""
    slots = []
    while bitmap:
        lowest = bitmap & -bitmap
        slots.append(lowest.bit_length() - 1)
        bitmap ^= lowest
    return tuple(slots)


def slot_state(slot: int, reply: list[Any] | None) -> SlotState:
    """Return what the index believes `slot` holds.

    Raises:
        SlotLost: the script refused the slot.
    """
    if reply is None:
        raise SlotLost(f"slot {slot} is fenced, unknown, or misses a batch")
    num_blocks, digest = reply
    return SlotState(num_blocks=num_blocks, digest=read_digest(digest))


def read_time_ms(event_id: str) -> int:
    """Return when a line was added to a log, on the Redis clock."""
    return int(event_id.partition("-")[0])


def read_digest(packed: bytes) -> int:
    """Return a slot's digest."""
    return int.from_bytes(packed[:HASH_BYTES], "little")
