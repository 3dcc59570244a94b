"""`kvlane drain`: send a worker no more requests, so that it can be stopped without anyone noticing."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer

from kvindex.commands.inspect.options import DEFAULT_REDIS, RedisUrl, index_reader, live_fleet
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
    live = asyncio.run(_drain(redis_url, worker, is_draining=not undo))
    if worker not in live:
        known = ", ".join(live) or "none"
        raise ConfigError(f"no live worker is called {worker}; live are: {known}")
    typer.echo(f"{worker}: {_said(live[worker])}")
    if wait:
        asyncio.run(_wait(redis_url, worker))
        typer.echo(f"{worker}: idle")


async def _drain(redis_url: str, worker: str, *, is_draining: bool) -> dict[str, RegisteredWorker]:
    """Change the worker; return the live workers after that, by name."""
    async with index_reader(redis_url) as reader:
        for pool, workers in await live_fleet(reader):
            if any(each.worker.worker_id == worker for each in workers):
                await reader.drain(pool, worker, is_draining=is_draining)
        return {each.worker.worker_id: each for _, workers in await live_fleet(reader) for each in workers}


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
