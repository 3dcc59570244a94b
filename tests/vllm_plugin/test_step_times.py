"""Costs of steps: what made the durations is found again."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvindex.worker import StepCosts
from vllm_plugin.step_times import KEPT_STEPS, MIN_STEPS, StepTimes, StepWork, fit

costs = st.builds(
    StepCosts,
    num_steps=st.just(0),
    prefill_tokens_per_s=st.floats(1_000, 100_000),
    attention_ns_per_pair=st.floats(0, 50),
    step_ms=st.floats(0.5, 20),
    decode_us_per_request=st.floats(0, 300),
    decode_ns_per_token=st.floats(0, 100),
)


def duration_ms(known: StepCosts, work: StepWork) -> float:
    prefill_ms = work.prefill_tokens / (known.prefill_tokens_per_s or 1) * 1e3
    return (
        known.step_ms
        + prefill_ms
        + work.prefill_pairs * known.attention_ns_per_pair / 1e6
        + work.decode_requests * known.decode_us_per_request / 1e3
        + work.decode_tokens * known.decode_ns_per_token / 1e6
    )


def prompts(chance: random.Random, num_steps: int) -> list[StepWork]:
    """Chunks of prompts of any length, with and without others that decode."""
    steps = []
    for _ in range(num_steps):
        tokens, before = chance.randint(16, 2_048), chance.choice([0, 0, chance.randint(0, 30_000)])
        running = chance.choice([0, chance.randint(0, 64)])
        pairs = tokens * (before + tokens / 2)
        steps.append(StepWork(tokens, pairs, running, running * chance.randint(100, 4_000)))
    return steps


def decodes(chance: random.Random, num_steps: int) -> list[StepWork]:
    return [
        StepWork(0, 0.0, running, running * chance.randint(100, 4_000))
        for running in (chance.randint(1, 64) for _ in range(num_steps))
    ]


def traffic(seed: int) -> list[StepWork]:
    chance = random.Random(seed)
    return [*prompts(chance, 100), *decodes(chance, 200)]


@given(costs, st.integers(0, 1_000))
@settings(max_examples=60, deadline=None)
def test_exact_times_give_the_costs_that_made_them(known: StepCosts, seed: int):
    steps = traffic(seed)
    found = fit([(work, duration_ms(known, work)) for work in steps], num_steps=300)
    assert found is not None
    assert found.num_steps == 300
    for work in traffic(seed + 1):
        assert duration_ms(found, work) == pytest.approx(duration_ms(known, work), rel=0.1)


@given(costs, st.integers(0, 1_000))
@settings(max_examples=60, deadline=None)
def test_noise_and_pauses_do_not_mislead(known: StepCosts, seed: int):
    chance = random.Random(seed)

    def measured_ms(work: StepWork) -> float:
        pause_ms = chance.uniform(50, 5_000) if chance.random() < 0.05 else 0.0
        return duration_ms(known, work) * chance.gauss(1, 0.07) + pause_ms

    found = fit([(work, measured_ms(work)) for work in traffic(seed)], num_steps=300)
    assert found is not None
    errors = sorted(
        abs(duration_ms(found, work) / duration_ms(known, work) - 1) for work in traffic(seed + 1)
    )
    assert errors[len(errors) // 2] < 0.06
    assert errors[int(0.95 * len(errors))] < 0.2


@given(costs, st.integers(0, 1_000), st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_an_engine_twice_as_slow_has_costs_twice_as_high_whatever_the_order(
    known: StepCosts, seed: int, factor: float
):
    chance = random.Random(seed)
    steps = [(work, duration_ms(known, work) * chance.gauss(1, 0.05)) for work in traffic(seed)]
    slower = [(work, ms * factor) for work, ms in steps]
    chance.shuffle(slower)
    found, scaled = fit(steps, num_steps=1), fit(slower, num_steps=1)
    assert found is not None
    assert scaled is not None
    assert found.prefill_tokens_per_s is not None
    assert scaled.prefill_tokens_per_s == pytest.approx(found.prefill_tokens_per_s / factor, rel=1e-3)
    assert scaled.step_ms == pytest.approx(found.step_ms * factor, rel=1e-3, abs=1e-6)


@given(st.lists(st.tuples(st.sampled_from(traffic(0)), st.floats(1e-3, 1e5)), max_size=60))
@settings(deadline=None)
def test_whatever_was_measured_no_cost_is_below_zero(steps: list[tuple[StepWork, float]]):
    found = fit(steps, num_steps=len(steps))
    if found is not None:
        assert found.prefill_tokens_per_s is None or found.prefill_tokens_per_s > 0
        rest = (found.attention_ns_per_pair, found.step_ms, found.decode_us_per_request)
        assert min(*rest, found.decode_ns_per_token) >= 0


def test_too_few_steps_tell_nothing():
    chance = random.Random(1)
    few = [(work, 5.0) for work in (*prompts(chance, MIN_STEPS - 1), *decodes(chance, MIN_STEPS - 1))]
    assert fit(few, num_steps=30) is None
    decoding = [(work, 5.0) for work in decodes(chance, MIN_STEPS)]
    only_decode = fit([*few, *decoding], num_steps=46)
    assert only_decode is not None
    assert only_decode.prefill_tokens_per_s is None
    assert only_decode.step_ms == pytest.approx(5.0, rel=0.01)


def test_what_no_step_tells_apart_is_one_cost():
    """Prompts of one length: tokens and pairs grow together, so all of it is the tokens'."""
    chance = random.Random(2)
    same = [(StepWork(1_000, 500_000.0, 0, 0), 100 * chance.gauss(1, 0.05)) for _ in range(100)]
    found = fit(same, num_steps=100)
    assert found is not None
    assert found.prefill_tokens_per_s == pytest.approx(10_000, rel=0.05)
    assert (found.attention_ns_per_pair, found.step_ms) == (0, 0)


