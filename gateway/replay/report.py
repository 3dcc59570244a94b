"""What a replay hands out: figures as a table and as JSON."""

from __future__ import annotations

from itertools import groupby

import msgspec
from rich.console import Console
from rich.table import Table

from gateway.replay.run import Summary
from gateway.replay.simulation import FleetSpec


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One call of `kvlane replay`."""

    trace: str
    fleet: FleetSpec
    seed: int
    ttft_target_ms: float
    pooled_hit_rate: float
    """With all workers' caches as one: no placement has more."""
    summaries: tuple[Summary, ...]
    """Of every policy at every rate, by rate."""


def show(console: Console, report: Report) -> None:
    """Print two tables for each rate: seconds, shares and the busiest worker over the mean; times between
    tokens, and what was split."""
    for rate, group in groupby(report.summaries, lambda each: each.requests_per_s):
        summaries = list(group)
        table = Table(
            title=f"{report.trace}: {report.fleet.num_workers} workers, {rate:.2f} requests/s; one cache of "
            f"the same size would give a hit rate of {report.pooled_hit_rate:.1%}",
            title_justify="left",
        )
        table.add_column("policy", no_wrap=True)
        loaded = ("loaded",) if report.fleet.tiers else ()
        for column in ("TTFT p50", "p90", "p99", "E2E p50", "p99", "hits", *loaded, "in time", "spread"):
            table.add_column(column, justify="right")
        for each in summaries:
            table.add_row(
                each.policy,
                *_seconds(each.ttft_ms.p50, each.ttft_ms.p90, each.ttft_ms.p99),
                *_seconds(each.e2e_ms.p50, each.e2e_ms.p99),
                f"{each.hit_rate:.1%}",
                *(f"{each.loaded_rate:.1%}" for _ in loaded),
                f"{each.goodput_per_s:.2f}/s",
                f"{each.busiest_over_mean:.2f}",
            )
        console.print(table)
        console.print(_between_tokens(report, summaries))


def _between_tokens(report: Report, summaries: list[Summary]) -> Table:
    table = Table(title="Time between tokens (ms), and what was split", title_justify="left")
    table.add_column("policy", no_wrap=True)
    split = ("split", "moved", "overlap") if report.fleet.wire else ()
    for column in ("mean", "p50", "p90", "p99", *split):
        table.add_column(column, justify="right")
    for each in summaries:
        itl = each.itl_ms
        moved = (
            str(each.num_split),
            f"{each.transferred_bytes / 1e9:.0f} GB",
            f"{each.transfer_overlap:.0%}",
        )
        times = (f"{value:.1f}" for value in (itl.mean, itl.p50, itl.p90, itl.p99))
        table.add_row(each.policy, *times, *(moved if split else ()))
    return table


def _seconds(*times_ms: float) -> list[str]:
    return [f"{each / 1000:.2f}" for each in times_ms]
