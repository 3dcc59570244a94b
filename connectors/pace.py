"""How long transfers take, learned from those that were made. Pure."""

from __future__ import annotations

from dataclasses import dataclass

MEMORY = 0.98
"""Weight of an observation beside the one after it: the last 50 count."""


@dataclass(frozen=True, slots=True)
class Moved:
    """One transfer that is over."""

    num_bytes: int
    seconds: float
    """In which it had chunks on their way, and then waited for the engine to notice. The time in which they
    were still being computed is not in it."""


class Pace:
    """Latency and bandwidth that explain what was observed best: a straight line through time over bytes.

    Of one thread; `gb_per_s` and `latency_ms` may be read by others.
    """

    def __init__(self) -> None:
        self._weight = self._bytes = self._seconds = self._squares = self._products = 0.0
        self.gb_per_s = 0.0
        """0 until something was observed."""
        self.latency_ms = 0.0
        """What a transfer takes beside that, whatever its size."""

    def observe(self, moved: Moved) -> None:
        """Take a transfer into account."""
        size, seconds = float(moved.num_bytes), moved.seconds
        if size <= 0 or seconds <= 0:
            return
        self._weight = MEMORY * self._weight + 1
        self._bytes = MEMORY * self._bytes + size
        self._seconds = MEMORY * self._seconds + seconds
        self._squares = MEMORY * self._squares + size * size
        self._products = MEMORY * self._products + size * seconds
        # Without sizes that differ, or where the larger ones were faster, all of the time is the bytes'.
        s_per_byte, latency_s = self._seconds / self._bytes, 0.0
        variance = self._weight * self._squares - self._bytes**2
        if variance > 1e-6 * self._bytes**2:
            slope = (self._weight * self._products - self._bytes * self._seconds) / variance
            if 0 < slope < s_per_byte:
                s_per_byte = slope
                latency_s = (self._seconds - slope * self._bytes) / self._weight
        self.gb_per_s, self.latency_ms = 1e-9 / s_per_byte, latency_s * 1e3
