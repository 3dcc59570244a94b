"""`kvlane inspect heatmap`: who holds how much of recent prompts, by depth: workers, and tiers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Group, RenderableType
from rich.text import Text

from kvindex.blocks import BlockHash, Pool
from kvindex.chunks import CHUNK_SCHEME
from kvindex.commands.inspect.admin_api import Chain, ask, ask_about_prompt, read_chains
from kvindex.commands.inspect.decisions import PromptModel
from kvindex.commands.inspect.options import (
    DEFAULT_ADMIN,
    DEFAULT_REDIS,
    AdminUrl,
    AsJson,
    RedisUrl,
    index_reader,
    show,
)
from kvindex.commands.inspect.tables import table
from kvindex.errors import ConfigError
from kvindex.index import IndexReader
from kvindex.worker import Tier

BLOCKS_PER_COLUMN = 256
"""Most distinct blocks that stand for a column: one call of well under a millisecond."""

TALLEST_INCHES = 9
"""Of a picture's rows; more workers than that have room for a name each are drawn closer, without names."""

SHADES = " ·░▒▓█"
"""Nothing, less than a quarter, then by quarters, and everything."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds which share of the blocks of each column."""

    holder: str
    """A worker, or a store outside the engines."""
    tier: Tier
    shares: list[float]


class Heatmap(msgspec.Struct, frozen=True, kw_only=True):
    """One pool, of workers' blocks or of stores' chunks, which are called blocks here.

    Column i is about prefixes of more than `depths_blocks[i]` blocks, up to the next.
    """

    pool_id: str
    model: str
    what: str
    """What is counted: blocks, or chunks."""
    block_size: int
    num_prompts: int
    depths_blocks: list[int]
    """First depth of each column, and then the end of the last."""
    num_blocks: list[int]
    """Distinct blocks looked up for each column."""
    rows: list[Row]
    """Who holds most first."""


def heatmap(
    *,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT-or-@FILE", help="Look at this prompt instead of the gateway's latest."),
    ] = None,
    model: PromptModel = None,
    prompts: Annotated[int, typer.Option(min=1, max=1000, help="Latest prompts to look at.")] = 200,
    columns: Annotated[int, typer.Option(min=1, max=64, help="Ranges of depth.")] = 24,
    rows: Annotated[int, typer.Option(min=1, help="Most rows of a table; JSON and PNG have all.")] = 40,
    png: Annotated[Path | None, typer.Option(help="Write a picture there.")] = None,
    redis_url: RedisUrl = DEFAULT_REDIS,
    admin: AdminUrl = DEFAULT_ADMIN,
    as_json: AsJson = False,
) -> None:
    """Show which share of recent prompts each worker and each tier holds, by depth in the prompt.

    The index knows hashes and not depths. Depths come from the gateway's latest requests, of which it keeps
    hashes and counts, or from a prompt that you give.
    """
    if prompt is not None:
        chains = read_chains(ask_about_prompt(admin, prompt, model))
    else:
        path = f"/prompts?limit={prompts}"
        latest = ask(admin, "GET", path)
        chains = [chain for each in latest if model in (None, each["model"]) for chain in read_chains(each)]
    found = asyncio.run(_read(redis_url, [chain for chain in chains if chain.hashes], columns))
    if png is not None:
        draw(found, png)
    show(found, Group(*_view(found, rows)), as_json=as_json)


async def _read(redis_url: str, chains: Sequence[Chain], num_columns: int) -> list[Heatmap]:
    async with index_reader(redis_url) as reader:
        return [
            await look_up(reader, pool, ours, num_columns)
            for pool in (*await reader.pools(), *await reader.chunk_pools())
            if (ours := [chain for chain in chains if chain.pool_id == pool.pool_id])
        ]


async def look_up(reader: IndexReader, pool: Pool, chains: Sequence[Chain], num_columns: int) -> Heatmap:
    """Return how much of `chains`, prompts in `pool`, each live worker or store holds."""
    depths = _depths(max(chain.stride * len(chain.hashes) for chain in chains), num_columns)
    columns = [_sample(blocks) for blocks in _by_column(chains, depths)]
    slots = await _slots(reader, pool)
    held = [await reader.holders_of(pool, blocks) for blocks in columns]
    rows = [_row(holder, tier, ours, held) for (holder, tier), ours in slots.items()]
    return Heatmap(
        pool_id=pool.pool_id,
        model=pool.model,
        what="chunks" if pool.scheme == CHUNK_SCHEME else "blocks",
        block_size=pool.block_size,
        num_prompts=len(chains),
        depths_blocks=depths,
        num_blocks=[len(blocks) for blocks in columns],
        rows=sorted(rows, key=lambda row: (-sum(row.shares), row.holder)),
    )


