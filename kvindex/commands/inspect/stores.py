"""`kvlane inspect stores`: what LMCache servers hold outside the engines, and who reaches it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from rich.console import RenderableType
from rich.text import Text

from kvindex.commands.inspect.options import DEFAULT_REDIS, AsJson, RedisUrl, index_reader, live_fleet, show
from kvindex.commands.inspect.tables import table
from kvindex.index import IndexReader
from kvindex.stores import RegisteredStore


class StoreView(msgspec.Struct, frozen=True):
    """A live store, as one teller tells of it."""

    registered: RegisteredStore
    workers: list[str]
    """Who loads from it."""


def stores(redis_url: RedisUrl = DEFAULT_REDIS, as_json: AsJson = False) -> None:
    """List the stores outside the engines by tier: chunks, who tells of them, which workers reach them."""
    found = asyncio.run(_read(redis_url))
    show(found, _view(found), as_json=as_json)


async def read_stores(reader: IndexReader) -> list[RegisteredStore]:
    """Return every live store, by pool and slot."""
    return [each for pool in await reader.chunk_pools() for each in (await reader.stores(pool))[1]]


async def _read(redis_url: str) -> list[StoreView]:
    async with index_reader(redis_url) as reader:
        found = await read_stores(reader)
        workers = [each.worker for _, live in await live_fleet(reader) for each in live]
    return [
        StoreView(
            each,
            [
                worker.worker_id
                for worker in workers
                if worker.tiers is not None and each.store.name in worker.tiers.stores
            ],
        )
        for each in found
    ]


def _view(found: Sequence[StoreView]) -> RenderableType:
    if not found:
        return Text(
            "No store is live: no LMCache server has told an agent of a chunk. "
            "Start an engine with `kvlane serve MODEL --tiers cpu=20GB`."
        )
    return table(
        "stores",
        ["store", "tier", "model", "told by", "workers"],
        ["slot", "chunks", "tokens", "lease"],
        (
            (
                each.registered.store.name,
                each.registered.store.tier,
                each.registered.store.model,
                "events of " + each.registered.store.teller if each.registered.store.teller else "its agent",
                ", ".join(each.workers) or "nobody",
                str(each.registered.slot),
                f"{each.registered.num_indexed_blocks:,}",
                f"{each.registered.num_indexed_blocks * each.registered.store.chunk_size:,}",
                f"{each.registered.lease_left_ms / 1000:.1f} s",
            )
            for each in found
        ),
    )
