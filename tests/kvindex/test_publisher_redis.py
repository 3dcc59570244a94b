"""The publisher on a real Redis that loses or changes what it was told."""

from collections.abc import Callable
from contextlib import ExitStack, closing

import pytest
import redis
from structlog.testing import capture_logs

from connectors.bench.ports import free_ports
from kvindex.blocks import format_hash
from kvindex.embedded import embedded_redis
from kvindex.keys import bucket_key, directory
from kvindex.redis_index import RedisIndexWriter
from tests.support.publishing import Published, index_is, slots_of
from tests.support.scripted_engine import prompt, removal
from tests.support.waiting import eventually

STRANGER = 0x0123456789ABCDEF


class Tampering:
    """Changes entries of a pool with a single bucket, behind the index's back."""

    def __init__(self, client: redis.Redis, published: Published, slot: int) -> None:
        self.client = client
        self.directory = directory(published.worker.pool)
        self.bucket = bucket_key(published.worker.pool, 0)
        self.slot_key = f"{self.directory}:s:{slot}"
        self.slot_set = slot.to_bytes(2, "little")

    def lose(self, block: int) -> None:
        assert self.client.hdel(self.bucket, block.to_bytes(8, "little")) == 1

    def add(self, block: int) -> None:
        assert self.client.hset(self.bucket, block.to_bytes(8, "little"), self.slot_set) == 1

    def hand_over(self, block: int) -> None:
        assert self.client.hset(self.bucket, block.to_bytes(8, "little"), b"\x63\x00") == 0


def lose(tampering: Tampering, block: int) -> None:
    tampering.lose(block)


def add(tampering: Tampering, block: int) -> None:
    tampering.add(STRANGER)


def exchange(tampering: Tampering, block: int) -> None:
    """One entry becomes another: the count stays."""
    tampering.lose(block)
    tampering.add(STRANGER)


def hand_over(tampering: Tampering, block: int) -> None:
    """The entry stays, and names another slot."""
    tampering.hand_over(block)


def lose_and_hide(tampering: Tampering, block: int) -> None:
    """Count and digest are made to agree with what is left."""
    tampering.lose(block)
    digest = tampering.client.hget(tampering.slot_key, "digest")
    told = int.from_bytes(digest, "little") ^ block
    tampering.client.hset(tampering.slot_key, "digest", told.to_bytes(8, "little"))
    tampering.client.hincrby(tampering.slot_key, "count", -1)


def alter_the_digest(tampering: Tampering, block: int) -> None:
    tampering.client.hset(tampering.slot_key, "digest", b"\x01" * 8)


def alter_the_count(tampering: Tampering, block: int) -> None:
    tampering.client.hincrby(tampering.slot_key, "count", 1)


@pytest.mark.parametrize(
    ("tamper", "num_lost", "num_added"),
    [
        (lose, 1, 0),
        (add, 0, 1),
        (exchange, 1, 1),
        (hand_over, 1, 0),
        (lose_and_hide, 1, 0),
        (alter_the_digest, 0, 0),
        (alter_the_count, 0, 0),
    ],
)
async def test_one_changed_entry_is_found_within_two_heartbeats_named_and_repaired(
    redis_url: str, tamper: Callable[[Tampering, int], None], num_lost: int, num_added: int
):
    event, hashes = prompt(*range(20))
    with (
        capture_logs() as logs,
        closing(Published(redis_url)) as published,
        redis.Redis.from_url(redis_url) as client,
    ):
        worker, writer = published.worker, published.writer
        published.source.put(event)
        await eventually(lambda: index_is(redis_url, worker.pool, {worker.incarnation: hashes}))
        slot = (await slots_of(redis_url, worker.pool))[worker.incarnation]
        tamper(Tampering(client, published, slot), hashes[3])
        beats = writer.num_heartbeats
        await eventually(lambda: writer.num_opened == 2)
        beats_when_found, _ = writer.opened_at[1]
        assert beats_when_found <= beats + 2
        await eventually(lambda: index_is(redis_url, worker.pool, {worker.incarnation: hashes}))
    (found,) = [entry for entry in logs if "num_lost" in entry]
    assert (found["num_lost"], found["num_added"]) == (num_lost, num_added)
    assert found["lost"] == [format_hash(hashes[3])] * num_lost
    assert found["added"] == [format_hash(STRANGER)] * num_added
    assert writer.num_opened == 2


