"""The index in plain dicts, for tests and simulation: every answer is found by looking at everything.

One `MemoryIndex` takes the place of Redis; any number of writers and readers share it.
"""

from __future__ import annotations

import functools
import operator
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from kvindex.blocks import BlockHash, Pool
from kvindex.chunks import CHUNK_SCHEME
from kvindex.errors import SlotLost, WorkerConflict
from kvindex.history import EventKind, Opening, PoolEvent, Removal
from kvindex.index import FIRST_OPENING, NOTHING_NEW, Costs, Holder, nothing
from kvindex.keys import ABANDONED_AFTER_LEASES, LOG_EVENTS, LOG_REMOVALS
from kvindex.pending import MOST_PENDING, Pending, Sample
from kvindex.stores import RegisteredStore, Store, StoreSpeed
from kvindex.worker import (
    Batch,
    Entries,
    Load,
    Match,
    RegisteredWorker,
    Reservation,
    Role,
    SlotPart,
    SlotState,
    StepCosts,
    Worker,
    WorkerState,
)

_BUCKET_BLOCKS = 64


@dataclass(eq=False)
class _Slot:
    number: int
    holder: Holder
    lease_ms: int
    expires_ms: float
    sequence: int = 0
    blocks: set[int] = field(default_factory=set)
    digest: int = 0
    load: Load = field(default_factory=Load)
    costs: Costs | None = None

    @property
    def state(self) -> SlotState:
        return SlotState(num_blocks=len(self.blocks), digest=self.digest)

    def change(self, stored: set[int], removed: set[int]) -> None:
        changed = (stored - self.blocks) | (removed & self.blocks)
        self.digest = functools.reduce(operator.xor, changed, self.digest)
        self.blocks ^= changed


@dataclass(frozen=True)
class _Charge:
    slot: _Slot
    prefill_tokens: int
    created_ms: float
    expires_ms: float


@dataclass(frozen=True)
class _Pending:
    slot: _Slot
    sample: Sample
    expires_ms: float


_Event = TypeVar("_Event", PoolEvent, Removal)


@dataclass
class _Pool:
    version: int = 0
    slots: dict[int, _Slot] = field(default_factory=dict)
    dead: list[int] = field(default_factory=list)
    charges: dict[str, _Charge] = field(default_factory=dict)
    pending: dict[str, _Pending] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    draining: set[str] = field(default_factory=set)
    events: deque[PoolEvent] = field(default_factory=lambda: deque(maxlen=LOG_EVENTS))
    removals: deque[Removal] = field(default_factory=lambda: deque(maxlen=LOG_REMOVALS))
    num_events: int = 0
    num_expired: int = 0

    def purge(self, now_ms: float) -> None:
        expired = [decision_id for decision_id, each in self.charges.items() if each.expires_ms <= now_ms]
        for decision_id in expired:
            del self.charges[decision_id]
        self.num_expired += len(expired)

    def keep_pending(self, decision_id: str, pending: _Pending, now_ms: float) -> None:
        if len(self.pending) >= MOST_PENDING:
            self.pending = {key: each for key, each in self.pending.items() if each.expires_ms > now_ms}
        if len(self.pending) < MOST_PENDING:
            self.pending[decision_id] = pending

    def next_id(self, now_ms: float) -> str:
        self.num_events += 1
        return f"{int(now_ms)}-{self.num_events}"

    def note(self, kind: EventKind, slot: int, holder: Holder | None, detail: str, now_ms: float) -> None:
        self.events.append(
            PoolEvent(
                event_id=self.next_id(now_ms),
                at_ms=int(now_ms),
                kind=kind,
                slot=slot,
                worker_id=holder.holder_id if holder else "",
                incarnation=holder.incarnation if holder else "",
                detail=detail,
            )
        )

    def fence(self, slot: _Slot, kind: EventKind, detail: str, now_ms: float) -> None:
        self.note(kind, slot.number, slot.holder, detail, now_ms)
        del self.slots[slot.number]
        self.dead.append(slot.number)
        self.version += 1


