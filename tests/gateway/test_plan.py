from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.parity import Reason
from gateway.plan import (
    ANSWER_TOKENS,
    CROWDING,
    DECODE_WEIGHT,
    TIE_MS,
    TIE_SHARE,
    Candidate,
    Demand,
    Terms,
    least_loaded,
    obstacle,
    plan,
    weigh,
)
from gateway.profile import Profile
from kvindex.worker import Load, WorkerState
from tests.support.workers import make_worker


def candidate(
    name: str = "10.0.0.1:8000",
    *,
    overlap: int = 0,
    backlog: int = 0,
    charged: int = 0,
    running: int = 0,
    usage: float = 0.0,
    fill: float = 0.0,
    rate: float = 1000.0,
    slot: int = 0,
    degraded: Reason | None = None,
) -> Candidate:
    load = Load(waiting_prefill_tokens=backlog, running_requests=running, kv_usage=usage)
    state = WorkerState(slot=slot, load=load, charged_tokens=charged, charged_requests=int(charged > 0))
    return Candidate(
        worker=make_worker(name),
        state=state,
        overlap_blocks=overlap,
        profile=Profile(prefill_tokens_per_s=rate),
        cache_fill=fill,
        degraded=degraded,
    )


def demand(num_tokens: int, **fields) -> Demand:
    base = {"num_tokens": num_tokens, "num_lookup_tokens": num_tokens, "model": "tiny"}
    return Demand(**(base | fields))


def names(choices) -> list[str]:
    return [choice.candidate.worker.endpoint for choice in choices]


def test_terms_are_backlog_and_uncached_tokens_over_the_rate():
    choice = weigh(demand(100), candidate(overlap=2, backlog=300, charged=200, rate=1000))
    assert choice.cached_tokens == 32
    assert choice.uncached_tokens == 68
    assert choice.terms == Terms(queue_ms=500.0, prefill_ms=68.0, crowding_ms=68.0 * CROWDING)
    assert choice.terms.ttft_ms == 568.0
    assert choice.terms.cost_ms == 568.0 + 68.0 * CROWDING


def test_attention_grows_with_the_square_and_its_share_of_the_queue_is_reported():
    profile = Profile(prefill_tokens_per_s=1000, attention_ns_per_pair=1e6)
    load = Load(waiting_prefill_tokens=10, waiting_prefill_pairs=250.0)
    state = WorkerState(slot=0, load=load, charged_tokens=5, charged_requests=1)
    worker = Candidate(worker=make_worker(), state=state, overlap_blocks=2, profile=profile)
    choice = weigh(demand(100), worker)
    pairs = 68 * 32 + 68 * 68 / 2
    assert choice.terms.prefill_ms == pytest.approx(68 + pairs)
    assert choice.terms.queue_ms == pytest.approx(15 + 250)
    assert choice.charge_tokens == round(68 + pairs)


def test_running_decodes_slow_the_prefill_and_the_prefill_slows_them():
    profile = Profile(
        prefill_tokens_per_s=1000, step_ms=5, decode_us_per_request=100, decode_ns_per_token=1000
    )
    load = Load(running_requests=20, running_tokens=3000, waiting_prefill_tokens=100)
    state = WorkerState(slot=0, load=load, charged_tokens=0, charged_requests=0)
    worker = make_worker(max_num_batched_tokens=70)
    terms = weigh(demand(100), Candidate(worker=worker, state=state, overlap_blocks=0, profile=profile)).terms
    assert terms.sharing_ms == pytest.approx(4 * (5 + 2 + 3))
    assert terms.slowdown_ms == pytest.approx(DECODE_WEIGHT * 20 * 100)
    assert terms.ttft_ms == pytest.approx(100 + 100 + 40)


def test_a_long_queue_everywhere_makes_no_tie_of_an_overlap():
    asked = demand(1600)
    warm, cold = candidate("warm:1", overlap=90, backlog=100_000), candidate("cold:1", backlog=99_000)
    assert names(plan(asked, [warm, cold], seed=1))[0] == "warm:1"


@pytest.mark.parametrize(
    ("num_tokens", "cached"), [(1, 0), (16, 0), (17, 16), (32, 16), (33, 32), (160, 144), (0, 0)]
)
def test_a_full_hit_leaves_the_block_of_the_last_token_to_compute(num_tokens, cached):
    assert weigh(demand(num_tokens), candidate(overlap=100)).cached_tokens == cached


