"""What an engine's steps cost, measured while it serves: each step's work against the time that it took."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvindex.worker import StepCosts

MIN_STEPS = 16
"""Prompt steps from which prefill is told, and decoding steps from which decoding is."""

KEPT_STEPS = 512
"""Latest steps of each of the two kinds that count. To one step with a prompt there are hundreds that only
decode: they would push it out."""

_SIMPLER_BY = 1.02
"""A cost counts only where it explains this much: what no step tells apart is told apart by no figure."""

_ROUNDS = 4
_OUTLIER_AT = 2.5
_NEGLIGIBLE = 1e-12

Matrix = npt.NDArray[np.float64]


class StepWork(NamedTuple):
    """What is in a step."""

    prefill_tokens: int
    prefill_pairs: float
    """Pairs of a prompt token and one before it."""
    decode_requests: int
    decode_tokens: int
    """Context of these requests."""


class StepTimes:
    """Times an engine's steps, which end in the order in which they begin.

    A step that begins before the one ahead of it has ended is counted from that end on: the engine is given
    its next step while it computes. Time in which no step is under way counts for nothing.

    Steps are noted on the engine's thread, `costs` is called on one other.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._under_way: deque[tuple[float, StepWork]] = deque()
        self._ended_at_s = 0.0
        self._prompting: deque[tuple[StepWork, float]] = deque(maxlen=KEPT_STEPS)
        self._decoding: deque[tuple[StepWork, float]] = deque(maxlen=KEPT_STEPS)
        self._num_steps = 0
        self._known: StepCosts | None = None
        self._known_after = 0

    def begin(self, work: StepWork) -> None:
        """Note that the engine was given a step, which may be empty."""
        self._under_way.append((self._clock(), work))

    def end(self) -> None:
        """Note that the oldest step under way has ended."""
        if not self._under_way:
            return
        began_at_s, work = self._under_way.popleft()
        began_at_s = max(began_at_s, self._ended_at_s)
        self._ended_at_s = self._clock()
        if work.prefill_tokens or work.decode_requests:
            steps = self._prompting if work.prefill_tokens else self._decoding
            steps.append((work, (self._ended_at_s - began_at_s) * 1e3))
            self._num_steps += 1

    def costs(self) -> StepCosts | None:
        """Return what the latest steps cost; None while they are too few to tell."""
        if (num_steps := self._num_steps) != self._known_after:
            self._known = fit([*self._prompting.copy(), *self._decoding.copy()], num_steps=num_steps)
            self._known_after = num_steps
        return self._known


def fit(steps: Iterable[tuple[StepWork, float]], *, num_steps: int) -> StepCosts | None:
    """Return the costs that explain the steps' durations (ms) best; None if there are too few steps.

    Least squares of the relative error, with no cost below 0, in which steps far from all others (the engine
    was paused, or compiled something) count for little. Of several explanations that are about as good the
    simplest is taken: prompts of one length do not tell tokens from pairs, nor one running request a step
    from a request.

    Args:
        num_steps: how many were measured in all, for the record.
    """
    measured = [(work, duration_ms) for work, duration_ms in steps if duration_ms > 0]
    num_prompting = sum(work.prefill_tokens > 0 for work, _ in measured)
    is_prefill_known = num_prompting >= MIN_STEPS
    is_decode_known = len(measured) - num_prompting >= MIN_STEPS
    if not is_prefill_known:
        measured = [(work, duration_ms) for work, duration_ms in measured if not work.prefill_tokens]
    if not is_prefill_known and not is_decode_known:
        return None
    work = np.array([(1.0, *work) for work, _ in measured])
    step_ms, token_ms, pair_ms, request_ms, context_ms = _solve(
        work, np.array([duration_ms for _, duration_ms in measured]), needs_prefill=is_prefill_known
    )
    return StepCosts(
        num_steps=num_steps,
        prefill_tokens_per_s=1e3 / token_ms if token_ms > 0 else None,
        attention_ns_per_pair=pair_ms * 1e6,
        step_ms=step_ms,
        decode_us_per_request=request_ms * 1e3,
        decode_ns_per_token=context_ms * 1e6,
    )


def _solve(work: Matrix, durations_ms: Matrix, *, needs_prefill: bool) -> tuple[float, ...]:
    """Return a cost in ms for each column of `work`."""
    # The scale of a column is that of its unit; without this a matrix of such columns is singular.
    scale = np.abs(work).max(axis=0)
    scale[scale == 0] = 1.0
    scaled = work / scale
    expected_ms, trust = durations_ms, np.ones_like(durations_ms)
    costs = np.zeros(work.shape[1])
    for _ in range(_ROUNDS):
        costs = _simplest(scaled, durations_ms, trust / expected_ms**2, needs_prefill=needs_prefill)
        expected_ms = np.maximum(scaled @ costs, _NEGLIGIBLE)
        error = np.abs(durations_ms / expected_ms - 1)
        usual = max(float(np.median(error)), 1e-3)
        trust = np.minimum(1.0, _OUTLIER_AT * usual / np.maximum(error, _NEGLIGIBLE))
        trust *= trust
    return tuple(float(each) for each in costs / scale)


def _simplest(work: Matrix, durations_ms: Matrix, weights: Matrix, *, needs_prefill: bool) -> Matrix:
    """Return the least squares solution of the fewest columns that is about as good as any, none below 0.

    With five columns all 31 choices are tried: the best among those without a cost below 0 is the exact
    non-negative solution.
    """
    weighted = work * weights[:, None]
    squares, products = weighted.T @ work, weighted.T @ durations_ms
    total = float(weights @ durations_ms**2)
    num_columns = work.shape[1]
    found: list[tuple[float, Matrix]] = []
    for size in range(1, num_columns + 1):
        for columns in map(list, itertools.combinations(range(num_columns), size)):
            if needs_prefill and 1 not in columns:
                continue
            block = squares[np.ix_(columns, columns)]
            solution = np.linalg.lstsq(block, products[columns], rcond=_NEGLIGIBLE)[0]
            if np.all(solution >= 0):
                costs = np.zeros(num_columns)
                costs[columns] = solution
                left = total - 2 * float(products @ costs) + float(costs @ squares @ costs)
                found.append((max(left, total * _NEGLIGIBLE), costs))
    best = min((left for left, _ in found), default=0.0)
    return next((costs for left, costs in found if left <= best * _SIMPLER_BY), np.zeros(num_columns))
