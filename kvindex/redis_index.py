"""The index in Redis: one Lua script for each operation, so that each is atomic and one round trip.

Works on Redis 6.2 and later and on Valkey. The layout is described in `kvindex/keys.py`, the
algorithms in `kvindex/scripts/`.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry

from kvindex.blocks import HASH_BYTES, BlockHash, Pool, pack_hashes, unpack_hashes
from kvindex.config import IndexConfig
from kvindex.errors import ConfigError, IndexUnavailable, SlotLost, WorkerConflict
from kvindex.history import EventKind, Opening, PoolEvent, Removal
from kvindex.index import FIRST_OPENING, MAX_PROBES
from kvindex.keys import (
    FLEET_HEAD,
    GROUP,
    LIVE_ROW,
    LOAD,
    POOLS,
    RESERVATION,
    SLOT,
    bucket_key,
    directory,
    live_key,
    log_key,
    lua_names,
    removals_key,
)
from kvindex.redis_memory import PoolMemory, measure
from kvindex.worker import (
    Batch,
    Entries,
    Load,
    Match,
    RegisteredWorker,
    Reservation,
    SlotPart,
    SlotState,
    Worker,
    WorkerState,
)

_MAX_CONNECTIONS = 32
"""Of one reader; more calls at once wait for their turn, as they would in Redis itself."""

_RETRIES = 2
"""Every call may be repeated, so a connection that Redis has dropped meanwhile costs no error."""


_WORKERS_PER_CALL = 250
"""One to two milliseconds of Redis."""

_RESTARTS = 5
_ALL_WORKERS = 65_536


@functools.cache
def _script(name: str) -> str:
    folder = importlib.resources.files("kvindex") / "scripts"
    return lua_names() + (folder / "prelude.lua").read_text() + (folder / f"{name}.lua").read_text()


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except RedisError as error:
        parts = urlsplit(url)
        where = parts.path if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"
        raise IndexUnavailable(f"Redis at {where}: {error}") from error


def _options(config: IndexConfig) -> dict[str, Any]:
    return {
        "socket_timeout": config.redis_timeout_s,
        "socket_connect_timeout": config.redis_timeout_s,
        "retry_on_error": [RedisConnectionError],
    }


def _backoff(config: IndexConfig) -> ExponentialBackoff:
    return ExponentialBackoff(cap=config.redis_timeout_s / 10, base=0.001)


def _refuse_url(error: ValueError) -> ConfigError:
    return ConfigError(f"redis_url: {error}")


class RedisIndexWriter:
    """`IndexWriter` on Redis. Connects on first use.

    Raises:
        ConfigError: the URL is not one of Redis.
    """

    def __init__(self, config: IndexConfig) -> None:
        self._url = config.redis_url
        retry = Retry(_backoff(config), _RETRIES, supported_errors=(RedisConnectionError,))
        try:
            self._client = redis.Redis.from_url(self._url, retry=retry, **_options(config))
        except ValueError as error:
            raise _refuse_url(error) from error
        names = ("open_slot", "apply", "heartbeat", "blocks_of", "close_slot")
        self._scripts = {name: self._client.register_script(_script(name)) for name in names}

    def _run(self, name: str, pool: Pool, *args: str | bytes | int) -> Any:  # noqa: ANN401 (a reply of Redis)
        with _reaching(self._url):
            return self._scripts[name](keys=[directory(pool)], args=args)

    def open_slot(
        self, worker: Worker, *, lease_ms: int, takeover: bool = False, because: Opening = FIRST_OPENING
    ) -> int:
        """See `IndexWriter`."""
        pool = worker.pool
        with _reaching(self._url):
            self._client.hset(POOLS, pool.pool_id, msgspec.msgpack.encode(pool))
        described = msgspec.json.encode(worker)
        owner = (worker.worker_id, worker.incarnation, described)
        reply = self._run("open_slot", pool, *owner, lease_ms, int(takeover), because.kind, because.detail)
        if isinstance(reply, bytes):
            raise WorkerConflict(
                f"{worker.worker_id} is published by another live process (incarnation {reply.decode()})"
            )
        return int(reply)

    def apply(self, pool: Pool, slot: int, incarnation: str, batch: Batch) -> SlotState:
        """See `IndexWriter`."""
        stored, removed = pack_hashes(batch.stored), pack_hashes(batch.removed)
        return _slot_state(slot, self._run("apply", pool, slot, incarnation, batch.sequence, stored, removed))

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
        return _slot_state(slot, reply)

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
        self._client.close()


class RedisIndexReader:
    """`IndexReader` on Redis, for one event loop. Connects on first use.

    Raises:
        ConfigError: the URL is not one of Redis.
    """

    def __init__(self, config: IndexConfig) -> None:
        self._url = config.redis_url
        retry = AsyncRetry(_backoff(config), _RETRIES, supported_errors=(RedisConnectionError,))
        try:
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                self._url,
                max_connections=_MAX_CONNECTIONS,
                timeout=config.redis_timeout_s,
                retry=retry,
                **_options(config),
            )
        except ValueError as error:
            raise _refuse_url(error) from error
        self._client = redis.asyncio.Redis.from_pool(pool)
        names = ("workers", "match", "reserve", "settle", "holders", "sweep")
        self._scripts = {name: self._client.register_script(_script(name)) for name in names}

    async def _run(self, name: str, pool: Pool, *args: str | bytes | int) -> Any:  # noqa: ANN401 (a reply of Redis)
        with _reaching(self._url):
            return await self._scripts[name](keys=[directory(pool)], args=args)

    async def pools(self) -> list[Pool]:
        """See `IndexReader`."""
        with _reaching(self._url):
            known: list[Any] = await self._client.hvals(POOLS)
            pools = [msgspec.msgpack.decode(packed, type=Pool) for packed in known]
            pipeline = self._client.pipeline(transaction=False)
            for pool in pools:
                pipeline.hmget(directory(pool), ["members", "dead", "sweeping"])
            in_use = await pipeline.execute()
        return [pool for pool, sets in zip(pools, in_use, strict=True) if any(sets)]

    async def workers(self, pool: Pool) -> tuple[int, list[RegisteredWorker]]:
        """See `IndexReader`."""
        described, fleet = await self._describe(pool)
        workers = [
            RegisteredWorker(
                worker=msgspec.json.decode(worker, type=Worker),
                slot=slot,
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

    async def _describe(self, pool: Pool) -> tuple[list[Any], _Fleet]:
        """Return what is known of every worker, in short calls and as of one registry version."""
        described: list[Any] = []
        first, version, restarts = 0, None, 0
        while True:
            # A registry that changes all the time is read in one call in the end.
            size = _WORKERS_PER_CALL if restarts < _RESTARTS else _ALL_WORKERS
            num_workers, part, *packed = await self._run("workers", pool, first, size)
            fleet = _Fleet(*packed)
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

    async def holders_of(self, pool: Pool, blocks: Sequence[BlockHash]) -> dict[BlockHash, tuple[int, ...]]:
        """See `IndexReader`."""
        holders = {}
        for at in range(0, len(blocks), MAX_PROBES):
            asked = blocks[at : at + MAX_PROBES]
            sets, *packed = await self._run("holders", pool, pack_hashes(asked))
            live = _Fleet(*packed).rows
            for block, slots in zip(asked, sets, strict=True):
                holders[block] = tuple(slot for slot in _read_set(slots) if slot in live)
        return holders

    async def entries(self, pool: Pool, *, first_bucket: int = 0, max_buckets: int = 64) -> Entries:
        """See `IndexReader`. A bucket has about 64 entries and is read by one of Redis's own commands."""
        transaction = self._client.pipeline(transaction=True)
        transaction.hget(directory(pool), "buckets")
        transaction.time()
        transaction.get(live_key(pool))
        stop = first_bucket + max_buckets
        for bucket in range(first_bucket, stop):
            transaction.hgetall(bucket_key(pool, bucket))
        with _reaching(self._url):
            num_buckets, (seconds, micros), rows, *buckets = await transaction.execute()
        fleet = _Fleet(FLEET_HEAD.pack(1000 * seconds + micros // 1000, 0), rows or b"", b"")
        num_buckets = int(num_buckets or 0)
        return Entries(
            holders={
                BlockHash(int.from_bytes(block, "little")): alive
                for bucket in buckets
                for block, slots in bucket.items()
                if (alive := tuple(slot for slot in _read_set(slots) if slot in fleet.rows))
            },
            next_bucket=stop if stop < num_buckets else None,
            num_buckets=num_buckets,
        )

    async def sweep(self, pool: Pool, *, max_buckets: int) -> int:
        """See `IndexReader`."""
        return int(await self._run("sweep", pool, max_buckets))

    async def events(self, pool: Pool, *, after: str | None = None, max_events: int) -> list[PoolEvent]:
        """See `IndexReader`."""
        return [
            PoolEvent(
                event_id=event_id,
                at_ms=_at_ms(event_id),
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
                at_ms=_at_ms(event_id),
                slot=int(fields[b"slot"]),
                incarnation=fields[b"incarnation"].decode(),
                blocks=tuple(unpack_hashes(fields[b"blocks"])),
            )
            for event_id, fields in await self._read_log(removals_key(pool), after, max_events)
        ]

    async def memory(self, pool: Pool) -> PoolMemory:
        """Measure what the pool costs in Redis."""
        _, workers = await self.workers(pool)
        with _reaching(self._url):
            return await measure(self._client, pool, [each.slot for each in workers])

    async def used_memory_bytes(self) -> int:
        """Return what Redis has allocated in all."""
        with _reaching(self._url):
            return int((await self._client.info("memory"))["used_memory"])

    async def _read_log(
        self, key: str, after: str | None, max_events: int
    ) -> list[tuple[str, dict[bytes, bytes]]]:
        with _reaching(self._url):
            if after is None:
                lines: Any = await self._client.xrevrange(key, count=max_events)
                lines.reverse()
            else:
                lines = await self._client.xrange(key, min=f"({after}", count=max_events)
        return [(event_id.decode(), fields) for event_id, fields in lines]

    async def close(self) -> None:
        """See `IndexReader`."""
        await self._client.aclose()


class _Row(NamedTuple):
    expires_ms: float
    epoch: int
    state: WorkerState


@functools.lru_cache(maxsize=4096)
def _read_row(slot: int, packed: bytes) -> _Row:
    """Most rows are the same as in the answer before."""
    expires_ms, _, epoch, tokens, requests, *load = LIVE_ROW.unpack(packed)
    state = WorkerState(
        slot=slot,
        load=Load(**dict(zip(Load.__struct_fields__, load, strict=True))),
        charged_tokens=tokens,
        charged_requests=requests,
    )
    return _Row(expires_ms, epoch, state)


class _Fleet:
    """The live workers in an answer, by slot in ascending order."""

    def __init__(self, head: bytes, packed: bytes, expired: bytes) -> None:
        self.now_ms, self.counter = FLEET_HEAD.unpack(head)
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
        self.version = hash((self.counter, *lapsed))

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


def _read_bitmap(packed: bytes) -> Iterator[int]:
    """Yield the slots whose bits are set, in ascending order."""
    slots = int.from_bytes(packed, "little")
    while slots:
        lowest = slots & -slots
        yield lowest.bit_length() - 1
        slots ^= lowest


def _read_set(packed: bytes) -> Iterator[int]:
    """Yield the slots of a set in the form that `kvindex/scripts/prelude.lua` describes."""
    return _read_bitmap(packed) if len(packed) % 2 else (slot for (slot,) in SLOT.iter_unpack(packed))


def _read_groups(packed: bytes) -> Iterator[tuple[int, int]]:
    """Yield each slot that holds something, with the number of leading probes that it holds."""
    at = 0
    while at < len(packed):
        num_probes, num_words = GROUP.unpack_from(packed, at)
        at += GROUP.size
        for slot in _read_bitmap(packed[at : at + 4 * num_words]):
            yield slot, num_probes
        at += 4 * num_words


def _slot_state(slot: int, reply: list[Any] | None) -> SlotState:
    if reply is None:
        raise SlotLost(f"slot {slot} is fenced, unknown, or misses a batch")
    num_blocks, digest = reply
    return SlotState(num_blocks=num_blocks, digest=_read_digest(digest))


def _at_ms(event_id: str) -> int:
    return int(event_id.partition("-")[0])


def _read_digest(packed: bytes) -> int:
    return int.from_bytes(packed[:HASH_BYTES], "little")
