"""`kvlane role`: say what a worker is asked to do, from the next request on."""

from __future__ import annotations

import asyncio
import enum
from typing import Annotated

import typer

from kvindex.commands.inspect.options import DEFAULT_REDIS, RedisUrl, index_reader, live_fleet
from kvindex.errors import ConfigError
from kvindex.worker import Role


class GivenRole(enum.StrEnum):
    """A role, or the one that the worker starts with."""

    PREFILL = Role.PREFILL
    DECODE = Role.DECODE
    BOTH = Role.BOTH
    OWN = "own"


app = typer.Typer(add_completion=False)


@app.command()
def role(
    worker: Annotated[str, typer.Argument(help="Its name, as `kvlane inspect workers` shows it.")],
    given: Annotated[
        GivenRole, typer.Argument(metavar="ROLE", help="prefill, decode, both, or own: as it was started.")
    ],
    redis_url: RedisUrl = DEFAULT_REDIS,
) -> None:
    """Say what a worker is asked to do.

    It holds from the next request on and through restarts of the worker. Every worker is able to do
    both: a role is where the gateway sends which half of a request.
    """
    wanted = None if given is GivenRole.OWN else Role(given)
    live = asyncio.run(_give(redis_url, worker, wanted))
    if worker not in live:
        known = ", ".join(live) or "none"
        raise ConfigError(f"no live worker is called {worker}; live are: {known}")
    typer.echo(f"{worker}: {live[worker]}")


async def _give(redis_url: str, worker: str, wanted: Role | None) -> dict[str, Role]:
    """Give the role; return the live workers' roles after that, by name."""
    async with index_reader(redis_url) as reader:
        for pool, workers in await live_fleet(reader):
            if any(each.worker.worker_id == worker for each in workers):
                await reader.give_role(pool, worker, wanted)
        live = [each for _, workers in await live_fleet(reader) for each in workers]
    return {each.worker.worker_id: each.role for each in live}
