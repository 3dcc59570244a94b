"""`kvlane inspect workers`, `pools` and `block`: a few bounded calls for each pool."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
import typer
from rich.console import RenderableType
from rich.text import Text

from kvindex.blocks import BlockHash, format_hash, parse_hash
from kvindex.commands.inspect.options import (
    DEFAULT_ADMIN,
    DEFAULT_REDIS,
    AdminUrl,
    AsJson,
    RedisUrl,
    index_reader,
    live_fleet,
    show,
)
from kvindex.commands.inspect.parity import UNKNOWN, parity_of_pools, parity_of_workers, read_fleet
from kvindex.commands.inspect.tables import HOW_TO_JOIN, table
from kvindex.errors import ConfigError
from kvindex.keys import POOLS
from kvindex.worker import RegisteredWorker, Tier


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
    num_expired_reservations: int
    """That nobody settled in time, since the pool began."""


class HolderView(msgspec.Struct, frozen=True):
    """A live worker or store that holds the block."""

    pool_id: str
    model: str
    holder: str
    tier: Tier
    slot: int


def workers(
    redis_url: RedisUrl = DEFAULT_REDIS, admin: AdminUrl = DEFAULT_ADMIN, as_json: AsJson = False
) -> None:
    """List the live workers with their load and indexed blocks, and what a gateway holds of them."""
    found = asyncio.run(read_workers(redis_url))
    parity = parity_of_workers(read_fleet(admin))
    described = [
        msgspec.to_builtins(each) | {"parity": parity.get(each.worker.incarnation)} for each in found
    ]
    show(described, view_workers(found, parity), as_json=as_json)


def pools(
    redis_url: RedisUrl = DEFAULT_REDIS, admin: AdminUrl = DEFAULT_ADMIN, as_json: AsJson = False
) -> None:
    """List the pools: workers whose block hashes can be compared."""
    found = asyncio.run(_read_pools(redis_url))
    parity = parity_of_pools(read_fleet(admin))
    described = [msgspec.to_builtins(each) | {"parity": parity.get(each.pool_id)} for each in found]
    show(described, _view_pools(found, parity), as_json=as_json)


def block(
    block_hash: Annotated[str, typer.Argument(metavar="HASH", help="Up to 16 hex digits.")],
    redis_url: RedisUrl = DEFAULT_REDIS,
    as_json: AsJson = False,
) -> None:
    """Say which live workers hold a block, or which stores a chunk."""
    try:
        wanted = parse_hash(block_hash)
    except ValueError as error:
        raise ConfigError(f"HASH: up to 16 hex digits, not {block_hash!r}") from error
    found = asyncio.run(_read_holders(redis_url, wanted))
    show(found, _view_holders(format_hash(wanted), found), as_json=as_json)


async def read_workers(redis_url: str) -> list[RegisteredWorker]:
    """Return every live worker, by pool and slot."""
    async with index_reader(redis_url) as reader:
        return [each for _, workers in await live_fleet(reader) for each in workers]


async def _read_pools(redis_url: str) -> list[PoolView]:
    """Return every pool that still has entries or live workers."""
    async with index_reader(redis_url) as reader:
        fleet = await live_fleet(reader)
        num_expired = {pool: await reader.expired_reservations(pool) for pool, _ in fleet}
    return [
        PoolView(
            pool_id=pool.pool_id,
            model=pool.model,
            block_size=pool.block_size,
            scheme=pool.scheme,
            num_workers=len(workers),
            num_blocks=sum(each.worker.num_blocks for each in workers),
            num_indexed_blocks=sum(each.num_indexed_blocks for each in workers),
            num_expired_reservations=num_expired[pool],
        )
        for pool, workers in fleet
    ]


async def _read_holders(redis_url: str, block: BlockHash) -> list[HolderView]:
    """Return the live workers and stores that hold `block`, in whatever pool."""
    async with index_reader(redis_url) as reader:
        holders = []
        for pool, workers in await live_fleet(reader):
            slots = set(await reader.holders(pool, block))
            holders += [
                HolderView(pool.pool_id, pool.model, each.worker.worker_id, Tier.DEVICE, each.slot)
                for each in workers
                if each.slot in slots
            ]
        for pool in await reader.chunk_pools():
            slots = set(await reader.holders(pool, block))
            holders += [
                HolderView(pool.pool_id, pool.model, each.store.holder_id, each.store.tier, each.slot)
                for each in (await reader.stores(pool))[1]
                if each.slot in slots
            ]
    return holders


def view_workers(found: Sequence[RegisteredWorker], parity: Mapping[str, str]) -> RenderableType:
    """Show workers, their load, and what a gateway holds of them, by incarnation."""
    if not found:
        return Text(f"No worker is live: no pool named by {POOLS} has one with a valid lease. {HOW_TO_JOIN}")
    stores = ("loads from",) if any(each.worker.tiers for each in found) else ()
    return table(
        "workers",
        ["worker", "model", "engine", "parity", "role", "labels", *stores],
        ["slot", "blocks indexed", "KV in use", "running", "waiting", "backlog tokens", "lease"],
        (
            (
                each.worker.worker_id,
                each.worker.model,
                f"{each.worker.engine} ({each.worker.publisher})".lstrip(),
                parity.get(each.worker.incarnation, UNKNOWN),
                f"{each.role}, draining" if each.is_draining else each.role,
                ", ".join(f"{name}={value}" for name, value in sorted(each.worker.labels.items())),
                *(", ".join(each.worker.tiers.stores) if each.worker.tiers else "-" for _ in stores),
                str(each.slot),
                f"{each.num_indexed_blocks:,} of {each.worker.num_blocks:,}",
                f"{each.load.kv_usage:.0%}",
                str(each.load.running_requests),
                f"{each.load.waiting_requests} + {each.charged_requests}",
                f"{each.load.waiting_prefill_tokens:,} + {each.charged_tokens:,}",
                f"{each.lease_left_ms / 1000:.1f} s",
            )
            for each in found
        ),
    )


def _view_pools(found: Sequence[PoolView], parity: Mapping[str, str]) -> RenderableType:
    if not found:
        return Text(f"No pool: {POOLS} is empty, so no worker has ever registered here. {HOW_TO_JOIN}")
    return table(
        "pools",
        ["pool", "model", "hash scheme", "parity"],
        ["block size", "workers", "blocks indexed", "reservations expired"],
        (
            (
                each.pool_id,
                each.model,
                each.scheme,
                parity.get(each.pool_id, UNKNOWN),
                str(each.block_size),
                str(each.num_workers),
                f"{each.num_indexed_blocks:,} of {each.num_blocks:,}",
                f"{each.num_expired_reservations:,}",
            )
            for each in found
        ),
    )


def _view_holders(block: str, found: Sequence[HolderView]) -> RenderableType:
    if not found:
        return Text(
            f"No live worker holds block {block}: it was never stored, was evicted, or its workers are gone. "
            "Hashes depend on model, block size, LoRA name and cache salt."
        )
    rows = ((each.holder, each.tier, each.model, each.pool_id, str(each.slot)) for each in found)
    return table(f"holders of {block}", ["holder", "tier", "model", "pool"], ["slot"], rows)