async def test_in_a_large_pool_a_changed_entry_is_found_once_every_part_was_read(redis_url: str):
    event, hashes = prompt(*range(6_000))
    with (
        capture_logs() as logs,
        closing(Published(redis_url, heartbeat_ms=50)) as published,
        redis.Redis.from_url(redis_url) as client,
    ):
        worker, writer = published.worker, published.writer
        published.source.put(event)
        await eventually(lambda: index_is(redis_url, worker.pool, {worker.incarnation: hashes}))
        slot = (await slots_of(redis_url, worker.pool))[worker.incarnation]
        # Through another writer: the publisher's belongs to its thread.
        with closing(RedisIndexWriter(published.config)) as other:
            num_parts = other.blocks_of(worker.pool, slot, worker.incarnation, turn=0).num_parts
        assert num_parts > 2
        buckets = client.scan_iter(match=directory(worker.pool) + ":b:*")
        lost = hashes[1_234].to_bytes(8, "little")
        assert sum(client.hdel(bucket, lost) for bucket in buckets) == 1
        audits = writer.num_audits
        await eventually(lambda: writer.num_opened == 2)
        _, audits_when_found = writer.opened_at[1]
        assert audits_when_found <= audits + num_parts
        await eventually(lambda: index_is(redis_url, worker.pool, {worker.incarnation: hashes}))
    (found,) = [entry for entry in logs if "num_lost" in entry]
    assert (found["lost"], found["num_added"]) == ([format_hash(hashes[1_234])], 0)


async def test_nothing_is_found_where_nothing_was_changed(redis_url: str):
    """Two engines write to the same buckets all the time while they are audited."""
    with (
        closing(Published(redis_url, "127.0.0.1:1", heartbeat_ms=50)) as first,
        closing(Published(redis_url, "127.0.0.1:2", heartbeat_ms=50)) as second,
    ):
        writers = (first.writer, second.writer)
        expected = {}
        for number, published in enumerate((first, second)):
            hashes: list[int] = []
            for at in range(0, 4_000, 20):
                event, stored = prompt(*range(at, at + 20))
                published.source.put(event)
                hashes += stored[number::2]
                published.source.put(removal(stored[1 - number :: 2]))
            expected[published.worker.incarnation] = hashes
        await eventually(lambda: index_is(redis_url, first.worker.pool, expected), patience_s=30)
        audits = [writer.num_audits for writer in writers]
        await eventually(lambda: all(w.num_audits > a + 8 for w, a in zip(writers, audits, strict=True)))
        assert [writer.num_opened for writer in writers] == [1, 1]


async def test_a_flushed_redis_is_filled_again(redis_url: str):
    event, hashes = prompt(1, 2, 3, 4)
    with closing(Published(redis_url)) as published, redis.Redis.from_url(redis_url) as client:
        worker = published.worker
        published.source.put(event)
        await eventually(lambda: index_is(redis_url, worker.pool, {worker.incarnation: hashes}))
        client.flushall()
        await eventually(lambda: index_is(redis_url, worker.pool, {worker.incarnation: hashes}))
        client.script_flush()
        more, more_hashes = prompt(5, 6)
        published.source.put(more)
        everything = {worker.incarnation: hashes + more_hashes}
        await eventually(lambda: index_is(redis_url, worker.pool, everything))


async def test_a_redis_that_dies_and_returns_empty_is_filled_again():
    event, hashes = prompt(1, 2, 3, 4)
    more, more_hashes = prompt(5, 6)
    (port,) = free_ports(1)
    with ExitStack() as first:
        url = first.enter_context(embedded_redis(port))
        with closing(Published(url)) as published:
            worker = published.worker
            published.source.put(event)
            await eventually(lambda: index_is(url, worker.pool, {worker.incarnation: hashes}))
            first.close()  # kill -9
            published.source.put(more)
            with embedded_redis(port):
                everything = {worker.incarnation: hashes + more_hashes}
                await eventually(lambda: index_is(url, worker.pool, everything))