def _depths(deepest_blocks: int, num_columns: int) -> list[int]:
    """Return where columns of equal width begin, and where the last ends."""
    width = -(-deepest_blocks // num_columns)
    return list(range(0, deepest_blocks + width, width))


def _by_column(chains: Sequence[Chain], depths: Sequence[int]) -> list[list[BlockHash]]:
    width = depths[1]
    columns: list[dict[BlockHash, None]] = [{} for _ in depths[1:]]
    for chain in chains:
        for depth, block in chain.by_depth():
            columns[(depth - 1) // width][block] = None
    return [list(blocks) for blocks in columns]


def _sample(blocks: Sequence[BlockHash]) -> list[BlockHash]:
    step = -(-len(blocks) // BLOCKS_PER_COLUMN) or 1
    return list(blocks[::step])


async def _slots(reader: IndexReader, pool: Pool) -> dict[tuple[str, Tier], set[int]]:
    """Return everyone who holds blocks of a pool; several may tell of one store."""
    if pool.scheme != CHUNK_SCHEME:
        _, workers = await reader.workers(pool)
        return {(each.worker.worker_id, Tier.DEVICE): {each.slot} for each in workers}
    found: dict[tuple[str, Tier], set[int]] = {}
    for each in (await reader.stores(pool))[1]:
        found.setdefault((each.store.name, each.store.tier), set()).add(each.slot)
    return found


def _row(holder: str, tier: Tier, ours: set[int], held: Sequence[dict[BlockHash, tuple[int, ...]]]) -> Row:
    counts = [sum(not ours.isdisjoint(slots) for slots in column.values()) for column in held]
    shares = [count / len(column) if column else 0.0 for count, column in zip(counts, held, strict=True)]
    return Row(holder=holder, tier=tier, shares=shares)


def draw(found: Sequence[Heatmap], file: Path) -> None:
    """Write a picture of every pool.

    Raises:
        ConfigError: matplotlib is missing, there is nothing to draw, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("--png needs matplotlib: pip install 'kvlane[plot]'") from error
    drawn = [each for each in found if each.rows]
    if not drawn:
        raise ConfigError("--png: there is nothing to draw, no live worker or no prompt")
    heights = [1.4 + min(0.22 * len(each.rows), TALLEST_INCHES) for each in drawn]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    axes = figure.subplots(len(drawn), squeeze=False, height_ratios=heights)[:, 0]
    for axis, each in zip(axes, drawn, strict=True):
        image = axis.imshow(
            [row.shares for row in each.rows],
            aspect="auto",
            interpolation="nearest",
            vmin=0,
            vmax=1,
            cmap="viridis",
            extent=(0, each.depths_blocks[-1] * each.block_size, len(each.rows) - 0.5, -0.5),
        )
        axis.set_title(f"{each.model}: share of the {each.what} of {each.num_prompts:,} prompts", loc="left")
        axis.set_xlabel("depth in the prompt, tokens")
        if 0.22 * len(each.rows) <= TALLEST_INCHES:
            axis.set_yticks(
                range(len(each.rows)), [f"{row.holder} {row.tier}" for row in each.rows], fontsize=7
            )
        else:
            axis.set_ylabel(f"{len(each.rows):,} holders, by what they hold")
        figure.colorbar(image, ax=axis, label="share held", aspect=30, pad=0.01)
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--png {file}: {error}") from error


def _view(found: Sequence[Heatmap], max_rows: int) -> Iterator[RenderableType]:
    if not found:
        yield Text("No prompt with a full block is known: the gateway has seen none lately, or gave none.")
    for each in found:
        yield _table(each, max_rows)
        if len(each.rows) > max_rows:
            left = len(each.rows) - max_rows
            yield Text(f"and {left:,} more, which hold less (--rows)")


def _table(each: Heatmap, max_rows: int) -> RenderableType:
    width = (each.depths_blocks[1]) * each.block_size
    title = (
        f"{each.model}: {each.what} of {each.num_prompts:,} prompts, a column is {width:,} tokens "
        f"({SHADES[1]} some, {SHADES[2]} a quarter, {SHADES[3]} half, {SHADES[4]} more, {SHADES[5]} all)"
    )
    rows = (
        (row.holder, row.tier, "".join(map(_shade, row.shares)), f"{_overall(row, each):.0%}")
        for row in each.rows[:max_rows]
    )
    return table(title, ["held by", "tier", "depth"], ["of all"], rows)


def _overall(row: Row, each: Heatmap) -> float:
    held = sum(part * count for part, count in zip(row.shares, each.num_blocks, strict=True))
    return held / max(sum(each.num_blocks), 1)


def _shade(share: float) -> str:
    return SHADES[1 + int(4 * share)] if share else SHADES[0]
