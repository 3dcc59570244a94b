"""`kvlane bench index`: what the index costs in Redis, on an embedded one.

Calls are counted against the CPU seconds that Redis itself used where a rate "per core" is given, so
that clients on the same machine do not lower it. Latencies do include the client and whatever else runs.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import count

import msgspec
import uvloop

from gateway.bench.peers import peer
from gateway.bench.report import Figure
from kvindex.block_state import BlockState
from kvindex.blocks import BlockHash
from kvindex.config import IndexConfig
from kvindex.embedded import embedded_redis
from kvindex.events import BlockStored, decode_batch
from kvindex.index import MAX_BATCH
from kvindex.outbox import Outbox
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Batch, Worker, WorkerState

BLOCK_SIZE = 16
PROMPT_BLOCKS = 6_250
"""100,000 tokens."""
WRITTEN_BLOCKS_PER_S = 40_000
_LEASE_MS = 3_600_000
_POOL = Worker(
    endpoint="",
    model="bench",
    block_size=BLOCK_SIZE,
    num_blocks=1_000_000,
    bytes_per_token=1,
    max_model_len=1_000_000,
    incarnation="bench",
).pool


def run(*, scale: float = 1.0) -> list[Figure]:
    """Measure the index; `scale` below 1 takes fewer blocks and calls, for a first look."""
    figures = [_memory(round(1_000_000 * scale))]
    for num_workers in (8, 64):
        figures += _match(num_workers, _conversation, "", num_calls=round(3_000 * scale))
    figures += _match(64, _scattered, "_scattered", num_calls=round(3_000 * scale))
    figures.append(_match_reserve_per_core(round(20_000 * scale)))
    figures += _store(round(200_000 * scale))
    figures.append(_select_under_write(round(5_000 * scale)))
    return figures


def _memory(num_blocks: int) -> Figure:
    with _fleet(8) as fleet:
        before = fleet.redis.info("memory")["used_memory"]
        rng = _random(0)
        for _ in range(0, num_blocks, MAX_BATCH):
            hashes = _random_hashes(rng, MAX_BATCH)
            for slot in rng.sample(fleet.slots, 2):
                fleet.store(slot, hashes)
        num_stored = -(-num_blocks // MAX_BATCH) * MAX_BATCH
        bytes_per_block = (fleet.redis.info("memory")["used_memory"] - before) / num_stored
    return Figure(
        "index.bytes_per_block_1m",
        bytes_per_block,
        "bytes",
        "<= 20",
        "one HASH a block, a JSON field a holder",
        _bytes_per_block_as_hashes(num_blocks // 10),
    )


def _bytes_per_block_as_hashes(num_blocks: int) -> float:
    with embedded_redis() as url:
        redis = _Redis(url)
        before = redis.info("memory")["used_memory"]
        rng = _random(0)
        for block in _random_hashes(rng, num_blocks):
            pods = (f"10.0.0.{number}:8000" for number in rng.sample(range(8), 2))
            holders = (
                msgspec.json.encode({"pod": pod, "tier": "gpu"}).decode().replace('"', '\\"') for pod in pods
            )
            redis.send(f"HSET bench@{block} " + " ".join(f'"{holder}" 1' for holder in holders))
        return float(redis.info("memory")["used_memory"] - before) / num_blocks


def _conversation(num_workers: int) -> Iterator[int]:
    """All hold the system prompt, one in four went on with the conversation, one has all of it."""
    rng = _random(0)
    system_blocks = PROMPT_BLOCKS // 8
    yield PROMPT_BLOCKS
    for number in range(1, num_workers):
        yield system_blocks if number % 4 else rng.randrange(system_blocks, PROMPT_BLOCKS)


def _scattered(num_workers: int) -> Iterator[int]:
    """Every worker's run ends elsewhere: the most probes that a match can need."""
    rng = _random(0)
    yield from (rng.randrange(PROMPT_BLOCKS) for _ in range(num_workers))


