"""What the index benches stand on: an empty Redis that can be asked about itself, and workers in it."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from kvindex.blocks import BlockHash
from kvindex.config import IndexConfig
from kvindex.embedded import embedded_redis
from kvindex.index import MAX_BATCH
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Batch, Worker

BLOCK_SIZE = 16
PROMPT_BLOCKS = 6_250
"""100,000 tokens."""
LEASE_MS = 3_600_000
_RESERVATION_TTL_MS = 30_000
INCARNATION = "bench"


def worker(number: int) -> Worker:
    """Return the description of a worker of the benches' pool."""
    return Worker(
        endpoint=f"10.0.{number // 250}.{number % 250}:8000",
        model="bench",
        block_size=BLOCK_SIZE,
        num_blocks=1_000_000,
        bytes_per_token=1,
        max_model_len=1_000_000,
        incarnation=INCARNATION,
    )


POOL = worker(0).pool


class RedisServer:
    """Asks a server about itself; only the index package knows a Redis client."""

    def __init__(self, url: str) -> None:
        port = int(url.rpartition(":")[2].partition("/")[0])
        self._stream = socket.create_connection(("127.0.0.1", port)).makefile("rwb")

    def send(self, line: str) -> bytes:
        """Send an inline command; return the first line of the answer."""
        self._stream.write(line.encode() + b"\r\n")
        self._stream.flush()
        return self._stream.readline()

    def info(self, section: str) -> dict[str, str]:
        """Return a section of INFO."""
        num_bytes = int(self.send(f"INFO {section}")[1:])
        lines = self._stream.read(num_bytes + 2).decode().split()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def memory_bytes(self) -> int:
        """Return the bytes that the server has allocated."""
        return int(self.info("memory")["used_memory"])

    def cpu_s(self) -> float:
        """Return the CPU seconds that the server has used."""
        cpu = self.info("cpu")
        return float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])

    def us_per_script(self) -> float:
        """Return the mean time of a script since the last call of this, in microseconds."""
        stat = self.info("commandstats")["cmdstat_evalsha"]
        self.send("CONFIG RESETSTAT")
        return float(dict(pair.split("=") for pair in stat.split(","))["usec_per_call"])


class Fleet:
    """Registered workers on an empty Redis."""

    def __init__(self, url: str, num_workers: int) -> None:
        self.config = IndexConfig(redis_url=url, redis_timeout_s=10)
        self.redis = RedisServer(url)
        self.writer = RedisIndexWriter(self.config)
        opened = [self.writer.open_slot(worker(n), lease_ms=LEASE_MS) for n in range(num_workers)]
        self._sequences = dict.fromkeys(opened, 0)

    @property
    def slots(self) -> list[int]:
        """The workers' slots."""
        return list(self._sequences)

    def store(self, slot: int, hashes: Sequence[BlockHash]) -> None:
        """Store the blocks for the worker of `slot`."""
        for at in range(0, len(hashes), MAX_BATCH):
            self._sequences[slot] += 1
            batch = Batch(sequence=self._sequences[slot], stored=tuple(hashes[at : at + MAX_BATCH]))
            self.writer.apply(POOL, slot, INCARNATION, batch)


@contextmanager
def fleet_of(num_workers: int) -> Iterator[Fleet]:
    """Run an embedded Redis with that many workers registered."""
    with embedded_redis() as url:
        yield Fleet(url, num_workers)


@contextmanager
def conversing_fleet(num_workers: int, depths: Callable[[int], Iterator[int]]) -> Iterator[Fleet]:
    """Run a fleet that holds the prompt, each worker to its depth in blocks."""
    with fleet_of(num_workers) as fleet:
        prompt = the_prompt()
        for slot, depth in zip(fleet.slots, depths(num_workers), strict=True):
            fleet.store(slot, prompt[:depth])
        yield fleet


@asynccontextmanager
async def reader_of(fleet: Fleet) -> AsyncIterator[RedisIndexReader]:
    """Connect a gateway's side to the fleet's Redis."""
    reader = RedisIndexReader(fleet.config)
    try:
        yield reader
    finally:
        await reader.close()


def conversation(num_workers: int) -> Iterator[int]:
    """All hold the system prompt, one in four went on with the conversation, one has all of it."""
    rng = random_from(0)
    system_blocks = PROMPT_BLOCKS // 8
    yield PROMPT_BLOCKS
    for number in range(1, num_workers):
        yield system_blocks if number % 4 else rng.randrange(system_blocks, PROMPT_BLOCKS)


def scattered(num_workers: int) -> Iterator[int]:
    """Every worker's run ends elsewhere: the most probes that a match can need."""
    rng = random_from(0)
    yield from (rng.randrange(PROMPT_BLOCKS) for _ in range(num_workers))


def the_prompt() -> list[BlockHash]:
    """Return the hashes of the benches' prompt."""
    return random_hashes(random_from(1), PROMPT_BLOCKS)


def random_from(seed: int) -> random.Random:
    """Return a generator; a bench must repeat itself."""
    return random.Random(seed)  # noqa: S311


def random_hashes(rng: random.Random, num_hashes: int) -> list[BlockHash]:
    """Return hashes as any content might have."""
    return [BlockHash(rng.getrandbits(64)) for _ in range(num_hashes)]


async def select(reader: RedisIndexReader, prompt: Sequence[BlockHash], decision_id: str) -> None:
    """Do what a gateway does for a request: match and reserve."""
    match = await reader.match(POOL, prompt)
    best = max(match.overlap_blocks, key=lambda slot: match.overlap_blocks[slot])
    await reader.reserve(
        POOL,
        decision_id,
        best,
        prefill_tokens=BLOCK_SIZE,
        seen_backlog_tokens=None,
        ttl_ms=_RESERVATION_TTL_MS,
    )


async def latencies_ms(call: Callable[[], Awaitable[object]], num_calls: int) -> list[float]:
    """Return how long each of so many calls in a row took."""
    took_ms = []
    for _ in range(num_calls):
        began_s = time.perf_counter()
        await call()
        took_ms.append((time.perf_counter() - began_s) * 1_000)
    return took_ms


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value that so many percent do not exceed."""
    return sorted(values)[(len(values) - 1) * percent // 100]
