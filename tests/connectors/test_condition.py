from __future__ import annotations

import asyncio

from connectors.condition import Condition


async def test_who_waits_is_woken_when_it_is_so_and_not_before() -> None:
    condition = Condition()
    arrived: list[str] = []
    num_woken = 0

    async def wait_for_two() -> None:
        nonlocal num_woken
        await condition.wait_for(lambda: len(arrived) == 2)
        num_woken += 1

    waiting = asyncio.create_task(wait_for_two())
    await asyncio.sleep(0)
    for name in "ab":
        assert num_woken == 0
        arrived.append(name)
        condition.notify()
        await asyncio.sleep(0)
    await waiting
    await wait_for_two()
    assert num_woken == 2


async def test_what_is_so_no_longer_when_its_turn_comes_is_waited_for_again() -> None:
    condition = Condition()
    is_open = False
    waiting = asyncio.create_task(condition.wait_for(lambda: is_open))
    await asyncio.sleep(0)
    is_open = True
    condition.notify()
    is_open = False
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    is_open = True
    condition.notify()
    await waiting


async def test_who_gives_up_is_forgotten() -> None:
    condition = Condition()
    waiting = asyncio.create_task(condition.wait_for(lambda: False))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not condition._waiting
    condition.notify()
