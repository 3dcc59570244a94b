"""The index in Redis: one Lua script for each operation, so that each is atomic and one round trip.

Works on Redis 6.2 and later and on Valkey. The layout is described in `kvindex/keys.py`, the
algorithms in `kvindex/scripts/`, how the servers are reached in `kvindex/redis_connection.py`.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.resources
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from kvindex.blocks import HASH_BYTES, BlockHash, Pool, pack_hashes
from kvindex.config import IndexConfig
from kvindex.errors import SlotLost, WorkerConflict
from kvindex.index import MAX_PROBES
from kvindex.keys import FLEET_HEAD, GROUP, LIVE_ROW, LOAD, POOLS, RESERVATION, directory, lua_names
from kvindex.redis_connection import AsyncConnection, Connection, Reply, Script
from kvindex.worker import (
    Batch,
    Load,
    Match,
    RegisteredWorker,
    Reservation,
    SlotState,
    Worker,
    WorkerState,
)


@functools.cache
def _script(name: str) -> Script:
    folder = importlib.resources.files("kvindex") / "scripts"
    return Script(lua_names() + (folder / "prelude.lua").read_text() + (folder / f"{name}.lua").read_text())


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

    def open_slot(self, worker: Worker, *, lease_ms: int, takeover: bool = False) -> int:
        """See `IndexWriter`."""
        pool = worker.pool
        self._announce(pool)
        described = msgspec.json.encode(worker)
        reply = self._run(
            "open_slot", pool, worker.worker_id, worker.incarnation, described, lease_ms, int(takeover)
        )
        if isinstance(reply, bytes):
            raise WorkerConflict(
                f"{worker.worker_id} is published by another live process (incarnation {reply.decode()})"
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
        return _slot_state(slot, reply)

    def apply(self, pool: Pool, slot: int, incarnation: str, batch: Batch) -> SlotState:
        """See `IndexWriter`."""
        stored, removed = pack_hashes(batch.stored), pack_hashes(batch.removed)
        reply = self._run("apply", pool, slot, incarnation, batch.sequence, stored, removed)
        return self._state_at_home(pool, slot, reply)

    def heartbeat(
        self,
        pool: Pool,
        slot: int,
        incarnation: str,
        load: Load,
        *,
        lease_ms: int,
        accepted: Sequence[str] = (),
        settle_older_than_ms: int | None = None,
    ) -> SlotState:
        """See `IndexWriter`."""
        packed = LOAD.pack(
            load.waiting_requests,
            load.running_requests,
            load.waiting_prefill_tokens,
            load.running_tokens,
            load.kv_usage,
        )
        age_ms = -1 if settle_older_than_ms is None else settle_older_than_ms
        reply = self._run("heartbeat", pool, slot, incarnation, lease_ms, packed, age_ms, *accepted)
        self._keep_announced(pool, lease_ms)
        return self._state_at_home(pool, slot, reply)

    def close_slot(self, pool: Pool, slot: int, incarnation: str) -> None:
        """See `IndexWriter`."""
        self._run("close_slot", pool, slot, incarnation)

    def close(self) -> None:
        """See `IndexWriter`."""
        self._redis.close()


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
        known = await self._redis.call("HVALS", POOLS)
        pools = [msgspec.msgpack.decode(packed, type=Pool) for packed in known]
        sets = ("members", "dead", "sweeping")
        in_use = await asyncio.gather(*(self._redis.call("HMGET", directory(pool), *sets) for pool in pools))
        return [pool for pool, slots in zip(pools, in_use, strict=True) if any(slots)]

    async def workers(self, pool: Pool) -> tuple[int, list[RegisteredWorker]]:
        """See `IndexReader`."""
        described, *packed = await self._run("workers", pool)
        fleet = _Fleet(*packed)
        workers = [
            RegisteredWorker(
                worker=msgspec.json.decode(worker, type=Worker),
                slot=slot,
                lease_ms=row.lease_ms,
                lease_left_ms=int(row.expires_ms - fleet.now_ms),
                num_indexed_blocks=num_blocks,
                digest=f"{_read_digest(digest):016x}",
                load=row.state.load,
                charged_tokens=row.state.charged_tokens,
                charged_requests=row.state.charged_requests,
            )
            for slot, worker, num_blocks, digest in described
            if (row := fleet.rows.get(slot)) is not None
        ]
        return fleet.version, workers

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
        groups, *packed = await self._run("match", pool, pack_hashes(probes))
        fleet = _Fleet(*packed)
        return Match(
            states=fleet.states,
            overlap_blocks={
                slot: held * stride if held < len(probes) else len(hashes)
                for slot, held in _read_groups(groups)
                if slot in fleet.rows
            },
            stride=stride,
            registry_version=fleet.version,
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
    ) -> Reservation:
        """See `IndexReader`. A decision has one reservation: a second call replaces the first."""
        seen_tokens = -1 if seen_backlog_tokens is None else seen_backlog_tokens
        reply = await self._run("reserve", pool, decision_id, slot, prefill_tokens, seen_tokens, ttl_ms)
        if isinstance(reply, int):
            return Reservation(charged=True)
        return Reservation(charged=False, states=_Fleet(*reply).states)

    async def settle(self, pool: Pool, decision_id: str) -> bool:
        """See `IndexReader`."""
        return bool(await self._run("settle", pool, decision_id))

    async def holders(self, pool: Pool, block: BlockHash) -> list[int]:
        """See `IndexReader`."""
        return sorted((await self.match(pool, [block])).overlap_blocks)

    async def sweep(self, pool: Pool, *, max_buckets: int) -> int:
        """See `IndexReader`."""
        return int(await self._run("sweep", pool, max_buckets))

    async def close(self) -> None:
        """See `IndexReader`."""
        await self._redis.close()


class _Row(NamedTuple):
    expires_ms: float
    lease_ms: int
    epoch: int
    state: WorkerState


@functools.lru_cache(maxsize=4096)
def _read_row(slot: int, packed: bytes) -> _Row:
    """Most rows are the same as in the answer before."""
    expires_ms, lease_ms, epoch, tokens, requests, *load = LIVE_ROW.unpack(packed)
    state = WorkerState(
        slot=slot,
        load=Load(**dict(zip(Load.__struct_fields__, load, strict=True))),
        charged_tokens=tokens,
        charged_requests=requests,
    )
    return _Row(expires_ms, lease_ms, epoch, state)


class _Fleet:
    """The live workers in an answer, by slot in ascending order."""

    def __init__(self, head: bytes, packed: bytes, expired: bytes) -> None:
        self.now_ms, counter = FLEET_HEAD.unpack(head)
        lapsed = []
        self.rows: dict[int, _Row] = {}
        for slot, at in enumerate(range(0, len(packed), LIVE_ROW.size)):
            row = _read_row(slot, packed[at : at + LIVE_ROW.size])
            if row.expires_ms > self.now_ms:
                self.rows[slot] = row
            elif row.epoch:
                lapsed.append(slot)
        for slot, epoch, tokens in RESERVATION.iter_unpack(expired):
            if slot in self.rows and self.rows[slot].epoch == epoch:
                self._discharge(slot, tokens)
        # The counter tells of slots opened and fenced; a lease that ends is no write, so it is added here.
        self.version = hash((counter, *lapsed))

    def _discharge(self, slot: int, tokens: int) -> None:
        row = self.rows[slot]
        state = msgspec.structs.replace(
            row.state,
            charged_tokens=row.state.charged_tokens - tokens,
            charged_requests=row.state.charged_requests - 1,
        )
        self.rows[slot] = row._replace(state=state)

    @property
    def states(self) -> tuple[WorkerState, ...]:
        return tuple([row.state for row in self.rows.values()])


def _read_groups(packed: bytes) -> Iterator[tuple[int, int]]:
    """Yield each slot that holds something, with the number of leading probes that it holds."""
    at = 0
    while at < len(packed):
        num_probes, num_words = GROUP.unpack_from(packed, at)
        at += GROUP.size
        slots = int.from_bytes(packed[at : at + 4 * num_words], "little")
        at += 4 * num_words
        while slots:
            lowest = slots & -slots
            yield lowest.bit_length() - 1, num_probes
            slots ^= lowest


def _slot_state(slot: int, reply: list[Any] | None) -> SlotState:
    if reply is None:
        raise SlotLost(f"slot {slot} is fenced, unknown, or misses a batch")
    num_blocks, digest = reply
    return SlotState(num_blocks=num_blocks, digest=_read_digest(digest))


def _read_digest(packed: bytes) -> int:
    return int.from_bytes(packed[:HASH_BYTES], "little")
