"""How much of the last seconds something took. Pure."""

from __future__ import annotations

import math

MEMORY_S = 10.0
"""A moment this long ago counts for a third of the present one: about as long as an answer takes."""


class RecentShare:
    """Share of recent time, 0 to 1, in which something was going on; time before the first counts as without.

    One thread adds, any may read.
    """

    def __init__(self) -> None:
        self._latest = 0.0, 0.0
        """The share, and the second it is of."""

    def add(self, began_s: float, ended_s: float) -> None:
        """Note that it went on from one time to another, which is later than all before."""
        self._latest = 1 - (1 - self.at(began_s)) * math.exp((began_s - ended_s) / MEMORY_S), ended_s

    def at(self, now_s: float) -> float:
        """Return the share as of now: nothing has been going on since the last end."""
        share, at_s = self._latest
        return share * math.exp(min(0.0, at_s - now_s) / MEMORY_S)
