"""The index in Redis: one Lua script for each operation, so that each is atomic and one round trip.

Works on Redis 6.2 and later and on Valkey. The layout is described in `kvindex/keys.py`, the
algorithms in `kvindex/scripts/`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import math
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError
from redis.retry import Retry

from kvindex.blocks import HASH_BYTES, BlockHash, Pool, pack_hashes
from kvindex.config import IndexConfig
from kvindex.errors import ConfigError, IndexUnavailable, SlotLost, WorkerConflict
from kvindex.index import MAX_PROBES
from kvindex.keys import FLEET_HEAD, LIVE_ROW, LOAD, POOLS, RESERVATION, STEP, directory, lua_names
from kvindex.redis_line import BlockingLine, Line
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

_SCRIPTS = importlib.resources.files("kvindex") / "scripts"

_MAX_CONNECTIONS = 32
"""Of one reader; more calls at once wait for their turn, as they would in Redis itself."""

_RETRIES = 2
"""Every call may be repeated, so a connection that Redis has dropped meanwhile costs no error."""


class _Script(NamedTuple):
    text: str
    sha: str


@functools.cache
def _script(name: str) -> _Script:
    text = _compose((_SCRIPTS / f"{name}.lua").read_text())
    return _Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


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
        self._line = BlockingLine(
            self._client.connection_pool, backoff=_backoff(config), num_retries=_RETRIES
        )

    def _run(self, name: str, pool: Pool, *args: str | bytes | int) -> Any:  # noqa: ANN401 (a reply of Redis)
        script, key = _script(name), directory(pool)
        with _reaching(self._url):
            try:
                return self._line.call("EVALSHA", script.sha, 1, key, *args)
            except NoScriptError:
                return self._line.call("EVAL", script.text, 1, key, *args)

    def open_slot(self, worker: Worker, *, lease_ms: int, takeover: bool = False) -> int:
        """See `IndexWriter`."""
        pool = worker.pool
        with _reaching(self._url):
            self._client.hset(POOLS, pool.pool_id, msgspec.msgpack.encode(pool))
        described = msgspec.json.encode(worker)
        reply = self._run(
            "open_slot", pool, worker.worker_id, worker.incarnation, described, lease_ms, int(takeover)
        )
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

    def close_slot(self, pool: Pool, slot: int, incarnation: str) -> None:
        """See `IndexWriter`."""
        self._run("close_slot", pool, slot, incarnation)

    def close(self) -> None:
        """See `IndexWriter`."""
        self._line.close()
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
        self._line = Line(
            pool, timeout_s=config.redis_timeout_s, backoff=_backoff(config), num_retries=_RETRIES
        )

    async def _run(self, name: str, pool: Pool, *args: str | bytes | int) -> Any:  # noqa: ANN401 (a reply of Redis)
        script, key = _script(name), directory(pool)
        with _reaching(self._url):
            try:
                return await self._line.call("EVALSHA", script.sha, 1, key, *args)
            except NoScriptError:
                return await self._line.call("EVAL", script.text, 1, key, *args)

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
        described, *packed = await self._run("workers", pool)
        fleet = _Fleet(*packed)
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
        steps, *packed = await self._run("match", pool, pack_hashes(probes))
        fleet = _Fleet(*packed)
        return Match(
            states=fleet.states,
            overlap_blocks={
                slot: held * stride if held < len(probes) else len(hashes)
                for slot, held in _read_overlaps(steps)
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
        await self._line.close()
        await self._client.aclose()


class _Row(NamedTuple):
    expires_ms: float
    epoch: int
    state: WorkerState


class _Rows(NamedTuple):
    """Of all slots that are not fenced."""

    by_slot: dict[int, _Row]
    states: tuple[WorkerState, ...]
    first_expiry_ms: float


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


class _Fleet:
    """The live workers in an answer, by slot in ascending order."""

    def __init__(self, head: bytes, packed: bytes, expired: bytes) -> None:
        self.now_ms, counter = FLEET_HEAD.unpack(head)
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
        self.version = hash((counter, *lapsed))

    def _discharge(self, slot: int, tokens: int) -> None:
        row = self.rows[slot]
        state = msgspec.structs.replace(
            row.state,
            charged_tokens=row.state.charged_tokens - tokens,
            charged_requests=row.state.charged_requests - 1,
        )
        self.rows[slot] = row._replace(state=state)


def _read_overlaps(packed: bytes) -> Iterator[tuple[int, int]]:
    """Yield each slot that holds the first probe, with the number of leading probes that it holds."""
    going_on = -1
    for (num_probes, holders), (_, following) in pairwise((*_read_steps(packed), (0, 0))):
        going_on &= holders
        for slot in _slots_of(going_on & ~following):
            yield slot, num_probes


def _read_steps(packed: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(packed):
        num_probes, num_bytes = STEP.unpack_from(packed, at)
        at += STEP.size + num_bytes
        yield num_probes, _read_set(packed[at - num_bytes : at])


@functools.lru_cache(maxsize=4096)
def _read_set(packed: bytes) -> int:
    """Return a set of slots as a bitmap; `prelude.lua` tells its two forms."""
    if len(packed) % 2:
        return int.from_bytes(packed, "little")
    return sum(1 << slot for slot in struct.unpack(f"<{len(packed) // 2}H", packed))


@functools.lru_cache(maxsize=4096)
def _slots_of(bitmap: int) -> tuple[int, ...]:
    slots = []
    while bitmap:
        lowest = bitmap & -bitmap
        slots.append(lowest.bit_length() - 1)
        bitmap ^= lowest
    return tuple(slots)


def _slot_state(slot: int, reply: list[Any] | None) -> SlotState:
    if reply is None:
        raise SlotLost(f"slot {slot} is fenced, unknown, or misses a batch")
    num_blocks, digest = reply
    return SlotState(num_blocks=num_blocks, digest=_read_digest(digest))


def _read_digest(packed: bytes) -> int:
    return int.from_bytes(packed[:HASH_BYTES], "little")
