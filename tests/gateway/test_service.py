"""Plans are given as the times they predict; how these come about is the plan's business."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.service import Shares, others_ms, prefer, shortest_queue_ms, soonest_ms


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


def names(choices):
    return [choice.name for choice in choices]


def choice(name, *, queue=0.0, prefill, others=0.0):
    return Choice(name, Terms(queue, prefill, slowdown_ms=others / 2, crowding_ms=others / 2))


# What costs least in all comes first: the holder, though another would be sooner.
HOLDER = choice("holder", queue=500, prefill=32, others=10)
IDLE = choice("idle", prefill=320, others=250)
PLAN = (HOLDER, IDLE)


def test_without_a_target_or_if_its_first_meets_it_the_plan_stays():
    assert prefer(PLAN, None) == PLAN
    assert prefer(PLAN, 600) == PLAN
    assert prefer((), 600) == ()


def test_the_first_that_meets_the_target_goes_before_those_that_do_not():
    later = choice("later", prefill=330, others=250)
    assert names(prefer((HOLDER, IDLE, later), 400)) == ["idle", "holder", "later"]


def test_a_target_that_nobody_meets_changes_nothing():
    assert prefer(PLAN, 300) == PLAN


def test_a_prediction_must_be_below_the_target_by_what_predictions_are_exact_to():
    assert names(prefer(PLAN, 532 * 1.11)) == ["holder", "idle"]
    assert names(prefer(PLAN, 532 * 1.09)) == ["idle", "holder"]
    assert names(prefer(PLAN, 320 * 1.09)) == ["holder", "idle"]


def test_others_do_not_pay_more_for_it_than_the_client_gains_by_weight():
    # 212 ms sooner.
    for others, first in ((10 + 2 * 212, "idle"), (10 + 2 * 212 + 1, "holder")):
        dear = choice("idle", prefill=320, others=others)
        assert names(prefer((HOLDER, dear), 400))[0] == first


TIMES = st.tuples(st.floats(0, 2_000), st.floats(0, 2_000), st.floats(0, 2_000))


@given(st.lists(TIMES, min_size=1, max_size=8), st.floats(1, 5_000))
def test_a_target_moves_at_most_one_worker_to_the_front_and_only_to_be_met(workers, target_ms):
    found = tuple(
        choice(str(number), queue=queue, prefill=prefill, others=others)
        for number, (queue, prefill, others) in enumerate(workers)
    )
    preferred = prefer(found, target_ms)
    head, *rest = preferred
    assert rest == [each for each in found if each is not head]
    if head is not found[0]:
        assert found[0].terms.ttft_ms * 1.1 > target_ms >= head.terms.ttft_ms
        assert others_ms(head) - others_ms(found[0]) <= 2 * (found[0].terms.ttft_ms - head.terms.ttft_ms)


def test_who_is_soonest_and_who_has_the_shortest_queue_may_be_two():
    found = (choice("idle", queue=5, prefill=320), choice("holder", queue=20, prefill=32))
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
