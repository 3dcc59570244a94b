"""`kvlane inspect drift`: over a real Redis, and on both indexes."""

import json

import pytest
import redis

from connectors.bench.ports import free_ports
from kvindex.commands.inspect.drift import compare
from kvindex.config import IndexConfig
from kvindex.errors import IndexUnavailable
from kvindex.keys import bucket_key
from kvindex.memory_index import MemoryIndex, MemoryIndexReader, MemoryIndexWriter
from kvindex.redis_index import RedisIndexReader
from kvindex.worker import Batch
from tests.support.workers import make_worker


@pytest.fixture
def fleet(publisher):
    workers = [publisher.open(number) for number in (1, 2, 3)]
    for number, worker in enumerate(workers):
        publisher.change(worker, stored=range(number, 2_000, number + 1))
    return workers


def damage(redis_url: str, worker, block: int, *, slots: bytes | None) -> None:
    """Change a block's entry behind the index's back."""
    with redis.Redis.from_url(redis_url) as client:
        for bucket in range(64):
            key = bucket_key(worker.pool, bucket)
            if client.hexists(key, block.to_bytes(8, "little")):
                if slots is None:
                    client.hdel(key, block.to_bytes(8, "little"))
                else:
                    client.hset(key, block.to_bytes(8, "little"), slots)
                return
    raise AssertionError("the block is not in the index")


def test_a_sound_index(inspect, redis_url, fleet):
    assert "Every slot holds what the index counts" in inspect("drift", "--redis-url", redis_url).stdout
    found = json.loads(inspect("drift", "--json", "--redis-url", redis_url).stdout)
    assert [(each["slot"], each["status"]) for each in found] == [(0, "equal"), (1, "equal"), (2, "equal")]
    assert [each["found_blocks"] for each in found] == [2000, 1000, 666]


def test_what_differs_is_shown(inspect, redis_url, fleet):
    damage(redis_url, fleet[0], 1, slots=None)  # held by the first two
    damage(redis_url, fleet[0], 3, slots=b"\x00\x00\x01\x00\x02\x00")  # of the first two, given to the third
    found = json.loads(inspect("drift", "--json", "--redis-url", redis_url).stdout)
    assert [(each["status"], each["found_blocks"] - each["kept_blocks"]) for each in found] == [
        ("differs", -1),
        ("differs", -1),
        ("differs", 1),
    ]
    shown = inspect("drift", "--redis-url", redis_url).stdout
    assert "0 equal, 3 differs, 0 busy" in shown
    assert "10.0.0.3:8000" in shown


def test_nobody_there(inspect, redis_url):
    assert "No worker is live" in inspect("drift", "--redis-url", redis_url).stdout
    error = inspect("drift", "--redis-url", f"redis://127.0.0.1:{free_ports(1)[0]}/0").exception
    assert isinstance(error, IndexUnavailable)


async def test_a_worker_that_writes_all_the_time_is_busy(redis_url, publisher, fleet, monkeypatch):
    reader = RedisIndexReader(IndexConfig(redis_url=redis_url, redis_timeout_s=10))
    entries, written = reader.entries, iter(range(10_000, 20_000))

    async def with_a_write(*args, **kwargs):
        found = await entries(*args, **kwargs)
        publisher.change(fleet[1], stored=[next(written)])
        return found

    monkeypatch.setattr(reader, "entries", with_a_write)
    found = await compare(reader, fleet[0].pool)
    await reader.close()
    assert [each.status for each in found] == ["equal", "busy", "equal"]


async def test_a_pool_that_grows_meanwhile_is_read_again(redis_url, publisher, fleet, monkeypatch):
    """Growth moves entries to where they are seen a second time."""
    reader = RedisIndexReader(IndexConfig(redis_url=redis_url, redis_timeout_s=10))
    entries, calls = reader.entries, []

    async def in_small_slices(pool, *, first_bucket, max_buckets):
        if first_bucket == 8 and not calls:
            publisher.change(fleet[2], stored=range(100_000, 104_000))
            calls.append(first_bucket)
        return await entries(pool, first_bucket=first_bucket, max_buckets=8)

    monkeypatch.setattr(reader, "entries", in_small_slices)
    found = await compare(reader, fleet[0].pool)
    await reader.close()
    assert calls
    assert {each.status for each in found} == {"equal"}


async def test_the_memory_index_agrees_with_itself():
    index = MemoryIndex()
    writer, reader = MemoryIndexWriter(index), MemoryIndexReader(index)
    worker = make_worker("a:1")
    slot = writer.open_slot(worker, lease_ms=60_000)
    writer.apply(worker.pool, slot, worker.incarnation, Batch(sequence=1, stored=tuple(range(300))))
    (found,) = await compare(reader, worker.pool)
    assert (found.status, found.found_blocks) == ("equal", 300)
