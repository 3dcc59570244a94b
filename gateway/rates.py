"""What each worker's steps cost: what it measured of them itself, corrected by what clients saw of it.

Before it has measured enough, what another worker of its pool measured; before any has, the profile of its
model.
"""

from __future__ import annotations

import enum
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec

from gateway.profile import Profile
from kvindex.worker import RegisteredWorker, StepCosts, Worker

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


class Source(enum.StrEnum):
    """Whence a profile is, before it is corrected."""

    WORKER = "worker"
    """The worker measured its own steps."""
    POOL = "pool"
    """Another worker of its pool measured."""
    PROFILE = "profile"
    """The settings say so."""


@dataclass(frozen=True, slots=True)
class Basis:
    """What is known of a worker's steps before it is corrected."""

    source: Source = Source.PROFILE
    costs: StepCosts | None = None
    """As measured; None where the settings say it."""


SETTINGS = Basis()


def basis_of(registered: RegisteredWorker, typical: StepCosts | None) -> Basis:
    """Return what is known of `registered`; `typical` is what its pool measured, if anything."""
    if registered.step_costs is not None and registered.step_costs.prefill_tokens_per_s is not None:
        return Basis(Source.WORKER, registered.step_costs)
    return Basis(Source.POOL, typical) if typical is not None else SETTINGS


def typical_costs(registered: Iterable[RegisteredWorker]) -> StepCosts | None:
    """Return the costs of the worker whose prefill is in the middle; None if no worker has measured any."""
    measured = [(costs.prefill_tokens_per_s, costs) for each in registered if (costs := each.step_costs)]
    by_speed = sorted(((speed, costs) for speed, costs in measured if speed), key=lambda each: each[0])
    return by_speed[(len(by_speed) - 1) // 2][1] if by_speed else None


@dataclass(frozen=True, slots=True)
class _Distance:
    """Logarithm of a worker's speed over its pool's, as of `at_s`."""

    log_ratio: float
    at_s: float


class Rates:
    """What the steps of every worker cost, for one event loop.

    What the access log measures corrects a profile as a whole: one factor, its speed, stands for all that
    steps do not show, such as the engine's front end, or for hardware and settings where the profile is not
    of this engine. Measured costs and profiles of the settings have factors of their own. A worker without
    samples has its pool's, so that a newcomer in a measured fleet is neither shunned nor flooded.

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
        self._pools: dict[tuple[str, bool], float] = {}
        self._distances: dict[tuple[str, bool], _Distance] = {}

    def profile(self, worker: Worker, basis: Basis = SETTINGS) -> Profile:
        """Return the worker's profile, as corrected by now."""
        log_speed = self._log_pool(worker, basis) + self._log_ratio(worker, basis)
        known = self._known(worker, basis)
        return known.faster(math.exp(log_speed)) if log_speed else known

    def speed(self, worker: Worker, basis: Basis = SETTINGS) -> float:
        """Return how many times as fast as its basis says the worker is."""
        return math.exp(self._log_pool(worker, basis) + self._log_ratio(worker, basis))

    def observe(
        self,
        worker: Worker,
        basis: Basis = SETTINGS,
        *,
        num_tokens: int,
        predicted_ms: float,
        queue_ms: float = 0.0,
        by: Profile,
        ttft_ms: float,
    ) -> None:
        """Correct the worker's speed by a first token that came `ttft_ms` after the decision.

        Args:
            basis: what is corrected: what is known now.
            num_tokens: prefill tokens predicted up to that token, the queue included.
            predicted_ms: when the token was expected.
            queue_ms: the part of it that was others' work. The larger, the less the sample tells: how much
                of a queue is left is known less well than what a prompt costs.
            by: the profile by which it was expected then.
        """
        if num_tokens < MIN_SAMPLE_TOKENS or ttft_ms <= 0 or predicted_ms <= 0:
            return
        speed_then = by.prefill_tokens_per_s / self._known(worker, basis).prefill_tokens_per_s
        measured = math.log(predicted_ms * speed_then / ttft_ms)
        weight = min(num_tokens / FULL_SAMPLE_TOKENS, 1.0) * (1 - queue_ms / predicted_ms)
        pool, ratio = self._log_pool(worker, basis), self._log_ratio(worker, basis)
        moved = pool + weight * POOL_STEP * _clipped(measured - pool, MAX_SURPRISE)
        self._pools[worker.pool.pool_id, basis.costs is None] = _clipped(moved, BOUND)
        ratio += weight * WORKER_STEP * _clipped(measured - pool - ratio, MAX_SURPRISE)
        distance = _Distance(_clipped(ratio, BOUND), self._clock())
        self._distances[worker.incarnation, basis.costs is None] = distance

    def _known(self, worker: Worker, basis: Basis) -> Profile:
        costs = basis.costs
        if costs is None or costs.prefill_tokens_per_s is None:
            return self._profiles.get(worker.model, self._default)
        return _profile_of(costs)

    def _log_pool(self, worker: Worker, basis: Basis) -> float:
        """Return the logarithm of the pool's speed over its basis'."""
        return self._pools.get((worker.pool.pool_id, basis.costs is None), 0.0)

    def _log_ratio(self, worker: Worker, basis: Basis) -> float:
        distance = self._distances.get((worker.incarnation, basis.costs is None))
        if distance is None:
            return 0.0
        age_s = self._clock() - distance.at_s
        return distance.log_ratio * math.pow(0.5, age_s / HALF_LIFE_S)


@functools.lru_cache(maxsize=1024)
def _profile_of(costs: StepCosts) -> Profile:
    """Every plan asks for the same ones, and a profile is checked when it is made."""
    measured = msgspec.structs.asdict(costs)
    del measured["num_steps"]
    return Profile(**measured)


def _clipped(value: float, limit: float) -> float:
    return max(-limit, min(value, limit))
