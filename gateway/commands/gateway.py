"""`kvlane gateway`: decide where each request goes, beside Envoy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import uvloop

from gateway.config import load_config
from gateway.server import run

app = typer.Typer(add_completion=False, help="Decide where each request goes, beside Envoy.")


@app.command()
def gateway(
    *,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of the settings; KVLANE_* variables override it.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="ext_proc, EDS and access log, for Envoy.")
    ] = None,
    admin_listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Health, metrics, fleet and receipts.")
    ] = None,
    redis_url: Annotated[str | None, typer.Option(help="The Redis that holds the index.")] = None,
    tenants: Annotated[
        Path | None,
        typer.Option(help="YAML file of tenants with their keys and limits; see `kvlane tenant`."),
    ] = None,
) -> None:
    """Decide where each request goes, beside Envoy."""
    options = {"listen": listen, "admin_listen": admin_listen, "redis_url": redis_url, "tenants": tenants}
    uvloop.run(run(load_config(config, **options)))
