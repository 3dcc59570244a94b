"""Publisher and reader through real failovers: nobody tells them, and the index is whole again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from contextlib import closing

import pytest

from kvindex.errors import IndexUnavailable
from kvindex.keys import directory
from kvindex.redis_health import examine
from kvindex.worker import SlotState
from tests.support.publishing import Impatient, state_of
from tests.support.redis_server import valkey_binary
from tests.support.redis_topology import cluster, sentinels, wait_until
from tests.support.scripted_engine import make_worker, prompt
from tests.support.waiting import eventually

PATIENCE_S = 60.0
ENGINES = {"redis": lambda: None, "valkey": valkey_binary}


class Following:
    """A reader that goes on asking, and notes what it is told."""

    def __init__(self, published: Impatient) -> None:
        self._published = published
        self.num_answers = 0
        self.errors: list[IndexUnavailable] = []
        self._stopping = False
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while not self._stopping:
            try:
                await self._published.reader.match(self._published.worker.pool, [1])
                self.num_answers += 1
            except IndexUnavailable as error:
                self.errors.append(error)
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        # Not cancelled: until Python 3.12 `wait_for`, which redis-py uses, may swallow that.
        self._stopping = True
        await self._task


@contextlib.asynccontextmanager
async def publishing(url: str):
    with closing(Impatient(url)) as published:
        following = Following(published)
        try:
            yield published, following
        finally:
            await following.close()
            await published.reader.close()


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_master_that_dies_is_replaced_and_what_its_replica_lacked_is_sent_again(engine):
    first, hashes = prompt(1, 2, 3, 4)
    lost, lost_hashes = prompt(5, 6)
    whole = state_of([*hashes, *lost_hashes])
    with sentinels(ENGINES[engine]()) as servers:
        async with publishing(servers.url) as (published, following):
            published.source.put(first)
            await eventually(lambda: published.holds(hashes))
            servers.wait_until_replicated()
            servers.cut_replication()
            published.source.put(lost)
            # The publisher must know, too, or it would send the last batch again without missing anything.
            await eventually(lambda: published.writer.answers[-1] == whole)
            num_before = len(published.writer.answers)
            servers.master.kill()
            await eventually(lambda: published.holds([*hashes, *lost_hashes]), PATIENCE_S)

            def replies() -> list[SlotState | Exception]:
                """What the new master said: after the first error, since one may have been under way."""
                answers = published.writer.answers[num_before:]
                since = itertools.dropwhile(lambda each: not isinstance(each, IndexUnavailable), answers)
                return [each for each in since if not isinstance(each, IndexUnavailable)]

            await eventually(lambda: len(replies()) > 1)
            first_beat, second_beat = replies()[:2]
            assert first_beat != whole, "the replica had everything: nothing was tested"
            assert second_beat == whole
            num_answers = following.num_answers
            await eventually(lambda: following.num_answers > num_answers)
            assert (await examine(published.config)).nodes[0].role == "master"


async def test_a_switchover_costs_no_block():
    """As before maintenance of the master: it stays up and becomes the replica."""
    event, hashes = prompt(1, 2, 3, 4)
    more, more_hashes = prompt(5, 6)
    with sentinels() as servers:
        async with publishing(servers.url) as (published, following):
            published.source.put(event)
            await eventually(lambda: published.holds(hashes))
            servers.wait_until_replicated()
            servers.fail_over()
            with servers.replica.client() as client:
                wait_until(lambda: client.info("replication")["role"] == "master")
            published.source.put(more)
            await eventually(lambda: published.holds([*hashes, *more_hashes]), PATIENCE_S)
            num_answers = following.num_answers
            await eventually(lambda: following.num_answers > num_answers)


async def test_a_cluster_loses_a_master_a_slot_moves_and_a_slot_goes_missing():
    event, hashes = prompt(*range(2_000))
    more, more_hashes = prompt(*range(2_000, 2_400))
    last, last_hashes = prompt(7, 8)
    key = directory(make_worker().pool)
    with cluster(replicated=key) as servers:
        async with publishing(servers.url) as (published, following):
            published.source.put(event)
            await eventually(lambda: published.holds(hashes))

            owner = servers.owner_of(key)
            target = next(node for node in servers.masters if node is not owner)
            moving = servers.move_pool(key, owner, target)
            next(moving)
            published.source.put(more)
            await eventually(lambda: published.holds([*hashes, *more_hashes]), PATIENCE_S)
            assert sum(1 for _ in moving) > 1
            await eventually(lambda: published.holds_each([*hashes, *more_hashes]), PATIENCE_S)
            for _ in servers.move_pool(key, target, owner):
                await asyncio.sleep(0.05)
            await eventually(lambda: published.holds_each([*hashes, *more_hashes]), PATIENCE_S)

            give_back = servers.deny_all(owner)
            await eventually(lambda: any("The cluster is down" in str(error) for error in following.errors))
            give_back()
            await eventually(lambda: published.holds([*hashes, *more_hashes]), PATIENCE_S)

            owner.kill()
            with servers.replica.client() as client:
                wait_until(lambda: client.info("replication")["role"] == "master")
            published.source.put(last)
            await eventually(lambda: published.holds([*hashes, *more_hashes, *last_hashes]), PATIENCE_S)
            assert await published.reader.pools() == [published.worker.pool]
            num_answers = following.num_answers
            await eventually(lambda: following.num_answers > num_answers)