def test_only_the_prompt_that_was_looked_up_can_be_cached():
    asked = demand(300, num_lookup_tokens=100)
    assert weigh(asked, candidate(overlap=100)).uncached_tokens == 300 - 96


def test_the_overlap_of_a_degraded_worker_does_not_count():
    wrong = candidate("wrong:1", overlap=90, degraded=Reason.HASHES)
    assert (weigh(demand(1600), wrong).cached_tokens, weigh(demand(1600), wrong).uncached_tokens) == (0, 1600)
    assert names(plan(demand(1600), [wrong, candidate("right:1", overlap=40)], seed=1))[0] == "right:1"


def test_overlap_wins_until_the_queue_costs_more():
    asked = demand(1600)
    warm = candidate("warm:1", overlap=90, backlog=1000)
    assert names(plan(asked, [warm, candidate("cold:1")], seed=1)) == ["warm:1", "cold:1"]
    busy = candidate("warm:1", overlap=90, backlog=4000)
    assert names(plan(asked, [busy, candidate("cold:1")], seed=1)) == ["cold:1", "warm:1"]


def test_a_faster_worker_wins():
    choices = plan(demand(1000), [candidate("slow:1", rate=1000), candidate("fast:1", rate=3000)], seed=1)
    assert names(choices) == ["fast:1", "slow:1"]


def test_ties_go_by_requests_then_room_then_kv_usage_then_the_draw():
    asked = demand(1000)
    fewer = [candidate("a:1", running=3), candidate("b:1", running=2)]
    assert names(plan(asked, fewer, seed=1))[0] == "b:1"
    roomier = [candidate("a:1", fill=0.9, usage=0.1), candidate("b:1", fill=0.2, usage=0.5)]
    assert names(plan(asked, roomier, seed=1))[0] == "b:1"
    emptier = [candidate("a:1", fill=0.93, usage=0.5), candidate("b:1", fill=0.94, usage=0.1)]
    assert names(plan(asked, emptier, seed=1))[0] == "b:1"
    equal = [candidate(f"{name}:1") for name in "abcd"]
    firsts = [names(plan(asked, equal, seed=seed))[0] for seed in range(400)]
    assert all(firsts.count(f"{name}:1") > 50 for name in "abcd")


def test_a_difference_within_the_noise_is_a_tie():
    asked = demand(1000)
    nearly = candidate("b:1", rate=1000 / (1 + TIE_SHARE / 2), running=0)
    assert names(plan(asked, [candidate("a:1", running=1), nearly], seed=1))[0] == "b:1"


def test_no_candidates_give_an_empty_plan():
    assert plan(demand(10), [], seed=1) == ()


@pytest.mark.parametrize(
    ("fields", "asked", "reason"),
    [
        ({}, {}, None),
        ({}, {"endpoints": frozenset({"other:1"})}, "not in the requested subset"),
        ({}, {"endpoints": frozenset({"10.0.0.1:8000"})}, None),
        ({}, {"model": "unknown"}, "does not serve the model"),
        ({}, {"model": "adapter"}, None),
        ({}, {"model": None}, None),
        ({"max_model_len": 9}, {"num_context_tokens": 10}, "context too short"),
        ({"max_model_len": 10}, {"num_context_tokens": 10}, None),
        ({"dp_size": 2, "dp_rank": 1}, {"dp_rank": 0}, "other data-parallel rank"),
        ({"dp_size": 2, "dp_rank": 1}, {"dp_rank": 1}, None),
        ({}, {"dp_rank": 0}, None),
    ],
)
def test_obstacle_names_what_is_in_the_way(fields, asked, reason):
    assert obstacle(make_worker(**fields), {"tiny", "adapter"}, demand(10, **asked)) == reason


def test_least_loaded_counts_requests_and_draws_among_equals():
    workers = [make_worker(f"{name}:1") for name in "abc"]
    requests = {"a:1": 2, "b:1": 1}
    assert [w.endpoint for w in least_loaded(workers, requests, seed=1)] == ["c:1", "b:1", "a:1"]
    firsts = {least_loaded(workers, {}, seed=seed)[0].endpoint for seed in range(50)}
    assert firsts == {"a:1", "b:1", "c:1"}


