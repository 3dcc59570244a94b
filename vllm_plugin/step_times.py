"""What an engine's steps cost, measured while it serves: each step's work against the time that it took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from connectors.fit import explain
from kvindex.recent import RecentShare
from kvindex.worker import StepCosts

MIN_STEPS = 16
"""Prompt steps from which prefill is told, and decoding steps from which decoding is."""

KEPT_STEPS = 512
"""Latest steps of each of the two kinds that count. To one step with a prompt there are hundreds that only
decode: they would push it out."""

_PREFILL_TOKENS = 1
"""Which column of a step's work that is."""


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
        self._prompts = RecentShare()
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
        if work.prefill_tokens:
            self._prompts.add(began_at_s, self._ended_at_s)

    def prefill_share(self) -> float:
        """Return the share of recent time that steps with prompts in them took. On any thread."""
        return self._prompts.at(self._clock())

    def costs(self) -> StepCosts | None:
        """Return what the latest steps cost; None while they are too few to tell."""
        if (num_steps := self._num_steps) != self._known_after:
            self._known = fit([*self._prompting.copy(), *self._decoding.copy()], num_steps=num_steps)
            self._known_after = num_steps
        return self._known


def fit(steps: Iterable[tuple[StepWork, float]], *, num_steps: int) -> StepCosts | None:
    """Return the costs that explain the steps' durations (ms) best; None if there are too few steps.

    Prompts of one length do not tell tokens from pairs, nor one running request a step from a request
    (`connectors.fit`).

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
    step_ms, token_ms, pair_ms, request_ms, context_ms = explain(
        work,
        np.array([duration_ms for _, duration_ms in measured]),
        needed=(_PREFILL_TOKENS,) if is_prefill_known else (),
    )
    return StepCosts(
        num_steps=num_steps,
        prefill_tokens_per_s=1e3 / token_ms if token_ms > 0 else None,
        attention_ns_per_pair=pair_ms * 1e6,
        step_ms=step_ms,
        decode_us_per_request=request_ms * 1e3,
        decode_ns_per_token=context_ms * 1e6,
    )
