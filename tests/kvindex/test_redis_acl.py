"""The users of docs/operations.md, taken from there, on real servers: enough rights, and no more."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from kvindex.blocks import BlockHash
from kvindex.config import IndexConfig
from kvindex.errors import IndexRefused, SlotLost
from kvindex.redis_connection import Connection
from kvindex.redis_health import examine
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Batch, Load, Role, StepCosts
from tests.support.waiting import eventually
from tests.support.workers import make_worker

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
_FOUND = re.findall(r"^    (ACL SETUSER kvlane-(\w+) .*)$", OPERATIONS.read_text(), re.MULTILINE)
RULES = {name: rule for rule, name in _FOUND}
ON_A_CLUSTER = re.search(r"^    (\+cluster.*)$", OPERATIONS.read_text(), re.MULTILINE)
LEASE_MS = 60_000
WORKER = make_worker(incarnation="one")
POOL = WORKER.pool


def create(nodes: list[str], extra: str = "") -> None:
    for url in nodes:
        with redis.Redis.from_url(url) as client:
            for rule in RULES.values():
                client.execute_command(*rule.replace(">PASSWORD", ">pw").split(), *extra.split())


def remove(nodes: list[str]) -> None:
    for url in nodes:
        with redis.Redis.from_url(url) as client:
            client.execute_command("ACL", "DELUSER", *(f"kvlane-{name}" for name in RULES))


@pytest.fixture(params=["redis", "valkey", "cluster"])
def url(request) -> Iterator[str]:
    url = request.getfixturevalue(f"{request.param}_url")
    nodes, extra = [url], ""
    if request.param == "cluster":
        nodes = [node.url for node in request.getfixturevalue("valkey_cluster").masters]
        extra = ON_A_CLUSTER[1]
    create(nodes, extra)
    yield url
    remove(nodes)


def config(url: str, user: str) -> IndexConfig:
    return IndexConfig(redis_url=url.replace("://", f"://kvlane-{user}:pw@"), redis_timeout_s=10)


async def test_each_may_do_its_work(url):
    writer = RedisIndexWriter(config(url, "publisher"))
    gateway, inspector = RedisIndexReader(config(url, "gateway")), RedisIndexReader(config(url, "inspector"))

    slot = writer.open_slot(WORKER, lease_ms=LEASE_MS)
    slot = writer.open_slot(WORKER, lease_ms=LEASE_MS)  # fences the first
    # Enough for the buckets to be split.
    for sequence in range(1, 11):
        stored = tuple(range(100 * sequence, 100 * sequence + 100))
        writer.apply(POOL, slot, "one", Batch(sequence=sequence, stored=stored))
    writer.apply(POOL, slot, "one", Batch(sequence=11, removed=(100,)))
    for decision_id in ("named", "aged", "lapsed", "ended"):
        ttl_ms = 1 if decision_id == "lapsed" else LEASE_MS
        reservation = await gateway.reserve(
            POOL, decision_id, slot, prefill_tokens=1, seen_backlog_tokens=None, ttl_ms=ttl_ms
        )
        assert reservation.charged
    await asyncio.sleep(0.01)  # until one has lapsed
    assert await gateway.settle(POOL, "ended")
    writer.heartbeat(POOL, slot, "one", Load(), lease_ms=LEASE_MS, accepted=["named"], settle_older_than_ms=0)
    writer.report_costs(POOL, slot, "one", StepCosts(num_steps=1, prefill_tokens_per_s=1.0))
    for is_draining in (True, False):
        assert await gateway.drain(POOL, WORKER.worker_id, is_draining=is_draining)
    for role in (Role.DECODE, None):
        assert await gateway.give_role(POOL, WORKER.worker_id, role)

    for reader in (gateway, inspector):
        assert await reader.pools() == [POOL]
        _, [worker] = await reader.workers(POOL)
        assert worker.num_indexed_blocks == 999
        assert worker.charged_requests == 0
        assert worker.step_costs is not None
        assert await reader.expired_reservations(POOL) == 1
        assert await reader.holders(POOL, 101) == [slot]
        assert (await reader.match(POOL, [101, 102])).overlap_blocks == {slot: 2}
        assert await reader.holders_of(POOL, [BlockHash(101)]) == {101: (slot,)}
        assert (await reader.events(POOL, max_events=10))[-1].slot == slot
        assert (await reader.removals(POOL, max_events=10))[-1].blocks == (100,)
    assert (await inspector.entries(POOL, max_buckets=100)).holders.keys() == {*range(101, 1_100)}
    assert (await inspector.memory(POOL)).num_entries == 999
    assert await inspector.used_memory_bytes() > 0
    assert (await examine(config(url, "inspector"))).nodes

    writer.close_slot(POOL, slot, "one")
    writer.open_slot(make_worker("10.0.0.2:8000"), lease_ms=1)  # and is not heard of again

    async def all_is_swept() -> bool:
        await gateway.sweep(POOL, max_buckets=10)
        return await gateway.pools() == []

    await eventually(all_is_swept)
    with pytest.raises(SlotLost):
        writer.apply(POOL, slot, "one", Batch(sequence=12))
    writer.close()
    await gateway.close()
    await inspector.close()


async def test_none_may_do_more(url):
    inspector = RedisIndexReader(config(url, "inspector"))
    with pytest.raises(IndexRefused, match="give the user the rights"):
        await inspector.reserve(POOL, "d", 0, prefill_tokens=1, seen_backlog_tokens=None, ttl_ms=1)
    await inspector.close()
    writer = RedisIndexWriter(config(url, "inspector"))
    with pytest.raises(IndexRefused, match="give the user the rights"):
        writer.open_slot(WORKER, lease_ms=LEASE_MS)
    writer.close()
    for user in RULES:
        connection = Connection(config(url, user))
        for command in (
            ("FLUSHALL",),
            ("CONFIG", "GET", "*"),
            ("ACL", "LIST"),
            ("HGET", "somebody:else", "x"),
            ("EVALSHA", "0" * 40, 1, "somebody:else"),
        ):
            with pytest.raises(IndexRefused, match=r"[Nn]o permissions"):
                connection.call(*command)
        connection.close()


def test_the_users_are_those_of_the_parts():
    assert set(RULES) == {"publisher", "gateway", "inspector"}
