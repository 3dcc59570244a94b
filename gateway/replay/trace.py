"""Recorded traffic: when requests came, how long they were, and what they shared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace."""

    at_ms: float
    """Since the trace's first request."""
    num_tokens: int
    """Prompt tokens, at least 1."""
    num_output_tokens: int
    """At least 1."""
    blocks: tuple[int, ...] = ()
    """Content of the prompt's leading full blocks: equal numbers stand for equal prefixes. Without any, the
    prompt shares nothing."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests by time of arrival."""

    name: str
    block_size: int
    requests: tuple[TraceRequest, ...]

    @property
    def duration_s(self) -> float:
        """Return the time from the first arrival to the last."""
        return self.requests[-1].at_ms / 1000 if self.requests else 0.0

    @property
    def requests_per_s(self) -> float:
        """Return the mean rate of arrivals."""
        return len(self.requests) / max(self.duration_s, 1e-3)

    def at_speed(self, speed: float) -> Trace:
        """Return the same requests in 1 / `speed` of the time."""
        return self.changed(self.name, lambda each: (each.at_ms / speed, each))

    def changed(self, name: str, change: Callable[[TraceRequest], tuple[float, TraceRequest]]) -> Trace:
        """Return the trace with each request at a new time, in the order of these."""
        return make_trace(name, self.block_size, map(change, self.requests))


def make_trace(name: str, block_size: int, timed: Iterable[tuple[float, TraceRequest]]) -> Trace:
    """Return the requests in the order of their times, which are counted from the first."""
    ordered = sorted(timed, key=lambda pair: pair[0])
    first_ms = ordered[0][0] if ordered else 0.0
    return Trace(
        name,
        block_size,
        tuple(
            TraceRequest(at_ms - first_ms, each.num_tokens, each.num_output_tokens, each.blocks)
            for at_ms, each in ordered
        ),
    )
