"""Parts die: workers, the gateway. Real Envoy, gateway and Redis, simulated engines."""

import concurrent.futures
from collections.abc import Iterator

import httpx
import pytest

from gateway.local_fleet import LocalFleet
from tests.support.fleet import charges, eventually, registered, simulated_fleet

pytestmark = pytest.mark.envoy


@pytest.fixture
def fleet(tmp_path, monkeypatch) -> Iterator[LocalFleet]:
    """Two slow workers, which no probe keeps busy: a prompt of 1,000 tokens takes two seconds."""
    monkeypatch.setenv("KVLANE_PARITY_PROBE", "false")
    with simulated_fleet(tmp_path, "--prefill-tokens-per-s", "500", num_workers=2) as fleet:
        yield fleet


def ask(fleet: LocalFleet, prompt: object = "hello") -> httpx.Response:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 2}
    return httpx.post(f"{fleet.url}/v1/completions", json=body, timeout=30)


def busy_worker(fleet: LocalFleet) -> int | None:
    """Return the number of the worker that computes a prompt."""
    for engine, each in registered(fleet).items():
        if each.load.running_requests:
            return fleet.engines.index(engine)
    return None


def test_a_killed_worker_fails_its_request_clearly_and_gets_no_other(fleet):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        in_flight = pool.submit(ask, fleet, list(range(100, 1100)))
        eventually(lambda: busy_worker(fleet) is not None)
        dead = busy_worker(fleet)
        fleet.processes.kill(f"worker-{dead}")
        response = in_flight.result(timeout=20)
    # The worker had the request: only its client knows whether it may be sent again.
    assert response.status_code == 503
    assert "worker went away" in response.json()["error"]["message"]
    assert response.headers["retry-after"] == "1"
    # Before the lease ends the connection fails and the next in the list serves.
    alive = fleet.engines[1 - dead]
    for _ in range(5):
        response = ask(fleet)
        assert response.status_code == 200, response.text
        assert response.json()["system_fingerprint"] == alive
    eventually(lambda: set(registered(fleet)) == {alive})
    eventually(lambda: fleet.known_workers() == {alive})
    response = ask(fleet)
    assert response.headers["x-kvlane-worker"] == response.json()["system_fingerprint"] == alive
    eventually(lambda: charges(fleet) == 0)


def test_a_restarted_worker_is_routed_to_again_without_its_former_blocks(fleet):
    prompt = list(range(100, 300))
    first = ask(fleet, prompt)
    holder = first.headers["x-kvlane-worker"]
    number = fleet.engines.index(holder)
    eventually(lambda: registered(fleet)[holder].num_indexed_blocks)
    before = registered(fleet)[holder].worker.incarnation
    fleet.processes.kill(f"worker-{number}")
    fleet.start_engine(number)
    eventually(lambda: (found := registered(fleet).get(holder)) and found.worker.incarnation != before)
    assert registered(fleet)[holder].num_indexed_blocks == 0
    eventually(lambda: fleet.known_workers() == set(fleet.engines))
    assert ask(fleet, prompt).headers["x-kvlane-matched-tokens"] == "0"


def test_without_any_worker_the_answer_is_503_and_when_to_try_again(fleet):
    for number in range(2):
        fleet.processes.kill(f"worker-{number}")
    eventually(lambda: not registered(fleet))
    response = ask(fleet)
    assert response.status_code == 503
    assert response.json()["error"]["code"] in {503, "503"}
    assert int(response.headers["retry-after"]) >= 1


def test_envoy_serves_on_while_the_gateway_is_away_and_follows_it_when_it_is_back(fleet):
    assert "x-kvlane-decision" in ask(fleet).headers
    fleet.processes.kill("gateway")
    served = [ask(fleet) for _ in range(8)]
    assert {each.status_code for each in served} == {200}
    assert not any("x-kvlane-decision" in each.headers for each in served)
    fleet.start_gateway()
    # It imports a tokenizer library first.
    eventually(lambda: "x-kvlane-decision" in ask(fleet).headers, timeout_s=120)


def test_a_request_in_the_gateways_hands_is_served_when_it_dies(fleet):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, fleet, list(range(100 + number, 300 + number))) for number in range(8)]
        eventually(lambda: busy_worker(fleet) is not None)
        fleet.processes.kill("gateway")
        assert {each.result(timeout=30).status_code for each in answers} == {200}