class MemoryIndex:
    """What the writers and readers of one test or simulation share.

    Args:
        clock: seconds; leases and reservations live by it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pools: dict[Pool, _Pool] = {}

    def now_ms(self) -> float:
        """Return the time that leases are measured on."""
        return self._clock() * 1000

    def pool(self, pool: Pool) -> _Pool:
        """Return the pool's state, made on first use."""
        return self._pools.setdefault(pool, _Pool())

    def known_pools(self) -> list[Pool]:
        """Return the pools that have slots, fenced ones included."""
        return [pool for pool, state in self._pools.items() if state.slots or state.dead]

    def live(self, pool: Pool) -> list[_Slot]:
        """Return the slots whose lease runs, by number."""
        slots = self.pool(pool).slots
        return [slots[number] for number in sorted(slots) if slots[number].expires_ms > self.now_ms()]

    def states(self, pool: Pool) -> tuple[WorkerState, ...]:
        """Return the live workers with what they are charged at this moment."""
        charges = [c for c in self.pool(pool).charges.values() if c.expires_ms > self.now_ms()]
        states = []
        for slot in self.live(pool):
            tokens = [charge.prefill_tokens for charge in charges if charge.slot is slot]
            states.append(
                WorkerState(
                    slot=slot.number,
                    load=slot.load,
                    charged_tokens=sum(tokens),
                    charged_requests=len(tokens),
                )
            )
        return tuple(states)

    def pending(self, pool: Pool) -> tuple[Pending, ...]:
        """Return what live workers have been asked to compute."""
        state, now_ms = self.pool(pool), self.now_ms()
        return tuple(
            Pending(each.slot.number, each.sample)
            for each in state.pending.values()
            if each.expires_ms > now_ms
            and each.slot.expires_ms > now_ms
            and state.slots.get(each.slot.number) is each.slot
        )

    def registry_version(self, pool: Pool) -> int:
        """Return a number that differs whenever the set of live workers does."""
        return hash((self.pool(pool).version, *(slot.number for slot in self.live(pool))))


class MemoryIndexWriter:
    """`IndexWriter` on a `MemoryIndex`."""

    def __init__(self, index: MemoryIndex) -> None:
        self._index = index

    def _slot(self, pool: Pool, slot: int, incarnation: str) -> _Slot:
        found = self._index.pool(pool).slots.get(slot)
        if found is None or found.holder.incarnation != incarnation:
            raise SlotLost(f"slot {slot} is not held by incarnation {incarnation}")
        return found

    def open_slot(
        self, holder: Holder, *, lease_ms: int, takeover: bool = False, because: Opening = FIRST_OPENING
    ) -> int:
        """See `IndexWriter`."""
        pool = self._index.pool(holder.pool)
        now_ms = self._index.now_ms()
        for former in [s for s in pool.slots.values() if s.holder.holder_id == holder.holder_id]:
            alive = former.expires_ms > now_ms and former.holder.incarnation != holder.incarnation
            if alive and not takeover:
                raise WorkerConflict(f"{holder.holder_id} is held by {former.holder.incarnation}")
            is_ours = former.holder.incarnation == holder.incarnation
            detail = "it has a fresh slot" if is_ours else "another process took its place"
            pool.fence(former, EventKind.FENCED, detail, now_ms)
        taken = {*pool.slots, *pool.dead}
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        pool.slots[number] = _Slot(number, holder, lease_ms, now_ms + lease_ms)
        pool.version += 1
        pool.note(because.kind, number, holder, because.detail, now_ms)
        return number

    def apply(
        self,
        pool: Pool,
        slot: int,
        incarnation: str,
        *batches: Batch,
        meanwhile: Callable[[], None] = nothing,
    ) -> SlotState:
        """See `IndexWriter`."""
        meanwhile()
        target = self._slot(pool, slot, incarnation)
        for batch in batches:
            if batch.sequence > target.sequence + 1:
                raise SlotLost(f"slot {slot} is at {target.sequence}, the batch is {batch.sequence}")
            if batch.sequence == target.sequence + 1:
                target.sequence = batch.sequence
                target.change(set(batch.stored), set(batch.removed))
                if batch.removed:
                    self._note_removed(pool, slot, incarnation, batch)
        return target.state

    def _note_removed(self, pool: Pool, slot: int, incarnation: str, batch: Batch) -> None:
        state, now_ms = self._index.pool(pool), self._index.now_ms()
        state.removals.append(
            Removal(
                event_id=state.next_id(now_ms),
                at_ms=int(now_ms),
                slot=slot,
                incarnation=incarnation,
                blocks=tuple(map(BlockHash, batch.removed)),
            )
        )

    def heartbeat(
        self,
        pool: Pool,
        slot: int,
        incarnation: str,
        load: Load,
        *,
        lease_ms: int,
        batches: Sequence[Batch] = (),
        accepted: Sequence[str] = (),
        settle_older_than_ms: int | None = None,
    ) -> SlotState:
        """See `IndexWriter`."""
        if batches:
            self.apply(pool, slot, incarnation, *batches)
        target = self._slot(pool, slot, incarnation)
        now_ms = self._index.now_ms()
        target.load = load
        target.lease_ms = lease_ms
        target.expires_ms = now_ms + lease_ms
        charges = self._index.pool(pool).charges
        for decision_id in accepted:
            charges.pop(decision_id, None)
        if settle_older_than_ms is not None:
            for decision_id, charge in list(charges.items()):
                if charge.slot is target and charge.created_ms <= now_ms - settle_older_than_ms:
                    del charges[decision_id]
        self._index.pool(pool).purge(now_ms)
        return target.state

    def report_costs(self, pool: Pool, slot: int, incarnation: str, costs: Costs) -> None:
        """See `IndexWriter`."""
        self._slot(pool, slot, incarnation).costs = costs

    def blocks_of(self, pool: Pool, slot: int, incarnation: str, *, turn: int) -> SlotPart:
        """See `IndexWriter`. There is one part."""
        blocks = self._slot(pool, slot, incarnation).blocks
        return SlotPart(part=0, num_parts=1, blocks=frozenset(map(BlockHash, blocks)))

    def close_slot(self, pool: Pool, slot: int, incarnation: str) -> None:
        """See `IndexWriter`."""
        target = self._index.pool(pool).slots.get(slot)
        if target is not None and target.holder.incarnation == incarnation:
            self._index.pool(pool).fence(target, EventKind.CLOSED, "", self._index.now_ms())

    def close(self) -> None:
        """See `IndexWriter`."""


