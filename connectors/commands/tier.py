"""`kvlane tier`: keep the tiers of a node: CPU memory, disk and S3 behind its engines."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.progress import Progress

from connectors.tiers import checks, node
from connectors.tiers.spec import DEFAULT_PORT, JoinedTiers, parse_tiers
from connectors.tiers.warm import read_prompts, warm
from kvindex.config import TierAgentConfig, connector_config
from kvindex.errors import ConfigError
from kvindex.tiers.agent import TierAgent
from kvindex.tiers.server import clear_memory, describe_server, empty_place
from kvindex.worker import Tier

CLEAR_TIMEOUT_S = 300.0
MOST_FAILURES = 10

RedisUrl = Annotated[
    str | None, typer.Option(envvar="KVLANE_REDIS_URL", help="The Redis that holds the index.")
]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Keep the tiers of a node: CPU memory, disk and S3 behind its engines.",
)


@app.callback()
def tier() -> None:
    """Keep the tiers of a node: CPU memory, disk and S3 behind its engines."""


@app.command()
def serve(
    tiers: Annotated[
        str, typer.Argument(help="cpu=SIZE, disk=PATH:SIZE, s3=s3://BUCKET/PREFIX, chunk=TOKENS, port=PORT.")
    ],
    lmcache_arguments: Annotated[
        list[str] | None, typer.Argument(help="More arguments of `lmcache server`, after --.")
    ] = None,
    *,
    linger: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="End when no engine has used the tiers for so long. Default: never.",
        ),
    ] = None,
    redis_url: RedisUrl = None,
) -> None:
    """Keep a node's LMCache server running; `kvlane serve --tiers` starts this where it is not.

    The server is started again when it dies; disk and S3 keep what they have. What it holds is in the index
    that Redis has. Ctrl-C ends it.
    """
    spec = parse_tiers(tiers)
    if isinstance(spec, JoinedTiers):
        raise ConfigError("kvlane tier serve: lmcache=HOST:PORT is a server that is there already")
    checks.check_lmcache()
    checks.check_tiers(spec, has_gpu=node.has_gpu())
    stopping = _stopped_by_signals()
    with _agent(redis_url) as told:
        node.TierKeeper(spec, lmcache_arguments or (), told.url, linger).run(stopping)


@app.command()
def agent(
    *,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where LMCache servers report.")] = 9300,
    host: Annotated[str, typer.Option(help="Address that it listens on.")] = "127.0.0.1",
    redis_url: RedisUrl = None,
) -> None:
    """Bring what LMCache servers hold into the index, for servers that somebody else runs.

    Start them with --coordinator-url http://HOST:PORT --coordinator-event-reporting. `kvlane tier serve`
    needs no other agent than its own.
    """
    stopping = _stopped_by_signals()
    with _agent(redis_url, tier_agent_host=host, tier_agent_port=port):
        stopping.wait()


@app.command()
def clear(
    tiers: Annotated[list[Tier], typer.Argument(help="Which tiers: cpu, disk, object.")],
    *,
    server: Annotated[
        str, typer.Option(help="HTTP API of the LMCache server: one port above the engines'.")
    ] = f"http://127.0.0.1:{DEFAULT_PORT + 1}",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete what a node's tiers hold. What is in a bucket is gone for every node.

    Memory keeps what is being read or written.
    """
    with httpx.Client(timeout=CLEAR_TIMEOUT_S) as client:
        described = describe_server(client, server)
        places = [place for place in (described.memory, *described.places) if place.tier in tiers]
        if missing := set(tiers) - {place.tier for place in places}:
            raise ConfigError(f"the server at {server} has no {' and no '.join(sorted(missing))} tier")
        names = ", ".join(place.name for place in places)
        if not yes:
            typer.confirm(f"Delete everything in {names}?", abort=True)
        for place in places:
            if place is described.memory:
                clear_memory(client, server)
                typer.echo(f"{place.name}: cleared")
            else:
                typer.echo(f"{place.name}: {empty_place(client, server, place)} objects deleted")


@app.command("warm")
def warm_up(
    prompts: Annotated[
        Path,
        typer.Argument(help="A JSON body of /v1/chat/completions or /v1/completions a line.", metavar="FILE"),
    ],
    *,
    url: Annotated[str, typer.Option(help="The gateway's Envoy, or an engine.")] = "http://127.0.0.1:10000",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    api_key: Annotated[
        str | None, typer.Option(envvar="KVLANE_API_KEY", help="Key of the tenant whose prompts they are.")
    ] = None,
) -> None:
    """Have prompts computed, so that the tiers hold them before anybody asks.

    One token of each is answered. Engines with tiers store what they compute in all of them.
    """
    requests = read_prompts(prompts)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("prompts", total=len(requests))
        sending = warm(
            requests, url, concurrency=concurrency, api_key=api_key, on_done=lambda: progress.advance(bar)
        )
        outcome = asyncio.run(sending)
    typer.echo(
        f"{outcome.num_done} of {len(requests)} prompts, {outcome.num_tokens} tokens, "
        f"{outcome.num_cached_tokens} of them from caches"
    )
    for failure in outcome.failures[:MOST_FAILURES]:
        typer.echo(failure, err=True)
    if outcome.failures:
        raise typer.Exit(1)


def _stopped_by_signals() -> threading.Event:
    stopping = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        stopping.set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    return stopping


@contextmanager
def _agent(redis_url: str | None, **settings: str | int) -> Iterator[TierAgent]:
    """Run the coordinator that LMCache servers report to until the block ends."""
    given = settings | ({"redis_url": redis_url} if redis_url else {})
    config = connector_config(TierAgentConfig, {f"kvlane.{name}": value for name, value in given.items()})
    agent = TierAgent(config)
    agent.start()
    try:
        yield agent
    finally:
        agent.stop()
