"""`kvlane inspect drift`: is what the index counts for a slot what it holds for it?"""

from __future__ import annotations

import asyncio
import enum
from collections import Counter, defaultdict
from collections.abc import Sequence

import msgspec
from rich.console import RenderableType
from rich.text import Text

from kvindex.blocks import Pool, format_hash
from kvindex.chunks import CHUNK_SCHEME
from kvindex.commands.inspect.options import DEFAULT_REDIS, AsJson, RedisUrl, index_reader, show
from kvindex.commands.inspect.scan import scan
from kvindex.commands.inspect.tables import HOW_TO_JOIN, table
from kvindex.index import IndexReader
from kvindex.stores import RegisteredStore
from kvindex.worker import RegisteredWorker

TRIES = 3
"""Reads of a pool, before what changes all the time is called busy."""


class Status(enum.StrEnum):
    """What a comparison says."""

    EQUAL = "equal"
    DIFFERS = "differs"
    BUSY = "busy"
    """The worker wrote during every read, or entries moved: it cannot be told here; its publisher can."""


class SlotDrift(msgspec.Struct, frozen=True, kw_only=True):
    """One slot: count and digest that Redis keeps beside those of the entries."""

    model: str
    holder: str
    """A worker or a store."""
    slot: int
    status: Status
    kept_blocks: int
    kept_digest: str
    found_blocks: int
    found_digest: str


def drift(redis_url: RedisUrl = DEFAULT_REDIS, as_json: AsJson = False) -> None:
    """Compare count and digest of every slot with its entries, read in slices. Changes nothing."""
    found = asyncio.run(_read(redis_url))
    show(found, _view(found), as_json=as_json)


async def _read(redis_url: str) -> list[SlotDrift]:
    async with index_reader(redis_url) as reader:
        pools = [*await reader.pools(), *await reader.chunk_pools()]
        return [each for pool in pools for each in await compare(reader, pool)]


async def compare(reader: IndexReader, pool: Pool) -> list[SlotDrift]:
    """Return every live slot of `pool`, by number."""
    compared: dict[int, SlotDrift] = {}
    for _ in range(TRIES):
        compared |= await _compare_once(reader, pool)
        if all(each.status == Status.EQUAL for each in compared.values()):
            break
    return [compared[slot] for slot in sorted(compared)]


async def _compare_once(reader: IndexReader, pool: Pool) -> dict[int, SlotDrift]:
    before = await _states(reader, pool)
    counts: Counter[tuple[int, ...]] = Counter()
    digests: defaultdict[tuple[int, ...], int] = defaultdict(int)
    sizes = set()
    async for entries in scan(reader, pool):
        sizes.add(entries.num_buckets)
        for block, slots in entries.holders.items():
            counts[slots] += 1
            digests[slots] ^= block
    after = await _states(reader, pool)
    # A pool that grows moves entries, and one may be seen twice.
    is_settled = len(sizes) <= 1
    num_found: Counter[int] = Counter()
    digest_found: defaultdict[int, int] = defaultdict(int)
    for slots, count in counts.items():
        for slot in slots:
            num_found[slot] += count
            digest_found[slot] ^= digests[slots]
    compared = {}
    for slot, each in after.items():
        digest = format_hash(digest_found[slot])
        is_same = (num_found[slot], digest) == (each.num_indexed_blocks, each.digest)
        is_still = is_settled and slot in before and _state(before[slot]) == _state(each)
        compared[slot] = SlotDrift(
            model=pool.model,
            holder=each.holder.holder_id,
            slot=slot,
            status=Status.EQUAL if is_same else Status.DIFFERS if is_still else Status.BUSY,
            kept_blocks=each.num_indexed_blocks,
            kept_digest=each.digest,
            found_blocks=num_found[slot],
            found_digest=digest,
        )
    return compared


async def _states(reader: IndexReader, pool: Pool) -> dict[int, RegisteredWorker | RegisteredStore]:
    registered: Sequence[RegisteredWorker | RegisteredStore]
    if pool.scheme == CHUNK_SCHEME:
        _, registered = await reader.stores(pool)
    else:
        _, registered = await reader.workers(pool)
    return {each.slot: each for each in registered}


def _state(registered: RegisteredWorker | RegisteredStore) -> tuple[str, int, str]:
    return registered.holder.incarnation, registered.num_indexed_blocks, registered.digest


def _view(found: Sequence[SlotDrift]) -> RenderableType:
    if not found:
        return Text(f"No worker is live. {HOW_TO_JOIN}")
    statuses = Counter(each.status for each in found)
    title = ", ".join(f"{statuses[status]:,} {status}" for status in Status)
    notable = [each for each in found if each.status != Status.EQUAL]
    if not notable:
        return Text(f"Every slot holds what the index counts for it: {title}.")
    rows = (
        (
            each.holder,
            each.model,
            each.status,
            str(each.slot),
            f"{each.kept_blocks:,}",
            f"{each.found_blocks:,}",
            f"{each.found_blocks - each.kept_blocks:+,}",
            each.kept_digest,
            each.found_digest,
        )
        for each in notable
    )
    columns = ["slot", "blocks kept", "found", "difference", "digest kept", "found"]
    return table(f"slots: {title}", ["holder", "model", "status"], columns, rows)
