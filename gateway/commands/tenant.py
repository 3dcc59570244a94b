"""`kvlane tenant`: make API keys, and check the file of tenants before gateways read it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gateway.tenants.keys import hash_key, new_key
from gateway.tenants.roster import load_roster
from kvindex.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Make API keys, and check the file of tenants before gateways read it.",
)


@app.command()
def key(
    note: Annotated[str, typer.Option(help="Whose key it is, for whoever reads the file.")] = "",
) -> None:
    """Print a new key, which is kept nowhere, and the line for the file of tenants."""
    made = new_key()
    typer.echo("Give this to the client; it is not shown again:", err=True)
    typer.echo(made)
    typer.echo("Write this under the tenant's `keys:`", err=True)
    typer.echo(_line(made, note))


@app.command("hash")
def hash_given(
    note: Annotated[str, typer.Option(help="Whose key it is, for whoever reads the file.")] = "",
) -> None:
    """Print the line for a key that is read from standard input, so that no list of processes shows it."""
    given = sys.stdin.readline().strip()
    if not given:
        raise ConfigError("no key on standard input")
    typer.echo(_line(given, note))


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="The file that gateways are given as --tenants.")],
) -> None:
    """Show what a file of tenants says, or in one line what is wrong with it (exit code 2)."""
    columns = ("tenant", "keys", "requests/s", "prompt tokens/s", "at a time", "weight", "TTFT ms")
    table = Table(*columns)
    for tenant in load_roster(file).tenants.values():
        limits = (tenant.requests_per_s, tenant.prompt_tokens_per_s, tenant.max_concurrent)
        values = (*limits, tenant.weight, tenant.ttft_target_ms)
        shown = ["-" if value is None else f"{value:g}" for value in values]
        table.add_row(tenant.name, str(len(tenant.keys)), *shown)
    Console().print(table)


def _line(key: str, note: str) -> str:
    return f"- sha256: {hash_key(key)}" + (f"  # {note}" if note else "")
