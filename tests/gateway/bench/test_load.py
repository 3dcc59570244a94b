"""The bench's client and peers, against each other."""

import os
import random
import threading
import time
from contextlib import closing

import httpx
import pytest

from connectors.bench.ports import free_ports
from gateway.bench.load import Client, cpu_s, interleave, saturate
from gateway.bench.peers import peer, serve_engines
from gateway.errors import BenchFailed


@pytest.fixture(scope="module")
def engines():
    ports = free_ports(2)
    with peer(serve_engines, ports, "tiny", "/models/tiny", 4096):
        for port in ports:
            wait_until_open(port)
        yield [f"127.0.0.1:{port}" for port in ports]


def wait_until_open(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{port}/v1/models")
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        else:
            return


def test_the_engine_names_its_model_and_answers_any_size(engines):
    (card,) = httpx.get(f"http://{engines[0]}/v1/models").json()["data"]
    assert card["root"] == "/models/tiny"
    assert card["max_model_len"] == 4096
    with closing(Client(engines[0])) as client:
        for size in (2, 100_000, 2_000_000, 2):
            assert client.post(b"x" * size).headers["content-type"] == "application/json"


def test_interleave_sends_every_body_everywhere_and_drops_the_first(engines):
    addresses = dict(zip("ab", engines, strict=True))
    samples = interleave([b"{}"] * 6, addresses, random.Random(1))
    assert {name: len(each) for name, each in samples.items()} == {"a": 5, "b": 5}
    assert all(sample.took_ms > 0 for each in samples.values() for sample in each)


def test_saturate_counts_requests_of_all_clients(engines):
    assert saturate(engines[0], [b"{}", b"{ }"], num_clients=3, duration_s=1) >= 3


def test_a_refused_request_fails_the_bench():
    (port,) = free_ports(1)
    with pytest.raises(BenchFailed, match="2 of 2 connections"):
        saturate(f"127.0.0.1:{port}", [b"{}"], num_clients=2, duration_s=1)


def test_cpu_counts_this_process():
    before_s = cpu_s([os.getpid()])
    thread = threading.Thread(target=burn, args=(0.2,))
    thread.start()
    thread.join()
    assert 0.1 < cpu_s([os.getpid()]) - before_s < 5


def burn(duration_s: float) -> None:
    end = time.thread_time() + duration_s
    while time.thread_time() < end:
        pass
