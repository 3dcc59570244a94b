"""What splitting requests does to first tokens and to running answers, in simulation, and where it begins.

Three fleets of the same workers play the same traffic: one that moves no KV, one in which every worker does
both and requests may be split, and one with two workers for prompts alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from gateway.replay.fleets import EngineFile
from gateway.replay.mixes import Mix
from gateway.replay.policies import PolicyName
from gateway.replay.readers import read_trace
from gateway.replay.run import Summary, play, summarize
from gateway.replay.simulation import FleetSpec
from gateway.replay.trace import Trace
from gateway.replay.wire import WireSpec
from kvindex.figures import Figure
from kvindex.worker import Role

NUM_WORKERS = 8
NUM_PREFILL_WORKERS = 2

SPEEDS = (0.5, 1.0, 2.0, 3.0)
"""Times the trace's own rate."""

LOADS = (0.25, 0.5, 1.0, 1.5)
"""Times the mix's rate."""

LONG_SHARES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)
WIRES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

BEGINS_AT = 0.01
"""Share of requests that is more than chance."""


def run(
    trace_file: Path | None,
    *,
    engine: EngineFile,
    wire: WireSpec,
    mix: Mix,
    scale: float,
    console: Console,
) -> list[Figure]:
    """Return the figures of the mix, and of the trace in `trace_file` if there is one.

    Args:
        mix: at the load that is called 1; its share of long prompts, its rate and the wire are varied.
        scale: share of the requests that are played, from the beginning.

    Raises:
        TraceError: the file is no trace, or a request does not fit a worker.
    """
    mix = dataclasses.replace(mix, num_requests=max(100, int(scale * mix.num_requests)))
    bench = _Bench(engine, wire, console)
    figures: list[Figure] = []
    for load in LOADS:
        faster = dataclasses.replace(mix, requests_per_s=load * mix.requests_per_s)
        figures += bench.compare(f"mix_{load:g}", faster.trace(0))
    if trace_file is not None:
        whole = read_trace(trace_file)
        count = max(100, int(scale * len(whole.requests)))
        trace = Trace(whole.name, whole.block_size, whole.requests[:count])
        for speed in SPEEDS:
            figures += bench.compare(f"trace_{speed:g}", trace.at_speed(speed))
    figures += bench.worst()
    figures += bench.begins(
        "load",
        LOADS,
        "times the mix's rate",
        lambda load: dataclasses.replace(mix, requests_per_s=load * mix.requests_per_s),
    )
    figures += bench.begins(
        "long_share", LONG_SHARES, "", lambda share: dataclasses.replace(mix, long_share=share)
    )
    figures += bench.begins("gb_per_s", WIRES, "GB/s", lambda _: mix, lambda gb_per_s: gb_per_s)
    return figures


class _Bench:
    def __init__(self, engine: EngineFile, wire: WireSpec, console: Console) -> None:
        self._engine = engine
        self._wire = wire
        self._console = console
        self._ratios: list[tuple[float, float]] = []
        """Of TTFT and ITL, each the mean of a run over that without splits."""

    def compare(self, case: str, trace: Trace) -> Iterator[Figure]:
        """Yield what splits change in one trace."""
        whole = self._play(trace, None)
        for name, num_prefill in (("both", 0), ("roles", NUM_PREFILL_WORKERS)):
            split = self._play(trace, self._wire, num_prefill)
            self._console.print(f"{case}, {name}: {split.num_split} of {len(trace.requests)} split")
            ratios = split.ttft_ms.mean / whole.ttft_ms.mean, split.itl_ms.mean / whole.itl_ms.mean
            if not num_prefill:
                self._ratios.append(ratios)
            for figure, ratio, of in (
                ("ttft", ratios[0], whole.ttft_ms.mean),
                ("ttft_p99", split.ttft_ms.p99 / whole.ttft_ms.p99, whole.ttft_ms.p99),
                ("itl", ratios[1], whole.itl_ms.mean),
                ("itl_p99", split.itl_ms.p99 / whole.itl_ms.p99, whole.itl_ms.p99),
                ("e2e", split.e2e_ms.mean / whole.e2e_ms.mean, whole.e2e_ms.mean),
            ):
                yield Figure(f"split.{figure}_{name}_{case}", ratio, "", None, "ms, whole", of)
            yield Figure(f"split.share_{name}_{case}", split.num_split / len(trace.requests), "")

    def worst(self) -> Iterator[Figure]:
        """Yield the worst means over all that was compared, of fleets in which all workers do both."""
        ttft, itl = (max(each) for each in zip(*self._ratios, strict=True))
        yield Figure("split.worst_ttft_over_whole", ttft, "", "<= 1.03")
        yield Figure("split.worst_itl_over_whole", itl, "", "<= 1.03")

    def begins(
        self,
        what: str,
        values: Sequence[float],
        unit: str,
        mix_of: Callable[[float], Mix],
        gb_per_s_of: Callable[[float], float] | None = None,
    ) -> Iterator[Figure]:
        """Yield the share of split requests at each value, with prefill workers, and where it leaves zero."""
        found: float | None = None
        for value in values:
            wire = self._wire
            if gb_per_s_of is not None:
                wire = WireSpec(gb_per_s_of(value), wire.latency_ms)
            trace = mix_of(value).trace(0)
            share = self._play(trace, wire, NUM_PREFILL_WORKERS).num_split / len(trace.requests)
            yield Figure(f"split.share_at_{what}_{value:g}", share, "")
            if found is None and share >= BEGINS_AT:
                found = value
        if found is not None:
            yield Figure(f"split.begins_at_{what}", found, unit)

    def _play(self, trace: Trace, wire: WireSpec | None, num_prefill: int = 0) -> Summary:
        roles: Iterable[Role] = (Role.PREFILL,) * num_prefill + (Role.BOTH,) * (NUM_WORKERS - num_prefill)
        fleet = FleetSpec(
            engine=self._engine.spec(trace.block_size),
            num_workers=NUM_WORKERS,
            wire=wire,
            roles=tuple(roles),
        )
        outcome = play(PolicyName.KVLANE, fleet, trace, seed=0)
        return summarize(PolicyName.KVLANE, trace, outcome, ttft_target_ms=2_000.0)
