"""What a pool costs in Redis, measured: exact counts, and samples of the keys that are many."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from kvindex import keys
from kvindex.blocks import Pool
from kvindex.chunks import CHUNK_SCHEME

SAMPLES = 64
"""Keys of one kind that are measured; the others are taken to be like them."""


class PoolMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one pool, keys and values with their share of Redis's own tables."""

    pool_id: str
    model: str
    what: str
    """What its entries are: block or chunk."""
    holders: str
    """Who has them: workers or stores."""
    num_holders: int
    num_entries: int
    """Distinct blocks in the index, those of dead slots included until they are swept."""
    num_buckets: int
    num_sampled_buckets: int
    entries_bytes: int
    bytes_per_entry: float
    """0 where there are no entries."""
    fixed_bytes: dict[str, int]
    """What does not grow with the blocks: registry, live rows, slots, reservations, logs."""
    total_bytes: int


Call = Callable[..., Awaitable[Any]]
"""Makes one command and returns its answer, as `AsyncConnection.call`."""


async def measure(call: Call, pool: Pool, slots: Sequence[int]) -> PoolMemory:
    """Measure the pool's keys; every command is short.

    Args:
        call: makes the commands.
        pool: which to measure.
        slots: of the live workers or stores.
    """
    counts = await call("HMGET", keys.directory(pool), "buckets", "entries")
    num_buckets, num_entries = (int(count or 0) for count in counts)
    sampled = random.sample(range(num_buckets), min(SAMPLES, num_buckets))
    buckets = await _sizes(call, [keys.bucket_key(pool, bucket) for bucket in sampled])
    entries_bytes = round(sum(buckets) / len(buckets) * num_buckets) if buckets else 0
    is_of_chunks = pool.scheme == CHUNK_SCHEME
    fixed_bytes = {}
    for name, found in keys.fixed_keys(pool, slots).items():
        some = random.sample(found, min(SAMPLES, len(found)))
        sizes = await _sizes(call, some)
        fixed_bytes[name] = round(sum(sizes) / len(some) * len(found)) if some else 0
    return PoolMemory(
        pool_id=pool.pool_id,
        model=pool.model,
        what="chunk" if is_of_chunks else "block",
        holders="stores" if is_of_chunks else "workers",
        num_holders=len(slots),
        num_entries=num_entries,
        num_buckets=num_buckets,
        num_sampled_buckets=len(sampled),
        entries_bytes=entries_bytes,
        bytes_per_entry=entries_bytes / num_entries if num_entries else 0.0,
        fixed_bytes=fixed_bytes,
        total_bytes=entries_bytes + sum(fixed_bytes.values()),
    )


async def _sizes(call: Call, names: Sequence[str | bytes]) -> list[int]:
    """Return the bytes of each key, 0 for those that do not exist."""
    return [await call("MEMORY", "USAGE", name) or 0 for name in names]
