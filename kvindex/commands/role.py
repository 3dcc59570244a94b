"""`kvlane role`: say what a worker is asked to do, from the next request on."""

from __future__ import annotations

import asyncio
import enum
from typing import Annotated

import typer

from kvindex.commands.inspect.options import DEFAULT_REDIS, RedisUrl
from kvindex.commands.one_worker import change
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
    given_to = asyncio.run(
        change(redis_url, worker, lambda reader, pool: reader.give_role(pool, worker, wanted))
    )
    typer.echo(f"{worker}: {given_to.role}")
