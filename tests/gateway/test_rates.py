from __future__ import annotations

import math
import random

import pytest

from gateway.profile import Profile
from gateway.rates import (
    BOUND,
    HALF_LIFE_S,
    MIN_SAMPLE_TOKENS,
    POOL_STEP,
    SETTINGS,
    WORKER_STEP,
    Basis,
    Rates,
    Source,
    basis_of,
    typical_costs,
)
from kvindex.worker import Load, RegisteredWorker, Role, StepCosts, Worker
from tests.support.workers import make_worker

A, B = make_worker("a:1"), make_worker("b:1")


class Clock:
    """A clock that stands still until it is moved."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def rates_of(tokens_per_s: float, **options) -> Rates:
    return Rates(Profile(prefill_tokens_per_s=tokens_per_s), **options)


def observe(
    rates: Rates, worker, num_tokens: int, ttft_ms: float, queue_ms: float = 0.0, basis: Basis = SETTINGS
) -> None:
    by = rates.profile(worker, basis)
    predicted_ms = by.prefill_ms(num_tokens)
    rates.observe(
        worker,
        basis,
        num_tokens=num_tokens,
        predicted_ms=predicted_ms,
        queue_ms=queue_ms,
        by=by,
        ttft_ms=ttft_ms,
    )


def feed(rates: Rates, worker, tokens_per_s: float, times: int = 1) -> None:
    for _ in range(times):
        observe(rates, worker, 4000, 4000 / tokens_per_s * 1000)


def test_a_rate_starts_at_the_default_and_converges_to_what_is_measured():
    rates = rates_of(10_000)
    assert rates.profile(A).prefill_tokens_per_s == pytest.approx(10_000)
    feed(rates, A, 2000, times=100)
    assert rates.profile(A).prefill_tokens_per_s == pytest.approx(2000, rel=0.05)


def test_one_stalled_request_moves_a_rate_little():
    rates = rates_of(1000)
    feed(rates, A, 1e-6)
    assert rates.profile(A).prefill_tokens_per_s == pytest.approx(1000 / 2 ** (POOL_STEP + WORKER_STEP))


def test_little_work_tells_nothing():
    rates = rates_of(1000)
    observe(rates, A, MIN_SAMPLE_TOKENS - 1, 5)
    observe(rates, A, 4000, 0)
    assert rates.profile(A).prefill_tokens_per_s == pytest.approx(1000)


def test_small_samples_count_for_less():
    small, large = rates_of(1000), rates_of(1000)
    observe(small, A, MIN_SAMPLE_TOKENS, MIN_SAMPLE_TOKENS / 2)
    observe(large, A, 4000, 2000)
    assert 1000 < small.profile(A).prefill_tokens_per_s < large.profile(A).prefill_tokens_per_s


def test_a_newcomer_starts_from_its_pool_and_other_pools_do_not_matter():
    rates = rates_of(10_000)
    feed(rates, A, 2000, times=100)
    assert rates.profile(B).prefill_tokens_per_s == pytest.approx(2000, rel=0.01)
    assert rates.profile(make_worker("c:1", model="other")).prefill_tokens_per_s == pytest.approx(10_000)


def test_a_slow_worker_is_told_from_a_fast_one():
    rates = rates_of(2000)
    for _ in range(300):
        feed(rates, A, 4000)
        feed(rates, B, 1000)
    assert rates.profile(A).prefill_tokens_per_s == pytest.approx(4000, rel=0.15)
    assert rates.profile(B).prefill_tokens_per_s == pytest.approx(1000, rel=0.15)


def test_noise_does_not_part_equal_workers_by_more_than_a_tie():
    rates, noise = rates_of(10_000), random.Random(7)
    for _ in range(200):
        for worker in (A, B):
            feed(rates, worker, 3000 * math.exp(noise.gauss(0, 0.3)))
    ratio = rates.profile(A).prefill_tokens_per_s / rates.profile(B).prefill_tokens_per_s
    assert ratio == pytest.approx(1, rel=0.2)


def test_a_worker_that_is_not_measured_any_more_returns_to_its_pool():
    clock = Clock()
    rates = rates_of(1000, clock=clock)
    for _ in range(100):
        feed(rates, A, 1000)
        feed(rates, B, 100)
    fresh = math.log(
        rates.profile(B).prefill_tokens_per_s / rates.profile(make_worker("c:1")).prefill_tokens_per_s
    )
    clock.now_s += HALF_LIFE_S
    later = math.log(
        rates.profile(B).prefill_tokens_per_s / rates.profile(make_worker("c:1")).prefill_tokens_per_s
    )
    assert later == pytest.approx(fresh / 2)
    assert fresh < -1


@pytest.mark.parametrize(("tokens_per_s", "sign"), [(1e-9, -1), (1e15, 1)])
def test_a_rate_is_bounded(tokens_per_s, sign):
    rates = rates_of(1000)
    feed(rates, A, tokens_per_s, times=2000)
    assert rates.profile(A).prefill_tokens_per_s == pytest.approx(1000 * math.exp(sign * 2 * BOUND))


def test_a_queue_tells_little_of_the_worker_behind_it():
    alone, queued = rates_of(1000), rates_of(1000)
    observe(alone, A, 4000, 8000)
    observe(queued, A, 4000, 8000, queue_ms=3600)
    slowed = [1000 - each.profile(A).prefill_tokens_per_s for each in (alone, queued)]
    assert slowed[0] > 5 * slowed[1] > 0


def test_a_speed_moves_the_whole_profile_and_models_have_their_own():
    given = Profile(prefill_tokens_per_s=1000, attention_ns_per_pair=10, step_ms=4)
    rates = Rates(Profile(prefill_tokens_per_s=7), {A.model: given})
    feed(rates, A, 500, times=200)
    slowed = rates.profile(A)
    assert slowed.step_ms == pytest.approx(8, rel=0.1)
    assert slowed.attention_ns_per_pair == pytest.approx(20, rel=0.1)
    assert rates.profile(make_worker("c:1", model="other")).prefill_tokens_per_s == 7


def test_a_prediction_of_an_earlier_profile_is_measured_by_that_profile():
    rates = rates_of(1000)
    before = rates.profile(A)
    feed(rates, A, 500, times=200)
    settled = rates.profile(A).prefill_tokens_per_s
    rates.observe(A, num_tokens=4000, predicted_ms=4000, by=before, ttft_ms=8000)
    assert rates.profile(A).prefill_tokens_per_s == pytest.approx(settled, rel=0.02)


def costs(tokens_per_s: float | None, **fields: float) -> StepCosts:
    return StepCosts(num_steps=100, prefill_tokens_per_s=tokens_per_s, **fields)


def registered(worker: Worker, step_costs: StepCosts | None = None) -> RegisteredWorker:
    return RegisteredWorker(
        worker=worker,
        slot=0,
        role=Role.BOTH,
        lease_ms=1,
        lease_left_ms=1,
        num_indexed_blocks=0,
        digest="",
        load=Load(),
        charged_tokens=0,
        charged_requests=0,
        step_costs=step_costs,
    )


def test_a_worker_is_known_by_its_own_steps_then_by_its_pools_then_by_the_settings():
    measured, early, fresh = (
        registered(A, costs(9_000)),
        registered(B, costs(None)),
        registered(make_worker("c:1")),
    )
    typical = typical_costs([measured, early, fresh])
    assert typical == costs(9_000)
    found = [basis_of(each, typical).source for each in (measured, early, fresh)]
    assert found == [Source.WORKER, Source.POOL, Source.POOL]
    assert typical_costs([early, fresh]) is None
    assert basis_of(early, None) is SETTINGS


def test_typical_is_the_worker_in_the_middle():
    speeds = [100, 1_000, 1_100, 1_200, 50_000]
    workers = [registered(make_worker(f"{speed}:1"), costs(speed)) for speed in reversed(speeds)]
    assert typical_costs(workers) == costs(1_100)


def test_measured_steps_replace_the_settings_as_a_whole():
    given = Profile(prefill_tokens_per_s=1000, attention_ns_per_pair=10, step_ms=4)
    rates = Rates(given)
    basis = Basis(Source.WORKER, costs(8_000, step_ms=1.5, decode_us_per_request=20))
    assert rates.profile(A) == given
    assert rates.profile(A, basis) == Profile(
        prefill_tokens_per_s=8_000, step_ms=1.5, decode_us_per_request=20
    )


def test_the_access_log_corrects_measured_steps_apart_from_the_settings():
    rates = rates_of(1_000)
    basis = Basis(Source.WORKER, costs(8_000))
    feed(rates, A, 500, times=50)
    assert rates.speed(A, basis) == 1
    for _ in range(100):
        observe(rates, A, 4_000, 1_000, basis=basis)  # half as fast as it says
    assert rates.speed(A, basis) == pytest.approx(0.5, rel=0.05)
    assert rates.profile(A, basis).prefill_tokens_per_s == pytest.approx(4_000, rel=0.05)
    assert rates.profile(A).prefill_tokens_per_s == pytest.approx(500, rel=0.1)
    # What it says of itself may change meanwhile: it is corrected by as much.
    faster = Basis(Source.WORKER, costs(16_000))
    assert rates.profile(A, faster).prefill_tokens_per_s == pytest.approx(8_000, rel=0.05)
    newcomer = rates.profile(make_worker("new:1"), Basis(Source.POOL, costs(8_000)))
    assert newcomer.prefill_tokens_per_s == pytest.approx(4_000, rel=0.05)
