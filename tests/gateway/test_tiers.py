from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.plan import Candidate, Demand, weigh
from gateway.profile import Profile
from gateway.tiers import (
    BOUND,
    HALF_LIFE_S,
    SPEEDS,
    Source,
    TierLoad,
    TierPart,
    TierRun,
    TierSpeed,
    TierSpeeds,
    tier_loads,
    tier_runs,
)
from kvindex.stores import Store, StoreSpeed
from kvindex.worker import Load, Tier, WorkerState
from tests.support.workers import make_worker

FAST = TierSpeed(gb_per_s=1.024, latency_ms=2.0)  # 1 ms for 1000 tokens of 1024 bytes
SLOW = TierSpeed(gb_per_s=0.001024, latency_ms=100.0)


def store(name: str, tier: Tier, teller: str = "") -> Store:
    return Store(name=name, teller=teller, tier=tier, model="m", chunk_size=64, incarnation=name)


CPU, DISK = store("a/cpu", Tier.CPU), store("a/fs", Tier.DISK)
BUCKET, OTHER_CPU = store("s3://b", Tier.OBJECT), store("b/cpu", Tier.CPU)
REACHED = frozenset({"a/cpu", "a/fs", "s3://b"})


def runs(*chunks: list[Store], reached: frozenset[str] = REACHED) -> list[tuple[str, int, int]]:
    return [(each.name, first, end) for each, first, end in tier_runs(chunks, reached, 64)]


def test_each_chunk_comes_from_the_fastest_tier_that_has_it_until_one_is_nowhere():
    found = runs([BUCKET, CPU], [DISK, CPU], [DISK, BUCKET], [BUCKET], [], [CPU])
    assert found == [("a/cpu", 0, 128), ("a/fs", 128, 192), ("s3://b", 192, 256)]


def test_what_a_worker_does_not_reach_is_not_there():
    assert runs([OTHER_CPU], [CPU]) == []
    assert runs([OTHER_CPU, BUCKET], [OTHER_CPU]) == [("s3://b", 0, 64)]
    assert runs() == []


def test_all_who_tell_of_a_store_tell_of_one():
    events = store("s3://b", Tier.OBJECT, "node")
    assert runs([BUCKET], [events], [events, BUCKET]) == [("s3://b", 0, 192)]


def part(at: Store, first: int, end: int, speed: TierSpeed = FAST) -> TierPart:
    return TierPart(store=at.name, tier=at.tier, first_token=first, end_token=end, speed=speed, known=speed)


def test_a_load_is_what_lies_behind_the_cached_tokens_and_before_the_last():
    parts = [part(CPU, 0, 1000), part(DISK, 1000, 3000, SLOW), part(CPU, 3000, 4000)]
    [memory, disk] = tier_loads(parts, 500, 3499, 1024)
    assert (memory.store, memory.num_tokens, memory.ms) == ("a/cpu", 999, pytest.approx(2 + 0.999))
    assert (disk.store, disk.num_tokens, disk.ms) == ("a/fs", 2000, pytest.approx(100 + 2000))
    assert tier_loads(parts, 4000, 5000, 1024) == tier_loads(parts, 2000, 2000, 1024) == ()
    [disk, memory] = tier_loads(parts, 2000, 3499, 1024, read_from=1500)
    assert (disk.num_tokens, disk.num_bytes) == (1000, 1500 * 1024)
    assert (memory.num_tokens, memory.num_bytes) == (499, 499 * 1024)


def candidate(*parts: TierPart, overlap: int = 0, pending: int = 0, rate: float = 1000.0) -> Candidate:
    return Candidate(
        worker=make_worker(),
        state=WorkerState(slot=0, load=Load(), charged_tokens=0, charged_requests=0),
        overlap_blocks=overlap,
        pending_blocks=pending,
        profile=Profile(prefill_tokens_per_s=rate),
        tiers=parts,
    )


def demand(num_tokens: int) -> Demand:
    return Demand(num_tokens=num_tokens, num_lookup_tokens=num_tokens, model="tiny")


