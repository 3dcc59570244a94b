"""How fast each worker prefills: starts from a default and follows what is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvindex.worker import Worker

MIN_SAMPLE_TOKENS = 256
"""A first token behind less work than this tells of fixed costs, not of prefill speed."""

FULL_SAMPLE_TOKENS = 2048
"""Work at which one sample counts in full."""

POOL_STEP = 0.2
WORKER_STEP = 0.05
"""Share of the way to a full sample that one sample moves a rate, on a logarithmic scale. A pool's rate
moves fast; its workers part from each other slowly, or the noise of a few samples would keep requests
away from a worker that is as good as the others."""

MAX_SURPRISE = math.log(2)
"""One sample counts as at most twice or half the rate: a stalled request is no slow worker."""

BOUND = math.log(100)
"""A pool's rate stays within this distance of the default, a worker's within the same of its pool's."""

HALF_LIFE_S = 300.0
"""Time in which a worker without samples loses half of its distance: a slow one is tried again."""


@dataclass(frozen=True, slots=True)
class _Distance:
    """Logarithm of a worker's rate over its pool's, as of `at_s`."""

    log_ratio: float
    at_s: float


class Rates:
    """Prefill tokens per second of every worker, for one event loop.

    A worker without samples has its pool's rate, so that a newcomer in a measured fleet is neither
    shunned nor flooded.

    Args:
        default: prefill tokens per second, before anything is measured.
        clock: seconds.
    """

    def __init__(self, default: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._default = default
        self._clock = clock
        self._pools: dict[str, float] = {}
        self._distances: dict[str, _Distance] = {}

    def prefill_tokens_per_s(self, worker: Worker) -> float:
        """Return the worker's rate."""
        return self._default * math.exp(self._log_pool(worker) + self._log_ratio(worker))

    def observe(self, worker: Worker, *, num_tokens: int, ttft_ms: float) -> None:
        """Correct the rates by a first token that came `ttft_ms` after the decision.

        Args:
            num_tokens: prefill tokens predicted up to that token, the queue included.
        """
        if num_tokens < MIN_SAMPLE_TOKENS or ttft_ms <= 0:
            return
        measured = math.log(num_tokens / ttft_ms * 1000 / self._default)
        weight = min(num_tokens / FULL_SAMPLE_TOKENS, 1.0)
        pool, ratio = self._log_pool(worker), self._log_ratio(worker)
        moved = pool + weight * POOL_STEP * _clipped(measured - pool, MAX_SURPRISE)
        self._pools[worker.pool.pool_id] = _clipped(moved, BOUND)
        ratio += weight * WORKER_STEP * _clipped(measured - pool - ratio, MAX_SURPRISE)
        self._distances[worker.incarnation] = _Distance(_clipped(ratio, BOUND), self._clock())

    def _log_pool(self, worker: Worker) -> float:
        """Return the logarithm of the pool's rate over the default."""
        return self._pools.get(worker.pool.pool_id, 0.0)

    def _log_ratio(self, worker: Worker) -> float:
        distance = self._distances.get(worker.incarnation)
        if distance is None:
            return 0.0
        age_s = self._clock() - distance.at_s
        return distance.log_ratio * math.pow(0.5, age_s / HALF_LIFE_S)


def _clipped(value: float, limit: float) -> float:
    return max(-limit, min(value, limit))
