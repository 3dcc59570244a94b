"""`kvlane inspect diff`: what two workers hold in common, and what that costs."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
import typer
from rich.console import Group, RenderableType
from rich.text import Text

from kvindex.blocks import Pool
from kvindex.commands.inspect.options import (
    DEFAULT_REDIS,
    AsJson,
    RedisUrl,
    index_reader,
    live_fleet,
    show,
)
from kvindex.commands.inspect.scan import scan
from kvindex.commands.inspect.tables import num_bytes, share, table
from kvindex.errors import ConfigError
from kvindex.index import IndexReader
from kvindex.worker import RegisteredWorker

SAMPLED_BUCKETS = 4096
"""About 260,000 blocks. Buckets are made of hashes, so that some are a fair sample of all."""


class Diff(msgspec.Struct, frozen=True, kw_only=True):
    """Two workers of one pool, block by block. Counts are estimates where `sampled_share` is below 1."""

    left: str
    right: str
    model: str
    sampled_share: float
    only_left_blocks: int
    only_right_blocks: int
    both_blocks: int
    block_bytes: int
    duplicated_bytes: int
    """What one of the two would have free if the other alone held what both hold."""
    left_num_blocks: int
    """KV cache size, 0 where unknown."""
    right_num_blocks: int


WorkerName = Annotated[str, typer.Argument(metavar="WORKER", help="As `kvlane inspect workers` names it.")]


def diff(
    left: WorkerName,
    right: WorkerName,
    everything: Annotated[
        bool, typer.Option("--all", help="Read the whole pool, not a sample of some 260,000 blocks.")
    ] = False,
    redis_url: RedisUrl = DEFAULT_REDIS,
    as_json: AsJson = False,
) -> None:
    """Compare what two workers hold: blocks of one, of the other, of both, and what one copy would save."""
    found = asyncio.run(_read(redis_url, left, right, None if everything else SAMPLED_BUCKETS))
    show(found, _view(found), as_json=as_json)


async def _read(redis_url: str, left: str, right: str, max_buckets: int | None) -> Diff:
    async with index_reader(redis_url) as reader:
        pool, ours, theirs = _pair(await live_fleet(reader), left, right)
        return await compare(reader, pool, ours, theirs, max_buckets=max_buckets)


def _pair(
    fleet: list[tuple[Pool, list[RegisteredWorker]]], left: str, right: str
) -> tuple[Pool, RegisteredWorker, RegisteredWorker]:
    known = {each.worker.worker_id for _, workers in fleet for each in workers}
    for name in (left, right):
        if name not in known:
            live = ", ".join(sorted(known)[:10]) or "none"
            raise ConfigError(f"no live worker {name}; live are {live}{', ...' if len(known) > 10 else ''}")
    for pool, workers in fleet:
        by_name = {each.worker.worker_id: each for each in workers}
        if left in by_name and right in by_name:
            return pool, by_name[left], by_name[right]
    raise ConfigError(
        f"{left} and {right} serve other models or block sizes: their blocks cannot be compared"
    )


async def compare(
    reader: IndexReader,
    pool: Pool,
    left: RegisteredWorker,
    right: RegisteredWorker,
    *,
    max_buckets: int | None,
) -> Diff:
    """Count the blocks of two workers of `pool`, in at most `max_buckets` buckets of it."""
    only_left = only_right = both = 0
    num_read, num_buckets = 0, 1
    async for entries in scan(reader, pool, max_buckets=max_buckets):
        num_buckets = max(entries.num_buckets, 1)
        num_read = num_buckets if entries.next_bucket is None else entries.next_bucket
        for slots in entries.holders.values():
            has_left, has_right = left.slot in slots, right.slot in slots
            only_left += has_left and not has_right
            only_right += has_right and not has_left
            both += has_left and has_right
    # The totals are known exactly; the sample tells how they divide.
    counted = only_left + only_right + 2 * both
    total = left.num_indexed_blocks + right.num_indexed_blocks
    scale = total / counted if counted and num_read < num_buckets else 1.0
    block_bytes = left.worker.block_size * left.worker.bytes_per_token
    return Diff(
        left=left.worker.worker_id,
        right=right.worker.worker_id,
        model=pool.model,
        sampled_share=min(num_read / num_buckets, 1.0),
        only_left_blocks=round(scale * only_left),
        only_right_blocks=round(scale * only_right),
        both_blocks=round(scale * both),
        block_bytes=block_bytes,
        duplicated_bytes=round(scale * both) * block_bytes,
        left_num_blocks=left.worker.num_blocks,
        right_num_blocks=right.worker.num_blocks,
    )


def _view(found: Diff) -> RenderableType:
    union = found.only_left_blocks + found.only_right_blocks + found.both_blocks
    rows = [
        (name, f"{count:,}", share(count, union), num_bytes(count * found.block_bytes))
        for name, count in (
            (f"only {found.left}", found.only_left_blocks),
            (f"only {found.right}", found.only_right_blocks),
            ("both", found.both_blocks),
        )
    ]
    sampled = "" if found.sampled_share == 1 else f", estimated from {found.sampled_share:.1%} of the pool"
    saved = (
        f"Held once, the common blocks would leave {num_bytes(found.duplicated_bytes)} free: "
        f"{share(found.both_blocks, found.left_num_blocks)} of the cache of {found.left}, "
        f"or {share(found.both_blocks, found.right_num_blocks)} of that of {found.right}."
    )
    title = f"blocks of {found.model}{sampled}"
    return Group(table(title, ["held by"], ["blocks", "share", "KV bytes"], rows), Text(saved))
