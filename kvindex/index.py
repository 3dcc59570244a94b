"""The two faces of the index. Publishers write through one, gateways read through the other.

Implementations: `redis_index` (production) and `memory_index` (tests and simulation). One behaviour
suite, `tests/kvindex/test_index_contract.py`, holds for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvindex.blocks import BlockHash, Pool
from kvindex.history import Opening, PoolEvent, Removal
from kvindex.pending import Sample
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
)

MAX_PROBES = 256
"""Most hashes that one `match` sends; longer prompts are probed at even strides."""

MAX_BATCH = 128
"""Most hashes in one `Batch`: larger ones delay the reads that share the Redis core."""


Holder = Worker | Store
"""What may have a slot. A pool has workers, or stores (`chunks.CHUNK_SCHEME`)."""

Costs = StepCosts | StoreSpeed
"""What a worker, or who tells of a store, has measured."""

FIRST_OPENING = Opening()

NOTHING_NEW = Sample((), ())


def nothing() -> None:
    """Do nothing."""


class IndexWriter(Protocol):
    """A publisher's side: blocking calls, made from one thread of the process that owns the cache.

    Every method raises `IndexUnavailable` when Redis cannot answer; it is then unknown whether the
    call took effect, and repeating it is safe.
    """

    def open_slot(
        self, holder: Holder, *, lease_ms: int, takeover: bool = False, because: Opening = FIRST_OPENING
    ) -> int:
        """Register `holder` and return a fresh, empty slot for it; `because` goes into the pool's log.

        Slots that this holder id had before are fenced at once and swept later. `load` is zero until
        the first heartbeat.

        Raises:
            WorkerConflict: another incarnation holds a live lease under this holder id and `takeover`
                is off.
        """

    def apply(
        self,
        pool: Pool,
        slot: int,
        incarnation: str,
        *batches: Batch,
        meanwhile: Callable[[], None] = nothing,
    ) -> SlotState:
        """Apply each batch if it follows the last one; a batch already applied changes nothing.

        Every batch is a write of its own, and others' calls go between. After an error it is unknown how
        many were applied, and repeating all of them is safe.

        Args:
            batches: at least one, by ascending sequence.
            meanwhile: called while the index is at work, any number of times; raises nothing, and calls
                nothing of this writer.

        Returns:
            The slot after the last of them.

        Raises:
            SlotLost: a sequence is missing, or the slot is unknown or fenced.
        """

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
        """Apply `batches` as `apply` does, then renew the lease and replace the load; in one round trip.

        An index that refuses the batches because it is full takes lease and load all the same.

        Args:
            accepted: decision ids that `load` now contains; their reservations are settled.
            settle_older_than_ms: settle this slot's reservations of at least this age, for publishers
                that cannot name ids.

        Raises:
            SlotLost: the slot is unknown or fenced.
        """

    def report_costs(self, pool: Pool, slot: int, incarnation: str, costs: Costs) -> None:
        """Replace what the worker says of its steps, or who tells of a store of its speed.

        It is kept beside the holder and not with its load, which every `match` reads.

        Raises:
            SlotLost: the slot is unknown or fenced.
        """

    def blocks_of(self, pool: Pool, slot: int, incarnation: str, *, turn: int) -> SlotPart:
        """Read one part of the slot's entries, whatever its count and digest say. Writes nothing.

        As many turns in a row as there are parts read the whole slot. A part is a consistent view of its
        blocks; the number of parts may change from one turn to the next.

        Args:
            turn: which part to read, modulo the number of parts.

        Raises:
            SlotLost: the slot is unknown or fenced.
        """

    def close_slot(self, pool: Pool, slot: int, incarnation: str) -> None:
        """Take the holder out of every answer; its entries are swept later. Idempotent."""

    def close(self) -> None:
        """Release connections; the slots live on until their lease ends."""


class IndexReader(Protocol):
    """A gateway's or inspector's side, on one event loop.

    Every method raises `IndexUnavailable` when Redis cannot answer.
    """

    async def pools(self) -> list[Pool]:
        """Return the pools that ever had a worker and still have entries or live workers."""

    async def chunk_pools(self) -> list[Pool]:
        """Return the pools that ever had a store and still have entries or live stores."""

    async def workers(self, pool: Pool) -> tuple[int, list[RegisteredWorker]]:
        """Return the registry version and every live worker of a pool of theirs, by slot."""

    async def stores(self, pool: Pool) -> tuple[int, list[RegisteredStore]]:
        """Return the registry version and every live store of a pool of chunks, by slot."""

    async def match(self, pool: Pool, hashes: Sequence[BlockHash]) -> Match:
        """Return, for every live worker, its load and how many leading blocks it holds. Read-only."""

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
        """Charge `slot` with `prefill_tokens` and one request until settled or `ttl_ms` have passed.

        Beside it `sample` is pending there for `pending_ms`, at most `ttl_ms`, unless `settle` ends that
        before: an engine that has accepted the request has not computed it yet. A pool keeps `MOST_PENDING`
        of them.

        Nothing is charged, and the fresh states are returned, if the slot's backlog has grown past
        `seen_backlog_tokens` (None: charge in any case) or the slot is no longer live.
        """

    async def settle(self, pool: Pool, decision_id: str) -> bool:
        """Take back what `reserve` charged. False if it was settled or had expired already."""

    async def expired_reservations(self, pool: Pool) -> int:
        """Return how many reservations nobody settled in time, since the pool began, as of the last write.

        Each is a request whose gateway died, or a defect: whoever reserves settles, too.
        """

    async def holders(self, pool: Pool, block: BlockHash) -> list[int]:
        """Return the live slots that hold `block`."""

    async def holders_of(self, pool: Pool, blocks: Sequence[BlockHash]) -> dict[BlockHash, tuple[int, ...]]:
        """Return the live slots that hold each block, ascending. Reads `MAX_PROBES` blocks at a time."""

    async def entries(self, pool: Pool, *, first_bucket: int = 0, max_buckets: int = 64) -> Entries:
        """Read the entries of `max_buckets` buckets. Writes nothing.

        A scan begins at 0 and goes on at `next_bucket` until that is None. It is no snapshot:
        entries written meanwhile may be in it or not. Growth of the pool moves entries
        to a new last bucket, so one may be seen twice, but none is missed. Shrinking, which only a sweep
        of a pool that has lost most of its entries does, moves entries to lower buckets: if `num_buckets`
        is lower than in the slice before, some may have been missed, and the scan should begin again.
        """

    async def give_role(self, pool: Pool, worker_id: str, role: Role | None) -> bool:
        """Give a worker a role, which it keeps through restarts; None: the role it starts with.

        Returns:
            False, and nothing is changed, if no such worker is registered.
        """

    async def drain(self, pool: Pool, worker_id: str, *, is_draining: bool) -> bool:
        """Have a worker sent no more requests, or again; it stays so through restarts.

        Returns:
            False, and nothing is changed, if no such worker is registered.
        """

    async def sweep(self, pool: Pool, *, max_buckets: int) -> int:
        """Drop one slice of the entries of dead slots; return how many dead slots are left to sweep.

        A slice is `max_buckets` buckets, fewer where they are full. A slot is given out again only when
        every bucket was visited since it died. Any number of sweepers may call this.
        """

    async def events(self, pool: Pool, *, after: str | None = None, max_events: int) -> list[PoolEvent]:
        """Return what happened to slots, oldest first: the latest, or those that follow the event `after`.

        `after` may be a time in ms as well. The pool remembers the latest `keys.LOG_EVENTS`.
        """

    async def removals(self, pool: Pool, *, after: str | None = None, max_events: int) -> list[Removal]:
        """Return batches of evicted blocks as `events` does. The pool remembers `keys.LOG_REMOVALS`."""

    async def close(self) -> None:
        """Release connections."""
