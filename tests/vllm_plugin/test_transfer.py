"""Real engines: a prompt that is computed here and decoded there gives the same tokens, whatever fails."""

import asyncio
import json
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import httpx
import pytest

from connectors.params import new_transfer_id
from tests.support.lora_adapter import RANK, make_adapter
from tests.support.pair import Pair, pair, transfer_engine
from tests.support.vllm_engine import BLOCK_SIZE, MODEL_NAME, tiny_model
from tests.support.waiting import eventually

pytestmark = pytest.mark.vllm

PATIENCE_S = 120.0
AROUND_BLOCKS = [n * BLOCK_SIZE + d for n in range(1, 11) for d in (-1, 0, 1)]
LONG = [1_000, 1_023, 1_024, 1_025, 2_048, 3_500]
ADAPTERS = ("sql", "poetry")
# In bfloat16 the order of a batch's additions now and then decides which token is the likeliest.
ENGINE = ("--max-num-batched-tokens", "1024", "--dtype", "float32")
DONE = "kvlane_transfer_ended_total{outcome=done,role=receive}"
CACHE_HITS = "vllm:prefix_cache_hits_total"
SPECULATED = "vllm:spec_decode_num_draft_tokens_total"

draw = random.Random(5)


def prompt(num_tokens: int) -> list[int]:
    return [draw.randrange(100, 1_000) for _ in range(num_tokens)]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """Arguments of an engine with adapters."""
    adapters = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(ADAPTERS):
        make_adapter(adapters / name, tiny_model(), seed=seed)
    modules = (f"{name}={adapters / name}" for name in ADAPTERS)
    return "--enable-lora", "--max-loras", "2", "--max-lora-rank", str(RANK), "--lora-modules", *modules


@pytest.fixture(scope="module")
def engines(redis_server: str, lora: Sequence[str]) -> Iterator[Pair]:
    settings = {"transport": "ucx", "lease_s": 3, "peer_timeout_s": 10}
    with pair(redis_server, settings, *ENGINE, *lora) as both:
        yield both


async def received(engines: Pair) -> float:
    return (await engines.decode.metrics()).get(DONE, 0)


async def clean(engines: Pair) -> None:
    for engine in (engines.prefill, engines.decode):
        await eventually(engine.is_clean, PATIENCE_S)


@dataclass(frozen=True)
class Prompt:
    tokens: list[int]
    model: str = MODEL_NAME


async def same(engines: Pair, prompts: Sequence[Prompt]) -> None:
    """Send prompts at once, split, then whole.

    The outputs must be equal, and every prompt's blocks were received.
    """
    before = await received(engines)
    split = await asyncio.gather(*(engines.complete(each.tokens, model=each.model) for each in prompts))
    assert await received(engines) == before + len(prompts)
    assert split == await whole(engines, prompts)


