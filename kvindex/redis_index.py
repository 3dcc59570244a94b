"""The index in Redis: one Lua script for each operation, so that each is atomic and one round trip.

Works on Redis 6.2 and later and on Valkey. The layout is described in `kvindex/keys.py`, the
algorithms in `kvindex/scripts/`, how the servers are reached in `kvindex/redis_connection.py`; what they
answer is read in `kvindex/redis_answers.py`.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.resources
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from kvindex.blocks import BlockHash, Pool, pack_hashes, unpack_hashes
from kvindex.chunks import CHUNK_SCHEME
from kvindex.config import IndexConfig
from kvindex.errors import SlotLost, WorkerConflict
from kvindex.history import EventKind, Opening, PoolEvent, Removal
from kvindex.index import FIRST_OPENING, MAX_PROBES, NOTHING_NEW, Costs, Holder, nothing
from kvindex.keys import (
    LOAD,
    POOLS,
    bucket_key,
    directory,
    log_key,
    lua_names,
    removals_key,
)
from kvindex.pending import Sample
from kvindex.redis_answers import (
    Fleet,
    Row,
    pack_sample,
    read_digest,
    read_overlaps,
    read_set,
    read_time_ms,
    slot_state,
    slots_of,
)
from kvindex.redis_connection import AsyncConnection, Connection, Reply, Script, ScriptCall
from kvindex.redis_memory import PoolMemory, measure
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

_SCRIPTS = importlib.resources.files("kvindex") / "scripts"

_WORKERS_PER_CALL = 250
"""One to two milliseconds of Redis."""

_RESTARTS = 5
_ALL_WORKERS = 65_536


@functools.cache
def _script(name: str) -> Script:
    return Script(_compose((_SCRIPTS / f"{name}.lua").read_text()))


def _compose(body: str) -> str:
    """Put before `body` the names and those paragraphs of the prelude that it needs.

    Every call defines anew what its script contains: the whole prelude would cost more than most calls.
    """
    shared = [*lua_names().splitlines(), *(_SCRIPTS / "prelude.lua").read_text().split("\n\n")]
    text = re.sub(r"^ *--.*\n", "", body, flags=re.MULTILINE)
    for paragraph in reversed(shared):
        defined = re.findall(r"^local (?:function )?(\w+(?:, \w+)*)", paragraph, re.MULTILINE)
        if any(re.search(rf"\b{name}\b", text) for names in defined for name in names.split(", ")):
            text = f"{paragraph}\n{text}"
    return text


class RedisIndexWriter:
    """`IndexWriter` on Redis. Connects on first use.

    Raises:
        ConfigError: the URL is not one of ours.
    """

    def __init__(self, config: IndexConfig) -> None:
        self._redis = Connection(config)
        self._look_at_s: dict[Pool, float] = {}
        self._homes: dict[Pool, str | None] = {}

    def _run(self, name: str, pool: Pool, *args: str | bytes | int) -> Reply:
        return self._redis.run(_script(name), directory(pool), *args)

    def open_slot(
        self, holder: Holder, *, lease_ms: int, takeover: bool = False, because: Opening = FIRST_OPENING
    ) -> int:
        """See `IndexWriter`."""
        pool = holder.pool
        self._announce(pool)
        described = msgspec.json.encode(holder)
        owner = (holder.holder_id, holder.incarnation, described)
        reply = self._run("open_slot", pool, *owner, lease_ms, int(takeover), because.kind, because.detail)
        if isinstance(reply, bytes):
            raise WorkerConflict(
                f"{holder.holder_id} is published by another live process (incarnation {reply.decode()})"
            )
        self._homes[pool] = self._redis.home(directory(pool))
        return int(reply)

    def _announce(self, pool: Pool) -> None:
        self._redis.call("HSET", POOLS, pool.pool_id, msgspec.msgpack.encode(pool))

    def _keep_announced(self, pool: Pool, every_ms: int) -> None:
        """On a cluster the list of pools is on a node of its own, which may lose it alone."""
        now_s = time.monotonic()
        if now_s >= self._look_at_s.get(pool, 0.0):
            if not self._redis.call("HEXISTS", POOLS, pool.pool_id):
                self._announce(pool)
            self._look_at_s[pool] = now_s + every_ms / 1000

    def _state_at_home(self, pool: Pool, slot: int, reply: list[Any] | None) -> SlotState:
        """Keys that move to another node one by one are not of one moment: what they say is not trusted."""
        if self._redis.home(directory(pool)) != self._homes.get(pool):
            raise SlotLost(f"the pool of slot {slot} has moved to another node of the cluster")
        return slot_state(slot, reply)

    def apply(
        self,
        pool: Pool,
        slot: int,
        incarnation: str,
        *batches: Batch,
        meanwhile: Callable[[], None] = nothing,
    ) -> SlotState:
        """See `IndexWriter`."""
        replies = self._redis.run_each(directory(pool), _writes(slot, incarnation, batches), meanwhile)
        return [self._state_at_home(pool, slot, reply) for reply in replies][-1]

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
        packed = LOAD.pack(*msgspec.structs.astuple(load))
        age_ms = -1 if settle_older_than_ms is None else settle_older_than_ms
        beat = ScriptCall(_script("heartbeat"), (slot, incarnation, lease_ms, packed, age_ms, *accepted))
        replies = self._redis.run_each(directory(pool), [*_writes(slot, incarnation, batches), beat])
        self._keep_announced(pool, lease_ms)
        return [self._state_at_home(pool, slot, reply) for reply in replies][-1]

    def report_costs(self, pool: Pool, slot: int, incarnation: str, costs: Costs) -> None:
        """See `IndexWriter`."""
        if not self._run("report_costs", pool, slot, incarnation, msgspec.json.encode(costs)):
            raise SlotLost(f"slot {slot} is fenced or unknown")

    def blocks_of(self, pool: Pool, slot: int, incarnation: str, *, turn: int) -> SlotPart:
        """See `IndexWriter`. A part is 2 or 3 buckets of about 64 entries."""
        reply = self._run("blocks_of", pool, slot, incarnation, turn)
        if reply is None:
            raise SlotLost(f"slot {slot} is fenced or unknown")
        part, num_parts, packed = reply
        return SlotPart(part=part, num_parts=num_parts, blocks=frozenset(unpack_hashes(packed)))

    def close_slot(self, pool: Pool, slot: int, incarnation: str) -> None:
        """See `IndexWriter`."""
        self._run("close_slot", pool, slot, incarnation)

    def close(self) -> None:
        """See `IndexWriter`."""
        self._redis.close()


def _writes(slot: int, incarnation: str, batches: Iterable[Batch]) -> list[ScriptCall]:
    apply = _script("apply")
    return [
        ScriptCall(
            apply, (slot, incarnation, batch.sequence, *map(pack_hashes, (batch.stored, batch.removed)))
        )
        for batch in batches
    ]


def _registered(described: Sequence[Any], row: Row, now_ms: float) -> RegisteredWorker:
    slot, packed, num_blocks, digest, given_role, costs, is_draining = described
    worker = msgspec.json.decode(packed, type=Worker)
    return RegisteredWorker(
        worker=worker,
        slot=slot,
        role=Role(given_role.decode()) if given_role else worker.role,
        is_draining=bool(is_draining),
        lease_ms=row.lease_ms,
        lease_left_ms=int(row.expires_ms - now_ms),
        num_indexed_blocks=num_blocks,
        digest=f"{read_digest(digest):016x}",
        load=row.state.load,
        charged_tokens=row.state.charged_tokens,
        charged_requests=row.state.charged_requests,
        step_costs=msgspec.json.decode(costs, type=StepCosts) if costs else None,
    )


class RedisIndexReader:
    """`IndexReader` on Redis, for one event loop. Connects on first use.

    Raises:
        ConfigError: the URL is not one of ours.
    """

    def __init__(self, config: IndexConfig) -> None:
        self._redis = AsyncConnection(config)

    async def _run(self, name: str, pool: Pool, *args: str | bytes | int) -> Reply:
        return await self._redis.run(_script(name), directory(pool), *args)

    async def pools(self) -> list[Pool]:
        """See `IndexReader`."""
        return [pool for pool in await self._pools() if pool.scheme != CHUNK_SCHEME]

    async def chunk_pools(self) -> list[Pool]:
        """See `IndexReader`."""
        return [pool for pool in await self._pools() if pool.scheme == CHUNK_SCHEME]

    async def _pools(self) -> list[Pool]:
        known = await self._redis.call("HVALS", POOLS)
        pools = [msgspec.msgpack.decode(packed, type=Pool) for packed in known]
        sets = ("members", "dead", "sweeping")
        in_use = await asyncio.gather(*(self._redis.call("HMGET", directory(pool), *sets) for pool in pools))
        return [pool for pool, slots in zip(pools, in_use, strict=True) if any(slots)]

    async def workers(self, pool: Pool) -> tuple[int, list[RegisteredWorker]]:
        """See `IndexReader`."""
        described, fleet = await self._describe(pool)
        workers = [
            _registered(each, row, fleet.now_ms)
            for each in described
            if (row := fleet.rows.get(each[0])) is not None
        ]
        return fleet.version, workers

    async def stores(self, pool: Pool) -> tuple[int, list[RegisteredStore]]:
        """See `IndexReader`."""
        described, fleet = await self._describe(pool)
        stores = [
            RegisteredStore(
                store=msgspec.json.decode(packed, type=Store),
                slot=slot,
                lease_ms=row.lease_ms,
                lease_left_ms=int(row.expires_ms - fleet.now_ms),
                num_indexed_blocks=num_blocks,
                digest=f"{read_digest(digest):016x}",
                speed=msgspec.json.decode(costs, type=StoreSpeed) if costs else None,
            )
            for slot, packed, num_blocks, digest, _, costs, *_ in described
            if (row := fleet.rows.get(slot)) is not None
        ]
        return fleet.version, stores

    async def _describe(self, pool: Pool) -> tuple[list[Any], Fleet]:
        """Return what is known of every worker, in short calls and as of one registry version."""
        described: list[Any] = []
        first, version, restarts = 0, None, 0
        while True:
            # A registry that changes all the time is read in one call in the end.
            size = _WORKERS_PER_CALL if restarts < _RESTARTS else _ALL_WORKERS
            num_workers, part, *packed = await self._run("workers", pool, first, size)
            fleet = Fleet(*packed)
            if first and fleet.counter != version:
                described, first, restarts = [], 0, restarts + 1
                continue
            described += part
            first, version = first + size, fleet.counter
            if first >= num_workers:
                return described, fleet

    async def match(self, pool: Pool, hashes: Sequence[BlockHash]) -> Match:
        """See `IndexReader`.

        A worker's overlap is where its run of blocks ends, found by binary search over every
        `stride`-th block. It is less than a stride below the truth, and above it only if the prefix
        has a hole: then it is the end of a later run, a depth at which the worker holds the probed block.
        """
        stride = max(1, -(-len(hashes) // MAX_PROBES))
        probes = list(hashes[stride - 1 :: stride])
        if len(hashes) % stride:
            probes.append(hashes[-1])
        steps, pending, *packed = await self._run("match", pool, pack_hashes(probes))
        fleet = Fleet(*packed)
        return Match(
            states=fleet.states,
            overlap_blocks={
                slot: held * stride if held < len(probes) else len(hashes)
                for slot, held in read_overlaps(steps)
                if slot in fleet.rows
            },
            stride=stride,
            registry_version=fleet.version,
            pending=fleet.pending(pending),
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
        """See `IndexReader`. A decision has one reservation: a second call replaces the first."""
        seen_tokens = -1 if seen_backlog_tokens is None else seen_backlog_tokens
        load = (slot, prefill_tokens, seen_tokens, ttl_ms)
        reply = await self._run("reserve", pool, decision_id, *load, pack_sample(sample), pending_ms)
        if isinstance(reply, int):
            return Reservation(charged=True)
        pending, *packed = reply
        fleet = Fleet(*packed)
        return Reservation(charged=False, states=fleet.states, pending=fleet.pending(pending))

    async def settle(self, pool: Pool, decision_id: str) -> bool:
        """See `IndexReader`."""
        return bool(await self._run("settle", pool, decision_id))

    async def expired_reservations(self, pool: Pool) -> int:
        """See `IndexReader`."""
        return int(await self._redis.call("HGET", directory(pool), "expired") or 0)

    async def holders(self, pool: Pool, block: BlockHash) -> list[int]:
        """See `IndexReader`."""
        return sorted((await self.match(pool, [block])).overlap_blocks)

    async def holders_of(self, pool: Pool, blocks: Sequence[BlockHash]) -> dict[BlockHash, tuple[int, ...]]:
        """See `IndexReader`."""
        holders = {}
        for at in range(0, len(blocks), MAX_PROBES):
            asked = blocks[at : at + MAX_PROBES]
            sets, *packed = await self._run("holders", pool, pack_hashes(asked))
            live = Fleet(*packed).rows
            for block, slots in zip(asked, sets, strict=True):
                holders[block] = tuple(slot for slot in slots_of(read_set(slots)) if slot in live)
        return holders

    async def entries(self, pool: Pool, *, first_bucket: int = 0, max_buckets: int = 64) -> Entries:
        """See `IndexReader`. A bucket has about 64 entries and is read by one of Redis's own commands."""
        stop = first_bucket + max_buckets
        _, _, *packed = await self._run("match", pool, b"")
        fleet = Fleet(*packed)
        # In ascending order, and then their number: what a split moves meanwhile is seen twice, not missed.
        keys = [bucket_key(pool, bucket) for bucket in range(first_bucket, stop)]
        buckets = [await self._redis.call("HGETALL", key) for key in keys]
        num_buckets = int(await self._redis.call("HGET", directory(pool), "buckets") or 0)
        return Entries(
            holders={
                BlockHash(int.from_bytes(block, "little")): alive
                for bucket in buckets
                for block, slots in bucket.items()
                if (alive := tuple(slot for slot in slots_of(read_set(slots)) if slot in fleet.rows))
            },
            next_bucket=stop if stop < num_buckets else None,
            num_buckets=num_buckets,
        )

    async def give_role(self, pool: Pool, worker_id: str, role: Role | None) -> bool:
        """See `IndexReader`."""
        return bool(await self._run("give_role", pool, worker_id, role or ""))

    async def drain(self, pool: Pool, worker_id: str, *, is_draining: bool) -> bool:
        """See `IndexReader`."""
        return bool(await self._run("drain", pool, worker_id, int(is_draining)))

    async def sweep(self, pool: Pool, *, max_buckets: int) -> int:
        """See `IndexReader`."""
        return int(await self._run("sweep", pool, max_buckets))

    async def events(self, pool: Pool, *, after: str | None = None, max_events: int) -> list[PoolEvent]:
        """See `IndexReader`."""
        return [
            PoolEvent(
                event_id=event_id,
                at_ms=read_time_ms(event_id),
                kind=EventKind(fields[b"kind"].decode()),
                slot=int(fields[b"slot"]),
                worker_id=fields[b"worker"].decode(),
                incarnation=fields[b"incarnation"].decode(),
                detail=fields[b"detail"].decode(),
            )
            for event_id, fields in await self._read_log(log_key(pool), after, max_events)
        ]

    async def removals(self, pool: Pool, *, after: str | None = None, max_events: int) -> list[Removal]:
        """See `IndexReader`."""
        return [
            Removal(
                event_id=event_id,
                at_ms=read_time_ms(event_id),
                slot=int(fields[b"slot"]),
                incarnation=fields[b"incarnation"].decode(),
                blocks=tuple(unpack_hashes(fields[b"blocks"])),
            )
            for event_id, fields in await self._read_log(removals_key(pool), after, max_events)
        ]

    async def memory(self, pool: Pool) -> PoolMemory:
        """Measure what the pool costs in Redis."""
        described, fleet = await self._describe(pool)
        return await measure(self._redis.call, pool, [slot for slot, *_ in described if slot in fleet.rows])

    async def used_memory_bytes(self) -> int:
        """Return what Redis has allocated in all."""
        return sum(
            [
                int((await master.call("INFO", "memory"))["used_memory"])
                async for master in self._redis.masters()
            ]
        )

    async def _read_log(
        self, key: str, after: str | None, max_events: int
    ) -> list[tuple[str, dict[bytes, bytes]]]:
        if after is None:
            lines = (await self._redis.call("XREVRANGE", key, "+", "-", "COUNT", max_events))[::-1]
        else:
            lines = await self._redis.call("XRANGE", key, f"({after}", "+", "COUNT", max_events)
        return [(event_id.decode(), fields) for event_id, fields in lines]

    async def close(self) -> None:
        """See `IndexReader`."""
        await self._redis.close()
