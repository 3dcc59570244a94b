"""What goes wrong in a fleet, on a real Redis: afterwards the index is again what the engines hold.

Leases and timeouts are about a tenth of what they are in production, except where the network stalls.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest
import redis
from structlog.testing import capture_logs

from connectors.bench.ports import free_ports
from kvindex.config import IndexConfig, PublisherConfig
from kvindex.contents import EngineContents
from kvindex.event_source import ZmqEventSource
from kvindex.keys import directory
from kvindex.publisher import LoadReport, Publisher
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Load
from tests.support.engine_core import EventStream
from tests.support.engine_flaws import add_flags
from tests.support.proxy import stalling_proxy
from tests.support.publishing import Published, index_is, slots_of
from tests.support.running import running
from tests.support.scripted_engine import make_worker, prompt, removal
from tests.support.waiting import eventually

POOL = make_worker().pool
PATIENCE_S = 60.0


async def becomes(url: str, expected: dict[str, Collection[int]]) -> None:
    await eventually(lambda: index_is(url, POOL, expected), patience_s=PATIENCE_S)


async def incarnation_of_the_only_worker(url: str) -> str:
    live = await eventually(lambda: slots_of(url, POOL), patience_s=PATIENCE_S)
    (incarnation,) = live
    return incarnation


async def nobody_is_live(url: str) -> bool:
    return not await slots_of(url, POOL)


# The network and Redis


async def test_a_network_that_stalls_for_half_a_minute(redis_url: str):
    """The lease ends, the engine goes on, and is back with all that it did meanwhile."""
    first, first_hashes = prompt(*range(20))
    usual = PublisherConfig()
    times = {"lease_ms": usual.lease_ms, "heartbeat_ms": usual.heartbeat_ms, "flush_ms": usual.flush_ms}
    with (
        stalling_proxy(redis_url) as proxy,
        closing(Published(proxy.url, **times, redis_timeout_s=usual.redis_timeout_s)) as published,
    ):
        name = published.worker.incarnation
        published.source.put(first)
        await becomes(redis_url, {name: first_hashes})
        proxy.stall()
        over_s = time.monotonic() + 30
        await eventually(lambda: nobody_is_live(redis_url), patience_s=PATIENCE_S)
        expected = set(first_hashes)
        for number in range(300):
            event, hashes = prompt(1000 + number, 7, *range(20))
            published.source.put(event, removal(hashes[3:]))
            expected |= set(hashes[:3])
        await eventually(lambda: published.source.is_drained, patience_s=PATIENCE_S)
        await asyncio.sleep(over_s - time.monotonic())
        proxy.resume()
        await becomes(redis_url, {name: expected})


async def test_a_redis_that_goes_back_in_time(redis_url: str):
    """As after a failover to a replica that lacks the last batches, or a restart from a snapshot."""
    early, early_hashes = prompt(*range(200))
    late, late_hashes = prompt(7, *range(199))
    with closing(Published(redis_url)) as published, redis.Redis.from_url(redis_url) as client:
        name = published.worker.incarnation
        published.source.put(early)
        await becomes(redis_url, {name: early_hashes})
        snapshot = {key: client.dump(key) for key in client.scan_iter()}
        published.source.put(late, removal(early_hashes[50:]))
        await becomes(redis_url, {name: [*early_hashes[:50], *late_hashes]})
        transaction = client.pipeline(transaction=True)
        for key, value in snapshot.items():
            transaction.restore(key, 0, value, replace=True)
        transaction.execute()
        await becomes(redis_url, {name: [*early_hashes[:50], *late_hashes]})


async def test_every_key_that_may_be_lost(redis_url: str):
    """An eviction policy takes keys one by one: registry, slots, buckets."""
    event, hashes = prompt(*range(400))
    with closing(Published(redis_url, lease_ms=500)) as published, redis.Redis.from_url(redis_url) as client:
        name = published.worker.incarnation
        published.source.put(event)
        await becomes(redis_url, {name: hashes})
        for kind in (":b:", ":s:", ":live", ":ids", ""):
            prefix = (directory(POOL) + kind).encode()
            lost = min(key for key in client.scan_iter() if key.startswith(prefix))
            num_opened = published.writer.num_opened
            client.delete(lost)
            await becomes(redis_url, {name: hashes})
            if kind != ":ids":  # which only the next registration reads
                assert published.writer.num_opened > num_opened


# Engines


@contextmanager
def publishing(url: str, lease_ms: int, *tokens: int) -> Iterator[int]:
    """Run a process that publishes the blocks of one prompt; yield its process id."""
    module = "tests.support.publishing_process"
    with running(sys.executable, "-m", module, url, str(lease_ms), *map(str, tokens)) as process:
        yield process.pid


async def test_an_engine_that_is_killed_and_restarted_at_its_address(redis_url: str):
    _, before = prompt(1, 2, 3, 4)
    _, after = prompt(5, 6, 3, 4)
    with publishing(redis_url, 500, 1, 2, 3, 4):
        first = await incarnation_of_the_only_worker(redis_url)
        await becomes(redis_url, {first: before})
    await eventually(lambda: nobody_is_live(redis_url), patience_s=PATIENCE_S)
    with publishing(redis_url, 500, 5, 6, 3, 4):
        second = await incarnation_of_the_only_worker(redis_url)
        assert second != first
        await becomes(redis_url, {second: after})


@pytest.mark.parametrize("is_swept", [False, True])
async def test_an_engine_that_is_paused_beyond_its_lease(redis_url: str, is_swept: bool):
    """It resumes in its slot, or in a fresh one if it was silent for ten leases and swept."""
    _, hashes = prompt(*range(40))
    reader = RedisIndexReader(IndexConfig(redis_url=redis_url, redis_timeout_s=10))
    with publishing(redis_url, 200, *range(40)) as pid, redis.Redis.from_url(redis_url) as client:
        name = await incarnation_of_the_only_worker(redis_url)
        await becomes(redis_url, {name: hashes})
        (slot,) = (await slots_of(redis_url, POOL)).values()
        os.kill(pid, signal.SIGSTOP)
        await eventually(lambda: nobody_is_live(redis_url), patience_s=PATIENCE_S)
        if is_swept:

            async def is_gone() -> bool:
                await reader.sweep(POOL, max_buckets=100)
                return not client.keys("*:b:*")

            await eventually(is_gone, patience_s=PATIENCE_S)
        os.kill(pid, signal.SIGCONT)
        await becomes(redis_url, {name: hashes})
        if not is_swept:
            assert await slots_of(redis_url, POOL) == {name: slot}
    await reader.close()


async def test_two_engines_with_one_address_by_mistake(redis_url: str):
    """The first stays, the second says what to do and waits; when the first goes it is let in."""
    first_event, first_hashes = prompt(1, 2, 3, 4)
    second_event, second_hashes = prompt(1, 2, 5, 6)
    with capture_logs() as logs, closing(Published(redis_url, lease_ms=500)) as rightful:
        name = rightful.worker.incarnation
        rightful.source.put(first_event)
        await becomes(redis_url, {name: first_hashes})
        with closing(Published(redis_url, lease_ms=500)) as intruder:
            intruder.source.put(second_event)
            await eventually(
                lambda: [entry for entry in logs if "give each its own endpoint" in entry["event"]],
                patience_s=PATIENCE_S,
            )
            assert await index_is(redis_url, POOL, {name: first_hashes})
            rightful.close()
            await becomes(redis_url, {intruder.worker.incarnation: second_hashes})


class LossyStream(EventStream):
    """vLLM's stream, whose queue to the subscriber may be full."""

    is_full = False

    def publish(self, *events: object) -> None:
        pub = self._pub
        self._pub = Nowhere() if self.is_full else pub
        super().publish(*events)
        self._pub = pub


