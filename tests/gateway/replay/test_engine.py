from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.profile import Profile
from gateway.replay.engine import GAP_MS, Engine, EngineSpec, Job
from gateway.replay.trace import TraceRequest

PROFILE = Profile(
    prefill_tokens_per_s=10_000,
    attention_ns_per_pair=10,
    step_ms=5,
    decode_us_per_request=100,
    decode_ns_per_token=200,
)


def spec(**changes) -> EngineSpec:
    known = {"profile": PROFILE, "num_blocks": 1000, "block_size": 16, "max_num_batched_tokens": 256}
    return EngineSpec(**(known | changes))


def job(number: int, num_tokens: int, num_output_tokens: int = 1, blocks=(), at: float = 0.0) -> Job:
    return Job(number, TraceRequest(at, num_tokens, num_output_tokens, tuple(blocks)), at)


def play(engine: Engine, jobs: list[Job]) -> None:
    """Submit each job at its arrival; wake the engine whenever it asks for it."""
    waiting = sorted(jobs, key=lambda each: each.arrived_ms)
    while waiting or engine.is_busy:
        if waiting and waiting[0].arrived_ms < engine.wake_ms:
            arriving = waiting.pop(0)
            engine.submit(arriving, arriving.arrived_ms)
        else:
            engine.wake(engine.wake_ms)


def by_steps(jobs: list[Job], budget: int) -> dict[int, tuple[float, float]]:
    """Return first and last token's times, step by step; prompts share nothing and all fit."""
    now, waiting = 0.0, sorted(jobs, key=lambda each: each.arrived_ms)
    done, out, times = {}, {}, {}
    while len(out) < len(jobs) or any(out[each.number] < each.request.num_output_tokens for each in jobs):
        here = [each for each in waiting if each.arrived_ms <= now]
        active = [each for each in here if out.get(each.number, 0) < each.request.num_output_tokens]
        if not active:
            now = min(each.arrived_ms for each in waiting if each.number not in out)
            continue
        decoding = [each for each in active if each.number in out]
        context = sum(each.request.num_tokens + out[each.number] for each in decoding)
        step_ms = PROFILE.step_ms + len(decoding) * 0.1 + context * 200 / 1e6
        left, ended = budget - len(decoding), []
        for each in active:
            if each.number not in out and left > 0:
                start = done.get(each.number, 0)
                chunk = min(left, each.request.num_tokens - start)
                left -= chunk
                done[each.number] = start + chunk
                step_ms += chunk / 10 + chunk * (start + chunk / 2) * 10 / 1e6
                if start + chunk == each.request.num_tokens:
                    ended.append(each)
        now += step_ms
        for each in decoding:
            out[each.number] += 1
        for each in ended:
            out[each.number] = 1
            times[each.number] = (now, now)
        for each in here:
            if each.number in times and out[each.number] == each.request.num_output_tokens:
                first, last = times[each.number]
                times[each.number] = (
                    (first, last if last > first else now) if each in active else (first, last)
                )
    return times


@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 900), st.integers(1, 60)), min_size=1, max_size=8)
)
def test_times_are_those_of_a_simulation_step_by_step(arrivals):
    # No two at the same moment, for then the first of them would get the step for itself.
    jobs = [
        job(number, tokens, out, at=at + 0.0137 * number) for number, (at, tokens, out) in enumerate(arrivals)
    ]
    play(Engine(spec()), jobs)
    expected = by_steps(jobs, 256)
    for each in jobs:
        assert (each.first_token_ms, each.finished_ms) == pytest.approx(expected[each.number])


def test_a_prompt_is_computed_in_chunks_of_the_budget_and_attention_grows_with_the_square():
    alone = job(0, 512)
    play(Engine(spec()), [alone])
    assert alone.first_token_ms == pytest.approx(2 * 5 + 51.2 + 512 * 512 / 2 * 10 / 1e6)


