"""What `kvlane inspect` reads from the index: a few bounded calls for each pool."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from kvindex.blocks import BlockHash, Pool
from kvindex.config import IndexConfig
from kvindex.index import IndexReader
from kvindex.redis_index import RedisIndexReader
from kvindex.worker import RegisteredWorker


class PoolView(msgspec.Struct, frozen=True):
    """A pool in figures."""

    pool_id: str
    model: str
    block_size: int
    scheme: str
    num_workers: int
    num_blocks: int
    """KV cache blocks of all live workers."""
    num_indexed_blocks: int


class HolderView(msgspec.Struct, frozen=True):
    """A live worker that holds the block."""

    pool_id: str
    model: str
    worker: str
    slot: int


@asynccontextmanager
async def _reader(config: IndexConfig) -> AsyncIterator[IndexReader]:
    reader = RedisIndexReader(config)
    try:
        yield reader
    finally:
        await reader.close()


async def _fleet(reader: IndexReader) -> list[tuple[Pool, list[RegisteredWorker]]]:
    pools = sorted(await reader.pools(), key=lambda pool: (pool.model, pool.block_size))
    return [(pool, (await reader.workers(pool))[1]) for pool in pools]


async def read_workers(config: IndexConfig) -> list[RegisteredWorker]:
    """Return every live worker, by pool and slot."""
    async with _reader(config) as reader:
        return [each for _, workers in await _fleet(reader) for each in workers]


async def read_pools(config: IndexConfig) -> list[PoolView]:
    """Return every pool that still has entries or live workers."""
    async with _reader(config) as reader:
        fleet = await _fleet(reader)
    return [
        PoolView(
            pool_id=pool.pool_id,
            model=pool.model,
            block_size=pool.block_size,
            scheme=pool.scheme,
            num_workers=len(workers),
            num_blocks=sum(each.worker.num_blocks for each in workers),
            num_indexed_blocks=sum(each.num_indexed_blocks for each in workers),
        )
        for pool, workers in fleet
    ]


async def read_holders(config: IndexConfig, block: BlockHash) -> list[HolderView]:
    """Return the live workers that hold `block`, in whatever pool."""
    async with _reader(config) as reader:
        holders = []
        for pool, workers in await _fleet(reader):
            slots = set(await reader.holders(pool, block))
            holders += [
                HolderView(pool.pool_id, pool.model, each.worker.worker_id, each.slot)
                for each in workers
                if each.slot in slots
            ]
    return holders
