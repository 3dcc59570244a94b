"""A fleet in which some engines are wrong on purpose: nobody's hit rate is zero in silence."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from gateway.local_fleet import LocalFleet
from tests.support.chat_templates import LLAMA_LIKE
from tests.support.doctor import report
from tests.support.fleet import eventually, parities, registered, simulated, simulated_fleet

pytestmark = pytest.mark.envoy

LONG = "The quick brown fox jumps over the lazy dog, and the dog reads a book about lists. " * 20


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """Right, another template, salts not told, no events, late events."""
    directory: Path = tmp_path_factory.mktemp("parity")
    template = directory / "other.jinja"
    template.write_text(LLAMA_LIKE)
    each = [
        ("--lora", "sql"),
        ("--chat-template", str(template)),
        ("--ignore-salt",),
        ("--no-events",),
        ("--event-delay-s", "0.5"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVLANE_PARITY_TIMEOUT_S", "3")
        patch.setenv("KVLANE_PARITY_AGAIN_S", "1")
        with simulated_fleet(directory, num_workers=len(each), each=each) as fleet:
            yield fleet


def ask(fleet: LocalFleet, **body: object) -> httpx.Response:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    response = httpx.post(f"{fleet.url}{path}", json={"model": "tiny", "max_tokens": 2, **body}, timeout=30)
    assert response.status_code == 200, response.text
    return response


def finds(fleet: LocalFleet, prompt: str) -> bool:
    return int(ask(fleet, prompt=prompt).headers["x-kvlane-matched-tokens"]) > 300


def test_each_worker_has_the_verdict_that_it_deserves(fleet):
    expected = [
        ("exact", None),
        ("degraded", "tokens"),
        ("degraded", "salt"),
        ("degraded", "no_blocks"),
        ("exact", None),
    ]

    def deserved() -> bool:
        found = parities(fleet)
        return [(found[each]["state"], found[each]["reason"]) for each in fleet.engines] == expected

    # On a busy machine a first check may have come too early for events that are late.
    eventually(deserved, timeout_s=60)
    found = parities(fleet)
    assert found[fleet.engines[4]]["lag_ms"] > 300
    assert all(each["cure"] for each in found.values() if each["state"] == "degraded")
    metrics = httpx.get(f"{fleet.admin_url}/metrics").text
    assert 'kvlane_gateway_workers{state="degraded"} 3.0' in metrics
    assert 'kvlane_gateway_workers{state="exact"} 2.0' in metrics
    assert 'kvlane_gateway_pool_exact{block_size="32",model="tiny"} 0.0' in metrics
    log = fleet.processes.log("gateway").read_text()
    assert "worker is degraded" in log


def test_requests_go_by_overlap_where_it_can_be_trusted_and_say_where_it_cannot(fleet):
    holders = set()
    for number in range(12):
        prompt = f"{number} {LONG}"
        first = ask(fleet, prompt=prompt)
        worker = first.headers["x-kvlane-worker"]
        verdict = parities(fleet)[worker]
        if verdict["state"] == "exact":
            assert "x-kvlane-fallback" not in first.headers
            holders.add(worker)
            eventually(partial(finds, fleet, prompt))
        else:
            assert first.headers["x-kvlane-fallback"] == f"parity_{verdict['reason']}"
            assert first.headers["x-kvlane-matched-tokens"] == "0"
            decision = first.headers["x-kvlane-decision"]
            receipt = httpx.get(f"{fleet.admin_url}/decisions/{decision}").json()
            shown = {each["worker"]: each["degraded"] for each in receipt["candidates"]}
            assert shown[worker] == verdict["reason"]
            assert [name for name, why in shown.items() if why is None]
    assert holders


def test_a_probe_matches_nobody(fleet):
    """What probes left behind is found by no prompt that users can send."""
    engine = fleet.engines[0]
    requests = httpx.get(f"http://{engine}/sim/requests").json()
    assert {each["cached_tokens"] for each in requests if each["request_id"].startswith("kvlane-probe")} == {
        0
    }
    assert registered(fleet)[engine].num_indexed_blocks > 0


def test_the_doctor_finds_what_the_gateway_found(fleet):
    findings = report("--redis-url", fleet.redis_url, "--admin", fleet.admin_url)["findings"]
    problems = {each["subject"]: each for each in findings if each["level"] == "problem"}
    assert set(problems) == {f"worker {engine}" for engine in fleet.engines[1:4]}
    assert all(each["cost"] and each["cure"] for each in problems.values())


def test_a_degraded_worker_is_checked_again_and_a_cured_one_is_exact(fleet):
    wrong = fleet.engines[3]
    before = parities(fleet)[wrong]["checked_at"]
    eventually(lambda: parities(fleet)[wrong]["checked_at"] > before, timeout_s=30)
    incarnation = registered(fleet)[wrong].worker.incarnation
    number = fleet.engines.index(wrong)
    fleet.processes.kill(f"worker-{number}")
    fleet.processes.start(f"worker-{number}", simulated()(int(wrong.rpartition(":")[2]), fleet.redis_url))
    eventually(
        lambda: (again := registered(fleet).get(wrong)) and again.worker.incarnation != incarnation,
        timeout_s=30,
    )
    eventually(lambda: parities(fleet).get(wrong, {}).get("state") == "exact", timeout_s=30)
    assert time.time() - parities(fleet)[wrong]["checked_at"] < 60
