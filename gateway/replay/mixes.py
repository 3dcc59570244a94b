"""Traffic that is made: long prompts that arrive among short ones with long answers."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from gateway.replay.trace import Trace, TraceRequest, make_trace

SPREAD = 0.5
"""Lengths differ by up to this share from those of their kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Two kinds of requests, mixed at random, that share nothing and come independently of each other."""

    long_share: float
    """Of the requests, 0 to 1."""
    requests_per_s: float
    num_requests: int
    long_tokens: int = 32_000
    short_tokens: int = 500
    long_output_tokens: int = 100
    short_output_tokens: int = 300
    block_size: int = 512

    def trace(self, seed: int) -> Trace:
        """Return the requests, the same for the same seed."""
        rng = random.Random(seed)  # noqa: S311 (no secret)
        contents = itertools.count()
        clock_ms = 0.0
        timed = []
        for _ in range(self.num_requests):
            clock_ms += rng.expovariate(self.requests_per_s) * 1e3
            is_long = rng.random() < self.long_share
            num_tokens = _around(rng, self.long_tokens if is_long else self.short_tokens)
            num_output_tokens = _around(rng, self.long_output_tokens if is_long else self.short_output_tokens)
            blocks = tuple(itertools.islice(contents, num_tokens // self.block_size))
            timed.append((clock_ms, TraceRequest(0.0, num_tokens, num_output_tokens, blocks)))
        return make_trace(f"{self.long_share:.0%} long", self.block_size, timed)


def _around(rng: random.Random, length: int) -> int:
    return max(1, round(length * rng.uniform(1 - SPREAD, 1 + SPREAD)))
