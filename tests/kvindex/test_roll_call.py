"""Counting gateways on real servers."""

import contextlib

import pytest

from kvindex.config import IndexConfig
from kvindex.roll_call import RollCall
from tests.support.waiting import eventually


@pytest.fixture(params=["redis_url", "valkey_url", "cluster_url"])
async def join(request):
    url = request.getfixturevalue(request.param)
    joined = []

    def join(ttl_s=60.0):
        joined.append(RollCall(IndexConfig(redis_url=url, redis_timeout_s=10), ttl_s=ttl_s))
        return joined[-1]

    yield join
    for each in joined:
        with contextlib.suppress(Exception):
            await each.leave()
        await each.close()


async def test_gateways_count_each_other_until_they_leave(join):
    first, second = join(), join()
    assert [await first.count(), await second.count(), await first.count()] == [1, 2, 2]
    await second.leave()
    assert await first.count() == 1


async def test_a_gateway_that_says_nothing_any_more_stops_counting(join):
    silent, other = join(ttl_s=0.05), join()
    await silent.count()

    async def is_alone():
        return await other.count() == 1

    await eventually(is_alone)