def test_what_tiers_hold_is_loaded_where_that_is_faster():
    choice = weigh(demand(1000), candidate(part(CPU, 0, 640)))
    assert (choice.loaded_tokens, choice.uncached_tokens, choice.passed_over) == (640, 360, ())
    assert choice.load_limit_tokens is None
    assert [(cut.end_token, cut.ttft_ms) for cut in choice.cuts] == [(0, 1000), (640, pytest.approx(362.64))]
    assert choice.terms.load_ms == pytest.approx(2.64)
    assert choice.terms.prefill_ms == pytest.approx(360)
    assert choice.terms.ttft_ms == pytest.approx(362.64)
    assert choice.charge_tokens == 360


def test_what_is_slower_to_load_is_computed_and_the_choice_says_what_it_was():
    choice = weigh(demand(1000), candidate(part(BUCKET, 0, 640, SLOW)))
    assert (choice.loads, choice.loaded_tokens, choice.uncached_tokens) == ((), 0, 1000)
    assert (choice.terms.load_ms, choice.load_limit_tokens) == (0, 0)
    assert [(load.store, load.num_tokens) for load in choice.passed_over] == [("s3://b", 640)]
    assert choice.passed_over[0].ms == pytest.approx(740)


def test_what_is_near_is_loaded_and_what_is_far_behind_it_is_computed():
    parts = part(CPU, 0, 640), part(BUCKET, 640, 1280, SLOW)
    choice = weigh(demand(2000), candidate(*parts, overlap=10))
    assert [(load.store, load.num_tokens) for load in choice.loads] == [("a/cpu", 480)]
    assert [(load.store, load.num_tokens) for load in choice.passed_over] == [("s3://b", 640)]
    assert (choice.load_limit_tokens, choice.uncached_tokens) == (640, 1360)
    assert [cut.end_token for cut in choice.cuts] == [160, 640, 1280]
    assert choice.terms.ttft_ms == choice.cuts[1].ttft_ms == min(cut.ttft_ms for cut in choice.cuts)


def test_what_is_far_is_loaded_for_the_sake_of_much_that_is_near_behind_it():
    parts = part(BUCKET, 0, 64, TierSpeed(gb_per_s=1.0, latency_ms=200.0)), part(CPU, 64, 1984)
    choice = weigh(demand(2000), candidate(*parts))
    assert (choice.loaded_tokens, choice.passed_over) == (1984, ())
    assert weigh(demand(100), candidate(*parts)).loads == ()


def test_short_loads_are_not_worth_their_latency():
    speed = TierSpeed(gb_per_s=100.0, latency_ms=100.0)
    assert not weigh(demand(129), candidate(part(CPU, 0, 64, speed))).loads
    assert weigh(demand(1290), candidate(part(CPU, 0, 640, speed))).loads


def test_only_what_lies_behind_the_cached_and_the_pending_blocks_is_loaded():
    choice = weigh(demand(1000), candidate(part(CPU, 0, 640), overlap=10, pending=20))
    assert (choice.cached_tokens, choice.pending_tokens, choice.loaded_tokens) == (160, 160, 320)
    choice = weigh(demand(1000), candidate(part(CPU, 0, 640), overlap=50))
    assert (choice.loads, choice.passed_over, choice.cuts) == ((), (), ())


