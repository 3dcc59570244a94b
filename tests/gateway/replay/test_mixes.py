from __future__ import annotations

import statistics

import pytest

from gateway.replay.fleets import EngineFile
from gateway.replay.mixes import Mix
from gateway.replay.policies import PolicyName
from gateway.replay.run import Summary, play, summarize
from gateway.replay.simulation import FleetSpec
from gateway.replay.wire import WireSpec
from kvindex.worker import Role

MIX = Mix(long_share=0.1, requests_per_s=6.0, num_requests=600)


def test_a_mix_is_what_it_says_and_the_same_for_the_same_seed():
    trace = MIX.trace(1)
    assert trace == MIX.trace(1) != MIX.trace(2)
    assert trace.requests_per_s == pytest.approx(6.0, rel=0.1)
    long = [each for each in trace.requests if each.num_tokens > 10_000]
    assert len(long) / 600 == pytest.approx(0.1, abs=0.04)
    assert statistics.fmean(each.num_tokens for each in long) == pytest.approx(32_000, rel=0.1)
    contents = [block for each in trace.requests for block in each.blocks]
    assert len(contents) == len(set(contents))


def played(wire: WireSpec | None, roles: tuple[Role, ...] = (), load: float = 1.0) -> Summary:
    trace = MIX.trace(0).at_speed(load)
    fleet = FleetSpec(engine=EngineFile().spec(trace.block_size), num_workers=4, wire=wire, roles=roles)
    return summarize(
        PolicyName.KVLANE, trace, play(PolicyName.KVLANE, fleet, trace, seed=0), ttft_target_ms=2_000
    )


@pytest.mark.parametrize("load", [0.25, 1.0, 1.5])
@pytest.mark.parametrize("gb_per_s", [0.5, 50.0])
def test_where_requests_may_be_split_nothing_is_lost(load, gb_per_s):
    whole, split = played(None, load=load), played(WireSpec(gb_per_s, 2.0), load=load)
    assert whole.num_split == 0
    assert split.ttft_ms.mean < 1.05 * whole.ttft_ms.mean
    assert split.itl_ms.mean < 1.05 * whole.itl_ms.mean
    assert split.e2e_ms.mean < 1.05 * whole.e2e_ms.mean


def test_a_prefill_worker_is_of_use_only_behind_a_wire():
    roles = (Role.PREFILL, *(Role.BOTH,) * 3)
    alone, fast, slow = (
        played(None, roles),
        played(WireSpec(50.0, 2.0), roles),
        played(WireSpec(0.1, 2.0), roles),
    )
    assert fast.num_split > 20
    assert fast.transfer_overlap > 0.5
    assert fast.ttft_ms.mean < 0.95 * alone.ttft_ms.mean
    assert fast.itl_ms.mean < 0.95 * alone.itl_ms.mean
    # What a wire is like is found out by a transfer or two for each worker that answers.
    assert slow.num_split <= 6