class MemoryIndexReader:
    """`IndexReader` on a `MemoryIndex`."""

    def __init__(self, index: MemoryIndex) -> None:
        self._index = index

    async def pools(self) -> list[Pool]:
        """See `IndexReader`."""
        return [pool for pool in self._index.known_pools() if pool.scheme != CHUNK_SCHEME]

    async def chunk_pools(self) -> list[Pool]:
        """See `IndexReader`."""
        return [pool for pool in self._index.known_pools() if pool.scheme == CHUNK_SCHEME]

    async def workers(self, pool: Pool) -> tuple[int, list[RegisteredWorker]]:
        """See `IndexReader`."""
        now_ms = self._index.now_ms()
        pairs = zip(self._index.live(pool), self._index.states(pool), strict=True)
        workers = [
            RegisteredWorker(
                worker=slot.holder,
                slot=slot.number,
                role=self._index.pool(pool).roles.get(slot.holder.worker_id, slot.holder.role),
                is_draining=slot.holder.worker_id in self._index.pool(pool).draining,
                lease_ms=slot.lease_ms,
                lease_left_ms=int(slot.expires_ms - now_ms),
                num_indexed_blocks=slot.state.num_blocks,
                digest=f"{slot.state.digest:016x}",
                load=state.load,
                charged_tokens=state.charged_tokens,
                charged_requests=state.charged_requests,
                step_costs=slot.costs if isinstance(slot.costs, StepCosts) else None,
            )
            for slot, state in pairs
            if isinstance(slot.holder, Worker)
        ]
        return self._index.registry_version(pool), workers

    async def stores(self, pool: Pool) -> tuple[int, list[RegisteredStore]]:
        """See `IndexReader`."""
        now_ms = self._index.now_ms()
        stores = [
            RegisteredStore(
                store=slot.holder,
                slot=slot.number,
                lease_ms=slot.lease_ms,
                lease_left_ms=int(slot.expires_ms - now_ms),
                num_indexed_blocks=slot.state.num_blocks,
                digest=f"{slot.state.digest:016x}",
                speed=slot.costs if isinstance(slot.costs, StoreSpeed) else None,
            )
            for slot in self._index.live(pool)
            if isinstance(slot.holder, Store)
        ]
        return self._index.registry_version(pool), stores

    async def match(self, pool: Pool, hashes: Sequence[BlockHash]) -> Match:
        """See `IndexReader`. Exact, with or without holes: the stride is always 1."""
        overlap_blocks = {}
        for slot in self._index.live(pool):
            missing = (depth for depth, block in enumerate(hashes) if block not in slot.blocks)
            if num_blocks := next(missing, len(hashes)):
                overlap_blocks[slot.number] = num_blocks
        return Match(
            states=self._index.states(pool),
            overlap_blocks=overlap_blocks,
            stride=1,
            registry_version=self._index.registry_version(pool),
            pending=self._index.pending(pool),
        )

    async def reserve(
        self,
        pool: Pool,
        decision_id: str,
        slot: int,
        *,
        prefill_tokens: int,
        seen_backlog_tokens: int | None,
        ttl_ms: int,
        sample: Sample = NOTHING_NEW,
        pending_ms: int = 0,
    ) -> Reservation:
        """See `IndexReader`."""
        state_of = self._index.pool(pool)
        charges, now_ms = state_of.charges, self._index.now_ms()
        state_of.purge(now_ms)
        charges.pop(decision_id, None)
        state_of.pending.pop(decision_id, None)
        states = self._index.states(pool)
        state = next((state for state in states if state.slot == slot), None)
        if state is None or (seen_backlog_tokens is not None and state.backlog_tokens > seen_backlog_tokens):
            return Reservation(charged=False, states=states, pending=self._index.pending(pool))
        target = self._index.pool(pool).slots[slot]
        charges[decision_id] = _Charge(target, prefill_tokens, now_ms, now_ms + ttl_ms)
        if sample.depths:
            state_of.keep_pending(decision_id, _Pending(target, sample, now_ms + pending_ms), now_ms)
        return Reservation(charged=True)

    async def settle(self, pool: Pool, decision_id: str) -> bool:
        """See `IndexReader`."""
        state = self._index.pool(pool)
        state.purge(self._index.now_ms())
        state.pending.pop(decision_id, None)
        return state.charges.pop(decision_id, None) is not None

    async def expired_reservations(self, pool: Pool) -> int:
        """See `IndexReader`."""
        return self._index.pool(pool).num_expired

    async def holders(self, pool: Pool, block: BlockHash) -> list[int]:
        """See `IndexReader`."""
        return [slot.number for slot in self._index.live(pool) if block in slot.blocks]

    async def holders_of(self, pool: Pool, blocks: Sequence[BlockHash]) -> dict[BlockHash, tuple[int, ...]]:
        """See `IndexReader`."""
        return {block: tuple(await self.holders(pool, block)) for block in blocks}

    async def entries(self, pool: Pool, *, first_bucket: int = 0, max_buckets: int = 64) -> Entries:
        """See `IndexReader`. A bucket is `_BUCKET_BLOCKS` blocks in a row of all, in order."""
        live = self._index.live(pool)
        blocks = sorted({block for slot in live for block in slot.blocks})
        num_buckets = -(-len(blocks) // _BUCKET_BLOCKS)
        stop = first_bucket + max_buckets
        return Entries(
            holders={
                BlockHash(block): tuple(slot.number for slot in live if block in slot.blocks)
                for block in blocks[first_bucket * _BUCKET_BLOCKS : stop * _BUCKET_BLOCKS]
            },
            next_bucket=stop if stop < num_buckets else None,
            num_buckets=num_buckets,
        )

    async def give_role(self, pool: Pool, worker_id: str, role: Role | None) -> bool:
        """See `IndexReader`."""
        state = self._index.pool(pool)
        if all(slot.holder.holder_id != worker_id for slot in state.slots.values()):
            return False
        state.roles.pop(worker_id, None)
        if role is not None:
            state.roles[worker_id] = role
        state.version += 1
        return True

    async def drain(self, pool: Pool, worker_id: str, *, is_draining: bool) -> bool:
        """See `IndexReader`."""
        state = self._index.pool(pool)
        if all(slot.holder.holder_id != worker_id for slot in state.slots.values()):
            return False
        (state.draining.add if is_draining else state.draining.discard)(worker_id)
        state.version += 1
        return True

    async def sweep(self, pool: Pool, *, max_buckets: int) -> int:
        """See `IndexReader`. A slot stands for a bucket here."""
        state = self._index.pool(pool)
        now_ms = self._index.now_ms()
        state.purge(now_ms)
        for slot in list(state.slots.values()):
            if slot.expires_ms + (ABANDONED_AFTER_LEASES - 1) * slot.lease_ms <= now_ms:
                silence = f"silent for {ABANDONED_AFTER_LEASES} leases"
                state.fence(slot, EventKind.FENCED, silence, now_ms)
        swept, state.dead = state.dead[:max_buckets], state.dead[max_buckets:]
        for number in swept:
            state.note(EventKind.SWEPT, number, None, "", now_ms)
        return len(state.dead)

    async def events(self, pool: Pool, *, after: str | None = None, max_events: int) -> list[PoolEvent]:
        """See `IndexReader`."""
        return _slice(self._index.pool(pool).events, after, max_events)

    async def removals(self, pool: Pool, *, after: str | None = None, max_events: int) -> list[Removal]:
        """See `IndexReader`."""
        return _slice(self._index.pool(pool).removals, after, max_events)

    async def close(self) -> None:
        """See `IndexReader`."""


def _slice(events: Sequence[_Event], after: str | None, max_events: int) -> list[_Event]:
    if after is None:
        return list(islice(reversed(events), max_events))[::-1]
    following = (event for event in events if _place(event.event_id) > _place(after))
    return list(islice(following, max_events))


def _place(event_id: str) -> tuple[int, int]:
    at_ms, _, number = event_id.partition("-")
    return int(at_ms), int(number or 0)
