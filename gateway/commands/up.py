"""`kvlane up`: run a whole fleet on this machine: Redis, engines, gateway and Envoy."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from gateway.commands.envoy import DEFAULTS, check_free
from gateway.local_fleet import FleetOptions, LocalFleet, local_fleet, serve_command

app = typer.Typer(
    add_completion=False, help="Run a whole fleet on this machine: Redis, engines, gateway and Envoy."
)

_CHECK_INTERVAL_S = 0.5


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def up(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model name or directory, as `vllm serve` takes it.")],
    workers: Annotated[int, typer.Option(min=1, help="Number of engines.")] = 2,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where clients connect.")
    ] = DEFAULTS.listen,
    logs: Annotated[Path, typer.Option(help="Directory of the parts' output.")] = Path(".kvlane/logs"),
) -> None:
    """Run a whole fleet on this machine: Redis, engines, gateway and Envoy. Ctrl-C ends it.

    Every argument that is not listed below goes to each `vllm serve` unchanged, and so does the
    environment. What shall differ between engines, such as the GPU, is not for this command.
    """
    check_free(listen, "--listen")
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    options = FleetOptions(engine=serve_command(model, *context.args), num_workers=workers, listen=listen)
    with local_fleet(options, logs) as fleet:
        with console.status(f"starting; logs in {logs}"):
            fleet.wait_until_ready(lambda line: console.print(f"  [green]ready[/] {line}"))
        _show(fleet, logs, console)
        while True:
            fleet.processes.check()
            time.sleep(_CHECK_INTERVAL_S)


def _show(fleet: LocalFleet, logs: Path, console: Console) -> None:
    console.print(f"\nOpenAI API  [bold]{fleet.url}/v1[/]")
    console.print(f"admin       {fleet.admin_url}")
    console.print(f"Redis       {fleet.redis_url}")
    console.print(f"logs        {logs}")
    console.print(f"\nLook inside with: kvlane inspect workers --redis-url {fleet.redis_url}")
    console.print("Ctrl-C ends everything.")


def _end(signum: int, _frame: FrameType | None) -> NoReturn:
    """Unwind, once: a second Ctrl-C must not interrupt the clearing up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise SystemExit(128 + signum)
