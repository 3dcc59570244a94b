from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.errors import TraceError
from gateway.replay.bounds import hit_rate, oracle_ttfts_ms, pooled_hits
from gateway.replay.fleets import EngineFile, read_engine
from gateway.replay.policies import PolicyName
from gateway.replay.readers import read_trace
from gateway.replay.run import play, summarize
from gateway.replay.simulation import FleetSpec
from gateway.replay.trace import Trace, TraceRequest, make_trace
from gateway.replay.variations import VARIATIONS
from gateway.replay.wire import WireSpec
from kvindex.errors import ConfigError
from kvindex.worker import Role
from tests.support.cli import kvlane

MOONCAKE = Path(__file__).parents[2] / "data" / "mooncake_conversation_head.jsonl"


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(MOONCAKE).at_speed(4)


def fleet(trace: Trace, **changes) -> FleetSpec:
    return FleetSpec(engine=EngineFile().spec(trace.block_size), **changes)


@pytest.mark.parametrize("policy", PolicyName)
@pytest.mark.parametrize("num_gateways", [1, 3])
def test_every_request_is_served_and_a_second_run_is_the_same(policy, num_gateways, trace):
    spec = fleet(trace, num_gateways=num_gateways)
    outcome = play(policy, spec, trace, seed=3)
    for job, bound_ms in zip(outcome.jobs, oracle_ttfts_ms(trace, spec.engine), strict=True):
        assert job.ttft_ms >= bound_ms
        assert job.finished_ms >= job.first_token_ms
    again = play(policy, spec, trace, seed=3)
    first, second = (summarize(policy, trace, each, ttft_target_ms=2000) for each in (outcome, again))
    assert first == second
    assert 0 <= first.hit_rate <= hit_rate(trace, pooled_hits(trace, float("inf")))


def test_conversations_go_where_their_blocks_are():
    def turn(at_ms: float, conversation: int, number: int) -> tuple[float, TraceRequest]:
        blocks = tuple(1000 * conversation + depth for depth in range(20 * number))
        return at_ms, TraceRequest(0.0, 512 * len(blocks) + 100, 50, blocks)

    turns = [turn(9000 * number + 100 * name, name, number) for name in range(16) for number in range(1, 5)]
    trace = make_trace("conversations", 512, turns)
    rates = {
        policy: summarize(
            policy, trace, play(policy, fleet(trace), trace, seed=0), ttft_target_ms=2000
        ).hit_rate
        for policy in (PolicyName.KVLANE, PolicyName.RANDOM)
    }
    assert rates[PolicyName.KVLANE] > 0.9 * hit_rate(trace, pooled_hits(trace, float("inf")))
    assert rates[PolicyName.RANDOM] < 0.5 * rates[PolicyName.KVLANE]


def test_prompts_are_computed_by_prefill_workers_where_that_costs_less(trace):
    engine = EngineFile(kv_bytes_per_token=1_000, max_num_batched_tokens=2_048).spec(trace.block_size)
    spec = FleetSpec(
        engine=engine,
        num_workers=3,
        wire=WireSpec(10.0, 1.0),
        roles=(Role.PREFILL, Role.DECODE, Role.BOTH),
    )
    busy = trace.at_speed(0.15)
    outcome = play(PolicyName.KVLANE, spec, busy, seed=0)
    summary = summarize(PolicyName.KVLANE, busy, outcome, ttft_target_ms=2000)
    split = [job for job in outcome.jobs if job.prefill is not None]
    assert 0 < len(split) == summary.num_split == len(outcome.transfers) < len(outcome.jobs)
    assert {job.prefill.worker for job in split} <= {0, 2}
    assert {job.worker for job in outcome.jobs} == {1, 2}
    assert 0 < summary.transfer_overlap < 1
    assert (
        summary.transferred_bytes
        == sum(each.num_bytes for each in outcome.transfers)
        <= 1_000 * sum(job.request.num_tokens for job in split)
    )
    assert summary == summarize(
        PolicyName.KVLANE, busy, play(PolicyName.KVLANE, spec, busy, seed=0), ttft_target_ms=2000
    )
    still = FleetSpec(engine=engine, num_workers=3, roles=spec.roles)
    whole = summarize(
        PolicyName.KVLANE, busy, play(PolicyName.KVLANE, still, busy, seed=0), ttft_target_ms=2000
    )
    assert whole.num_split == 0
    assert summary.itl_ms.mean < whole.itl_ms.mean


@pytest.mark.parametrize("variation", VARIATIONS)
def test_variations_keep_the_requests_and_follow_the_seed(variation, trace):
    varied = VARIATIONS[variation](trace, 1)
    assert len(varied.requests) == len(trace.requests)
    assert varied == VARIATIONS[variation](trace, 1)
    assert varied.requests != trace.requests
    assert [each.at_ms for each in varied.requests] == sorted(each.at_ms for each in varied.requests)


def test_a_request_that_fits_no_worker_is_refused(trace):
    small = FleetSpec(engine=EngineFile(kv_tokens=5_000).spec(trace.block_size))
    with pytest.raises(TraceError, match="kv_tokens"):
        play(PolicyName.RANDOM, small, trace, seed=0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("step_ms: 0\n", "step_ms"),
        ("speed: 3\n", "speed"),
        ("max_num_seqs: 9000\n", "below"),
        ("[", "--engine"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(tmp_path, content, says):
    file = tmp_path / "engine.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=says):
        read_engine(file)


def test_the_command_writes_a_table_and_json(tmp_path):
    file = tmp_path / "out.json"
    options = [
        "--policy",
        "kvlane",
        "--policy",
        "random",
        "--speed",
        "2",
        "--limit",
        "20",
        "--json",
        str(file),
    ]
    options += ["--plots", str(tmp_path / "plots")]
    options += ["--wire", "50@2", "--roles", "prefill=2"]
    result = kvlane("replay", str(MOONCAKE), *options)
    assert result.returncode == 0, result.stderr
    assert "overlap" in result.stdout
    assert "block" not in result.stdout
    assert "random" in result.stdout
    written = json.loads(file.read_text())
    assert [each["policy"] for each in written["summaries"]] == ["kvlane", "random"]
    assert written["fleet"]["roles"] == ["prefill"] * 2 + ["both"] * 6
    assert written["summaries"][0]["itl_ms"]["p99"] > 0
    plots = sorted((tmp_path / "plots").iterdir())
    assert [each.name for each in plots] == ["e2e.png", "goodput.png", "hit_rate.png", "load.png", "ttft.png"]
    assert all(each.read_bytes().startswith(b"\x89PNG") for each in plots)
