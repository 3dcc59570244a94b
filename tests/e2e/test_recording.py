"""What a fleet served is recorded and replayed: real Envoy, gateway and Redis, simulated engines."""

from __future__ import annotations

import json
import random
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from gateway.commands.replay import app as replay
from gateway.local_fleet import LocalFleet
from gateway.replay.bounds import pooled_hits
from gateway.replay.readers import read_trace
from kvindex.commands.inspect import app as inspect
from tests.support.fleet import settled

pytestmark = pytest.mark.envoy

BLOCK = 32
NUM_CONVERSATIONS = 4
NUM_TURNS = 3


def test_recorded_traffic_is_what_was_sent_and_can_be_replayed(
    fleet: LocalFleet, client: httpx.Client, tmp_path: Path
):
    chance = random.Random(5)
    conversations = [
        [chance.randrange(100, 1000) for _ in range(4 * BLOCK)] for _ in range(NUM_CONVERSATIONS)
    ]
    sent, matched = [], []
    for _ in range(NUM_TURNS):
        for tokens in conversations:
            tokens += [chance.randrange(100, 1000) for _ in range(chance.randrange(20, 90))]
            body = {"model": "tiny", "prompt": tokens, "max_tokens": 5}
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            sent.append(len(tokens))
            matched.append(int(response.headers["x-kvlane-matched-tokens"]))
            settled(fleet)
    file = tmp_path / "recorded.jsonl"
    ran = CliRunner().invoke(inspect, ["receipts", "--jsonl", str(file), "--admin", fleet.admin_url])
    assert ran.exit_code == 0, ran.output
    # Other tests may have sent to the fleet before.
    file.write_text("\n".join(file.read_text().splitlines()[-len(sent) :]))

    trace = read_trace(file)
    assert trace.block_size == BLOCK
    assert [each.num_tokens for each in trace.requests] == sent
    assert [len(each.blocks) for each in trace.requests] == [num_tokens // BLOCK for num_tokens in sent]
    # One endless cache finds what the fleet did: its caches were large enough, and each turn went back.
    assert pooled_hits(trace, 1 << 30) == matched
    assert sum(matched) > 0

    figures = tmp_path / "figures.json"
    options = ["--policy", "kvlane", "--policy", "round-robin", "--workers", "3", "--json", str(figures)]
    ran = CliRunner().invoke(replay, [str(file), *options])
    assert ran.exit_code == 0, ran.output
    ours, others = json.loads(figures.read_text())["summaries"]
    assert ours["hit_rate"] == pytest.approx(sum(matched) / sum(sent))
    assert others["hit_rate"] < ours["hit_rate"]
