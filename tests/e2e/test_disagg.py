"""Two real engines with roles behind real Redis, gateway and Envoy: one computes prompts, one answers."""

from __future__ import annotations

import json
import random
import subprocess
import threading
from collections.abc import Iterator, Sequence
from itertools import chain

import httpx
import pytest

from connectors.bench.ports import free_ports
from connectors.bench.serving import ONE_PROCESS
from deploy.demo.model import ENGINE_ENV, NAME
from gateway.local_fleet import FleetOptions, LocalFleet, kvlane, local_fleet
from kvindex.worker import Role
from tests.support.fleet import eventually, is_idle, registered
from tests.support.vllm_engine import tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.envoy]

ENGINE = (
    *("--served-model-name", NAME, "--enforce-eager", "--max-model-len", "4096", "--block-size", "32"),
    *ONE_PROCESS,
)
TRANSFERRED = 'kvlane_transfer_ended_total{outcome="done",role="receive"}'
draw = random.Random(7)


@pytest.fixture(scope="module")
def transfer_ports() -> Sequence[int]:
    return free_ports(4)


@pytest.fixture(scope="module")
def fleet(transfer_ports: Sequence[int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    places = zip((Role.PREFILL, Role.DECODE), transfer_ports[:2], transfer_ports[2:], strict=True)

    def command(port: int, redis_url: str) -> Sequence[str]:
        role, transfer_port, metrics_port = next(places)
        extra = {"transfer_port": transfer_port, "transfer_metrics_port": metrics_port, "transport": "ucx"}
        config = {"kv_connector_extra_config": {f"kvlane.{name}": value for name, value in extra.items()}}
        listen = ("--host", "127.0.0.1", "--port", str(port), "--redis-url", redis_url, "--role", role)
        return kvlane(
            "serve", str(tiny_model()), *ENGINE, *listen, "--kv-transfer-config", json.dumps(config)
        )

    with pytest.MonkeyPatch.context() as patch:
        wire = {"KVLANE_TRANSFER_GB_PER_S": "100", "KVLANE_TRANSFER_LATENCY_MS": "0", "UCX_TLS": "tcp,self"}
        for name, value in {**ENGINE_ENV, **wire}.items():
            patch.setenv(name, value)
        with local_fleet(
            FleetOptions(command, start_timeout_s=300), tmp_path_factory.mktemp("logs")
        ) as fleet:
            fleet.wait_until_ready()
            yield fleet


@pytest.fixture
def answering(fleet: LocalFleet) -> Iterator[None]:
    """Keep the decode worker busy with answers, so that a prompt computed there would cost something."""
    over = threading.Event()
    decode = by_role(fleet)[1]

    def answer() -> None:
        body = {"model": NAME, "prompt": "Once", "max_tokens": 3_000, "ignore_eos": True, "stream": True}
        while not over.is_set():
            with httpx.stream("POST", f"http://{decode}/v1/completions", json=body, timeout=60) as response:
                for _ in response.iter_lines():
                    if over.is_set():
                        return

    threads = [threading.Thread(target=answer) for _ in range(12)]
    for thread in threads:
        thread.start()
    eventually(lambda: registered(fleet)[decode].load.running_requests == len(threads), timeout_s=60)
    yield
    over.set()
    for thread in threads:
        thread.join()


def by_role(fleet: LocalFleet) -> tuple[str, str]:
    """Return the endpoints of the prefill and of the decode worker."""
    found = {each.role: name for name, each in registered(fleet).items()}
    return found[Role.PREFILL], found[Role.DECODE]


def prompt(num_tokens: int) -> list[int]:
    return [draw.randrange(100, 1_000) for _ in range(num_tokens)]


def ask(url: str, tokens: list[int], **fields: object) -> httpx.Response:
    body = {"model": NAME, "prompt": tokens, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status()


def num_transfers(metrics_port: int) -> float:
    lines = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(TRANSFERRED))


@pytest.mark.usefixtures("answering")
@pytest.mark.parametrize("num_tokens", [700, 1_024, 3_001])
def test_a_split_answer_is_the_whole_one(fleet: LocalFleet, transfer_ports: Sequence[int], num_tokens: int):
    prefill, decode = by_role(fleet)
    tokens = prompt(num_tokens)
    before = num_transfers(transfer_ports[3])
    split = ask(fleet.url, tokens)
    assert split.headers["x-kvlane-prefill"] == prefill
    assert split.headers["x-kvlane-worker"] == decode
    assert num_transfers(transfer_ports[3]) == before + 1
    whole = ask(f"http://{prefill}", tokens)
    assert split.json()["choices"] == whole.json()["choices"]
    assert split.json()["usage"]["prompt_tokens"] == num_tokens
    receipt = httpx.get(f"{fleet.admin_url}/decisions/{split.headers['x-kvlane-decision']}").json()
    assert (receipt["split"]["prefill"], receipt["split"]["decode"]) == (prefill, decode)


@pytest.mark.usefixtures("answering")
def test_a_stream_is_the_clients_own(fleet: LocalFleet):
    tokens = prompt(900)
    streamed = ask(fleet.url, tokens, stream=True, stream_options={"include_usage": True}, logprobs=2)
    assert "x-kvlane-prefill" in streamed.headers
    events = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks[-1]["usage"] == {"prompt_tokens": 900, "total_tokens": 912, "completion_tokens": 12} | {
        key: value for key, value in chunks[-1]["usage"].items() if key.endswith("_details")
    }
    whole = ask(f"http://{by_role(fleet)[0]}", tokens, logprobs=2).json()["choices"][0]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole["text"]
    logprobs = [chunk["choices"][0]["logprobs"]["tokens"] for chunk in chunks[:-1]]
    assert [*chain(*logprobs)] == whole["logprobs"]["tokens"]


@pytest.mark.usefixtures("answering")
def test_several_answers_and_what_the_decode_worker_has_stay_whole(fleet: LocalFleet):
    decode = by_role(fleet)[1]
    tokens = prompt(900)
    assert "x-kvlane-prefill" not in ask(fleet.url, tokens, n=2, temperature=1).headers

    def is_whole() -> bool:
        answer = ask(fleet.url, tokens)
        assert answer.headers["x-kvlane-worker"] == decode
        return "x-kvlane-prefill" not in answer.headers and answer.headers["x-kvlane-matched-tokens"] == "896"

    eventually(is_whole, timeout_s=60)


@pytest.mark.usefixtures("answering")
def test_a_role_is_given_while_the_fleet_runs(fleet: LocalFleet):
    prefill, decode = by_role(fleet)
    give = kvlane("role", "--redis-url", fleet.redis_url)
    subprocess.run([*give, prefill, "both"], check=True)
    # Idle, as soon as it has said so: it does all of it.
    eventually(lambda: ask(fleet.url, prompt(900)).headers["x-kvlane-worker"] == prefill, timeout_s=60)
    subprocess.run([*give, prefill, "own"], check=True)
    assert by_role(fleet) == (prefill, decode)
    eventually(lambda: "x-kvlane-prefill" in ask(fleet.url, prompt(900)).headers, timeout_s=60)


def test_the_decode_worker_says_how_fast_kv_came(fleet: LocalFleet):
    prefill, decode = (registered(fleet)[name].load for name in by_role(fleet))
    # From over a minute for what a prompt has to faster than any memory.
    assert 1e-5 < decode.transfer_gb_per_s < 1_000
    assert 0 <= decode.transfer_latency_ms < 60_000
    assert prefill.transfer_gb_per_s == 0


def test_nothing_is_left_behind(fleet: LocalFleet, transfer_ports: Sequence[int]):
    def is_clean() -> bool:
        for port in transfer_ports[2:]:
            lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
            live = [line for line in lines if line.startswith("kvlane_transfer_live{")]
            assert len(live) == 2
            if any(float(line.split()[1]) for line in live):
                return False
        return is_idle(fleet)

    eventually(is_clean, timeout_s=60)
