"""Buffers are never used by two, nor before the wire has let go of them."""

import asyncio

import pytest
import torch

from connectors.errors import StagingExhausted
from connectors.staging import Copier, StagingRing
from connectors.transport import Peer, Request

CPU = torch.device("cpu")
PATIENCE_S = 30.0


async def test_buffers_are_bounded_and_served_in_order():
    ring = StagingRing(2, 16, CPU, poison=True)
    first, second = await ring.acquire(PATIENCE_S), await ring.acquire(PATIENCE_S)
    assert {first, second} == {0, 1}
    with pytest.raises(StagingExhausted, match=r"within 0\.01 s"):
        await ring.acquire(0.01)
    order: list[str] = []

    async def use(name: str) -> None:
        index = await ring.acquire(PATIENCE_S)
        order.append(name)
        ring.release(index)

    waiting = [asyncio.create_task(use(name)) for name in "abc"]
    await asyncio.sleep(0)
    ring.release(first)
    await asyncio.gather(*waiting)
    assert order == ["a", "b", "c"]
    ring.release(second)
    assert ring.num_free == 2


async def test_one_who_gives_up_waiting_takes_no_buffer_along():
    ring = StagingRing(1, 16, CPU)
    index = await ring.acquire(PATIENCE_S)
    gives_up = asyncio.create_task(ring.acquire(PATIENCE_S))
    waits = asyncio.create_task(ring.acquire(PATIENCE_S))
    await asyncio.sleep(0)
    ring.release(index)
    gives_up.cancel()
    assert await waits == index


async def test_a_buffer_with_an_unfinished_request_is_in_quarantine():
    ring = StagingRing(1, 16, CPU)
    request = Request(Peer("frozen:1"))
    ring.release(await ring.acquire(PATIENCE_S), request)
    assert (ring.num_free, ring.num_quarantined) == (0, 1)
    with pytest.raises(StagingExhausted, match="held by lost peers"):
        await ring.acquire(PATIENCE_S)
    request.finish(ConnectionResetError())
    await asyncio.sleep(0)
    assert (ring.num_free, ring.num_quarantined) == (1, 0)
    await ring.acquire(PATIENCE_S)


async def test_poison_finds_who_writes_too_late():
    ring = StagingRing(1, 16, CPU, poison=True)
    index = await ring.acquire(PATIENCE_S)
    kept = ring.memory[index]
    kept.fill_(1)
    ring.release(index)
    assert not (kept == 1).any()
    kept[3] = 7
    with pytest.raises(AssertionError, match="written after"):
        await ring.acquire(PATIENCE_S)


async def test_the_loop_goes_on_while_the_copier_copies():
    copier = Copier(CPU)
    started = asyncio.get_running_loop().create_future()
    done: list[int] = []
    go_on = asyncio.Event()
    loop = asyncio.get_running_loop()

    def copy() -> None:
        loop.call_soon_threadsafe(started.set_result, None)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(PATIENCE_S)
        done.append(torch.get_num_threads())

    running = asyncio.create_task(copier.run(copy))
    await started
    assert not done
    go_on.set()
    await running
    assert done == [1]
    copier.close()
