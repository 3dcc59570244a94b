"""Two real vLLM engines behind real Redis, gateway and Envoy, started as a user starts them: `kvlane up`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from connectors.bench.serving import ONE_PROCESS
from deploy.demo.model import ENGINE_ENV, NAME
from gateway.local_fleet import (
    PATIENCE,
    FleetOptions,
    LocalFleet,
    answers,
    free_address,
    kvlane,
    local_fleet,
    serve_command,
)
from gateway.tenants.keys import hash_key, new_key
from tests.support.doctor import report
from tests.support.fleet import eventually, parities, registered, settled
from tests.support.lora_adapter import RANK, make_adapter
from tests.support.vllm_engine import tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.envoy]

ENGINE = (
    *("--served-model-name", NAME, "--enforce-eager", "--max-model-len", "4096", "--block-size", "32"),
    *ONE_PROCESS,
)
ADAPTERS = ("sql", "poetry")
BLOCK_SIZE = 32
SYSTEM = "You answer questions about libraries. " + "Say which version you mean. " * 40


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENGINE_ENV.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def fleet(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    adapters = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(ADAPTERS):
        make_adapter(adapters / name, tiny_model(), seed=seed)
    tenants = ("--enable-scale-out", "--scheduling-policy", "priority")
    lora = (*tenants, "--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules")
    command = serve_command(
        str(tiny_model()), *ENGINE, *lora, *(f"{name}={adapters / name}" for name in ADAPTERS)
    )
    options = FleetOptions(command, start_timeout_s=300)
    with local_fleet(options, tmp_path_factory.mktemp("logs")) as fleet:
        fleet.wait_until_ready()
        yield fleet


@dataclass
class Turn:
    worker: str
    matched_tokens: int
    answer: str


def hits(engine: str) -> int:
    """Return vLLM's own count of prompt tokens served from its cache."""
    text = httpx.get(f"http://{engine}/metrics").text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return int(sum(s.value for s in samples if s.name == "vllm:prefix_cache_hits_total"))


