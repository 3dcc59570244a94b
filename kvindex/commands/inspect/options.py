"""What the subcommands of `kvlane inspect` share: options, the way to the index, two forms of output."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import msgspec
import typer
from rich.console import Console, RenderableType

from kvindex.blocks import Pool
from kvindex.config import index_config
from kvindex.index import IndexReader
from kvindex.redis_index import RedisIndexReader
from kvindex.worker import RegisteredWorker

RedisUrl = Annotated[
    str,
    typer.Option(envvar="KVLANE_REDIS_URL", help="Redis that holds the index: redis://, rediss://, unix://."),
]
AdminUrl = Annotated[str, typer.Option("--admin", envvar="KVLANE_ADMIN_URL", help="Admin API of a gateway.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

DEFAULT_REDIS = "redis://127.0.0.1:6379/0"
DEFAULT_ADMIN = "http://127.0.0.1:9003"


@asynccontextmanager
async def index_reader(redis_url: str) -> AsyncIterator[RedisIndexReader]:
    """Read the index for as long as the block runs."""
    reader = RedisIndexReader(index_config(redis_url))
    try:
        yield reader
    finally:
        await reader.close()


async def live_fleet(reader: IndexReader) -> list[tuple[Pool, list[RegisteredWorker]]]:
    """Return every pool with its live workers."""
    pools = sorted(await reader.pools(), key=lambda pool: (pool.model, pool.block_size))
    return [(pool, (await reader.workers(pool))[1]) for pool in pools]


def show(found: object, view: RenderableType, *, as_json: bool) -> None:
    """Print what was found."""
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        Console().print(view)
