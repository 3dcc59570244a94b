"""Real engines: a prompt that is computed here and decoded there gives the same tokens, whatever fails."""

import asyncio
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress

import httpx
import pytest

from connectors.params import new_transfer_id
from tests.support.pair import Pair, pair
from tests.support.vllm_engine import BLOCK_SIZE
from tests.support.waiting import eventually

pytestmark = pytest.mark.vllm

PATIENCE_S = 120.0
LENGTHS = [1, 2, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE, 200, 1_000, 3_500]
DONE = "kvlane_transfer_ended_total{outcome=done,role=receive}"

draw = random.Random(5)


def prompt(num_tokens: int) -> list[int]:
    return [draw.randrange(100, 1_000) for _ in range(num_tokens)]


@pytest.fixture(scope="module")
def engines(redis_server: str) -> Iterator[Pair]:
    settings = {"transport": "ucx", "lease_s": 3, "peer_timeout_s": 10}
    with pair(redis_server, settings, "--max-num-batched-tokens", "1024") as both:
        yield both


async def received(engines: Pair) -> float:
    return (await engines.decode.metrics()).get(DONE, 0)


async def clean(engines: Pair) -> None:
    for engine in (engines.prefill, engines.decode):
        await eventually(engine.is_clean, PATIENCE_S)


async def same(engines: Pair, prompts: list[list[int]]) -> None:
    """Send prompts at once, split, then whole; the outputs must be equal, and every one was received."""
    before = await received(engines)
    split = await asyncio.gather(*(engines.complete(each) for each in prompts))
    assert await received(engines) == before + len(prompts)
    whole = await asyncio.gather(*(engines.prefill.complete(each) for each in prompts))
    assert split == whole


async def test_split_is_whole_token_for_token(engines: Pair):
    await same(engines, [prompt(num_tokens) for num_tokens in LENGTHS])
    await clean(engines)


async def test_blocks_that_the_decode_worker_has_are_not_sent(engines: Pair):
    start = prompt(10 * BLOCK_SIZE)
    await same(engines, [start])
    sent = "kvlane_transfer_moved_bytes_total{role=send}"
    before = (await engines.prefill.metrics())[sent]
    await same(engines, [start + prompt(7)])
    # 4 layers, K and V, 2 heads of 32 bfloat16 numbers: one block, and not eleven.
    assert (await engines.prefill.metrics())[sent] - before == 4 * 2 * 2 * 32 * 2 * BLOCK_SIZE
    await clean(engines)


@pytest.mark.parametrize(
    "params",
    [
        {"transfer_id": new_transfer_id(), "role": "receive", "peer": "127.0.0.1:1"},
        {"transfer_id": "../../etc/passwd", "role": "receive", "peer": "127.0.0.1:1"},
        {"transfer_id": new_transfer_id(), "role": "receive", "peer": "PREFILL"},
        {"transfer_id": new_transfer_id(), "role": "receive", "peer": "PREFILL", "peer_tp_size": 2},
        "nonsense",
    ],
)
async def test_forged_params_cost_time_and_nothing_else(engines: Pair, params: object):
    if isinstance(params, dict) and params["peer"] == "PREFILL":
        params = {**params, "peer": engines.prefill.peer}
    tokens = prompt(50)
    got = await engines.decode.complete(tokens, kv_transfer_params={"kvlane": params})
    assert got == await engines.prefill.complete(tokens)
    await clean(engines)


async def test_a_client_that_goes_away_leaves_nothing_behind(engines: Pair):
    async def abandon(work: object, after_s: float) -> None:
        with pytest.raises((TimeoutError, httpx.ReadTimeout)):
            await asyncio.wait_for(work, after_s)  # type: ignore[arg-type]

    for after_s in (0.05, 0.3, 1.0):
        await abandon(engines.complete(prompt(3_000), 400), after_s)
    # One half alone: nobody receives what is sent, nobody sends what is waited for.
    for role in ("send", "receive"):
        params = {"transfer_id": new_transfer_id(), "role": role, "peer": engines.prefill.peer}
        half = engines.prefill if role == "send" else engines.decode
        await abandon(half.complete(prompt(3_000), 400, kv_transfer_params={"kvlane": params}), 0.3)
    await clean(engines)
    await same(engines, [prompt(100)])


async def test_blocks_that_nobody_fetches_are_freed_after_the_lease(engines: Pair):
    params = {"transfer_id": new_transfer_id(), "role": "send"}
    await engines.prefill.complete(prompt(100), 1, kv_transfer_params={"kvlane": params})
    await clean(engines)


async def wait_until_prefill_has_begun(engines: Pair) -> None:
    async def is_live() -> bool:
        return (await engines.prefill.metrics())["kvlane_transfer_live{role=send}"] > 0

    await eventually(is_live, PATIENCE_S)


@pytest.fixture
def hurt(engines: Pair) -> Iterator[Callable[[signal.Signals], None]]:
    leader = engines.prefill.engine.process.pid
    yield lambda what: os.killpg(leader, what)
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGCONT)


async def test_a_frozen_and_then_a_dead_prefill_worker(engines: Pair, hurt: Callable[[signal.Signals], None]):
    """The last test of this pair: it does not survive."""
    prompts = [prompt(3_500) for _ in range(3)]
    whole = [await engines.decode.complete(each, cache_salt="whole") for each in prompts]

    async def disaggregated(tokens: list[int]) -> list[int]:
        """Return what the decode worker makes of it, whatever becomes of the other half."""
        transfer_id = new_transfer_id()
        send = {"kvlane": {"transfer_id": transfer_id, "role": "send"}}
        receive = {"kvlane": {"transfer_id": transfer_id, "role": "receive", "peer": engines.prefill.peer}}
        prefill = asyncio.create_task(engines.prefill.complete(tokens, 1, kv_transfer_params=send))
        prefill.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await engines.decode.complete(tokens, kv_transfer_params=receive)

    frozen = asyncio.create_task(disaggregated(prompts[0]))
    await wait_until_prefill_has_begun(engines)
    hurt(signal.SIGSTOP)
    assert await frozen == whole[0]
    hurt(signal.SIGCONT)
    await clean(engines)

    killed = asyncio.create_task(disaggregated(prompts[1]))
    await wait_until_prefill_has_begun(engines)
    engines.prefill.engine.kill()
    assert await killed == whole[1]
    receive = {"transfer_id": new_transfer_id(), "role": "receive", "peer": engines.prefill.peer}
    assert await engines.decode.complete(prompts[2], kv_transfer_params={"kvlane": receive}) == whole[2]
    await eventually(engines.decode.is_clean, PATIENCE_S)


async def test_nixl_moves_the_same(redis_server: str):
    with pair(redis_server, {"transport": "nixl-ucx"}, "--max-num-batched-tokens", "1024") as engines:
        await same(engines, [prompt(num_tokens) for num_tokens in LENGTHS])
        await clean(engines)
