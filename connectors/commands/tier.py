"""`kvlane tier`: keep the tiers of a node: CPU memory, disk and S3 behind its engines."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from connectors.tiers import checks, node
from connectors.tiers.spec import JoinedTiers, parse_tiers
from kvindex.config import TierAgentConfig, connector_config
from kvindex.errors import ConfigError
from kvindex.tiers.agent import TierAgent

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
