"""How fast each worker is: starts from the profile of its model and follows what is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gateway.profile import Profile
from kvindex.worker import Worker

MIN_SAMPLE_TOKENS = 256
"""A first token behind less work than this tells of fixed costs, not of prefill speed."""

FULL_SAMPLE_TOKENS = 2048
"""Work at which one sample counts in full."""

POOL_STEP = 0.2
WORKER_STEP = 0.03
"""Share of the way to a full sample that one sample moves a speed, on a logarithmic scale. A pool's speed
moves fast; its workers part from each other slowly, or the noise of a few samples would keep requests
away from a worker that is as good as the others."""

MAX_SURPRISE = math.log(2)
"""One sample counts as at most twice or half the speed: a stalled request is no slow worker."""

BOUND = math.log(100)
"""A pool's speed stays within this distance of its profile, a worker's within the same of its pool's."""

HALF_LIFE_S = 300.0
"""Time in which a worker without samples loses half of its distance: a slow one is tried again."""


@dataclass(frozen=True, slots=True)
class _Distance:
    """Logarithm of a worker's speed over its pool's, as of `at_s`."""

    log_ratio: float
    at_s: float


class Rates:
    """What the steps of every worker cost, for one event loop.

    What is measured corrects a profile as a whole: one factor, its speed, stands for the engine's hardware
    and settings. A worker without samples has its pool's speed, so that a newcomer in a measured fleet is
    neither shunned nor flooded.

    Args:
        default: for models without a profile of their own.
        profiles: by model, before anything is measured.
        clock: seconds.
    """

    def __init__(
        self,
        default: Profile,
        profiles: Mapping[str, Profile] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._default = default
        self._profiles = profiles or {}
        self._clock = clock
        self._pools: dict[str, float] = {}
        self._distances: dict[str, _Distance] = {}

    def profile(self, worker: Worker) -> Profile:
        """Return the worker's profile, as corrected by now."""
        log_speed = self._log_pool(worker) + self._log_ratio(worker)
        return self._given(worker).faster(math.exp(log_speed)) if log_speed else self._given(worker)

    def observe(
        self,
        worker: Worker,
        *,
        num_tokens: int,
        predicted_ms: float,
        queue_ms: float = 0.0,
        by: Profile,
        ttft_ms: float,
    ) -> None:
        """Correct the worker's speed by a first token that came `ttft_ms` after the decision.

        Args:
            num_tokens: prefill tokens predicted up to that token, the queue included.
            predicted_ms: when the token was expected.
            queue_ms: the part of it that was others' work. The larger, the less the sample tells: how much
                of a queue is left is known less well than what a prompt costs.
            by: the profile by which it was expected then.
        """
        if num_tokens < MIN_SAMPLE_TOKENS or ttft_ms <= 0 or predicted_ms <= 0:
            return
        speed_then = by.prefill_tokens_per_s / self._given(worker).prefill_tokens_per_s
        measured = math.log(predicted_ms * speed_then / ttft_ms)
        weight = min(num_tokens / FULL_SAMPLE_TOKENS, 1.0) * (1 - queue_ms / predicted_ms)
        pool, ratio = self._log_pool(worker), self._log_ratio(worker)
        moved = pool + weight * POOL_STEP * _clipped(measured - pool, MAX_SURPRISE)
        self._pools[worker.pool.pool_id] = _clipped(moved, BOUND)
        ratio += weight * WORKER_STEP * _clipped(measured - pool - ratio, MAX_SURPRISE)
        self._distances[worker.incarnation] = _Distance(_clipped(ratio, BOUND), self._clock())

    def _given(self, worker: Worker) -> Profile:
        return self._profiles.get(worker.model, self._default)

    def _log_pool(self, worker: Worker) -> float:
        """Return the logarithm of the pool's speed over its profile's."""
        return self._pools.get(worker.pool.pool_id, 0.0)

    def _log_ratio(self, worker: Worker) -> float:
        distance = self._distances.get(worker.incarnation)
        if distance is None:
            return 0.0
        age_s = self._clock() - distance.at_s
        return distance.log_ratio * math.pow(0.5, age_s / HALF_LIFE_S)


def _clipped(value: float, limit: float) -> float:
    return max(-limit, min(value, limit))
