"""`kvlane replay`: simulate a fleet under recorded traffic, with our routing and that of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeRemainingColumn

from gateway.replay.bounds import hit_rate, pooled_hits
from gateway.replay.fleets import read_engine
from gateway.replay.policies import PolicyName
from gateway.replay.readers import read_trace
from gateway.replay.report import Report, show
from gateway.replay.run import Summary, play, summarize
from gateway.replay.simulation import FleetSpec, Outcome
from gateway.replay.tiers import read_tiers
from gateway.replay.trace import Trace
from gateway.replay.variations import VARIATIONS, Variation
from gateway.replay.wire import read_roles, read_wire
from kvindex.errors import ConfigError

app = typer.Typer(add_completion=False, help="Simulate a fleet under recorded traffic.")


@app.command()
def replay(
    trace_file: Annotated[
        Path,
        typer.Argument(metavar="TRACE", help="Mooncake JSON lines, Azure CSV, or our own receipts."),
    ],
    *,
    policy: Annotated[
        list[PolicyName] | None, typer.Option(help="May be given several times; all without it.")
    ] = None,
    speed: Annotated[
        list[float] | None, typer.Option(help="Times the trace's own rate; several give a load curve.")
    ] = None,
    variation: Annotated[Variation | None, typer.Option(help="Change the trace first.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only so many requests.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Engines of the fleet.")] = 8,
    gateways: Annotated[int, typer.Option(min=1, help="They get the requests in turn.")] = 1,
    engine: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML that describes the engines (docs/replay.md).")
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TIER=SIZE@GB_PER_S[@MS]",
            help="What every worker has beside its cache: cpu, disk, or object, which all share.",
        ),
    ] = None,
    tier_belief: Annotated[
        float, typer.Option(min=0.01, help="How many times as fast as they are tiers are taken to be.")
    ] = 1.0,
    wire: Annotated[
        str | None,
        typer.Option(
            metavar="GB_PER_S[@MS]",
            help="How KV moves between workers: our requests may be split. Without it, all stay whole.",
        ),
    ] = None,
    roles: Annotated[
        str | None,
        typer.Option(
            metavar="prefill=N,decode=N", help="Roles of so many workers, for our routing; the rest are both."
        ),
    ] = None,
    ttft_target_ms: Annotated[float, typer.Option(min=1, help="What counts as goodput.")] = 2_000.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also write PNG plots there (kvlane[plot]).")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures there.")
    ] = None,
) -> None:
    """Simulate a fleet under recorded traffic, with our routing and that of others."""
    trace = read_trace(trace_file)
    if limit is not None:
        trace = Trace(trace.name, trace.block_size, trace.requests[:limit])
    if variation is not None:
        trace = VARIATIONS[variation](trace, seed)
    fleet = FleetSpec(
        engine=read_engine(engine).spec(trace.block_size),
        num_workers=workers,
        num_gateways=gateways,
        tiers=read_tiers(tier or ()),
        tier_belief=tier_belief,
        wire=read_wire(wire) if wire is not None else None,
        roles=read_roles(roles, workers) if roles is not None else (),
    )
    names = policy or list(PolicyName)
    speeds = speed or [1.0]
    summaries, outcomes = [], []
    columns = (
        SpinnerColumn(),
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(names) * len(speeds) * len(trace.requests))
        for each in speeds:
            faster = trace.at_speed(each)
            for name in names:
                progress.update(bar, description=f"{name} at {faster.requests_per_s:.2f}/s")
                outcome = play(name, fleet, faster, seed=seed, progress=lambda: progress.advance(bar))
                outcomes.append(outcome)
                summaries.append(summarize(name, faster, outcome, ttft_target_ms=ttft_target_ms))
    achievable = hit_rate(trace, pooled_hits(trace, workers * fleet.engine.num_blocks))
    report = Report(
        trace=trace.name,
        fleet=fleet,
        seed=seed,
        ttft_target_ms=ttft_target_ms,
        pooled_hit_rate=achievable,
        summaries=tuple(summaries),
    )
    show(Console(), report)
    if plots is not None:
        _draw(plots, summaries, outcomes)
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def _draw(folder: Path, summaries: list[Summary], outcomes: list[Outcome]) -> None:
    from gateway.replay.plots import draw

    try:
        draw(folder, summaries, outcomes)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--plots needs: pip install 'kvlane[plot]' (no module named {error.name})"
        ) from error
    except OSError as error:
        raise ConfigError(f"--plots {folder}: {error}") from error
