"""`kvlane inspect top`: the fleet as it works."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from kvindex.blocks import format_hash
from kvindex.commands.inspect.admin_api import ask, read_chains
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
from kvindex.commands.inspect.prefixes import hottest
from kvindex.commands.inspect.tables import HOW_TO_JOIN, inline, local_time, share, table
from kvindex.errors import AdminUnavailable, IndexUnavailable
from kvindex.index import IndexReader
from kvindex.worker import RegisteredWorker, Role, Tier

TRAFFIC_S = 60
PROMPTS = 200
"""Latest prompts in which hot prefixes are looked for."""

HOT_PREFIXES = 10


class Traffic(msgspec.Struct, frozen=True):
    """Requests that a gateway decided about, and how much of them was held where they went."""

    requests: int
    prompt_tokens: int
    matched_tokens: int


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """A worker at this moment."""

    worker: str
    model: str
    role: Role
    tier: Tier
    num_indexed_blocks: int
    num_blocks: int
    kv_usage: float
    running_requests: int
    waiting_requests: int
    backlog_tokens: int
    traffic: Traffic | None
    """None without a gateway."""


class HotPrefix(msgspec.Struct, frozen=True, kw_only=True):
    """Leading blocks that several of the latest prompts share."""

    model: str
    block: str
    depth_blocks: int
    num_prompts: int
    num_holders: int


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """Everything at one moment."""

    at: float
    workers: list[WorkerRow]
    traffic: Traffic | None
    traffic_s: float | None
    """What the figures of traffic cover: the last minute, or less if receipts do not go back so far."""
    prefixes: list[HotPrefix]
    missing: str | None
    """What is not shown, and why."""


def top(
    *,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and stop.")] = False,
    interval_s: Annotated[float, typer.Option("--interval", min=0.2, help="Seconds between frames.")] = 2.0,
    rows: Annotated[int, typer.Option(min=1, help="Most workers shown, the busiest first.")] = 20,
    redis_url: RedisUrl = DEFAULT_REDIS,
    admin: AdminUrl = DEFAULT_ADMIN,
    as_json: AsJson = False,
) -> None:
    """Watch workers, load, hit rates and the hottest prefixes; with --json, one frame with every worker.

    Hit rates and prefixes come from one gateway's memory of its latest requests. Without a gateway the rest
    is shown.
    """
    if once or as_json:
        frame = asyncio.run(_read_once(redis_url, admin))
        show(frame, Group(*_view(frame, rows)), as_json=as_json)
        return
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_watch(redis_url, admin, interval_s, rows))


async def _read_once(redis_url: str, admin: str) -> Frame:
    async with index_reader(redis_url) as reader:
        return await read_frame(reader, admin)


async def _watch(redis_url: str, admin: str, interval_s: float, rows: int) -> None:
    async with index_reader(redis_url) as reader:
        with Live(Text("reading ..."), auto_refresh=False, screen=True) as live:
            while True:
                try:
                    shown: RenderableType = Group(*_view(await read_frame(reader, admin), rows))
                except IndexUnavailable as error:
                    shown = Text(f"{local_time(time.time())}  {error}; trying again", style="red")
                live.update(shown, refresh=True)
                await asyncio.sleep(interval_s)


async def read_frame(reader: IndexReader, admin: str) -> Frame:
    """Return the state of this moment.

    Raises:
        IndexUnavailable: Redis does not answer.
    """
    fleet = await live_fleet(reader)
    traffic: dict[str, Any] | None = None
    prompts: list[dict[str, Any]] = []
    missing = None
    try:
        traffic = await asyncio.to_thread(ask, admin, "GET", f"/traffic?seconds={TRAFFIC_S}")
        prompts = await asyncio.to_thread(ask, admin, "GET", f"/prompts?limit={PROMPTS}")
    except AdminUnavailable as error:
        missing = f"no hit rates and no prefixes: {error}"
    by_worker = traffic["workers"] if traffic else {}
    return Frame(
        at=time.time(),
        workers=[
            _row(
                each, by_worker.get(each.worker.worker_id) if traffic else None, is_known=traffic is not None
            )
            for _, workers in fleet
            for each in workers
        ],
        traffic=msgspec.convert(traffic["total"], Traffic) if traffic else None,
        traffic_s=traffic["covered_s"] if traffic else None,
        prefixes=await _hot_prefixes(reader, prompts),
        missing=missing,
    )


def _row(each: RegisteredWorker, counted: dict[str, int] | None, *, is_known: bool) -> WorkerRow:
    return WorkerRow(
        worker=each.worker.worker_id,
        model=each.worker.model,
        role=each.worker.role,
        tier=Tier.DEVICE,
        num_indexed_blocks=each.num_indexed_blocks,
        num_blocks=each.worker.num_blocks,
        kv_usage=each.load.kv_usage,
        running_requests=each.load.running_requests,
        waiting_requests=each.load.waiting_requests + each.charged_requests,
        backlog_tokens=each.load.waiting_prefill_tokens + each.charged_tokens,
        traffic=(msgspec.convert(counted, Traffic) if counted else Traffic(0, 0, 0)) if is_known else None,
    )


async def _hot_prefixes(reader: IndexReader, prompts: Sequence[dict[str, Any]]) -> list[HotPrefix]:
    pools = {pool.pool_id: pool for pool in await reader.pools()}
    chains = [chain for prompt in prompts for chain in read_chains(prompt)]
    found = []
    for each in hottest(chains, HOT_PREFIXES):
        if (pool := pools.get(each.pool_id)) is not None:
            holders = await reader.holders_of(pool, [each.block])
            found.append(
                HotPrefix(
                    model=pool.model,
                    block=format_hash(each.block),
                    depth_blocks=each.depth_blocks,
                    num_prompts=each.num_prompts,
                    num_holders=len(holders[each.block]),
                )
            )
    return found


def _view(frame: Frame, rows: int) -> Iterator[RenderableType]:
    yield Text(f"{local_time(frame.at)}  {_summary(frame)}")
    if not frame.workers:
        yield Text(f"No worker is live. {HOW_TO_JOIN}")
    else:
        busiest = sorted(frame.workers, key=_busy)[:rows]
        columns = [
            "blocks indexed",
            "KV in use",
            "running",
            "waiting",
            "backlog tokens",
            "requests",
            "hit rate",
        ]
        yield table("", ["worker", "model", "role", "tier"], columns, map(_cells, busiest))
        if left := len(frame.workers) - len(busiest):
            yield Text(f"and {left:,} workers more (--rows)")
    if frame.prefixes:
        yield table(
            f"prefixes that most of the latest {PROMPTS} prompts share",
            ["block", "model"],
            ["prompts", "blocks deep", "held by"],
            (
                (
                    each.block,
                    each.model,
                    inline(each.num_prompts),
                    inline(each.depth_blocks),
                    inline(each.num_holders),
                )
                for each in frame.prefixes
            ),
        )
    if frame.missing:
        yield Text(frame.missing, style="yellow")


def _summary(frame: Frame) -> str:
    workers = frame.workers
    parts = [
        f"{len(workers):,} workers",
        f"{sum(each.running_requests for each in workers):,} running",
        f"{sum(each.waiting_requests for each in workers):,} waiting",
        f"{sum(each.num_indexed_blocks for each in workers):,} blocks",
    ]
    if frame.traffic is not None:
        rate = share(frame.traffic.matched_tokens, frame.traffic.prompt_tokens)
        parts.append(f"{frame.traffic.requests:,} requests in {frame.traffic_s:.0f} s, hit rate {rate}")
    return ", ".join(parts)


def _busy(row: WorkerRow) -> tuple[int, int, float, str]:
    return -row.backlog_tokens, -row.running_requests - row.waiting_requests, -row.kv_usage, row.worker


def _cells(row: WorkerRow) -> tuple[str, ...]:
    traffic = row.traffic
    return (
        row.worker,
        row.model,
        row.role,
        row.tier,
        f"{row.num_indexed_blocks:,} of {row.num_blocks:,}",
        f"{row.kv_usage:.0%}",
        inline(row.running_requests),
        inline(row.waiting_requests),
        inline(row.backlog_tokens),
        inline(traffic.requests) if traffic else "?",
        share(traffic.matched_tokens, traffic.prompt_tokens) if traffic else "?",
    )