def test_of_a_disk_or_a_bucket_what_is_cached_is_read_as_well_if_anything_is():
    parts = part(BUCKET, 0, 320), part(CPU, 320, 640)
    choice = weigh(demand(1000), candidate(*parts, overlap=10))
    # In memory only what is missing.
    assert [(load.num_tokens, load.num_bytes // 1024) for load in choice.loads] == [(160, 320), (320, 320)]
    assert choice.terms.load_ms == pytest.approx(2.32 + 2.32)
    assert (choice.cached_tokens, choice.loaded_tokens, choice.uncached_tokens) == (160, 480, 360)
    cached = weigh(demand(1000), candidate(*parts, overlap=40))
    assert (cached.loads, cached.passed_over, cached.load_limit_tokens) == ((), (), 0)
    assert weigh(demand(1000), candidate(part(CPU, 0, 640), overlap=40)).load_limit_tokens is None


def test_the_last_token_is_computed():
    choice = weigh(demand(640), candidate(part(CPU, 0, 640)))
    assert (choice.loaded_tokens, choice.uncached_tokens) == (639, 1)


@given(
    st.integers(1, 5000),
    st.integers(0, 400),
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 20), st.floats(0.001, 100), st.floats(0, 500)), max_size=4
    ),
    st.floats(0, 1e6),
)
def test_no_other_chunk_to_stop_at_is_predicted_to_be_sooner(num_tokens, overlap, sizes, attention_ns):
    parts, at = [], 0
    speeds = {}
    for number, num_chunks, gb_per_s, latency_ms in sizes:
        speed = speeds.setdefault(number, TierSpeed(gb_per_s=gb_per_s, latency_ms=latency_ms))
        named = store(f"store {number}", Tier.DISK)
        parts.append(part(named, at, at + 64 * num_chunks, speed))
        at += 64 * num_chunks
    given = candidate(*parts, overlap=overlap)
    given = msgspec.structs.replace(
        given, profile=Profile(prefill_tokens_per_s=1000, attention_ns_per_pair=attention_ns)
    )
    choice = weigh(demand(num_tokens), given)
    assert choice.cached_tokens + choice.loaded_tokens + choice.uncached_tokens == num_tokens
    assert choice.uncached_tokens >= 1
    for end in range(0, at + 1, 64):
        shorter = [
            msgspec.structs.replace(each, end_token=min(end, each.end_token))
            for each in parts
            if each.first_token < end
        ]
        all_of_it = weigh(demand(num_tokens), msgspec.structs.replace(given, tiers=tuple(shorter))).cuts
        if all_of_it:
            assert choice.terms.ttft_ms <= all_of_it[-1].ttft_ms * (1 + 1e-9)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def load(ms: float, at: Store = BUCKET, known: TierSpeed | None = None) -> TierLoad:
    known = known or SPEEDS[at.tier]
    return TierLoad(store=at.name, tier=at.tier, num_tokens=1000, num_bytes=10**6, ms=ms, known=known)


def load_ms(speeds: TierSpeeds, at: Store = BUCKET) -> float:
    [found] = tier_loads(speeds.parts([TierRun(at, 0, 10_000)]), 0, 10_000, 1024)
    return found.ms


def test_a_store_that_is_slower_than_predicted_is_soon_known_to_be():
    speeds = TierSpeeds({Tier.OBJECT: FAST})
    before_ms = load_ms(speeds)
    for _ in range(12):
        now_ms = load_ms(speeds)
        told = load(now_ms, known=FAST)
        speeds.observe([told], predicted_ms=now_ms + 10, queue_ms=0, ttft_ms=5 * before_ms + 10)
    assert load_ms(speeds) == pytest.approx(5 * before_ms, rel=0.05)
    assert load_ms(speeds, CPU) == load_ms(TierSpeeds(), CPU)


def test_a_load_that_was_predicted_to_be_short_and_took_long_is_blamed():
    speeds = TierSpeeds()
    before_ms = load_ms(speeds)
    speeds.observe([load(10)], predicted_ms=1000, queue_ms=0, ttft_ms=20_000)
    assert load_ms(speeds) > 2 * before_ms


def test_without_samples_a_slow_store_is_tried_again():
    clock = Clock()
    speeds = TierSpeeds({Tier.OBJECT: FAST}, clock=clock)
    before_ms = load_ms(speeds)
    for _ in range(50):
        speeds.observe([load(100, known=FAST)], predicted_ms=100, queue_ms=0, ttft_ms=100_000)
    assert load_ms(speeds) == pytest.approx(before_ms * math.exp(BOUND))
    clock.now_s += 20 * HALF_LIFE_S
    assert load_ms(speeds) == pytest.approx(before_ms, rel=1e-4)