def test_what_is_cached_is_not_computed_again_but_the_last_token_is():
    engine = Engine(spec())
    first, second = (
        job(0, 64, blocks=range(4), at=0.0),
        job(1, 64, blocks=range(4), at=1000.0),
    )
    play(engine, [first, second])
    assert (first.cached_tokens, second.cached_tokens) == (0, 48)
    assert second.ttft_ms == pytest.approx(5 + 1.6 + 16 * (48 + 8) * 10 / 1e6)


def test_a_sibling_in_the_same_step_finds_what_was_scheduled_before_it():
    engine = Engine(spec())
    siblings = [job(number, 70, blocks=range(4), at=float(number > 0)) for number in range(3)]
    play(engine, siblings)
    assert [each.cached_tokens for each in siblings] == [0, 64, 64]


def test_a_request_waits_until_the_cache_has_room():
    engine = Engine(spec(num_blocks=10))
    long, short = job(0, 100, 50), job(1, 100, 10, at=1.0)
    play(engine, [long, short])
    assert short.first_token_ms > long.finished_ms


def test_the_load_is_what_is_waiting_and_what_is_decoding():
    engine = Engine(spec())
    play_until_first = job(0, 100, 1000)
    engine.submit(play_until_first, 0.0)
    engine.wake(engine.wake_ms)
    engine.submit(job(1, 700), 200.0)
    engine.wake(engine.wake_ms)
    load = engine.load(engine.wake_ms)
    assert load.running_requests == 2
    assert load.waiting_prefill_tokens == 700 - 255 + 255 // 2  # half of the step under way
    assert load.running_tokens >= 101
    assert load.prefill_share == 0  # of ten seconds, the first prompt took 20 ms
    assert not math.isinf(engine.wake_ms)


def test_times_between_tokens_are_counted_token_by_token():
    engine = Engine(spec())
    decoding, long = job(0, 100, 5), job(1, 500, 1, at=16.0)
    play(engine, [decoding, long])
    assert engine.num_gaps.total() == 4
    # One step of its own, two beside the long prompt's chunks, and one of its own.
    chunks = sorted(engine.num_gaps.elements())[-2:]
    assert chunks[0] * GAP_MS > 24
    assert sum(engine.num_gaps.elements()) * GAP_MS == pytest.approx(
        decoding.finished_ms - decoding.first_token_ms, abs=0.02
    )


def test_a_prefill_half_keeps_its_blocks_until_they_are_released():
    engine = Engine(spec())
    whole = job(0, 400, 50, blocks=range(25))
    whole.split(0, "half")
    half = whole.prefill
    engine.submit(half, 0.0)
    computed = []
    while engine.is_busy:
        computed += [num_tokens for _, num_tokens in engine.wake(engine.wake_ms).computed]
    assert computed == [256, 400]
    assert half.finished_ms == half.first_token_ms
    assert engine.cache.num_used_blocks > 0
    engine.release(half, engine.wake_ms)
    assert engine.cache.num_used_blocks == 0
    assert engine.cache.num_leading(range(25)) == 25


def test_a_decode_half_holds_room_computes_one_token_and_lets_others_pass():
    engine = Engine(spec())
    waiting, behind = job(0, 400, 3, blocks=range(25)), job(1, 64)
    waiting.split(1, "half")
    engine.submit(waiting, 0.0)
    assert engine.asking == [waiting]
    assert not engine.is_busy
    assert engine.cache.num_used_blocks == 26
    load = engine.load(0.0)
    assert (load.waiting_requests, load.waiting_prefill_tokens) == (1, 1)
    play(engine, [behind])
    assert not math.isnan(behind.finished_ms)
    assert math.isnan(waiting.first_token_ms)
    engine.received(waiting, 100.0)
    play(engine, [])
    assert waiting.first_token_ms == pytest.approx(100 + 5 + 0.1 + 399.5 * 10 / 1e6)
    assert engine.cache.num_leading(range(25)) == 25
    assert engine.cache.num_used_blocks == 0