class Nowhere:
    def send_multipart(self, frames: object) -> None: ...


@pytest.mark.parametrize("has_replay", [True, False])
async def test_an_event_queue_that_overflows(redis_url: str, has_replay: bool):
    """With replay nothing is lost. Without, nothing is claimed that is not known any more."""
    events_port, replay_port = free_ports(2)
    replay = f"tcp://127.0.0.1:{replay_port}" if has_replay else None
    parser = argparse.ArgumentParser()
    add_flags(parser)
    faultless = parser.parse_args([])
    faultless.events, faultless.replay = f"tcp://127.0.0.1:{events_port}", replay
    stream = LossyStream(faultless)
    config = PublisherConfig(redis_url=redis_url, lease_ms=2_000, heartbeat_ms=50, redis_timeout_s=10)
    worker = make_worker()
    source = ZmqEventSource(f"tcp://127.0.0.1:{events_port}", replay, recheck_s=0.2)
    publisher = Publisher(
        worker, config, RedisIndexWriter(config), EngineContents(worker, source), lambda: LoadReport(Load())
    )
    publisher.start()
    try:
        name = worker.incarnation
        known, known_hashes = prompt(1, 2, 3, 4)

        async def is_known() -> bool:  # the subscription takes hold at some time
            stream.publish(known)
            return await index_is(redis_url, POOL, {name: known_hashes})

        await eventually(is_known, patience_s=PATIENCE_S)
        lost, lost_hashes = prompt(5, 6, 7, 8)
        seen, seen_hashes = prompt(9, 9, 9, 9)
        stream.is_full = True
        for _ in range(50):
            stream.publish(lost)
        stream.is_full = False
        stream.publish(seen)
        everything = [*known_hashes, *lost_hashes, *seen_hashes]
        await becomes(redis_url, {name: everything if has_replay else seen_hashes})
    finally:
        publisher.stop()


async def test_200_workers_that_join_at_once(redis_url: str):
    fleet = []
    try:
        expected = {}
        for number in range(200):
            endpoint = f"10.0.{number // 100}.{number % 100}:8000"
            published = Published(redis_url, endpoint, lease_ms=60_000, heartbeat_ms=2_000)
            fleet.append(published)
            event, hashes = prompt(*range(20), number, number)
            published.source.put(event)
            expected[published.worker.incarnation] = hashes
        await becomes(redis_url, expected)
        assert len(set((await slots_of(redis_url, POOL)).values())) == 200
    finally:
        with ThreadPoolExecutor(len(fleet)) as pool:
            list(pool.map(Published.close, fleet))