def _match(
    num_workers: int, depths: Callable[[int], Iterator[int]], suffix: str, *, num_calls: int
) -> list[Figure]:
    async def measure() -> list[float]:
        async with _reader(fleet) as reader:
            return await _latencies_ms(lambda: reader.match(_POOL, prompt), num_calls)

    with _fleet(num_workers) as fleet:
        prompt = _random_hashes(_random(1), PROMPT_BLOCKS)
        for slot, depth in zip(fleet.slots, depths(num_workers), strict=True):
            fleet.store(slot, prompt[:depth])
        cpu_before_s = fleet.redis.cpu_s()
        latencies_ms = uvloop.run(measure())
        cpu_us = (fleet.redis.cpu_s() - cpu_before_s) / len(latencies_ms) * 1e6
    case = f"{PROMPT_BLOCKS}x{num_workers}{suffix}"
    target = None if suffix else "<= 0.2"
    return [
        Figure(f"index.match_p50_ms_{case}", _percentile(latencies_ms, 50), "ms", target),
        Figure(f"index.match_p99_ms_{case}", _percentile(latencies_ms, 99), "ms"),
        Figure(f"index.match_redis_us_{case}", cpu_us, "us"),
    ]


def _match_reserve_per_core(num_calls: int) -> Figure:
    num_clients = 64
    calls_per_client = -(-num_calls // num_clients)

    async def client(reader: RedisIndexReader, name: int) -> None:
        for number in range(calls_per_client):
            await _select(reader, prompt, f"{name}-{number}")

    async def measure() -> None:
        async with _reader(fleet) as reader:
            await asyncio.gather(*(client(reader, name) for name in range(num_clients)))

    with _fleet(8) as fleet:
        prompt = _random_hashes(_random(1), PROMPT_BLOCKS)
        for slot, depth in zip(fleet.slots, _conversation(8), strict=True):
            fleet.store(slot, prompt[:depth])
        cpu_before_s = fleet.redis.cpu_s()
        uvloop.run(measure())
        cpu_s = fleet.redis.cpu_s() - cpu_before_s
    return Figure("index.match_reserve_per_core", num_clients * calls_per_client / cpu_s, "1/s", ">= 10000")


def _store(num_blocks: int) -> list[Figure]:
    """From the engine's bytes, one block an event, to Redis' answer."""
    payloads = [
        msgspec.msgpack.encode(
            (
                0.0,
                (BlockStored([number], number - 1 if number else None, [number] * BLOCK_SIZE, BLOCK_SIZE),),
                0,
            )
        )
        for number in range(num_blocks)
    ]
    with _fleet(1) as fleet:
        cpu_before_s, began_s = fleet.redis.cpu_s(), time.perf_counter()
        state, outbox = BlockState(_POOL.model, BLOCK_SIZE), Outbox()
        for payload in payloads:
            for event in decode_batch(payload):
                if isinstance(event, BlockStored):
                    outbox.change(stored=state.store(event))
            if len(outbox) >= MAX_BATCH:
                fleet.drain(outbox)
        fleet.drain(outbox)
        took_s, cpu_s = time.perf_counter() - began_s, fleet.redis.cpu_s() - cpu_before_s
    return [
        Figure("index.store_blocks_per_s", num_blocks / took_s, "1/s", ">= 50000"),
        Figure("index.store_blocks_per_redis_core", num_blocks / cpu_s, "1/s"),
    ]


def _select_under_write(num_calls: int) -> Figure:
    async def measure() -> list[float]:
        numbers = count()
        async with _reader(fleet) as reader:
            return await _latencies_ms(lambda: _select(reader, prompt, str(next(numbers))), num_calls)

    with _fleet(8) as fleet:
        prompt = _random_hashes(_random(1), PROMPT_BLOCKS)
        for slot, depth in zip(fleet.slots, _conversation(8), strict=True):
            fleet.store(slot, prompt[:depth])
        with peer(_write_for_ever, fleet.config.redis_url):
            while len(uvloop.run(_states(fleet))) == len(fleet.slots):
                time.sleep(0.05)
            latencies_ms = uvloop.run(measure())
    return Figure("index.select_p99_ms_under_write", _percentile(latencies_ms, 99), "ms", "<= 3")


def _write_for_ever(url: str) -> None:
    """Store fresh blocks and remove old ones at a steady rate, as a worker of its own."""
    writer = RedisIndexWriter(IndexConfig(redis_url=url, redis_timeout_s=10))
    slot = writer.open_slot(_worker(1_000), lease_ms=_LEASE_MS)
    rng = _random(2)
    half = MAX_BATCH // 2
    former: tuple[int, ...] = ()
    began_s = time.perf_counter()
    for sequence in count(1):
        fresh = tuple(_random_hashes(rng, half))
        batch = Batch(sequence=sequence, stored=fresh, removed=former)
        writer.apply(_POOL, slot, "bench", batch)
        former = fresh
        due_s = began_s + sequence * MAX_BATCH / WRITTEN_BLOCKS_PER_S
        time.sleep(max(0.0, due_s - time.perf_counter()))


async def _select(reader: RedisIndexReader, prompt: Sequence[BlockHash], decision_id: str) -> None:
    match = await reader.match(_POOL, prompt)
    best = max(match.overlap_blocks, key=lambda slot: match.overlap_blocks[slot])
    await reader.reserve(
        _POOL, decision_id, best, prefill_tokens=BLOCK_SIZE, seen_backlog_tokens=None, ttl_ms=1_000
    )


async def _states(fleet: _Fleet) -> tuple[WorkerState, ...]:
    async with _reader(fleet) as reader:
        return (await reader.match(_POOL, ())).states


async def _latencies_ms(call: Callable[[], Awaitable[object]], num_calls: int) -> list[float]:
    latencies_ms = []
    for _ in range(num_calls):
        began_s = time.perf_counter()
        await call()
        latencies_ms.append((time.perf_counter() - began_s) * 1_000)
    return latencies_ms


def _percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[(len(values) - 1) * percent // 100]


def _random(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 (a bench must repeat itself)


def _random_hashes(rng: random.Random, num_hashes: int) -> list[BlockHash]:
    return [BlockHash(rng.getrandbits(64)) for _ in range(num_hashes)]


def _worker(number: int) -> Worker:
    return Worker(
        endpoint=f"10.0.{number // 250}.{number % 250}:8000",
        model=_POOL.model,
        block_size=_POOL.block_size,
        num_blocks=1_000_000,
        bytes_per_token=1,
        max_model_len=1_000_000,
        incarnation="bench",
    )


class _Redis:
    """Asks the server about itself; only the index package knows a Redis client."""

    def __init__(self, url: str) -> None:
        port = int(url.rpartition(":")[2].partition("/")[0])
        self._stream = socket.create_connection(("127.0.0.1", port)).makefile("rwb")

    def send(self, line: str) -> bytes:
        """Send an inline command; return the first line of the answer."""
        self._stream.write(line.encode() + b"\r\n")
        self._stream.flush()
        return self._stream.readline()

    def info(self, section: str) -> dict[str, float]:
        """Return the numbers of a section of INFO."""
        num_bytes = int(self.send(f"INFO {section}")[1:])
        pairs = (
            line.split(":", 1) for line in self._stream.read(num_bytes + 2).decode().split() if ":" in line
        )
        return {name: float(value) for name, value in pairs if value.replace(".", "", 1).isdigit()}

    def cpu_s(self) -> float:
        """CPU seconds that the server has used."""
        cpu = self.info("cpu")
        return cpu["used_cpu_user"] + cpu["used_cpu_sys"]


class _Fleet:
    """Registered workers on an empty Redis."""

    def __init__(self, url: str, num_workers: int) -> None:
        self.config = IndexConfig(redis_url=url, redis_timeout_s=10)
        self.redis = _Redis(url)
        self._writer = RedisIndexWriter(self.config)
        self.slots = [self._writer.open_slot(_worker(n), lease_ms=_LEASE_MS) for n in range(num_workers)]
        self._outboxes = {slot: Outbox() for slot in self.slots}

    def store(self, slot: int, hashes: Sequence[BlockHash]) -> None:
        self._outboxes[slot].change(stored=hashes)
        self.drain(self._outboxes[slot], slot)

    def drain(self, outbox: Outbox, slot: int = 0) -> None:
        while (batch := outbox.next_batch()) is not None:
            self._writer.apply(_POOL, slot, "bench", batch)
            outbox.confirm()


@contextmanager
def _fleet(num_workers: int) -> Iterator[_Fleet]:
    with embedded_redis() as url:
        yield _Fleet(url, num_workers)


@asynccontextmanager
async def _reader(fleet: _Fleet) -> AsyncIterator[RedisIndexReader]:
    reader = RedisIndexReader(fleet.config)
    try:
        yield reader
    finally:
        await reader.close()
