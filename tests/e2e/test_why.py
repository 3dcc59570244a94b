"""`kvlane inspect why` of real decisions: real Envoy, gateway and Redis, simulated engines."""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from connectors.bench.ports import free_ports
from gateway.local_fleet import FleetOptions, LocalFleet, kvlane, local_fleet
from kvindex.commands.inspect import app
from tests.support.fleet import eventually, indexed_blocks, is_idle, registered, simulated, simulated_fleet

pytestmark = pytest.mark.envoy

BLOCK = 32
NUM_BLOCKS = 64
_PROMPTS = random.Random(0)


@pytest.fixture(scope="module")
def small_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """Two slow workers with small caches."""
    options = ("--lora", "sql", "--num-blocks", str(NUM_BLOCKS), "--prefill-tokens-per-s", "4000")
    with simulated_fleet(tmp_path_factory.mktemp("fleet"), *options, num_workers=2) as fleet:
        yield fleet


@pytest.fixture
def fleet(small_fleet: LocalFleet) -> LocalFleet:
    """The fleet with empty caches."""
    for engine in small_fleet.engines:
        eventually(lambda engine=engine: httpx.post(f"http://{engine}/reset_prefix_cache").json()["success"])
    eventually(lambda: indexed_blocks(small_fleet) == 0)
    return small_fleet


def prompt(num_blocks: int) -> list[int]:
    """Return a prompt that was never sent before."""
    return [_PROMPTS.randrange(100, 1000) for _ in range(BLOCK * num_blocks)]


def ask(fleet: LocalFleet, tokens: list[int], **fields: object) -> tuple[str, str]:
    """Return decision id and worker."""
    body = {"model": "tiny", "prompt": tokens, "max_tokens": 1, **fields}
    response = httpx.post(f"{fleet.url}/v1/completions", json=body, timeout=30)
    assert response.status_code == 200, response.text
    return response.headers["x-kvlane-decision"], response.headers["x-kvlane-worker"]


def settled(fleet: LocalFleet) -> None:
    """Wait until nothing runs and the index holds what the engines hold."""
    counts = [-1, -1, -1]

    def unchanged() -> bool:
        counts.append(indexed_blocks(fleet) if is_idle(fleet) else -1)
        return counts[-1] > 0 and len(set(counts[-3:])) == 1

    eventually(unchanged)


def why(fleet: LocalFleet, decision_id: str, worker: str | None = None) -> dict[str, object]:
    asked = ["--worker", worker] if worker else []
    ran = CliRunner().invoke(app, ["why", decision_id, "--json", "--admin", fleet.admin_url, *asked])
    assert ran.exception is None
    findings = json.loads(ran.stdout)["findings"].values()
    return next(each for each in findings if worker in (None, each["worker"]))


def reachable(fleet: LocalFleet) -> set[str]:
    """Return the workers that accept the gateway's connections."""
    workers = httpx.get(f"{fleet.admin_url}/fleet").json()["workers"]
    return {each["worker"]["endpoint"] for each in workers if each["reachable"]}


def other(fleet: LocalFleet, worker: str) -> str:
    return fleet.engines[1 - fleet.engines.index(worker)]


def is_served(fleet: LocalFleet, decision_id: str) -> bool:
    return bool(httpx.get(f"{fleet.admin_url}/decisions/{decision_id}").json()["served"])


def test_never_stored_held_and_elsewhere(fleet):
    tokens = prompt(10)
    first, worker = ask(fleet, tokens)
    found = why(fleet, first)
    assert (found["reason"], found["missed_tokens"]) == ("never_stored", [0, BLOCK])
    settled(fleet)
    again, chosen = ask(fleet, tokens)
    assert (chosen, why(fleet, again)["reason"]) == (worker, "held")
    found = why(fleet, again, other(fleet, worker))
    assert (found["reason"], found["earlier"], found["holders_now"]) == ("elsewhere", first, [worker])


def test_tokens_that_differ(fleet):
    tokens = prompt(10)
    first, worker = ask(fleet, tokens)
    settled(fleet)
    changed = [*tokens[: 6 * BLOCK + 5], 99, *tokens[6 * BLOCK + 6 :]]
    found = why(fleet, ask(fleet, changed)[0], worker)
    assert (found["reason"], found["earlier"], found["overlap_blocks"]) == ("tokens_differ", first, 6)
    assert found["missed_tokens"] == [6 * BLOCK, 7 * BLOCK]


