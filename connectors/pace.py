"""How long it takes to move KV, learned from what was moved. Pure."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from connectors.fit import explain

KEPT = 50
"""Latest observations that count."""

HALF_LIFE_S = 60.0
"""An observation counts half as much as one that is so much younger: what has been slow for a few minutes is
slow, whatever was before. An age without observations changes nothing."""

_LEAST_SHARE = 1e-3
"""Where bytes explain less of the time, they explain nothing."""


@dataclass(frozen=True, slots=True)
class Moved:
    """One transfer or load that is over."""

    num_bytes: int
    seconds: float
    """In which it had chunks on their way. The time in which they were still being computed is not in it, nor
    is the time until the engine noticed: that is one of its steps, however fast the wire is."""


@dataclass(frozen=True, slots=True)
class Line:
    """Latency and bandwidth that explain what was observed best."""

    gb_per_s: float = 0.0
    """0 until something was observed."""
    latency_ms: float = 0.0
    """What moving takes beside that, whatever the size."""


class Pace:
    """A straight line through time over bytes; a few observations far from all others do not move it.

    Observations come from one thread, `line` is called on one, which may be another.

    Args:
        clock: seconds.
        forget_after_s: without observations for so long nothing is known any more, and the next one is the
            first; None: what is known stays.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, forget_after_s: float | None = None
    ) -> None:
        self._clock = clock
        self._forget_after_s = forget_after_s
        self._observed: deque[tuple[float, Moved]] = deque(maxlen=KEPT)
        self.num_observed = 0
        self._line = Line()
        self._line_of = 0

    def observe(self, moved: Moved) -> None:
        """Take something that was moved into account."""
        if moved.num_bytes > 0 and moved.seconds > 0:
            if self._is_forgotten():
                self._observed = deque([(self._clock(), moved)], KEPT)
            else:
                self._observed.append((self._clock(), moved))
            self.num_observed += 1

    def line(self) -> Line:
        """Return what is known by now."""
        if (num_observed := self.num_observed) != self._line_of:
            self._line_of = num_observed
            self._line = _fit(list(self._observed.copy()))
        return Line() if self._is_forgotten() else self._line

    def _is_forgotten(self) -> bool:
        if self._forget_after_s is None or not self._observed:
            return False
        return self._clock() - self._observed[-1][0] >= self._forget_after_s


def _fit(observed: Sequence[tuple[float, Moved]]) -> Line:
    at_s = np.array([at_s for at_s, _ in observed])
    work = np.array([(1.0, moved.num_bytes) for _, moved in observed])
    seconds = np.array([moved.seconds for _, moved in observed])
    weights = 0.5 ** ((at_s.max() - at_s) / HALF_LIFE_S)
    latency_s, s_per_byte = explain(work, seconds, needed=(1,), weights=weights)
    # Without sizes that differ, or where the larger ones were not slower, all of the time is the bytes'.
    if s_per_byte * work[:, 1].mean() < _LEAST_SHARE * seconds.mean():
        latency_s, (s_per_byte,) = 0.0, explain(work[:, 1:], seconds, weights=weights)
    return Line(1e-9 / s_per_byte, latency_s * 1e3)
