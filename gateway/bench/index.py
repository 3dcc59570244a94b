"""`kvlane bench index`: what the index costs in Redis, on an embedded one.

Calls are counted against the CPU seconds that Redis itself used where a rate "per core" is given, so
that clients on the same machine do not lower it. Latencies do include the client and whatever else runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import msgspec
import uvloop

from gateway.bench import index_publisher as publisher
from gateway.bench import radix_tree
from gateway.bench.index_fleet import (
    POOL,
    PROMPT_BLOCKS,
    RedisServer,
    conversation,
    conversing_fleet,
    fleet_of,
    latencies_ms,
    percentile,
    random_from,
    random_hashes,
    reader_of,
    scattered,
    select,
    the_prompt,
)
from kvindex.embedded import embedded_redis
from kvindex.figures import Figure
from kvindex.index import MAX_BATCH
from kvindex.redis_index import RedisIndexReader


def run(*, scale: float = 1.0) -> list[Figure]:
    """Measure the index; `scale` below 1 takes fewer blocks and calls, for a first look."""
    figures = [_smallest_call(round(3_000 * scale))]
    for num_workers in (8, 64):
        figures += _match(num_workers, conversation, "", num_calls=round(3_000 * scale))
    figures += _match(64, scattered, "_scattered", num_calls=round(3_000 * scale))
    figures.append(_match_reserve_per_core(round(20_000 * scale)))
    figures += publisher.store(round(200_000 * scale))
    figures.append(publisher.select_under_write(round(5_000 * scale)))
    figures += publisher.resync(round(1_000_000 * scale))
    figures.append(publisher.publisher_cpu(max(1, 20 * scale)))
    figures += _memory(round(1_000_000 * scale), round(10_000_000 * scale))
    return figures


def _memory(fewer_blocks: int, more_blocks: int) -> Iterator[Figure]:
    """Two holders a block, all of it through the writer; the larger index is the smaller one, grown."""
    beside = {
        "1m": ("one HASH a block, a JSON field a holder", _bytes_per_block_as_hashes(fewer_blocks // 10)),
        "10m": radix_tree.reference(", 2 holders", radix_tree.bytes_per_block, fewer_blocks // 2),
    }
    with fleet_of(8) as fleet:
        before = fleet.redis.memory_bytes()
        rng, num_stored = random_from(0), 0
        for name, num_blocks in (("1m", fewer_blocks), ("10m", more_blocks)):
            while num_stored < num_blocks:
                hashes = random_hashes(rng, MAX_BATCH)
                for slot in rng.sample(fleet.slots, 2):
                    fleet.store(slot, hashes)
                num_stored += MAX_BATCH
            bytes_per_block = (fleet.redis.memory_bytes() - before) / num_stored
            yield Figure(f"index.bytes_per_block_{name}", bytes_per_block, "bytes", "<= 20", *beside[name])


def _bytes_per_block_as_hashes(num_blocks: int) -> float:
    with embedded_redis() as url:
        redis = RedisServer(url)
        before = redis.memory_bytes()
        rng = random_from(0)
        for block in random_hashes(rng, num_blocks):
            pods = (f"10.0.0.{number}:8000" for number in rng.sample(range(8), 2))
            holders = (
                msgspec.json.encode({"pod": pod, "tier": "gpu"}).decode().replace('"', '\\"') for pod in pods
            )
            redis.send(f"HSET bench@{block} " + " ".join(f'"{holder}" 1' for holder in holders))
        return (redis.memory_bytes() - before) / num_blocks


def _smallest_call(num_calls: int) -> Figure:
    """What client, loopback and scheduling cost here: a script that finds nothing to do."""

    async def measure() -> list[float]:
        async with reader_of(fleet) as reader:
            return await latencies_ms(lambda: reader.settle(POOL, "unknown"), num_calls)

    with fleet_of(1) as fleet:
        took_ms, ping_ms = uvloop.run(measure()), []
        for _ in range(num_calls):
            began_s = time.perf_counter()
            fleet.redis.send("PING")
            ping_ms.append((time.perf_counter() - began_s) * 1_000)
    return Figure(
        "index.smallest_call_p50_ms",
        percentile(took_ms, 50),
        "ms",
        None,
        "PING over a bare blocking socket",
        percentile(ping_ms, 50),
    )


def _match(
    num_workers: int, depths: Callable[[int], Iterator[int]], suffix: str, *, num_calls: int
) -> list[Figure]:
    prompt = the_prompt()

    async def measure() -> list[float]:
        async with reader_of(fleet) as reader:
            await reader.match(POOL, prompt)
            fleet.redis.us_per_script()
            return await latencies_ms(lambda: reader.match(POOL, prompt), num_calls)

    with conversing_fleet(num_workers, depths) as fleet:
        took_ms = uvloop.run(measure())
        redis_us = fleet.redis.us_per_script()
    case = f"{PROMPT_BLOCKS}x{num_workers}{suffix}"
    target = None if suffix else "<= 0.2"
    beside = radix_tree.reference("", radix_tree.match_p50_ms, depths, num_workers, num_calls)
    return [
        Figure(f"index.match_p50_ms_{case}", percentile(took_ms, 50), "ms", target, *beside),
        Figure(f"index.match_p99_ms_{case}", percentile(took_ms, 99), "ms"),
        Figure(f"index.match_redis_us_{case}", redis_us, "us"),
    ]


def _match_reserve_per_core(num_calls: int) -> Figure:
    num_clients = 64
    calls_per_client = -(-num_calls // num_clients)
    prompt = the_prompt()

    async def client(reader: RedisIndexReader, name: int) -> None:
        for number in range(calls_per_client):
            await select(reader, prompt, f"{name}-{number}")

    async def measure() -> None:
        async with reader_of(fleet) as reader:
            await asyncio.gather(*(client(reader, name) for name in range(num_clients)))

    with conversing_fleet(8, conversation) as fleet:
        cpu_before_s = fleet.redis.cpu_s()
        uvloop.run(measure())
        cpu_s = fleet.redis.cpu_s() - cpu_before_s
    return Figure("index.match_reserve_per_core", num_clients * calls_per_client / cpu_s, "1/s", ">= 10000")
