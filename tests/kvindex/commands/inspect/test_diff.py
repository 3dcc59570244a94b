"""`kvlane inspect diff`: over a real Redis, and on both indexes."""

import json
import random

import pytest

from connectors.bench.ports import free_ports
from kvindex.commands.inspect.diff import compare
from kvindex.config import IndexConfig
from kvindex.errors import ConfigError, IndexUnavailable
from kvindex.memory_index import MemoryIndex, MemoryIndexReader, MemoryIndexWriter
from kvindex.redis_index import RedisIndexReader
from kvindex.worker import Batch
from tests.support.workers import make_worker


@pytest.fixture
def pair(publisher):
    left, right = publisher.open(1), publisher.open(2)
    publisher.change(left, stored=range(60))
    publisher.change(right, stored=range(40, 160))
    return left, right


def test_blocks_of_one_of_the_other_and_of_both(inspect, redis_url, pair):
    left, right = (each.worker_id for each in pair)
    shown = inspect("diff", left, right, "--redis-url", redis_url).stdout
    assert "Held once, the common blocks would leave 20.5 kB free: 0% of the cache" in " ".join(shown.split())
    assert "estimated" not in shown
    found = json.loads(inspect("diff", left, right, "--json", "--redis-url", redis_url).stdout)
    assert (found["only_left_blocks"], found["only_right_blocks"], found["both_blocks"]) == (40, 100, 20)
    assert found["block_bytes"] == 16 * 64
    assert found["duplicated_bytes"] == 20 * 16 * 64
    assert found["sampled_share"] == 1


def test_a_worker_with_itself(inspect, redis_url, pair):
    name = pair[0].worker_id
    found = json.loads(inspect("diff", name, name, "--json", "--redis-url", redis_url).stdout)
    assert (found["only_left_blocks"], found["both_blocks"]) == (0, 60)


def test_unknown_and_incomparable_workers_are_refused(inspect, redis_url, publisher, pair):
    other = publisher.open(3, model="another")
    for left, right, said in (
        ("nobody", pair[0].worker_id, "no live worker nobody; live are 10.0.0.1:8000, 10.0.0.2:8000"),
        (pair[0].worker_id, other.worker_id, "cannot be compared"),
    ):
        error = inspect("diff", left, right, "--redis-url", redis_url).exception
        assert isinstance(error, ConfigError)
        assert said in str(error)


def test_without_redis_there_is_one_line(inspect):
    error = inspect("diff", "a", "b", "--redis-url", f"redis://127.0.0.1:{free_ports(1)[0]}/0").exception
    assert isinstance(error, IndexUnavailable)


@pytest.mark.parametrize("max_buckets", [None, 100])
async def test_a_sample_tells_about_all(redis_url, publisher, max_buckets):
    rng = random.Random(0)
    hashes = [rng.getrandbits(64) for _ in range(20_000)]
    left, right = publisher.open(1), publisher.open(2)
    publisher.change(left, stored=hashes[:15_000])
    publisher.change(right, stored=hashes[10_000:])
    reader = RedisIndexReader(IndexConfig(redis_url=redis_url, redis_timeout_s=10))
    _, workers = await reader.workers(left.pool)
    found = await compare(reader, left.pool, *workers, max_buckets=max_buckets)
    await reader.close()
    counts = (found.only_left_blocks, found.only_right_blocks, found.both_blocks)
    if max_buckets is None:
        assert counts == (10_000, 5_000, 5_000)
    else:
        assert 0 < found.sampled_share < 0.5
        assert counts == pytest.approx((10_000, 5_000, 5_000), rel=0.1)


async def test_it_is_the_same_on_the_memory_index():
    index = MemoryIndex()
    writer, reader = MemoryIndexWriter(index), MemoryIndexReader(index)
    workers = [make_worker("a:1"), make_worker("b:1")]
    for worker, blocks in zip(workers, (range(60), range(40, 160)), strict=True):
        slot = writer.open_slot(worker, lease_ms=60_000)
        writer.apply(worker.pool, slot, worker.incarnation, Batch(sequence=1, stored=tuple(blocks)))
    _, registered = await reader.workers(workers[0].pool)
    found = await compare(reader, workers[0].pool, *registered, max_buckets=None)
    assert (found.only_left_blocks, found.only_right_blocks, found.both_blocks) == (40, 100, 20)
