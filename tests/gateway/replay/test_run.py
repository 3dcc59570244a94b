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
from kvindex.errors import ConfigError
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
    result = kvlane("replay", str(MOONCAKE), *options)
    assert result.returncode == 0, result.stderr
    assert "block" not in result.stdout
    assert "random" in result.stdout
    written = json.loads(file.read_text())
    assert [each["policy"] for each in written["summaries"]] == ["kvlane", "random"]
    plots = sorted((tmp_path / "plots").iterdir())
    assert [each.name for each in plots] == ["e2e.png", "goodput.png", "hit_rate.png", "load.png", "ttft.png"]
    assert all(each.read_bytes().startswith(b"\x89PNG") for each in plots)
