"""Plans are given as the times they predict; how these come about is the plan's business."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.service import Shares, prefer, shortest_queue_ms, soonest_ms


@dataclass(frozen=True)
class Terms:
    queue_ms: float
    prefill_ms: float
    slowdown_ms: float = 0.0
    crowding_ms: float = 0.0

    @property
    def ttft_ms(self) -> float:
        return self.queue_ms + self.prefill_ms


@dataclass(frozen=True)
class Choice:
    name: str
    terms: Terms


def planned(**workers: tuple[float, float]) -> tuple[Choice, ...]:
    """Return a plan over workers with these queues and prefills in ms, soonest first."""
    found = [Choice(name, Terms(*times)) for name, times in workers.items()]
    return tuple(sorted(found, key=lambda choice: choice.terms.ttft_ms))


def names(choices):
    return [choice.name for choice in choices]


IDLE_OR_HOLDER = {"idle": (0, 320), "holder": (500, 32)}


def test_without_a_target_the_plan_stays():
    found = planned(**IDLE_OR_HOLDER)
    assert prefer(found, None) == found


def test_of_those_in_time_the_one_that_computes_least_is_first():
    found = planned(**IDLE_OR_HOLDER)
    assert names(prefer(found, 800)) == ["holder", "idle"]
    assert names(prefer(found, 500)) == ["idle", "holder"]
    assert names(prefer(found, 1)) == ["idle", "holder"]


def test_a_prediction_must_be_below_the_target_by_what_predictions_are_exact_to():
    found = planned(**IDLE_OR_HOLDER)
    assert names(prefer(found, 532 * 1.09)) == ["idle", "holder"]
    assert names(prefer(found, 532 * 1.11)) == ["holder", "idle"]


def test_what_a_prefill_costs_others_counts_with_it():
    idle = Choice("idle", Terms(0, 200))
    shared = Choice("shared", Terms(50, 160, slowdown_ms=100, crowding_ms=10))
    assert names(prefer((shared, idle), 1_000)) == ["idle", "shared"]


def test_a_little_less_prefill_is_no_reason_to_wait():
    assert names(prefer(planned(idle=(0, 100), busy=(300, 95)), 10_000)) == ["idle", "busy"]


TIMES = st.tuples(st.floats(0, 2_000), st.floats(0, 2_000))


@given(st.dictionaries(st.text("abcdefgh", min_size=1, max_size=2), TIMES, min_size=1), st.floats(1, 5_000))
def test_a_target_only_orders_and_is_met_wherever_it_can_be(workers, target_ms):
    found = planned(**workers)
    preferred = prefer(found, target_ms)
    assert sorted(names(preferred)) == sorted(names(found))
    meeting = [choice for choice in found if choice.terms.ttft_ms * 1.1 <= target_ms]
    if meeting:
        first = preferred[0].terms
        assert first.ttft_ms <= target_ms
        assert first.prefill_ms <= min(choice.terms.prefill_ms for choice in meeting) * 1.1 + 1.001
        assert set(names(preferred[: len(meeting)])) == set(names(meeting))
    else:
        assert preferred == found


def test_who_is_soonest_and_who_has_the_shortest_queue_may_be_two():
    found = planned(idle=(5, 320), holder=(20, 32))
    assert (soonest_ms(found), shortest_queue_ms(found)) == (52, 5)


WORK = st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0.1, 1_000)), min_size=1, max_size=40)
WEIGHTS = st.fixed_dictionaries({name: st.floats(0.1, 10) for name in "abcd"})


@given(WORK, WEIGHTS)
def test_somebody_may_always_go_on(work, weights):
    shares = Shares()
    for tenant, work_ms in work:
        shares.add(tenant, weights[tenant], work_ms)
    active = {tenant for tenant, _ in work}
    least = min(active, key=lambda each: sum(ms for tenant, ms in work if tenant == each) / weights[each])
    assert not shares.is_over(least)
    assert not any(shares.is_over(each) for each in set("abcd") - active)


@given(WORK, WEIGHTS)
def test_nobody_who_is_held_to_its_share_gets_further_above_it_than_by_one_request(arrivals, weights):
    shares, in_hand = Shares(), dict.fromkeys("abcd", 0.0)
    for tenant, work_ms in arrivals:
        if not shares.is_over(tenant):
            active = {each for each, work in in_hand.items() if work} | {tenant}
            mean = sum(in_hand.values()) / sum(weights[each] for each in active)
            assert in_hand[tenant] / weights[tenant] <= mean * (1 + 1e-6)
            shares.add(tenant, weights[tenant], work_ms)
            in_hand[tenant] += work_ms


@given(WORK, st.randoms(use_true_random=False))
def test_what_was_added_and_removed_leaves_nothing(work, draw):
    shares = Shares()
    for tenant, work_ms in work:
        shares.add(tenant, 1, work_ms)
    draw.shuffle(work)
    for tenant, work_ms in work:
        shares.remove(tenant, work_ms)
    assert not any(shares.is_over(each) for each in "abcd")
    assert not shares._work_ms
    assert not shares._weights


@pytest.mark.parametrize("weight", [1, 3])
def test_two_that_ask_without_pause_are_served_by_weight_however_often_each_asks(weight):
    draw = random.Random(7)
    shares, queue, served = Shares(), [], {"greedy": 0.0, "modest": 0.0}
    weights = {"greedy": 1, "modest": weight}
    for _ in range(3_000):
        # One asks ten times as often as the other; a worker computes one request a step.
        for tenant in draw.choices(["greedy", "modest"], weights=[10, 1], k=20):
            is_congested = len(queue) >= 10
            if not (is_congested and shares.is_over(tenant)) and len(queue) < 50:
                shares.add(tenant, weights[tenant], 1)
                queue.append(tenant)
        done = queue.pop(0)
        served[done] += 1
        shares.remove(done, 1)
    assert served["modest"] / served["greedy"] == pytest.approx(weight, rel=0.1)
