from __future__ import annotations

import math
import random

import pytest

from gateway.rates import BOUND, HALF_LIFE_S, MIN_SAMPLE_TOKENS, POOL_STEP, WORKER_STEP, Rates
from tests.support.workers import make_worker

A, B = make_worker("a:1"), make_worker("b:1")


class Clock:
    """A clock that stands still until it is moved."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def feed(rates: Rates, worker, tokens_per_s: float, times: int = 1) -> None:
    for _ in range(times):
        rates.observe(worker, num_tokens=4000, ttft_ms=4000 / tokens_per_s * 1000)


def test_a_rate_starts_at_the_default_and_converges_to_what_is_measured():
    rates = Rates(10_000)
    assert rates.prefill_tokens_per_s(A) == pytest.approx(10_000)
    feed(rates, A, 2000, times=100)
    assert rates.prefill_tokens_per_s(A) == pytest.approx(2000, rel=0.05)


def test_one_stalled_request_moves_a_rate_little():
    rates = Rates(1000)
    feed(rates, A, 1e-6)
    assert rates.prefill_tokens_per_s(A) == pytest.approx(1000 / 2 ** (POOL_STEP + WORKER_STEP))


def test_little_work_tells_nothing():
    rates = Rates(1000)
    rates.observe(A, num_tokens=MIN_SAMPLE_TOKENS - 1, ttft_ms=5)
    rates.observe(A, num_tokens=4000, ttft_ms=0)
    assert rates.prefill_tokens_per_s(A) == pytest.approx(1000)


def test_small_samples_count_for_less():
    small, large = Rates(1000), Rates(1000)
    small.observe(A, num_tokens=MIN_SAMPLE_TOKENS, ttft_ms=MIN_SAMPLE_TOKENS / 2)
    large.observe(A, num_tokens=4000, ttft_ms=2000)
    assert 1000 < small.prefill_tokens_per_s(A) < large.prefill_tokens_per_s(A)


def test_a_newcomer_starts_from_its_pool_and_other_pools_do_not_matter():
    rates = Rates(10_000)
    feed(rates, A, 2000, times=100)
    assert rates.prefill_tokens_per_s(B) == pytest.approx(2000, rel=0.01)
    assert rates.prefill_tokens_per_s(make_worker("c:1", model="other")) == pytest.approx(10_000)


def test_a_slow_worker_is_told_from_a_fast_one():
    rates = Rates(2000)
    for _ in range(300):
        feed(rates, A, 4000)
        feed(rates, B, 1000)
    assert rates.prefill_tokens_per_s(A) == pytest.approx(4000, rel=0.15)
    assert rates.prefill_tokens_per_s(B) == pytest.approx(1000, rel=0.15)


def test_noise_does_not_part_equal_workers_by_more_than_a_tie():
    rates, noise = Rates(10_000), random.Random(7)
    for _ in range(200):
        for worker in (A, B):
            feed(rates, worker, 3000 * math.exp(noise.gauss(0, 0.3)))
    ratio = rates.prefill_tokens_per_s(A) / rates.prefill_tokens_per_s(B)
    assert ratio == pytest.approx(1, rel=0.2)


def test_a_worker_that_is_not_measured_any_more_returns_to_its_pool():
    clock = Clock()
    rates = Rates(1000, clock=clock)
    for _ in range(100):
        feed(rates, A, 1000)
        feed(rates, B, 100)
    fresh = math.log(rates.prefill_tokens_per_s(B) / rates.prefill_tokens_per_s(make_worker("c:1")))
    clock.now_s += HALF_LIFE_S
    later = math.log(rates.prefill_tokens_per_s(B) / rates.prefill_tokens_per_s(make_worker("c:1")))
    assert later == pytest.approx(fresh / 2)
    assert fresh < -1


@pytest.mark.parametrize(("tokens_per_s", "sign"), [(1e-9, -1), (1e15, 1)])
def test_a_rate_is_bounded(tokens_per_s, sign):
    rates = Rates(1000)
    feed(rates, A, tokens_per_s, times=2000)
    assert rates.prefill_tokens_per_s(A) == pytest.approx(1000 * math.exp(sign * 2 * BOUND))