def ask(fleet: LocalFleet, messages: list[dict[str, str]], **fields: object) -> Turn:
    body = {"model": NAME, "messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    response = httpx.post(f"{fleet.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    assert "x-kvlane-fallback" not in response.headers
    answer = response.json()["choices"][0]["message"]["content"]
    headers = response.headers
    return Turn(headers["x-kvlane-worker"], int(headers["x-kvlane-matched-tokens"]), answer)


def first_turn(number: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": f"Conversation {number}. {SYSTEM}"},
        {"role": "user", "content": "Which library reads YAML?"},
    ]


@pytest.mark.parametrize("number", range(4))
def test_the_second_turn_is_served_from_the_cache_of_the_worker_that_has_the_first(fleet, number):
    messages = first_turn(number)
    first = ask(fleet, messages)
    settled(fleet)
    before = {engine: hits(engine) for engine in fleet.engines}
    messages += [
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": "And which one writes it?"},
    ]
    second = ask(fleet, messages)
    gained = {engine: hits(engine) - before[engine] for engine in fleet.engines}
    assert second.worker == first.worker
    assert second.matched_tokens >= 8 * BLOCK_SIZE
    # What the index promised is what the engine found.
    assert gained[second.worker] == second.matched_tokens
    assert sum(gained.values()) == gained[second.worker]


def test_the_engines_are_exact_and_the_doctor_finds_no_problem(fleet):
    assert {each["state"] for each in parities(fleet).values()} == {"exact"}
    assert len(parities(fleet)) == len(fleet.engines)
    found = report("--redis-url", fleet.redis_url, "--admin", fleet.admin_url)
    assert found["num_problems"] == 0, found
    exact = [each["subject"] for each in found["findings"] if each["what"].startswith("exact: ")]
    assert exact == [f"worker {engine}" for engine in sorted(fleet.engines)]


def test_a_salt_shares_nothing_with_another_or_with_none(fleet):
    messages = first_turn(100)
    ask(fleet, messages, cache_salt="tenant-a")
    settled(fleet)
    before = sum(hits(engine) for engine in fleet.engines)
    assert ask(fleet, messages, cache_salt="tenant-b").matched_tokens == 0
    assert ask(fleet, messages).matched_tokens == 0
    assert sum(hits(engine) for engine in fleet.engines) == before
    settled(fleet)
    assert ask(fleet, messages, cache_salt="tenant-a").matched_tokens >= 8 * BLOCK_SIZE


def test_an_adapter_shares_nothing_with_another_or_with_the_base_model(fleet):
    messages = first_turn(101)
    before = sum(hits(engine) for engine in fleet.engines)
    for model in (NAME, *ADAPTERS):
        assert ask(fleet, messages, model=model).matched_tokens == 0
        settled(fleet)
    assert sum(hits(engine) for engine in fleet.engines) == before
    for model in (NAME, *ADAPTERS):
        assert ask(fleet, messages, model=model).matched_tokens >= 8 * BLOCK_SIZE
        settled(fleet)
    assert sum(hits(engine) for engine in fleet.engines) >= before + 3 * 8 * BLOCK_SIZE


@dataclass
class Gate:
    url: str
    keys: dict[str, str]

    def ask(self, tenant: str, path: str, body: dict[str, object]) -> int:
        """Return the prompt tokens that the index promised."""
        bearer = {"authorization": f"Bearer {self.keys[tenant]}"}
        sampling = {"max_tokens": 4, "temperature": 0}
        body = {**body, **({"sampling_params": sampling} if "token_ids" in body else sampling)}
        response = httpx.post(f"{self.url}{path}", json=body, headers=bearer, timeout=60)
        assert response.status_code == 200, response.text
        assert "x-kvlane-fallback" not in response.headers
        return int(response.headers["x-kvlane-matched-tokens"])


@pytest.fixture(scope="module")
def gate(fleet: LocalFleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    """A second gateway and Envoy before the same engines, which tell two tenants apart."""
    keys = {tenant: new_key() for tenant in ("acme", "beta")}
    file = tmp_path_factory.mktemp("tenants") / "tenants.yaml"
    # An engine refuses a priority unless it schedules by it.
    lines = [
        f"- {{name: {name}, priority: 7, keys: [{{sha256: {hash_key(key)}}}]}}" for name, key in keys.items()
    ]
    file.write_text("\n".join(["tenants:", *lines]))
    listen, envoy_admin, gateway, admin = (free_address() for _ in range(4))
    where = ("--listen", gateway, "--admin-listen", admin, "--redis-url", fleet.redis_url)
    env = {**PATIENCE, "KVLANE_CACHE_SALT_SECRET": "s" * 32, "KVLANE_PARITY_PROBE": "false"}
    fleet.processes.start("gateway-tenants", kvlane("gateway", *where, "--tenants", str(file)), env)
    fleet.start_envoy("envoy-tenants", listen, envoy_admin, "--gateway", gateway, "--fail-closed")
    models = {"authorization": f"Bearer {keys['acme']}"}
    eventually(lambda: answers(f"http://{admin}/ready"), timeout_s=300)
    eventually(
        lambda: httpx.get(f"http://{listen}/v1/models", headers=models).status_code == 200, timeout_s=60
    )
    yield Gate(f"http://{listen}", keys)
    fleet.processes.stop("envoy-tenants", "gateway-tenants")


@pytest.mark.parametrize(
    ("api", "model"),
    [("chat", NAME), ("chat", "sql"), ("text", NAME), ("tokens", "poetry"), ("generate", NAME)],
)
def test_tenants_share_no_match_and_no_hit_of_an_engine(fleet, gate, model, api):
    text = f"{api} with {model}. {SYSTEM}"
    path, body = {
        "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        "text": ("/v1/completions", {"prompt": text}),
        "tokens": ("/v1/completions", {"prompt": [5 + each for each in range(400)]}),
        "generate": ("/inference/v1/generate", {"token_ids": [9 + each for each in range(400)]}),
    }[api]
    body["model"] = model

    def gained(tenant: str, **fields: object) -> tuple[int, int]:
        before = sum(hits(engine) for engine in fleet.engines)
        matched = gate.ask(tenant, path, body | fields)
        settled(fleet)
        return matched, sum(hits(engine) for engine in fleet.engines) - before

    assert gained("acme") == (0, 0)
    assert gained("beta") == (0, 0)
    assert gained("beta", cache_salt="acme") == (0, 0)
    for tenant in gate.keys:
        matched, found = gained(tenant)
        assert matched == found >= 8 * BLOCK_SIZE


def test_a_killed_engine_gets_no_request_after_its_lease(fleet):
    victim = ask(fleet, first_turn(200)).worker
    (alive,) = set(fleet.engines) - {victim}
    fleet.processes.kill(f"worker-{fleet.engines.index(victim)}")
    # Before the lease ends Envoy may still be told to try it; the next in the list answers.
    assert ask(fleet, first_turn(200)).answer is not None
    eventually(lambda: set(registered(fleet)) == {alive}, timeout_s=15)
    eventually(lambda: fleet.known_workers() == {alive}, timeout_s=15)
    assert [ask(fleet, first_turn(200)).worker for _ in range(3)] == [alive] * 3


def test_up_serves_until_it_is_interrupted_and_leaves_nothing(tmp_path: Path):
    listen = free_address()
    command = [sys.executable, "-m", "kvindex.cli", "up", str(tiny_model()), "--workers", "1"]
    command += ["--listen", listen, "--logs", str(tmp_path / "logs"), *ENGINE]
    shared = set(Path("/dev/shm").glob("envoy*"))
    with (tmp_path / "up.log").open("w+") as log:
        up = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)}, stderr=log)
        try:
            said = tmp_path / "up.log"
            eventually(lambda: up.poll() is not None or "Ctrl-C ends" in said.read_text(), timeout_s=300)
            assert up.poll() is None, said.read_text()
            urls = re.findall(r"https?://[\d.:]+|redis://[\d.:]+", said.read_text())
            assert f"http://{listen}" in urls
            assert httpx.get(f"http://{listen}/v1/models").json()["data"][0]["id"] == NAME
            family = psutil.Process(up.pid).children(recursive=True)
            assert len(family) >= 4  # Redis, gateway, Envoy, the engine and its own
        finally:
            up.send_signal(signal.SIGINT)
            code = up.wait(timeout=60)
    assert code == 128 + signal.SIGINT
    deadline = time.monotonic() + 10
    while alive := [child for child in family if child.is_running() and child.status() != "zombie"]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
    left = {path.name for path in tmp_path.iterdir()} - {"logs", "up.log"}
    assert not {name for name in left if name.startswith("kvlane")}
    assert set(Path("/dev/shm").glob("envoy*")) <= shared
