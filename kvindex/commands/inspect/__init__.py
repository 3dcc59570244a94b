"""`kvlane inspect`: show what the fleet and its index hold, and why a request went where it went."""

from __future__ import annotations

import typer

from kvindex.commands.inspect import (
    decisions,
    diff,
    drift,
    events,
    fleet,
    heatmap,
    memory,
    rates,
    stores,
    top,
)

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Show what the fleet and its index hold, and why."
)

for command in (
    top.top,
    fleet.workers,
    fleet.pools,
    stores.stores,
    fleet.block,
    rates.rates,
    decisions.prefix,
    decisions.receipts,
    decisions.decision,
    decisions.why,
    heatmap.heatmap,
    diff.diff,
    drift.drift,
    memory.memory,
    events.events,
):
    app.command()(command)
