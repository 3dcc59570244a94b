"""`kvlane doctor`: say what keeps a fleet from its hit rate, what it costs, and what cures it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateway.config import load_config
from gateway.doctor.examination import examine
from gateway.doctor.finding import Finding, Level, count
from kvindex.errors import ConfigError

app = typer.Typer(
    add_completion=False,
    help="Say what keeps a fleet from its hit rate, what it costs, and what cures it.",
)

_COLOURS = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}


@app.command()
def doctor(
    *,
    config: Annotated[
        Path | None,
        typer.Option(help="The gateway's own --config, for tokenizers and keys; not needed else."),
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(help="The Redis that holds the index. Environment: KVLANE_REDIS_URL.")
    ] = None,
    admin: Annotated[
        str,
        typer.Option(envvar="KVLANE_ADMIN_URL", help="Admin API of a gateway, whose verdicts are shown too."),
    ] = "http://127.0.0.1:9003",
    replay: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORKER=URL",
            help="Replay endpoint of a worker's engine, IP:PORT=tcp://HOST:PORT; may be given several times.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Examine Redis, gateway and every worker, which gets a probe request of a few blocks.

    Exit code 0 if there is no problem, 1 otherwise; warnings do not count.
    """
    settings = load_config(config, redis_url=redis_url)
    examination = examine(settings, admin=admin, replays=dict(map(_pair, replay or ())))
    with Console(stderr=True).status("looking at Redis, gateway and workers"):
        findings = asyncio.run(examination)
    num_problems, num_warnings = count(findings, Level.PROBLEM), count(findings, Level.WARNING)
    if as_json:
        report = {"num_problems": num_problems, "num_warnings": num_warnings, "findings": findings}
        typer.echo(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        console = Console()
        console.print(_table(findings))
        console.print(f"{num_problems} problems, {num_warnings} warnings, the rest is well", highlight=False)
    raise typer.Exit(int(num_problems > 0))


def _pair(given: str) -> tuple[str, str]:
    worker, _, url = given.partition("=")
    if not worker or not url.startswith(("tcp://", "ipc://")):
        raise ConfigError(f"--replay {given}: give WORKER=URL, such as 10.0.0.1:8000=tcp://10.0.0.1:5558")
    return worker, url


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(show_lines=True, title="doctor", title_justify="left")
    table.add_column("")
    table.add_column("looked at", overflow="fold")
    table.add_column("found", overflow="fold")
    for finding in findings:
        table.add_row(
            Text(finding.level, style=_COLOURS[finding.level]),
            Text(finding.subject),
            Text("\n").join(_lines(finding)),
        )
    return table


def _lines(finding: Finding) -> Iterator[Text]:
    yield Text(finding.what)
    for label, said in (("costs", finding.cost), ("cure", finding.cure)):
        if said:
            yield Text.assemble((f"{label}: ", "bold"), said)
