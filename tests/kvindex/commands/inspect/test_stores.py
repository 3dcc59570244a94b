"""`kvlane inspect stores`, and stores in `workers`, `block` and `memory`, over a real Redis."""

import json

import pytest

from kvindex.config import IndexConfig
from kvindex.redis_index import RedisIndexWriter
from kvindex.stores import Store
from kvindex.worker import Batch, Tier, TierAccess


@pytest.fixture
def store(redis_url):
    """A bucket of which a server tells that it holds three chunks."""
    writer = RedisIndexWriter(IndexConfig(redis_url=redis_url, redis_timeout_s=10))
    store = Store(
        name="s3://kv", teller="node", tier=Tier.OBJECT, model="tiny", chunk_size=256, incarnation="1"
    )
    slot = writer.open_slot(store, lease_ms=60_000)
    writer.apply(store.pool, slot, store.incarnation, Batch(sequence=1, stored=(0xC0, 0xC1, 0xC2)))
    yield store
    writer.close()


def test_stores_and_who_reaches_them(inspect, redis_url, publisher, store):
    where = ("--redis-url", redis_url)
    assert "nobody" in inspect("stores", *where).stdout
    publisher.open(1, tiers=TierAccess(model="tiny", chunk_size=256, stores=("s3://kv",)))
    publisher.open(2)
    shown = inspect("stores", *where, COLUMNS="200").stdout
    for word in ("s3://kv", "object", "events of node", "10.0.0.1:8000", "768"):
        assert word in shown
    (found,) = json.loads(inspect("stores", *where, "--json").stdout)
    assert found["workers"] == ["10.0.0.1:8000"]
    assert found["registered"]["store"]["tier"] == "object"
    assert found["registered"]["num_indexed_blocks"] == 3
    assert "loads from" in inspect("workers", *where, COLUMNS="250").stdout


def test_a_chunk_has_holders_as_a_block_has(inspect, redis_url, worker, store):
    assert "s3://kv by node" in inspect("block", "c1", "--redis-url", redis_url).stdout
    (found,) = json.loads(inspect("block", "c1", "--redis-url", redis_url, "--json").stdout)
    assert (found["holder"], found["tier"], found["pool_id"]) == (
        "s3://kv by node",
        "object",
        store.pool.pool_id,
    )


def test_chunks_take_memory_of_their_own(inspect, redis_url, worker, store):
    found = json.loads(inspect("memory", "--redis-url", redis_url, "--json").stdout)
    kinds = {
        (pool["what"], pool["holders"], pool["num_holders"], pool["num_entries"]) for pool in found["pools"]
    }
    assert kinds == {("block", "workers", 1, 2), ("chunk", "stores", 1, 3)}
    assert "bytes a chunk" in inspect("memory", "--redis-url", redis_url).stdout


def test_nobody_there(inspect, redis_url):
    assert "No store is live" in inspect("stores", "--redis-url", redis_url).stdout


def test_what_happened_to_a_store_and_whether_its_entries_are_counted_right(inspect, redis_url, store):
    (line,) = inspect("events", "--redis-url", redis_url, "--json").stdout.splitlines()
    assert (json.loads(line)["worker"], json.loads(line)["kind"]) == ("s3://kv by node", "opened")
    assert "1 equal, 0 differs" in inspect("drift", "--redis-url", redis_url).stdout
    (found,) = json.loads(inspect("drift", "--redis-url", redis_url, "--json").stdout)
    assert (found["holder"], found["found_blocks"]) == ("s3://kv by node", 3)
