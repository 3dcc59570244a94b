import asyncio

from gateway.tenants.peers import Peers
from kvindex.errors import IndexUnavailable
from tests.support.waiting import eventually


class ScriptedRollCall:
    """Answers what a test says; an error for None. The real one: tests/kvindex/test_roll_call.py."""

    def __init__(self, answer):
        self.answer = answer
        self.num_asked = 0
        self.has_left = False

    async def count(self):
        self.num_asked += 1
        if self.answer is None:
            raise IndexUnavailable("away")
        return self.answer

    async def leave(self):
        self.has_left = True

    async def close(self):
        pass


async def test_the_count_follows_and_the_last_one_stands_while_redis_is_away():
    roll_call = ScriptedRollCall(2)
    peers = Peers(roll_call)
    await peers.start(interval_s=0.005)
    assert peers.num_gateways() == 2
    roll_call.answer = 3
    await eventually(lambda: peers.num_gateways() == 3)
    roll_call.answer, seen = None, roll_call.num_asked
    await eventually(lambda: roll_call.num_asked > seen + 1)
    assert peers.num_gateways() == 3
    await peers.stop()
    assert roll_call.has_left


async def test_a_gateway_is_never_none():
    for answer in (0, None):
        peers = Peers(ScriptedRollCall(answer))
        await peers.start(interval_s=60)
        assert peers.num_gateways() == 1
        await peers.stop()
        await asyncio.sleep(0)