class Clock:
    """A clock that stands still until it is moved."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def measured_ms(times: StepTimes) -> float:
    found = times.costs()
    assert found is not None
    return found.step_ms


ONE = StepWork(0, 0.0, 1, 100)


def test_time_without_a_step_is_not_counted():
    clock = Clock()
    times = StepTimes(clock)
    for _ in range(MIN_STEPS):
        times.begin(ONE)
        clock.now_s += 0.010
        times.end()
        clock.now_s += 3.0
    assert measured_ms(times) == pytest.approx(10)


def test_a_step_that_is_given_early_counts_from_the_end_of_the_one_ahead():
    """As with asynchronous scheduling: the engine always has its next step."""
    clock = Clock()
    times = StepTimes(clock)
    times.begin(ONE)
    for _ in range(MIN_STEPS):
        times.begin(ONE)
        clock.now_s += 0.010
        times.end()
    times.end()
    assert measured_ms(times) == pytest.approx(10)


def test_empty_steps_keep_their_place_and_tell_nothing():
    clock = Clock()
    times = StepTimes(clock)
    times.end()
    for _ in range(MIN_STEPS):
        times.begin(ONE)
        times.begin(StepWork(0, 0.0, 0, 0))
        clock.now_s += 0.010
        times.end()
        clock.now_s += 1.0
        times.end()
    found = times.costs()
    assert found is not None
    assert (found.num_steps, found.step_ms) == (MIN_STEPS, pytest.approx(10))


def test_an_engine_that_becomes_slower_is_known_to_be():
    clock = Clock()
    times = StepTimes(clock)
    for step_s in (0.010, 0.030):
        for _ in range(KEPT_STEPS):
            times.begin(ONE)
            clock.now_s += step_s
            times.end()
    assert measured_ms(times) == pytest.approx(30)


def test_steps_with_prompts_are_known_by_their_share_of_recent_time():
    now_s = 0.0
    times = StepTimes(lambda: now_s)
    assert times.prefill_share() == 0
    for _ in range(200):
        for work, duration_s in ((StepWork(512, 1.0, 4, 100), 0.3), (StepWork(0, 0.0, 4, 100), 0.1)):
            times.begin(work)
            now_s += duration_s
            times.end()
        now_s += 0.1
    assert times.prefill_share() == pytest.approx(0.6, abs=0.02)
    now_s += 100
    assert times.prefill_share() < 0.001