async def whole(engines: Pair, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return what a worker answers that has none of their blocks."""
    return await asyncio.gather(
        *(engines.prefill.complete(each.tokens, model=each.model, cache_salt="whole") for each in prompts)
    )


async def prove(engines: Pair) -> None:
    """Compare 200 prompts, half of them an adapter's: 100, and 100 that go on from within one of these.

    The base model's are not sent together with the adapters': the CPU build of vLLM 0.32 applies an
    adapter to the whole batch, wherever they are served.
    """
    lengths = [1, 2, *AROUND_BLOCKS, *LONG]
    lengths += [draw.randrange(3, 200) for _ in range(100 - len(lengths))]
    draw.shuffle(lengths)
    first = [Prompt(prompt(num_tokens)) for num_tokens in lengths[:50]]
    first += [Prompt(prompt(num_tokens), draw.choice(ADAPTERS)) for num_tokens in lengths[50:]]
    starts = [replace(each, tokens=each.tokens[: draw.randrange(len(each.tokens) + 1)]) for each in first]
    further = [replace(each, tokens=each.tokens + prompt(draw.randrange(1, 100))) for each in starts]
    for prompts in (first[:50], first[50:]):
        await same(engines, prompts)
    hits = (await engines.decode.metrics())[CACHE_HITS]
    for prompts in (further[:50], further[50:]):
        await same(engines, prompts)
    num_known = sum(len(each.tokens) // BLOCK_SIZE * BLOCK_SIZE for each in starts)
    assert (await engines.decode.metrics())[CACHE_HITS] - hits == num_known
    await clean(engines)


async def test_split_is_whole_token_for_token(engines: Pair):
    await prove(engines)
    tokens = prompt(100)
    models = [MODEL_NAME, *ADAPTERS]
    assert len({tuple(await engines.complete(tokens, model=model)) for model in models}) == len(models)


async def test_blocks_that_the_decode_worker_has_are_not_sent(engines: Pair):
    start = prompt(10 * BLOCK_SIZE)
    await same(engines, [Prompt(start)])
    sent = "kvlane_transfer_moved_bytes_total{role=send}"
    before = (await engines.prefill.metrics())[sent]
    await same(engines, [Prompt(start + prompt(7))])
    # 4 layers, K and V, 2 heads of 32 float32 numbers: one block, and not eleven.
    assert (await engines.prefill.metrics())[sent] - before == 4 * 2 * 2 * 32 * 4 * BLOCK_SIZE
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
    await same(engines, [Prompt(prompt(100))])


async def test_heads_go_between_engines_of_different_tensor_parallel_sizes(redis_server: str, engines: Pair):
    prompts = [Prompt(prompt(num_tokens)) for num_tokens in (1, *AROUND_BLOCKS[:3], 300, 1_500)]
    expected = await whole(engines, prompts)
    settings = {"transport": "ucx", "lease_s": 300, "peer_timeout_s": 300}
    with transfer_engine(redis_server, settings, *ENGINE, tp_size=2) as wide:
        assert await whole(Pair(wide, wide), prompts) == expected
        for split in (Pair(wide, engines.decode), Pair(engines.prefill, wide)):
            before = (await split.decode.metrics())[DONE]
            assert await asyncio.gather(*(split.complete(each.tokens) for each in prompts)) == expected
            # Ranks spin while they wait for each other: on two cores a receiver may starve beyond a lease.
            assert (await split.decode.metrics())[DONE] >= before + split.decode.tp_size
            await clean(split)


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
    expected = [await engines.decode.complete(each, cache_salt="whole") for each in prompts]
    halves = set()

    async def disaggregated(tokens: list[int]) -> list[int]:
        """Return what the decode worker makes of it, whatever becomes of the other half.

        That waits behind other prompts, so that there is time to hurt it.
        """
        transfer_id = new_transfer_id()
        send = {"kvlane": {"transfer_id": transfer_id, "role": "send"}}
        receive = {"kvlane": {"transfer_id": transfer_id, "role": "receive", "peer": engines.prefill.peer}}
        for work in (
            *(engines.prefill.complete(prompt(3_500), 1) for _ in range(2)),
            engines.prefill.complete(tokens, 1, kv_transfer_params=send),
        ):
            task = asyncio.create_task(work)
            halves.add(task)
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await engines.decode.complete(tokens, kv_transfer_params=receive)

    frozen = asyncio.create_task(disaggregated(prompts[0]))
    await wait_until_prefill_has_begun(engines)
    hurt(signal.SIGSTOP)
    assert await frozen == expected[0]
    hurt(signal.SIGCONT)
    await clean(engines)

    killed = asyncio.create_task(disaggregated(prompts[1]))
    await wait_until_prefill_has_begun(engines)
    engines.prefill.engine.kill()
    assert await killed == expected[1]
    receive = {"transfer_id": new_transfer_id(), "role": "receive", "peer": engines.prefill.peer}
    assert await engines.decode.complete(prompts[2], kv_transfer_params={"kvlane": receive}) == expected[2]
    await eventually(engines.decode.is_clean, PATIENCE_S)


async def test_nixl_moves_the_same_to_engines_that_speculate(redis_server: str, lora: Sequence[str]):
    speculate = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    arguments = (*ENGINE, *lora, "--speculative-config", json.dumps(speculate))
    with pair(redis_server, {"transport": "nixl-ucx"}, *arguments) as engines:
        await prove(engines)
        assert (await engines.decode.metrics())[SPECULATED] > 0