def test_another_salt_and_another_adapter(fleet):
    tokens = prompt(10)
    first, _ = ask(fleet, tokens, cache_salt="tenant-a")
    settled(fleet)
    found = why(fleet, ask(fleet, tokens, cache_salt="tenant-b")[0])
    assert (found["reason"], found["earlier"]) == ("other_salt", first)
    assert "tenant" not in str(found)
    tokens = prompt(10)
    first, _ = ask(fleet, tokens, model="sql")
    settled(fleet)
    found = why(fleet, ask(fleet, tokens)[0])
    assert (found["reason"], found["earlier"]) == ("other_lora", first)


def test_evicted(fleet):
    tokens = prompt(20)
    first, worker = ask(fleet, tokens)
    settled(fleet)
    # Enough to push out the end of the first prompt, not its beginning.
    body = {"model": "tiny", "prompt": prompt(54), "max_tokens": 1}
    httpx.post(f"http://{worker}/v1/completions", json=body, timeout=30).raise_for_status()
    eventually(lambda: registered(fleet)[worker].num_indexed_blocks == NUM_BLOCKS)
    settled(fleet)
    found = why(fleet, ask(fleet, tokens)[0], worker)
    assert (found["reason"], found["earlier"]) == ("evicted", first)
    assert 0 < found["overlap_blocks"] < 20
    assert f"{worker} evicted it at" in found["detail"]


def test_cleared(fleet):
    tokens = prompt(10)
    first, worker = ask(fleet, tokens)
    settled(fleet)
    assert httpx.post(f"http://{worker}/reset_prefix_cache").json()["success"]
    eventually(lambda: registered(fleet)[worker].num_indexed_blocks == 0)
    found = why(fleet, ask(fleet, tokens)[0], worker)
    assert (found["reason"], found["earlier"]) == ("cleared", first)


def test_still_being_computed(fleet):
    for _ in range(5):
        tokens = prompt(60)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            pool.submit(ask, fleet, tokens)
            eventually(lambda: not is_idle(fleet))
            (first,) = httpx.get(f"{fleet.admin_url}/decisions?limit=1").json()
            again, _ = ask(fleet, tokens)
        found = why(fleet, again, first["chosen"])
        # On a busy machine the first may have ended meanwhile.
        if found["reason"] == "computing":
            assert found["earlier"] == first["decision_id"]
            return
    raise AssertionError(found)


def test_restarted_and_joined(fleet):
    tokens, meanwhile = prompt(10), prompt(10)
    first, worker = ask(fleet, tokens)
    settled(fleet)
    former = registered(fleet)[worker].worker.incarnation
    number = fleet.engines.index(worker)
    fleet.processes.kill(f"worker-{number}")
    eventually(lambda: worker not in registered(fleet), timeout_s=30)
    eventually(lambda: fleet.known_workers() == {other(fleet, worker)}, timeout_s=30)
    second, _ = ask(fleet, meanwhile)
    fleet.start_engine(number)
    eventually(
        lambda: (found := registered(fleet).get(worker)) and found.worker.incarnation != former, timeout_s=60
    )
    eventually(lambda: fleet.known_workers() == set(fleet.engines), timeout_s=30)
    # It refused the gateway a moment ago, and is no candidate until it has been asked again.
    eventually(lambda: reachable(fleet) == set(fleet.engines), timeout_s=30)
    found = why(fleet, ask(fleet, tokens)[0], worker)
    assert (found["reason"], found["earlier"]) == ("restarted", first)
    found = why(fleet, ask(fleet, meanwhile)[0], worker)
    assert (found["reason"], found["earlier"]) == ("joined", second)


def test_an_index_that_is_behind(tmp_path: Path):
    """The publisher of an engine is held up while its engine works."""
    (events,) = free_ports(1)
    outside = ("--redis-url", "", "--events", f"tcp://127.0.0.1:{events}")
    options = FleetOptions(simulated(*outside), num_workers=1, start_timeout_s=60)
    with local_fleet(options, tmp_path) as fleet:
        (engine,) = fleet.engines
        where = (
            "--endpoint",
            engine,
            "--events",
            f"tcp://127.0.0.1:{events}",
            "--redis-url",
            fleet.redis_url,
        )
        env = os.environ | {"KVLANE_LEASE_MS": "60000"}
        with subprocess.Popen(kvlane("publish", *where), env=env, stderr=subprocess.DEVNULL) as publisher:
            try:
                fleet.wait_until_ready()
                ask(fleet, prompt(2))
                settled(fleet)
                tokens = prompt(10)
                publisher.send_signal(signal.SIGSTOP)
                first, _ = ask(fleet, tokens)
                eventually(lambda: is_served(fleet, first))
                again, _ = ask(fleet, tokens)
                publisher.send_signal(signal.SIGCONT)
                eventually(lambda: why(fleet, again)["holders_now"] == [engine])
                found = why(fleet, again)
                assert (found["reason"], found["earlier"], found["overlap_blocks"]) == ("behind", first, 0)
            finally:
                publisher.kill()
