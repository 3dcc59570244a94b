"""The same requests in other orders and shapes, so that nothing is tuned to one file."""

from __future__ import annotations

import dataclasses
import enum
import random
from collections.abc import Callable

from gateway.replay.trace import Trace, TraceRequest

BURST_S = 60.0
BURST_SHARE = 0.1

HEAVY_SHARE = 0.05
HEAVY_FACTOR = 4
HEAVY_MOST_TOKENS = 131_072


def shuffled(trace: Trace, seed: int) -> Trace:
    """Return the trace with arrival times dealt anew: rates stay, conversations mix."""
    times = [each.at_ms for each in trace.requests]
    _rng(seed).shuffle(times)
    dealt = iter(times)
    return trace.changed(f"{trace.name} shuffled", lambda each: (next(dealt), each))


def smooth(trace: Trace, seed: int) -> Trace:
    """Return the trace with independent arrivals at its mean rate, in the same order."""
    rng, clock_ms, gap_ms = _rng(seed), 0.0, 1000 / trace.requests_per_s

    def move(each: TraceRequest) -> tuple[float, TraceRequest]:
        nonlocal clock_ms
        clock_ms += rng.expovariate(1 / gap_ms)
        return clock_ms, each

    return trace.changed(f"{trace.name} smooth", move)


def bursts(trace: Trace, seed: int) -> Trace:
    """Return the trace with each minute's requests in its first tenth."""
    period_ms = BURST_S * 1000

    def move(each: TraceRequest) -> tuple[float, TraceRequest]:
        start_ms = each.at_ms // period_ms * period_ms
        return start_ms + (each.at_ms - start_ms) * BURST_SHARE, each

    return trace.changed(f"{trace.name} bursts", move)


def heavy_tail(trace: Trace, seed: int) -> Trace:
    """Return the trace with one prompt of twenty four times as long, its new part at the end."""
    rng = _rng(seed)

    def grow(each: TraceRequest) -> tuple[float, TraceRequest]:
        if rng.random() < HEAVY_SHARE:
            longer = min(each.num_tokens * HEAVY_FACTOR, max(each.num_tokens, HEAVY_MOST_TOKENS))
            each = dataclasses.replace(each, num_tokens=longer)
        return each.at_ms, each

    return trace.changed(f"{trace.name} heavy tail", grow)


class Variation(enum.StrEnum):
    """What may be done to a trace."""

    SHUFFLED = "shuffled"
    SMOOTH = "smooth"
    BURSTS = "bursts"
    HEAVY_TAIL = "heavy-tail"


VARIATIONS: dict[Variation, Callable[[Trace, int], Trace]] = {
    Variation.SHUFFLED: shuffled,
    Variation.SMOOTH: smooth,
    Variation.BURSTS: bursts,
    Variation.HEAVY_TAIL: heavy_tail,
}
"""Each the same for the same seed."""


def _rng(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 (no secret)
