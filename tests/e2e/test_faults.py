"""Parts misbehave under load: Redis, clocks, gateways, tokenizers, workers. Clients shall not notice.

Real Envoy, gateways and Redis; simulated engines.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from connectors.bench.ports import free_ports
from gateway.local_fleet import FleetOptions, LocalFleet, local_fleet
from gateway.processes import child_processes
from kvindex.embedded import embedded_redis
from tests.support.fleet import charges, eventually, registered, simulated
from tests.support.load import completion, load
from tests.support.proxy import stalling_proxy
from tests.support.redis_server import emptied
from tests.support.vllm_engine import tiny_model

pytestmark = pytest.mark.envoy

PATIENCE_S = 120
TEXT = {"model": "tiny", "prompt": "hello", "max_tokens": 2}


@contextmanager
def running(
    tmp_path: Path, *arguments: str, redis_url: str | None = None, each=(), **options
) -> Iterator[LocalFleet]:
    """Run a fleet of simulated engines, with a Redis of its own or behind `redis_url`."""
    engine = simulated("--lease-ms", "3000", *arguments, each=each)
    made = FleetOptions(engine, start_timeout_s=90, **options)
    if redis_url is None:
        with local_fleet(made, tmp_path) as fleet:
            fleet.wait_until_ready()
            yield fleet
        return
    with child_processes(tmp_path) as processes:
        fleet = LocalFleet(processes, redis_url, made)
        fleet.start()
        fleet.wait_until_ready()
        yield fleet


def more(sent, count: int = 40) -> int:
    """Wait for so many more answers; return how many there were before."""
    before = len(sent.answers)
    eventually(lambda: len(sent.answers) >= before + count, timeout_s=PATIENCE_S)
    return before


def clock_that_is(offset_s: float, directory: Path) -> dict[str, str]:
    """Return an environment in which Python's wall clock is wrong by so much."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(
        "import time\n"
        "_time, _time_ns = time.time, time.time_ns\n"
        f"time.time = lambda: _time() + {offset_s}\n"
        f"time.time_ns = lambda: _time_ns() + int({offset_s} * 1e9)\n"
    )
    return {"PYTHONPATH": f"{directory}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def is_decided(answer: httpx.Response | None) -> bool:
    return answer is not None and "x-kvlane-decision" in answer.headers


def test_three_gateways_with_wrong_clocks_of_which_one_is_killed(tmp_path):
    offsets = (-5.0, 0.0, 5.0)
    clocks = [clock_that_is(offset, tmp_path / f"clock{offset}") for offset in offsets]
    options = {"num_gateways": 3, "gateway_env": lambda n: {**clocks[n], "KVLANE_RESERVATION_TTL_MS": "2000"}}
    with running(tmp_path / "logs", **options) as fleet:
        with load(fleet.url) as sent:
            more(sent, 200)
            seen = [httpx.get(f"http://{admin}/decisions?limit=50").json() for admin in fleet.admins]
            now = time.time()
            for offset, decisions in zip(offsets, seen, strict=True):
                # Each gateway decides, with the clock that it was given, and by overlap.
                assert abs(decisions[0]["at"] - now - offset) < 2.5
                assert {each["fallback"] for each in decisions} == {None}
                assert max(each["matched_tokens"] for each in decisions) > 100
            fleet.processes.kill("gateway-1")
            more(sent, 200)
            # Envoy asks the dead one until its health check has failed; those requests it balances itself.
            eventually(lambda: all(map(is_decided, sent.answers[-50:])), timeout_s=PATIENCE_S)
        assert sent.errors() == []
        # What the dead one had charged runs out by Redis' clock, whoever asks.
        eventually(lambda: set(registered(fleet)) == set(fleet.engines))
        eventually(lambda: charges(fleet) == 0, timeout_s=PATIENCE_S)


def test_redis_stalls_goes_and_comes_back_empty(tmp_path):
    with embedded_redis() as redis_url, stalling_proxy(redis_url) as proxy:
        with running(tmp_path, redis_url=proxy.url) as fleet, load(fleet.url) as sent:
            more(sent)
            for _ in range(3):
                proxy.stall()
                time.sleep(1)
                proxy.resume()
                more(sent, 10)
            assert sent.errors() == []
            # Longer than every lease.
            before = len(sent.answers)
            proxy.stall()
            eventually(lambda: sent.since(before).fallbacks["index_unavailable"] > 5, timeout_s=PATIENCE_S)
            time.sleep(4)
            emptied(redis_url)
            proxy.resume()
            eventually(lambda: "" in sent.since(more(sent, 5)).fallbacks, timeout_s=PATIENCE_S)
            eventually(lambda: set(registered(fleet)) == set(fleet.engines), timeout_s=PATIENCE_S)
        assert sent.errors() == []
        assert set(sent.fallbacks) <= {"", "index_unavailable", "index_deadline", "index_recovering"}


def test_without_a_tokenizer_load_decides(tmp_path):
    env = {"KVLANE_TOKENIZERS": f'{{"tiny": "{tmp_path}/nowhere"}}'}
    with running(tmp_path, gateway_env=lambda _: env, num_workers=2) as fleet:
        answers = [httpx.post(f"{fleet.url}/v1/completions", json=TEXT, timeout=30) for _ in range(8)]
        assert {each.status_code for each in answers} == {200}
        assert {each.headers["x-kvlane-fallback"] for each in answers} == {"tokenizer"}


def test_a_hundred_workers_leave_and_join_under_load(tmp_path):
    ports = free_ports(100)
    with running(tmp_path, num_workers=0, gateway_env=lambda _: {"KVLANE_PARITY_PROBE": "false"}) as fleet:
        where = ("--redis-url", fleet.redis_url, "--tokenizer", str(tiny_model()))
        crowd = [sys.executable, "-m", "tests.support.engine_crowd", *where]
        fleet.processes.start("crowd", [*crowd, "--ports", ",".join(map(str, ports))])
        eventually(lambda: len(registered(fleet)) > 70, timeout_s=PATIENCE_S)
        eventually(lambda: len(fleet.known_workers()) > 70, timeout_s=PATIENCE_S)
        lives = set()

        def have_changed() -> bool:
            lives.update(each.worker.incarnation for each in registered(fleet).values())
            time.sleep(0.2)
            return len(lives) > 180

        with load(fleet.url) as sent:
            eventually(have_changed, timeout_s=PATIENCE_S)
        assert sent.errors() == []
        assert len(workers_of(sent)) > 8
        fleet.processes.stop("crowd")
        eventually(lambda: not registered(fleet), timeout_s=PATIENCE_S)
        eventually(lambda: not fleet.known_workers(), timeout_s=PATIENCE_S)


def workers_of(sent) -> Counter[str]:
    return Counter(each.headers["x-kvlane-worker"] for each in sent.answers if each)


@pytest.fixture(scope="module")
def flawed(tmp_path_factory) -> Iterator[LocalFleet]:
    """Six workers: one never answers, one ceases to, one is ten times slower than it should be."""
    each = [("--answers", "0"), ("--answers", "24"), ("--prefill-tokens-per-s", "1000")]
    env = dict.fromkeys(("KVLANE_PARITY_TIMEOUT_S", "KVLANE_SILENT_AFTER_S", "KVLANE_PARITY_AGAIN_S"), "1")
    options = {"num_workers": 6, "gateway_env": lambda _: env, "each": each}
    with running(tmp_path_factory.mktemp("flawed"), "--prefill-tokens-per-s", "10000", **options) as fleet:
        yield fleet


def test_workers_that_are_healthy_and_answer_no_request_get_none(flawed):
    never, ceasing, *good = flawed.engines
    with load(flawed.url, timeout_s=5, num_clients=8) as sent:
        eventually(lambda: not answers_requests(flawed)[ceasing], timeout_s=PATIENCE_S)
        assert not answers_requests(flawed)[never]
        before = more(sent, 100)
    assert set(workers_of(sent)) <= {ceasing, *good}
    assert set(workers_of(sent.since(before))) <= set(good)
    # Only what was in its hands has got no answer.
    assert len(sent.failures) <= 8
    assert sent.statuses[200] == len(sent.answers) - len(sent.failures)


def answers_requests(fleet: LocalFleet) -> dict[str, bool]:
    workers = httpx.get(f"{fleet.admin_url}/fleet").json()["workers"]
    return {each["worker"]["endpoint"]: each["parity"]["answers"] for each in workers}


def test_a_worker_ten_times_slower_than_expected_gets_less(flawed):
    def fresh(number: int) -> dict[str, object]:
        prompt = [100 + (number * 37 + position * position) % 900 for position in range(200)]
        return completion(number) | {"prompt": prompt, "stream": True}

    slow = flawed.engines[2]
    with load(flawed.url, num_clients=4, body=fresh) as sent:
        more(sent, 100)
        before = more(sent, 200)
    later = workers_of(sent.since(before))
    # Of four that answer, an even share would be a quarter.
    assert later[slow] / later.total() < 0.15, later
