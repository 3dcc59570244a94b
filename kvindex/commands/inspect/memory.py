"""`kvlane inspect memory`: what the index costs in the Redis that runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from kvindex.commands.inspect.options import DEFAULT_REDIS, AsJson, RedisUrl, index_reader, show
from kvindex.commands.inspect.tables import HOW_TO_JOIN, num_bytes, share, table
from kvindex.redis_memory import PoolMemory


class Memory(msgspec.Struct, frozen=True):
    """All pools, beside what Redis has allocated."""

    pools: list[PoolMemory]
    total_bytes: int
    used_memory_bytes: int
    """Scripts, connections, buffers and whatever else lives there included."""


def memory(redis_url: RedisUrl = DEFAULT_REDIS, as_json: AsJson = False) -> None:
    """Measure the bytes a block, and all that the index keeps beside the blocks, by pool."""
    found = asyncio.run(_read(redis_url))
    show(found, Group(*_view(found)), as_json=as_json)


async def _read(redis_url: str) -> Memory:
    async with index_reader(redis_url) as reader:
        all_pools = [*await reader.pools(), *await reader.chunk_pools()]
        pools = [await reader.memory(pool) for pool in all_pools]
        return Memory(pools, sum(pool.total_bytes for pool in pools), await reader.used_memory_bytes())


def _view(found: Memory) -> Iterator[RenderableType]:
    if not found.pools:
        yield Text(f"No pool has workers or entries. {HOW_TO_JOIN}")
    for pool in found.pools:
        per_block = f"{pool.bytes_per_entry:.1f} bytes a {pool.what}"
        sampled = f"{pool.num_sampled_buckets} of {pool.num_buckets:,} buckets sampled"
        rows = [
            (f"{pool.num_entries:,} {pool.what}s, {sampled}", num_bytes(pool.entries_bytes)),
            *((name, num_bytes(size)) for name, size in pool.fixed_bytes.items()),
            ("total", num_bytes(pool.total_bytes)),
        ]
        title = f"{pool.model}, {pool.num_holders:,} {pool.holders}: {per_block}"
        yield table(title, ["what"], ["bytes"], rows)
    part = share(found.total_bytes, found.used_memory_bytes)
    yield Text(
        f"The index takes {num_bytes(found.total_bytes)}, {part} of the {num_bytes(found.used_memory_bytes)} "
        "that Redis has allocated; the rest is Redis itself, scripts, connections, and whoever else uses it."
    )
