from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.replay.fleets import EngineFile
from gateway.replay.policies import PolicyName
from gateway.replay.run import Summary, play, summarize
from gateway.replay.simulation import FleetSpec
from gateway.replay.tiers import SimulatedTiers, TierSpec, parse_tier, reached_by, read_tiers
from gateway.replay.trace import Trace, TraceRequest, make_trace
from gateway.tiers import TierSpeed
from kvindex.errors import ConfigError
from kvindex.worker import Tier
from tests.support.cli import kvlane
from tests.support.recordings import DATA

SPEED = TierSpeed(gb_per_s=1.0, latency_ms=2.0)
CPU, OBJECT = (TierSpec(tier, 4000, SPEED) for tier in (Tier.CPU, Tier.OBJECT))


def test_a_tier_is_read_from_the_command_line():
    assert parse_tier("cpu=1.5TB@20@5") == TierSpec(
        Tier.CPU, 1_500_000_000_000, TierSpeed(gb_per_s=20, latency_ms=5)
    )
    assert [each.tier for each in read_tiers(["object=1PB@1", "cpu=1GB@1", "disk=1MB@0.5"])] == [
        Tier.CPU,
        Tier.DISK,
        Tier.OBJECT,
    ]


@pytest.mark.parametrize("text", ["cpu", "ram=1GB@1", "cpu=1@1", "cpu=1GB", "cpu=1GB@0", "cpu=1.1.1GB@1", ""])
def test_anything_else_is_refused_in_one_line(text):
    with pytest.raises(ConfigError, match="write cpu=SIZE@GB_PER_S"):
        parse_tier(text)


def test_a_tier_named_twice_is_refused():
    result = kvlane("replay", str(DATA / "mooncake_conversation_head.jsonl"), *["--tier", "cpu=1GB@1"] * 2)
    assert result.returncode == 2
    assert "may be named once" in result.stderr


def test_a_node_keeps_its_own_and_all_share_the_object_store():
    tiers = SimulatedTiers((CPU, OBJECT), 2, 1000)
    assert list(tiers.keep(0, [1, 2])) == [(0, {1: True, 2: True}), (2, {1: True, 2: True})]
    assert tiers.load(0, [1, 2, 3], 0, 100.0) == (2, pytest.approx(102.002))
    assert tiers.load(1, [1, 2, 3], 0, 100.0) == (2, pytest.approx(102.002))
    assert reached_by((CPU, OBJECT), 1) == ("1/cpu", "object")


def test_the_least_recently_used_goes_first():
    tiers = SimulatedTiers((CPU,), 1, 1000)
    list(tiers.keep(0, [1, 2, 3, 4]))
    tiers.load(0, [1], 0, 0.0)
    assert list(tiers.keep(0, [5, 3])) == [(0, {5: True, 2: False})]
    assert list(tiers.keep(0, range(10, 16))) == [
        (0, dict.fromkeys(range(12, 16), True) | dict.fromkeys([4, 1, 5, 3], False))
    ]


def test_loads_from_one_tier_wait_for_each_other_and_cached_blocks_are_not_read():
    tiers = SimulatedTiers((replace(CPU, capacity_bytes=10**9),), 1, 10**6)
    list(tiers.keep(0, [1, 2, 3]))
    assert tiers.load(0, [1, 2, 3], 1, 0.0) == (3, pytest.approx(4.0))
    assert tiers.load(0, [1, 2, 3], 2, 1.0) == (3, pytest.approx(7.0))
    assert tiers.load(0, [1, 2, 3], 3, 1.0) == (0, 1.0)
    assert tiers.load(0, [9], 0, 1.0) == (0, 1.0)


def test_of_an_object_store_what_is_cached_is_read_as_well_if_anything_is():
    tiers = SimulatedTiers((replace(OBJECT, capacity_bytes=10**9),), 1, 10**6)
    list(tiers.keep(0, [1, 2, 3]))
    assert tiers.load(0, [1, 2, 3], 2, 0.0) == (3, pytest.approx(5.0))
    assert tiers.load(0, [1, 2, 3], 3, 10.0) == (0, 10.0)


def conversations() -> Trace:
    """Twelve conversations in turn, more than an engine's cache holds."""

    def turn(at_ms: float, name: int, number: int) -> tuple[float, TraceRequest]:
        blocks = tuple(1000 * name + depth for depth in range(20 * number))
        return at_ms, TraceRequest(0.0, 512 * len(blocks) + 100, 5, blocks)

    turns = [
        turn(30_000 * number + 2_000 * name, name, number) for name in range(12) for number in range(1, 4)
    ]
    return make_trace("conversations", 512, turns)


def played(policy: PolicyName, *tiers: str, belief: float = 1.0) -> Summary:
    trace = conversations()
    engine = EngineFile(kv_tokens=60_000).spec(trace.block_size)
    fleet = FleetSpec(engine=engine, num_workers=2, tiers=read_tiers(tiers), tier_belief=belief)
    outcome = play(policy, fleet, trace, seed=0)
    again = play(policy, fleet, trace, seed=0)
    summary = summarize(policy, trace, outcome, ttft_target_ms=2000)
    assert summary == summarize(policy, trace, again, ttft_target_ms=2000)
    return summary


@pytest.mark.parametrize("policy", [PolicyName.KVLANE, PolicyName.RANDOM])
def test_tiers_give_back_what_engines_have_evicted(policy):
    alone, tiers = played(policy), played(policy, "cpu=1TB@20@5", "object=1PB@5@20")
    assert alone.loaded_rate == 0
    assert tiers.loaded_rate > 0.2
    assert tiers.hit_rate > alone.hit_rate + 0.2
    assert tiers.ttft_ms.mean < alone.ttft_ms.mean


def test_a_tier_that_is_slower_than_computing_is_left_alone_by_us():
    alone, slow = played(PolicyName.KVLANE), played(PolicyName.KVLANE, "object=1PB@0.01@1000")
    assert slow.loaded_rate == 0
    assert slow.ttft_ms == alone.ttft_ms
    assert played(PolicyName.RANDOM, "object=1PB@0.01@1000").ttft_ms.mean > 5 * alone.ttft_ms.mean


def test_a_tier_that_is_believed_too_fast_is_found_out():
    slow = "object=1PB@0.2@100"
    wrong = played(PolicyName.KVLANE, slow, belief=100)
    assert 0 < wrong.loaded_rate < 0.7 * played(PolicyName.RANDOM, slow).loaded_rate
