"""`kvlane inspect workers`, `pools` and `block` over a real Redis."""

import asyncio
import json

import pytest

from connectors.bench.ports import free_ports
from kvindex.config import IndexConfig
from kvindex.errors import ConfigError, IndexUnavailable
from kvindex.redis_index import RedisIndexReader


def test_workers(inspect, redis_url, worker):
    shown = inspect("workers", "--redis-url", redis_url).stdout
    assert "10.0.0.1:8000" in shown
    assert "2 of 4,000" in shown
    (found,) = json.loads(inspect("workers", "--json", KVLANE_REDIS_URL=redis_url).stdout)
    assert found["worker"]["incarnation"] == worker.incarnation
    assert found["load"]["running_requests"] == 5
    assert found["num_indexed_blocks"] == 2


def test_labels_and_draining_are_shown(inspect, redis_url, publisher):
    worker = publisher.open(labels={"zone": "a", "gpu": "h200"})
    index = RedisIndexReader(IndexConfig(redis_url=redis_url))
    asyncio.run(index.drain(worker.pool, worker.worker_id, is_draining=True))
    shown = inspect("workers", "--redis-url", redis_url, COLUMNS="250").stdout
    assert "both, draining" in shown
    assert "gpu=h200, zone=a" in shown
    (found,) = json.loads(inspect("workers", "--json", KVLANE_REDIS_URL=redis_url).stdout)
    assert found["is_draining"] is True


def test_pools(inspect, redis_url, worker):
    assert "2 of 4,000" in inspect("pools", "--redis-url", redis_url).stdout
    (found,) = json.loads(inspect("pools", "--redis-url", redis_url, "--json").stdout)
    assert found == {
        "pool_id": worker.pool.pool_id,
        "model": "tiny",
        "block_size": 16,
        "scheme": worker.pool.scheme,
        "num_workers": 1,
        "num_blocks": 4000,
        "num_indexed_blocks": 2,
        "num_expired_reservations": 0,
        "parity": None,
    }


@pytest.mark.parametrize(
    ("parity", "said"),
    [
        ({"state": "exact", "reason": None}, "exact"),
        ({"state": "degraded", "reason": "tokens"}, "degraded (tokens)"),
    ],
)
def test_what_a_gateway_holds_of_workers_and_pools(inspect, redis_url, worker, admin, parity, said):
    url, answers, _ = admin
    known = {"worker": {"incarnation": worker.incarnation}, "parity": parity}
    pools = [{"pool_id": worker.pool.pool_id, "parity": parity["state"]}]
    answers["GET", "/fleet"] = (200, {"workers": [known], "pools": pools})
    where = ("--redis-url", redis_url, "--admin", url)
    assert said in inspect("workers", *where, COLUMNS="250").stdout
    assert json.loads(inspect("workers", *where, "--json").stdout)[0]["parity"] == said
    assert parity["state"] in inspect("pools", *where).stdout
    assert json.loads(inspect("pools", *where, "--json").stdout)[0]["parity"] == parity["state"]


@pytest.mark.parametrize("written", ["beef", "0xBEEF", "000000000000beef"])
def test_block(inspect, redis_url, worker, written):
    assert "10.0.0.1:8000" in inspect("block", written, "--redis-url", redis_url).stdout
    (found,) = json.loads(inspect("block", written, "--redis-url", redis_url, "--json").stdout)
    assert found["pool_id"] == worker.pool.pool_id
    assert (found["holder"], found["tier"]) == (worker.worker_id, "device")


def test_nothing_found_says_why_and_what_to_do(inspect, redis_url, worker):
    assert "never stored" in inspect("block", "1", "--redis-url", redis_url).stdout
    assert json.loads(inspect("block", "1", "--redis-url", redis_url, "--json").stdout) == []


def test_an_empty_index_says_where_it_looked_and_how_to_start(inspect, redis_url):
    for what in ("workers", "pools"):
        shown = inspect(what, "--redis-url", redis_url).stdout
        assert "kvlane:pools" in shown
        assert "kvlane serve MODEL" in shown
        assert inspect(what, "--redis-url", redis_url, "--json").stdout == "[]\n"


@pytest.mark.parametrize("wrong", ["", "xyz", "1" * 17, "-1"])
def test_a_wrong_hash_is_refused(inspect, wrong):
    assert isinstance(inspect("block", "--", wrong).exception, ConfigError)


def test_an_unreachable_redis_is_named(inspect):
    (port,) = free_ports(1)
    error = inspect("workers", "--redis-url", f"redis://:secret@127.0.0.1:{port}/0").exception
    assert isinstance(error, IndexUnavailable)
    assert f"127.0.0.1:{port}" in str(error)
    assert "secret" not in str(error)


def test_a_wrong_redis_url_is_a_setting(inspect):
    assert isinstance(inspect("pools", "--redis-url", "http://x").exception, ConfigError)
