"""The plan beside other policies on a recorded trace, in simulation, and how fast that is simulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from gateway.errors import BenchFailed
from gateway.replay.bounds import hit_rate, pooled_hits
from gateway.replay.fleets import read_engine
from gateway.replay.policies import PolicyName
from gateway.replay.readers import read_trace
from gateway.replay.run import Summary, Timed, play_timed
from gateway.replay.simulation import FleetSpec
from gateway.replay.trace import Trace
from gateway.replay.variations import VARIATIONS
from kvindex.figures import Figure

NUM_WORKERS = 8
TTFT_TARGET_MS = 2_000.0
"""Round robin's p90 TTFT at the load that all figures are taken at."""

SEARCH_STEPS = 9
SLOWEST, FASTEST = 0.05, 40.0
"""Bounds of the search, in times the trace's own rate."""


def run(trace_file: Path, *, scale: float, console: Console) -> list[Figure]:
    """Return the figures of the trace in `trace_file`.

    Args:
        scale: share of the trace that is played, from its beginning.

    Raises:
        TraceError: the file is no trace.
        BenchFailed: round robin never has the p90 TTFT that marks the load.
    """
    whole = read_trace(trace_file)
    trace = Trace(whole.name, whole.block_size, whole.requests[: max(100, int(scale * len(whole.requests)))])
    fleet = FleetSpec(engine=read_engine(None).spec(trace.block_size), num_workers=NUM_WORKERS)
    speed = _search(fleet, trace)
    at_load = _play_all(fleet, trace.at_speed(speed))
    ours, others = _split(at_load)
    console.print(f"load: {ours.requests_per_s:.2f} requests/s, {speed:.2f} times the trace's own")
    pooled = hit_rate(trace, pooled_hits(trace, fleet.num_workers * fleet.engine.num_blocks))
    figures = [
        _p90_figure("replay.p90_ttft_over_best_other", at_load, "<= 0.9"),
        Figure(
            "replay.hit_rate_over_achievable",
            ours.hit_rate / pooled if pooled else 1.0,
            "",
            ">= 0.95",
            f"best other of {pooled:.1%}, which one cache of the same size gives",
            max(each.hit_rate for each in others) / pooled if pooled else 1.0,
        ),
        _worst_figure(
            "replay.worst_ratio_60_120",
            [_play_all(fleet, trace.at_speed(speed * share)) for share in (0.6, 1.2)],
        ),
        Figure("replay.requests_per_s", at_load[PolicyName.KVLANE].simulated_per_s, "1/s", ">= 500"),
    ]
    for name, vary in VARIATIONS.items():
        varied = _play_all(fleet, vary(trace, 0).at_speed(speed))
        figures.append(_p90_figure(f"replay.p90_ttft_over_best_other_{name.replace('-', '_')}", varied))
    return figures


def _search(fleet: FleetSpec, trace: Trace) -> float:
    """Return the speed at which round robin has the TTFT that marks the load, by halving on a log scale."""
    low, high = SLOWEST, FASTEST

    def p90_ms(speed: float) -> float:
        return _play(PolicyName.ROUND_ROBIN, fleet, trace.at_speed(speed)).summary.ttft_ms.p90

    if not p90_ms(low) <= TTFT_TARGET_MS <= p90_ms(high):
        raise BenchFailed(
            f"round robin's p90 TTFT is never {TTFT_TARGET_MS / 1000:g} s on this trace between {low:g} and "
            f"{high:g} times its rate; use `kvlane replay` with rates and engines of your own"
        )
    for _ in range(SEARCH_STEPS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if p90_ms(middle) > TTFT_TARGET_MS else (middle, high)
    return math.sqrt(low * high)


def _play(policy: PolicyName, fleet: FleetSpec, trace: Trace) -> Timed:
    return play_timed(policy, fleet, trace, seed=0, ttft_target_ms=TTFT_TARGET_MS)


def _play_all(fleet: FleetSpec, trace: Trace) -> dict[PolicyName, Timed]:
    return {policy: _play(policy, fleet, trace) for policy in PolicyName}


def _split(timed: dict[PolicyName, Timed]) -> tuple[Summary, list[Summary]]:
    others = [each.summary for name, each in timed.items() if name != PolicyName.KVLANE]
    return timed[PolicyName.KVLANE].summary, others


def _p90_figure(name: str, timed: dict[PolicyName, Timed], target: str | None = None) -> Figure:
    ours, others = _split(timed)
    best = min(others, key=lambda each: each.ttft_ms.p90)
    ratio = ours.ttft_ms.p90 / best.ttft_ms.p90
    return Figure(name, ratio, "", target, f"s, p90 TTFT of {best.policy}", best.ttft_ms.p90 / 1000)


def _worst_figure(name: str, loads: Iterable[dict[PolicyName, Timed]]) -> Figure:
    quantiles: tuple[tuple[str, Callable[[Summary], float]], ...] = (
        ("p50", lambda each: each.ttft_ms.p50),
        ("p99", lambda each: each.ttft_ms.p99),
    )
    ratios = []
    for timed in loads:
        ours, others = _split(timed)
        for label, of in quantiles:
            best = min(others, key=of)
            told = f"s, {label} TTFT of {best.policy} at {best.requests_per_s:.2f}/s"
            ratios.append((of(ours) / of(best), told, of(best) / 1000))
    worst, told, best_s = max(ratios)
    return Figure(name, worst, "", "<= 1.02", told, best_s)
