"""`kvlane drain`: send a worker no more requests, so that it can be stopped without anyone noticing."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer

from kvindex.commands.inspect.options import DEFAULT_REDIS, RedisUrl, index_reader, live_fleet
from kvindex.commands.one_worker import change
from kvindex.errors import ConfigError
from kvindex.worker import RegisteredWorker

POLL_S = 0.5
QUIET_S = 2.0
"""Idle for this long, a worker has nothing on its way: its load has been told, and gateways know of it."""

app = typer.Typer(add_completion=False)


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="Its name, as `kvlane inspect workers` shows it.")],
    *,
    undo: Annotated[bool, typer.Option("--undo", help="Send it requests again.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when it has no requests any more, or is gone.")
    ] = False,
    redis_url: RedisUrl = DEFAULT_REDIS,
) -> None:
    """Send a worker no more requests. Those that it has go on.

    It holds from the next request on and through restarts of the worker, until `--undo`.
    """
    if undo and wait:
        raise ConfigError("--undo and --wait exclude each other: a worker that gets requests is never idle")
    drained = asyncio.run(
        change(redis_url, worker, lambda reader, pool: reader.drain(pool, worker, is_draining=not undo))
    )
    typer.echo(f"{worker}: {_said(drained)}")
    if wait:
        asyncio.run(_wait(redis_url, worker))
        typer.echo(f"{worker}: idle")


async def _wait(redis_url: str, worker: str) -> None:
    async with index_reader(redis_url) as reader:
        idle_since_s = time.monotonic()
        while time.monotonic() - idle_since_s < QUIET_S:
            await asyncio.sleep(POLL_S)
            live = [each for _, workers in await live_fleet(reader) for each in workers]
            if any(_num_requests(each) for each in live if each.worker.worker_id == worker):
                idle_since_s = time.monotonic()


def _num_requests(each: RegisteredWorker) -> int:
    return each.load.running_requests + each.load.waiting_requests + each.charged_requests


def _said(each: RegisteredWorker) -> str:
    if not each.is_draining:
        return "gets requests"
    return f"draining, {_num_requests(each):,} requests left"
