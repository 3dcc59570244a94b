"""What is Redis's own: scripts, layout, memory, holes, and being unreachable."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from connectors.bench.ports import free_ports
from kvindex import redis_index
from kvindex.config import IndexConfig
from kvindex.errors import ConfigError, IndexUnavailable, SlotLost
from kvindex.index import MAX_BATCH
from kvindex.keys import LOG_LEFT_S, bucket_key, directory, log_key, removals_key
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Batch, Load, Worker
from tests.support.oracle import check_overlap

LEASE_MS = 600_000
COMPACT = ("ziplist", "listpack")  # its name until and from Redis 7


def worker(number: int = 0) -> Worker:
    return Worker(
        endpoint=f"10.0.0.{number}:8000",
        model="m",
        block_size=16,
        num_blocks=1000,
        bytes_per_token=1024,
        max_model_len=4096,
        incarnation="one",
    )


POOL = worker().pool


class Fleet:
    """Publishers that keep their own sequences."""

    def __init__(self, writer: RedisIndexWriter, num_workers: int) -> None:
        self.writer = writer
        self.sequences = {
            writer.open_slot(worker(number), lease_ms=LEASE_MS): 0 for number in range(num_workers)
        }

    @property
    def slots(self) -> list[int]:
        return list(self.sequences)

    def write(self, slot: int, stored=(), removed=()) -> None:
        for at in range(0, max(len(stored), len(removed)), MAX_BATCH):
            self.sequences[slot] += 1
            batch = Batch(
                sequence=self.sequences[slot],
                stored=tuple(stored[at : at + MAX_BATCH]),
                removed=tuple(removed[at : at + MAX_BATCH]),
            )
            self.writer.apply(POOL, slot, "one", batch)


@pytest.fixture
def config(redis_url):
    return IndexConfig(redis_url=redis_url, redis_timeout_s=10)


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url) as made:
        yield made


@pytest.fixture
def writer(config):
    made = RedisIndexWriter(config)
    yield made
    made.close()


@pytest.fixture
async def reader(config):
    made = RedisIndexReader(config)
    yield made
    await made.close()


def random_hashes(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.getrandbits(64) for _ in range(count)]


def buckets(client: redis.Redis) -> list[bytes]:
    return list(client.scan_iter(match=directory(POOL) + ":b:*", count=1000))


async def test_scripts_are_loaded_again_after_a_flush(writer, reader, client):
    fleet = Fleet(writer, 1)
    [slot] = fleet.slots
    for round_number in range(3):
        client.script_flush()
        fleet.write(slot, [round_number])
        client.script_flush()
        writer.heartbeat(POOL, slot, "one", Load(), lease_ms=LEASE_MS)
        client.script_flush()
        assert await reader.holders(POOL, round_number) == [slot]
        client.script_flush()
        assert (
            await reader.reserve(POOL, "a", slot, prefill_tokens=1, seen_backlog_tokens=None, ttl_ms=1000)
        ).charged


async def test_many_workers_are_described_in_slices_of_one_registry_version(writer, reader, monkeypatch):
    monkeypatch.setattr(redis_index, "_WORKERS_PER_CALL", 10)
    Fleet(writer, 35)
    run, calls = reader._run, []

    async def joined_meanwhile(name, pool, *args):
        calls.append(args)
        if len(calls) in (2, 5):
            writer.close_slot(POOL, len(calls), "one")
        return await run(name, pool, *args)

    monkeypatch.setattr(reader, "_run", joined_meanwhile)
    version, workers = await reader.workers(POOL)
    assert sorted(each.slot for each in workers) == sorted({*range(35)} - {2, 5})
    assert [skipped for skipped, _ in calls] == [0, 10, 0, 10, 20, 0, 10, 20, 30]
    assert version == (await reader.match(POOL, [])).registry_version


async def test_a_registry_that_changes_all_the_time_is_read_at_once(writer, reader, monkeypatch):
    monkeypatch.setattr(redis_index, "_WORKERS_PER_CALL", 1)
    Fleet(writer, 3)
    run = reader._run

    async def restarted_meanwhile(name, pool, *args):
        writer.open_slot(worker(0), lease_ms=LEASE_MS)
        return await run(name, pool, *args)

    monkeypatch.setattr(reader, "_run", restarted_meanwhile)
    _, workers = await reader.workers(POOL)
    assert {each.worker.worker_id for each in workers} == {worker(number).worker_id for number in range(3)}


async def test_reading_writes_nothing(writer, reader, client):
    fleet = Fleet(writer, 2)
    fleet.write(0, random_hashes(500))
    client.config_resetstat()
    await reader.match(POOL, random_hashes(500))
    await reader.workers(POOL)
    await reader.pools()
    await reader.events(POOL, max_events=10)
    await reader.removals(POOL, max_events=10)
    writes = {"xadd", "hset", "hdel", "hincrby", "del", "zadd", "zrem", "hsetnx", "set"}
    assert not {f"cmdstat_{name}" for name in writes} & set(client.info("commandstats"))


async def test_every_key_of_a_pool_carries_its_hash_tag(writer, reader, client):
    fleet = Fleet(writer, 2)
    fleet.write(0, random_hashes(500))
    await reader.reserve(POOL, "a", 0, prefill_tokens=1, seen_backlog_tokens=None, ttl_ms=LEASE_MS)
    tag = f"{{{POOL.pool_id}}}".encode()
    assert {key for key in client.scan_iter() if tag not in key} == {b"kvlane:pools"}


@pytest.mark.parametrize("num_holders", [2, 60])
def test_buckets_stay_small_and_compact_while_they_split(writer, client, num_holders):
    fleet = Fleet(writer, 60)
    hashes = random_hashes(6_000)
    for slot in fleet.slots[:num_holders]:
        fleet.write(slot, hashes)
    sizes = [client.hlen(key) for key in buckets(client)]
    assert sum(sizes) == len(hashes) == int(client.hget(directory(POOL), "entries"))
    assert len(sizes) == int(client.hget(directory(POOL), "buckets"))
    assert len(hashes) / len(sizes) <= 34
    assert max(sizes) < 128
    assert {client.object("encoding", key).decode() for key in buckets(client)} <= set(COMPACT)


def test_a_block_costs_less_than_20_bytes(writer, client):
    fleet = Fleet(writer, 8)
    before = client.info("memory")["used_memory"]
    rng = random.Random(0)
    for at in range(0, 100_000, MAX_BATCH):
        hashes = random_hashes(MAX_BATCH, seed=at)
        for slot in rng.sample(fleet.slots, 2):
            fleet.write(slot, hashes)
    assert (client.info("memory")["used_memory"] - before) / 100_000 <= 20


async def test_sweeping_returns_the_memory_and_keeps_what_lives(writer, reader, client):
    fleet = Fleet(writer, 3)
    doomed, shared = random_hashes(20_000, seed=1), random_hashes(500, seed=2)
    fleet.write(0, doomed)
    fleet.write(1, shared)
    fleet.write(0, shared)
    writer.close_slot(POOL, 0, "one")
    num_left = 1
    while num_left:
        num_left = await reader.sweep(POOL, max_buckets=8)
        fleet.write(2, random_hashes(100, seed=100 + fleet.sequences[2]))  # splits, during the sweep
    kept = {*shared, *(h for n in range(fleet.sequences[2]) for h in random_hashes(100, seed=100 + n))}
    assert int(client.hget(directory(POOL), "entries")) == len(kept)
    assert sum(client.hlen(key) for key in buckets(client)) == len(kept)
    assert (await reader.match(POOL, shared)).overlap_blocks == {1: len(shared)}
    while int(client.hget(directory(POOL), "buckets")) > len(kept) / 8:
        before = int(client.hget(directory(POOL), "buckets"))
        await reader.sweep(POOL, max_buckets=8)
        assert int(client.hget(directory(POOL), "buckets")) < before
    assert (await reader.match(POOL, shared)).overlap_blocks == {1: len(shared)}
    for block in random.Random(0).sample(sorted(kept), 100):
        assert len(await reader.holders(POOL, block)) == 1


async def test_a_fleet_that_has_gone_leaves_two_small_keys_and_its_log_for_a_day(writer, reader, client):
    fleet = Fleet(writer, 2)
    for slot in fleet.slots:
        fleet.write(slot, random_hashes(2_000))
        await reader.reserve(POOL, f"{slot}", slot, prefill_tokens=1, seen_backlog_tokens=None, ttl_ms=1)
        writer.close_slot(POOL, slot, "one")
    num_left = 1
    while num_left:
        num_left = await reader.sweep(POOL, max_buckets=100)
    log = log_key(POOL).encode()
    assert set(client.scan_iter()) == {b"kvlane:pools", directory(POOL).encode(), log}
    assert 0 < client.ttl(log) <= LOG_LEFT_S
    Fleet(writer, 1)
    assert client.ttl(log) == -1


async def test_the_logs_stay_within_their_bounds(config, reader, client, monkeypatch):
    monkeypatch.setattr("kvindex.keys.LOG_EVENTS", 100)
    monkeypatch.setattr("kvindex.keys.LOG_REMOVALS", 100)
    redis_index._script.cache_clear()
    small = RedisIndexWriter(config)
    redis_index._script.cache_clear()
    fleet = Fleet(small, 1)
    for number in range(1_000):
        fleet.write(0, [], [number])
    for _ in range(500):
        small.open_slot(worker(1), lease_ms=LEASE_MS)
    small.close()
    # Redis trims whole nodes of a hundred lines.
    for key in (log_key(POOL), removals_key(POOL)):
        assert 100 <= client.xlen(key) < 300
    assert (await reader.removals(POOL, max_events=1))[0].blocks == (999,)


def test_a_batch_of_evictions_is_remembered_in_little_memory(writer, client):
    fleet = Fleet(writer, 1)
    for number in range(2_000):
        fleet.write(0, [], random_hashes(16, seed=number))
    assert client.memory_usage(removals_key(POOL), samples=0) / 2_000 < 16 * 8 + 64


async def swept(reader: RedisIndexReader, client: redis.Redis) -> None:
    """Sweep until nothing is left to drop and nothing to merge."""
    seen: list[tuple[int, bytes]] = []
    while len(seen) < 2 or seen[-1][0] or seen[-1] != seen[-2]:
        num_left = await reader.sweep(POOL, max_buckets=50)
        seen.append((num_left, client.hget(directory(POOL), "buckets")))


async def test_a_slice_of_a_sweep_is_bounded_whatever_was_asked_for(writer, reader, client):
    fleet = Fleet(writer, 1)
    fleet.write(0, random_hashes(5_000))
    writer.close_slot(POOL, 0, "one")
    num_slices, num_entries = 0, 5_000
    while await reader.sweep(POOL, max_buckets=1_000_000):
        num_left = int(client.hget(directory(POOL), "entries"))
        assert 0 < num_entries - num_left < 512 + 256
        num_entries = num_left
        num_slices += 1
    assert num_slices >= 7


async def test_a_fleet_that_goes_at_once_is_fenced_in_slices(writer, reader, client):
    for number in range(40):
        writer.open_slot(worker(number), lease_ms=1)
    await asyncio.sleep(0.1)
    still_known = [client.hlen(directory(POOL) + ":ids")]
    while still_known[-1]:
        await reader.sweep(POOL, max_buckets=1)
        still_known.append(client.hlen(directory(POOL) + ":ids"))
    assert max(before - after for before, after in itertools.pairwise(still_known)) == 16


async def test_all_memory_comes_back(writer, reader, client):
    """A pool that has been large is, when all are gone, as small as one that never held a block."""
    Fleet(writer, 1)
    writer.close_slot(POOL, 0, "one")
    await swept(reader, client)
    baseline, num_keys = client.info("memory")["used_memory"], client.dbsize()
    fleet = Fleet(writer, 5)
    for slot in fleet.slots:
        fleet.write(slot, random_hashes(4_000, seed=slot // 2))
    assert client.dbsize() > num_keys + 100
    for slot in fleet.slots:
        writer.close_slot(POOL, slot, "one")
    await swept(reader, client)
    assert (client.dbsize(), buckets(client)) == (num_keys, [])
    assert client.hmget(directory(POOL), "buckets", "entries") == [b"1", b"0"]
    # What the buckets took was some 400 kB.
    assert client.info("memory")["used_memory"] - baseline < 100_000


async def test_what_redis_lost_does_not_keep_a_pool_large(writer, reader, client):
    fleet = Fleet(writer, 1)
    fleet.write(0, random_hashes(4_000))
    client.delete(*buckets(client)[:30])
    writer.close_slot(POOL, 0, "one")
    await swept(reader, client)
    assert client.hmget(directory(POOL), "buckets", "entries") == [b"1", b"0"]
    assert buckets(client) == []


async def test_entries_of_slots_that_nobody_has_are_swept_too(writer, reader, client):
    fleet = Fleet(writer, 2)
    fleet.write(0, [1, 2])
    client.hset(bucket_key(POOL, 0), (7).to_bytes(8, "little"), b"\x63\x00")
    client.hset(bucket_key(POOL, 0), (1).to_bytes(8, "little"), b"\x00\x00\x63\x00")
    writer.close_slot(POOL, 1, "one")
    await swept(reader, client)
    stored = {
        int.from_bytes(key, "little"): held for key, held in client.hgetall(bucket_key(POOL, 0)).items()
    }
    assert stored.keys() == {1, 2}
    assert len(set(stored.values())) == 1


async def test_sweepers_and_publishers_at_once(config, reader, client):
    """A slot that is given out is always empty, and what lives is never swept."""
    keeper = RedisIndexWriter(config)
    kept = keeper.open_slot(worker(99), lease_ms=LEASE_MS)
    kept_hashes = random_hashes(2_000, seed=99)
    for at in range(0, len(kept_hashes), MAX_BATCH):
        batch = Batch(sequence=at // MAX_BATCH + 1, stored=tuple(kept_hashes[at : at + MAX_BATCH]))
        keeper.apply(POOL, kept, "one", batch)
    running = True

    async def keep_sweeping() -> None:
        while running:
            await reader.sweep(POOL, max_buckets=4)

    def live_and_die(number: int) -> list[int]:
        own = RedisIndexWriter(config)
        slots = []
        for life in range(12):
            slot = own.open_slot(worker(number), lease_ms=LEASE_MS)
            part = own.blocks_of(POOL, slot, "one", turn=0)
            found = [part, *(own.blocks_of(POOL, slot, "one", turn=t) for t in range(1, part.num_parts))]
            assert not any(each.blocks for each in found)
            hashes = random_hashes(MAX_BATCH, seed=100 * number + life)
            shared = kept_hashes[:MAX_BATCH]
            own.apply(POOL, slot, "one", Batch(sequence=1, stored=tuple(hashes)))
            state = own.apply(POOL, slot, "one", Batch(sequence=2, stored=tuple(shared)))
            assert state.num_blocks == 2 * MAX_BATCH
            slots.append(slot)
        own.close_slot(POOL, slot, "one")
        own.close()
        return slots

    sweepers = [asyncio.create_task(keep_sweeping()) for _ in range(3)]
    lives = await asyncio.gather(*(asyncio.to_thread(live_and_die, number) for number in range(3)))
    running = False
    await asyncio.gather(*sweepers)
    assert len({slot for slots in lives for slot in slots}) < 36, "no slot was used again"
    await swept(reader, client)
    assert sorted(await scan(reader)) == sorted(kept_hashes)
    assert set((await scan(reader)).values()) == {(kept,)}
    keeper.close()


async def scan(reader: RedisIndexReader) -> dict[int, tuple[int, ...]]:
    found, first_bucket = {}, 0
    while first_bucket is not None:
        entries = await reader.entries(POOL, first_bucket=first_bucket)
        found |= entries.holders
        first_bucket = entries.next_bucket
    return found


async def test_a_write_after_a_flush_says_that_the_slot_is_lost(writer, reader, client):
    fleet = Fleet(writer, 1)
    client.flushall()
    with pytest.raises(SlotLost):
        fleet.write(0, [1])
    with pytest.raises(SlotLost):
        writer.heartbeat(POOL, 0, "one", Load(), lease_ms=LEASE_MS)
    assert (await reader.match(POOL, [1])).states == ()
    again = Fleet(writer, 1)
    again.write(0, [1])
    assert await reader.holders(POOL, 1) == [0]


@pytest.mark.parametrize("suffix", ["", ":live", ":s:0", ":ids"])
async def test_a_lost_key_is_healed_by_a_fresh_slot(writer, reader, client, suffix):
    """Redis was told to evict, against the advice: the worker has to get back in."""
    fleet = Fleet(writer, 1)
    fleet.write(0, [1, 2])
    client.delete(directory(POOL) + suffix)
    fresh = Fleet(writer, 1)
    [slot] = fresh.slots
    fresh.write(slot, [1, 2])
    await reader.sweep(POOL, max_buckets=10)
    assert (await reader.match(POOL, [1, 2])).overlap_blocks[slot] == 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_with_holes_an_overlap_is_the_end_of_a_run(config, client, data):
    """Never a stride below the truth; above it only where a later run ends."""
    client.flushall()
    num_blocks = data.draw(st.sampled_from([1, 2, 5, 40, 300]))
    hashes = random_hashes(num_blocks)
    writer, reader = RedisIndexWriter(config), RedisIndexReader(config)
    fleet = Fleet(writer, 3)
    held = {}
    for slot in fleet.slots:
        removed = data.draw(st.sets(st.integers(0, num_blocks - 1), max_size=6))
        held[slot] = [index not in removed for index in range(num_blocks)]
        fleet.write(slot, hashes)
        fleet.write(slot, (), [hashes[index] for index in removed])
    match = await reader.match(POOL, hashes)
    for slot, present in held.items():
        blocks = set(itertools.compress(hashes, present))
        check_overlap(hashes, blocks, match.overlap_blocks.get(slot, 0), match.stride)
    writer.close()
    await reader.close()


async def test_any_number_of_calls_may_be_made_at_once(reader):
    answers = await asyncio.gather(*(reader.match(POOL, [1, 2]) for _ in range(500)))
    assert len(answers) == 500


async def test_an_unreachable_redis_is_named_in_the_error():
    config = IndexConfig(redis_url=f"redis://user:secret@127.0.0.1:{free_ports(1)[0]}/0", redis_timeout_s=0.2)
    with pytest.raises(IndexUnavailable, match=r"Redis at 127\.0\.0\.1:\d+") as caught:
        RedisIndexWriter(config).open_slot(worker(), lease_ms=1000)
    assert "secret" not in str(caught.value)
    with pytest.raises(IndexUnavailable):
        await RedisIndexReader(config).match(POOL, [])


async def test_a_silent_redis_times_out():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = IndexConfig(redis_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0", redis_timeout_s=0.1)
        with pytest.raises(IndexUnavailable):
            await RedisIndexReader(config).pools()


async def test_a_dropped_connection_costs_no_error(writer, reader, client):
    fleet = Fleet(writer, 1)
    await reader.match(POOL, [1])
    client.client_kill_filter(_type="normal", skipme=True)
    fleet.write(0, [1])
    assert await reader.holders(POOL, 1) == [0]


async def test_an_error_of_redis_itself_is_reported(writer, client):
    client.set(directory(POOL), "not a hash")
    with pytest.raises(IndexUnavailable, match="WRONGTYPE"):
        writer.open_slot(worker(), lease_ms=1000)


@pytest.mark.parametrize("side", [RedisIndexWriter, RedisIndexReader])
def test_a_url_of_something_else_is_refused(side):
    with pytest.raises(ConfigError, match="redis_url"):
        side(IndexConfig(redis_url="http://127.0.0.1"))
