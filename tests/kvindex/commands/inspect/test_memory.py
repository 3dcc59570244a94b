"""`kvlane inspect memory` over a real Redis."""

import json
import random

import redis

from connectors.bench.ports import free_ports
from kvindex.errors import IndexUnavailable


def test_what_it_measures_is_what_redis_has_allocated(inspect, redis_url, publisher):
    with redis.Redis.from_url(redis_url) as client:
        before = client.info("memory")["used_memory"]
        rng = random.Random(0)
        for number in range(1, 9):
            worker = publisher.open(number)
            blocks = [rng.getrandbits(64) for _ in range(5_000)]
            publisher.change(worker, stored=blocks)
            publisher.change(worker, removed=blocks[:500])
        grown = client.info("memory")["used_memory"] - before
    found = json.loads(inspect("memory", "--json", "--redis-url", redis_url).stdout)
    (pool,) = found["pools"]
    assert (pool["num_holders"], pool["num_entries"]) == (8, 36_000)
    assert pool["num_sampled_buckets"] == 64 < pool["num_buckets"]
    assert 8 < pool["bytes_per_entry"] < 30
    assert pool["fixed_bytes"]["log of evictions"] > 4_000 * 8
    assert pool["fixed_bytes"]["log of slots"] > 0
    assert found["total_bytes"] == pool["total_bytes"] <= found["used_memory_bytes"]
    # Scripts and buffers are in the difference as well.
    assert 0.7 * grown < pool["total_bytes"] < 1.2 * grown
    shown = inspect("memory", "--redis-url", redis_url).stdout
    for word in ("bytes a block", "36,000 blocks", "live rows", "log of evictions", "reservations"):
        assert word in shown


def test_nobody_there(inspect, redis_url):
    assert "No pool has workers" in inspect("memory", "--redis-url", redis_url).stdout
    error = inspect("memory", "--redis-url", f"redis://127.0.0.1:{free_ports(1)[0]}/0").exception
    assert isinstance(error, IndexUnavailable)