def test_a_load_that_is_a_small_part_of_the_whole_or_behind_a_queue_tells_nothing():
    speeds = TierSpeeds()
    before_ms = load_ms(speeds)
    speeds.observe([load(100)], predicted_ms=1000, queue_ms=0, ttft_ms=1050)
    speeds.observe([load(100)], predicted_ms=1000, queue_ms=1000, ttft_ms=9000)
    speeds.observe([], predicted_ms=1000, queue_ms=0, ttft_ms=9000)
    assert load_ms(speeds) == before_ms


def test_of_two_stores_the_larger_load_is_blamed_most():
    speeds = TierSpeeds()
    before = load_ms(speeds, CPU), load_ms(speeds, BUCKET)
    speeds.observe([load(10, CPU), load(90)], predicted_ms=100, queue_ms=0, ttft_ms=300)
    assert 1 < load_ms(speeds, CPU) / before[0] < load_ms(speeds, BUCKET) / before[1]


MEASURED = {"s3://b": {"": StoreSpeed(num_loads=9, gb_per_s=2.0, latency_ms=50.0)}}
WORKER = Load(tier_gb_per_s=6.0, tier_latency_ms=3.0)


def known(speeds: TierSpeeds, at: Store, **options: Any) -> tuple[float, float, Source]:
    """Return GB/s, latency and whence they are, of what a worker would load from a store."""
    [found] = speeds.parts([TierRun(at, 0, 64)], **options)
    return found.speed.gb_per_s, found.speed.latency_ms, found.source


def test_what_was_measured_takes_the_place_of_the_settings():
    speeds = TierSpeeds({Tier.CPU: TierSpeed(gb_per_s=3.0, latency_ms=1.0), Tier.OBJECT: SLOW})
    assert known(speeds, BUCKET) == (0.001024, 100, Source.SETTINGS)
    assert known(speeds, CPU) == (3, 1, Source.SETTINGS)
    assert known(speeds, CPU, load=WORKER) == (6, 3, Source.MEASURED)
    # Into memory as the server measured it, and from there as the worker did.
    assert known(speeds, BUCKET, measured=MEASURED, load=WORKER) == (pytest.approx(1.5), 53, Source.MEASURED)
    assert known(speeds, BUCKET, measured=MEASURED) == (pytest.approx(1.2), 51, Source.MEASURED)
    # A worker that has loaded says nothing of how a disk is read.
    assert known(speeds, DISK, measured=MEASURED, load=WORKER)[2] is Source.SETTINGS


def test_a_bucket_is_as_fast_as_the_workers_own_server_has_found_it():
    slow = StoreSpeed(num_loads=1, gb_per_s=0.01, latency_ms=900.0)
    measured = {"s3://b": {"near": MEASURED["s3://b"][""], "far": slow}}
    for server, latency_ms in {"near": 55, "far": 905, "new": 55}.items():
        assert known(TierSpeeds(), BUCKET, server=server, measured=measured)[1] == latency_ms


def test_what_first_tokens_told_is_not_counted_again_when_it_was_measured_as_well():
    speeds = TierSpeeds()
    fast, slow = TierSpeed(gb_per_s=1.0), TierSpeed(gb_per_s=0.1)
    for _ in range(20):
        factor = speeds.factor("s3://b", fast, Source.MEASURED)
        told = msgspec.structs.replace(load(factor, known=fast), source=Source.MEASURED)
        speeds.observe([told], predicted_ms=factor, queue_ms=0, ttft_ms=20)
    assert speeds.factor("s3://b", fast, Source.MEASURED) == pytest.approx(20, rel=0.01)
    assert speeds.factor("s3://b", slow, Source.MEASURED) == pytest.approx(2, rel=0.01)
    assert speeds.factor("s3://b", TierSpeed(gb_per_s=0.001), Source.MEASURED) == 1
    assert speeds.factor("s3://b", TierSpeed(gb_per_s=9.0), Source.MEASURED) == pytest.approx(20, rel=0.01)
    # It was learned of what was measured, and says nothing of the settings.
    assert speeds.factor("s3://b", fast, Source.SETTINGS) == 1