candidates = st.lists(
    st.builds(
        candidate,
        name=st.sampled_from([f"w{i}:1" for i in range(6)]),
        overlap=st.integers(0, 200),
        backlog=st.integers(0, 50_000),
        charged=st.integers(0, 10_000),
        running=st.integers(0, 50),
        usage=st.floats(0, 1),
        rate=st.floats(10, 1e6),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda c: c.worker.endpoint,
)
tokens = st.integers(1, 5000)
seeds = st.integers(0, 2**64 - 1)


@given(candidates, tokens, seeds, st.randoms())
def test_the_plan_holds_every_candidate_and_ignores_their_order(given_, num_tokens, seed, random):
    choices = plan(demand(num_tokens), given_, seed=seed)
    assert sorted(names(choices)) == sorted(c.worker.endpoint for c in given_)
    shuffled = list(given_)
    random.shuffle(shuffled)
    assert plan(demand(num_tokens), shuffled, seed=seed) == choices


@given(candidates, tokens, seeds)
def test_the_winner_is_within_the_tie_of_the_fastest_and_something_is_always_computed(
    given_, num_tokens, seed
):
    choices = plan(demand(num_tokens), given_, seed=seed)
    best_ms = min(choice.terms.cost_ms for choice in choices)
    assert choices[0].terms.cost_ms <= best_ms * (1 + TIE_SHARE) + TIE_MS
    assert all(1 <= choice.uncached_tokens <= num_tokens for choice in choices)
    assert all(choice.cached_tokens + choice.uncached_tokens == num_tokens for choice in choices)


def rank_of(name: str, choices) -> int:
    return names(choices).index(name)


@given(candidates, tokens, seeds, st.integers(1, 100), st.integers(1, 20_000))
def test_more_overlap_or_less_backlog_never_worsens_a_rank(given_, num_tokens, seed, more, less):
    first, *others = given_
    name = first.worker.endpoint
    before = plan(demand(num_tokens), given_, seed=seed)
    load = first.state.load
    warmer = Candidate(
        worker=first.worker,
        state=first.state,
        overlap_blocks=first.overlap_blocks + more,
        profile=first.profile,
    )
    assert rank_of(name, plan(demand(num_tokens), [warmer, *others], seed=seed)) <= rank_of(name, before)
    idler = candidate(
        name,
        overlap=first.overlap_blocks,
        backlog=max(load.waiting_prefill_tokens - less, 0),
        charged=first.state.charged_tokens,
        running=load.running_requests,
        usage=load.kv_usage,
        rate=first.profile.prefill_tokens_per_s,
    )
    assert rank_of(name, plan(demand(num_tokens), [idler, *others], seed=seed)) <= rank_of(name, before)


def beside_prompts(name: str, share: float, *, step_ms: float = 10.0, running: int = 0) -> Candidate:
    state = WorkerState(
        slot=0,
        load=Load(prefill_share=share, running_requests=running),
        charged_tokens=0,
        charged_requests=0,
    )
    profile = Profile(prefill_tokens_per_s=1000, step_ms=step_ms)
    return Candidate(worker=make_worker(name), state=state, overlap_blocks=0, profile=profile)


def test_prompts_to_come_hold_up_an_answer_by_the_share_of_time_that_they_took():
    stalls = [weigh(demand(100), beside_prompts("a:1", share)).terms.stalls_ms for share in (0, 0.5, 0.75)]
    lasts_ms = ANSWER_TOKENS * 10
    assert stalls == pytest.approx([0, DECODE_WEIGHT * lasts_ms, DECODE_WEIGHT * lasts_ms * 3])
    most, more = (weigh(demand(100), beside_prompts("a:1", share)).terms for share in (0.9, 1.0))
    assert most == more


def test_a_short_answer_has_little_to_lose():
    def stalls_ms(max_output_tokens: int | None) -> float:
        asked = demand(100, max_output_tokens=max_output_tokens)
        return weigh(asked, beside_prompts("a:1", 0.5)).terms.stalls_ms

    assert stalls_ms(1) == pytest.approx(DECODE_WEIGHT * 10)
    assert stalls_ms(10_000) == stalls_ms(None) == pytest.approx(DECODE_WEIGHT * 10 * ANSWER_TOKENS)


def test_of_equal_workers_the_one_with_fewer_prompts_answers():
    prompts, answers = beside_prompts("a:1", 0.8), beside_prompts("b:1", 0.1, running=1)
    assert names(plan(demand(100), [prompts, answers], seed=0)) == ["b:1", "a:1"]
