"""A token bucket that may go into debt. Pure: the caller brings the clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TokenBucket:
    """Grows at a rate up to a capacity, which may both change from call to call.

    A taker waits until there is as much as it takes, or until the bucket is full: so what is larger than
    the bucket passes too, and those behind it wait until its debt is paid. Within any time T no more than
    `capacity + rate * T` is taken, and what the last taker took beyond the capacity.
    """

    level: float
    at_s: float

    def wait_s(self, amount: float, now_s: float, *, rate: float, capacity: float) -> float:
        """Return how long a taker of `amount` has to wait, 0 where it may take it now.

        Args:
            rate: growth a second.
        """
        grown = self.level + max(now_s - self.at_s, 0.0) * rate
        self.level, self.at_s = min(grown, capacity), now_s
        return max(min(amount, capacity) - self.level, 0.0) / rate

    def take(self, amount: float) -> None:
        """Take it; a negative amount is given back."""
        self.level -= amount
