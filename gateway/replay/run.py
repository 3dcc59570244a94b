"""One policy, one fleet, one trace: put together, played, summed up."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable

import msgspec

from gateway.replay.engine import GAP_MS
from gateway.replay.fleets import check_fits
from gateway.replay.knowledge import Told
from gateway.replay.kvlane import Kvlane, SimulatedIndex
from gateway.replay.policies import OTHERS, PolicyName
from gateway.replay.simulation import FleetSpec, Outcome, Policy, Simulation, Surroundings
from gateway.replay.trace import Trace


class Quantiles(msgspec.Struct, frozen=True):
    """Of a duration, in ms."""

    mean: float
    p50: float
    p90: float
    p99: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What one policy made of a trace."""

    policy: PolicyName
    requests_per_s: float
    """Of the trace."""
    ttft_ms: Quantiles
    e2e_ms: Quantiles
    itl_ms: Quantiles
    """Between two tokens of an answer, over all tokens."""
    hit_rate: float
    """Prompt tokens that the engines had cached or loaded, of all."""
    loaded_rate: float = 0.0
    """Those that came from tiers, of all."""
    goodput_per_s: float
    """Requests a second whose first token came in time."""
    busiest_over_mean: float
    """Computing time of the busiest worker over the mean of all."""
    num_split: int = 0
    """Requests whose prompt and answer were computed by two workers."""
    num_expired: int = 0
    """Requests that were to be, and whose worker had no room for the KV in time: it computed the prompt."""
    transferred_bytes: int = 0
    transfer_overlap: float = 0.0
    """Share of the time on the wire in which prompts were still being computed."""
    transfer_wait_ms: float = 0.0
    """Mean time from there to the arrival of the last block."""


def play(
    policy: PolicyName,
    fleet: FleetSpec,
    trace: Trace,
    *,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> Outcome:
    """Simulate `trace` under the policy of that name.

    Raises:
        TraceError: a request does not fit a worker.
    """
    check_fits(
        fleet.engine, max((each.num_tokens + each.num_output_tokens for each in trace.requests), default=0)
    )
    policies, surroundings = _gateways(policy, fleet, seed)
    return asyncio.run(Simulation(fleet, trace, policies, surroundings).run(progress))


def _gateways(name: PolicyName, fleet: FleetSpec, seed: int) -> tuple[list[Policy], Surroundings]:
    numbers = range(fleet.num_gateways)
    if name == PolicyName.KVLANE:
        index = SimulatedIndex(fleet)
        return [Kvlane(fleet, index, seed + number) for number in numbers], index
    told = Told(fleet.num_workers)
    return [OTHERS[name](fleet, told, seed + number) for number in numbers], told


def summarize(policy: PolicyName, trace: Trace, outcome: Outcome, *, ttft_target_ms: float) -> Summary:
    """Return the figures of one run.

    Args:
        ttft_target_ms: a first token within this time counts as goodput.
    """
    jobs, transfers = outcome.jobs, outcome.transfers
    wire_ms, waited_ms = sum(each.wire_ms for each in transfers), sum(each.waited_ms for each in transfers)
    in_time = sum(job.ttft_ms <= ttft_target_ms for job in jobs)
    mean_busy_ms = statistics.fmean(outcome.busy_ms)
    return Summary(
        policy=policy,
        requests_per_s=trace.requests_per_s,
        ttft_ms=_quantiles([job.ttft_ms for job in jobs]),
        e2e_ms=_quantiles([job.e2e_ms for job in jobs]),
        itl_ms=_weighted_quantiles(outcome.num_gaps),
        hit_rate=sum(job.num_hit_tokens for job in jobs) / sum(job.request.num_tokens for job in jobs),
        loaded_rate=sum(job.num_loaded_tokens for job in jobs) / sum(job.request.num_tokens for job in jobs),
        goodput_per_s=trace.requests_per_s * in_time / len(jobs),
        busiest_over_mean=max(outcome.busy_ms) / mean_busy_ms if mean_busy_ms else 1.0,
        num_split=sum(job.prefill is not None for job in jobs),
        num_expired=outcome.num_expired,
        transferred_bytes=sum(each.num_bytes for each in transfers),
        transfer_overlap=max(0.0, 1 - waited_ms / wire_ms) if wire_ms else 0.0,
        transfer_wait_ms=waited_ms / len(transfers) if transfers else 0.0,
    )


def _quantiles(values: list[float]) -> Quantiles:
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return Quantiles(statistics.fmean(values), cuts[49], cuts[89], cuts[98])


def _weighted_quantiles(num_gaps: Counter[int]) -> Quantiles:
    """Return the quantiles of durations that are counted by their length in `GAP_MS`."""
    total = num_gaps.total()
    if not total:
        return Quantiles(0.0, 0.0, 0.0, 0.0)
    ordered = sorted(num_gaps.items())
    ends = list(itertools.accumulate(count for _, count in ordered))
    p50, p90, p99 = (
        ordered[bisect.bisect_left(ends, share * total)][0] * GAP_MS for share in (0.5, 0.9, 0.99)
    )
    return Quantiles(sum(gap * count for gap, count in ordered) * GAP_MS / total, p50, p90, p99)


class Timed(msgspec.Struct, frozen=True):
    """A run's summary and how fast it was simulated."""

    summary: Summary
    simulated_per_s: float


def play_timed(
    policy: PolicyName,
    fleet: FleetSpec,
    trace: Trace,
    *,
    seed: int,
    ttft_target_ms: float,
    progress: Callable[[], None] = lambda: None,
) -> Timed:
    """Play and sum up."""
    start = time.perf_counter()
    outcome = play(policy, fleet, trace, seed=seed, progress=progress)
    elapsed_s = time.perf_counter() - start
    return Timed(
        summarize(policy, trace, outcome, ttft_target_ms=ttft_target_ms), len(trace.requests) / elapsed_s
    )
