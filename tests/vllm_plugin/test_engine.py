"""Real engines: what they say they computed is what the index holds."""

import asyncio
import json
import random
import statistics
import sys
import time
from functools import reduce
from operator import xor
from pathlib import Path
from typing import Any

import httpx
import pytest

from connectors.bench.ports import free_ports
from gateway.profile import Profile, num_pairs
from kvindex.blocks import BlockHash, Pool, hash_blocks, root_hash
from kvindex.config import index_config
from kvindex.redis_index import RedisIndexReader
from kvindex.worker import RegisteredWorker
from tests.support.running import running
from tests.support.vllm_engine import BLOCK_SIZE, MODEL_NAME, Engine, start_engine
from tests.support.waiting import eventually

pytestmark = pytest.mark.vllm

POOL = Pool(MODEL_NAME, BLOCK_SIZE)
LEASE_MS = 2_000
PROMPT = list(range(100, 300))
DECISION = "0123456789abcdef"


class Index:
    """What a test asks of the index."""

    def __init__(self, redis_url: str) -> None:
        self.reader = RedisIndexReader(index_config(redis_url))

    async def worker(self) -> RegisteredWorker | None:
        _, workers = await self.reader.workers(POOL)
        return workers[0] if workers else None

    async def holds(self, hashes: set[BlockHash]) -> bool:
        """Return whether the worker holds exactly these blocks."""
        found = await self.worker()
        assert found is not None
        return (found.num_indexed_blocks, int(found.digest, 16)) == (len(hashes), reduce(xor, hashes, 0))

    async def gone(self) -> bool:
        states = (
            await self.reader.match(POOL, hash_blocks(root_hash(MODEL_NAME), PROMPT, BLOCK_SIZE))
        ).states
        return await self.worker() is None and not states


async def complete(engine: Engine, **fields: Any) -> list[int]:
    """Return the tokens whose KV the engine computed: all but the last one."""
    body = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    headers = {"x-request-id": f"test-kv{DECISION}"}
    async with httpx.AsyncClient(base_url=engine.url, timeout=120) as client:
        body |= {"return_token_ids": True} | fields
        answer = (await client.post("/v1/completions", json=body, headers=headers)).raise_for_status().json()
    output: list[int] = answer["choices"][0]["token_ids"]
    return [*body["prompt"], *output][:-1]


def blocks(tokens: list[int], salt: str | None = None) -> set[BlockHash]:
    return set(hash_blocks(root_hash(MODEL_NAME, cache_salt=salt), tokens, BLOCK_SIZE))


async def test_an_engine_with_the_connector_is_in_the_index_as_it_is(redis_url: str):
    index = Index(redis_url)
    (port,) = free_ports(1)
    environment = {"KVLANE_REDIS_URL": redis_url, "KVLANE_LEASE_MS": str(LEASE_MS)}
    with start_engine(port, command=("kvlane", "serve"), env=environment) as engine:
        found = await eventually(index.worker)
        worker = found.worker
        assert (worker.endpoint, worker.publisher, worker.block_size) == (
            engine.endpoint,
            "connector",
            BLOCK_SIZE,
        )
        # 4 layers, K and V, 2 heads of 32 bfloat16 numbers.
        assert worker.bytes_per_token == 4 * 2 * 2 * 32 * 2

        charged = await index.reader.reserve(
            POOL, DECISION, found.slot, prefill_tokens=200, seen_backlog_tokens=None, ttl_ms=60_000
        )
        assert charged.charged
        work = asyncio.create_task(complete(engine))

        async def busy() -> bool:
            now = await index.worker()
            return now is not None and now.load.running_requests == 1 and now.load.running_tokens >= 200

        await eventually(busy)
        expected = blocks(await work)
        assert len(expected) == 239 // BLOCK_SIZE
        await eventually(lambda: index.holds(expected))

        async def idle_and_settled() -> bool:
            now = await index.worker()
            assert now is not None
            return (now.load.running_requests, now.load.kv_usage, now.charged_requests) == (0, 0, 0)

        await eventually(idle_and_settled)

        # The same tokens under a salt are other blocks; the same prompt again is none.
        expected |= blocks(await complete(engine, cache_salt="tenant-a"), "tenant-a")
        await complete(engine)
        await eventually(lambda: index.holds(expected))

        # A client that goes away leaves no load behind.
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(complete(engine, max_tokens=3_000), 1.0)
        await eventually(idle_and_settled)

        await its_steps_cost_what_requests_take(engine, index)

        assert not await index.gone()
        engine.kill()
        await eventually(index.gone, 2 * LEASE_MS / 1000)
    await index.reader.close()


async def its_steps_cost_what_requests_take(engine: Engine, index: Index) -> None:
    """Compare what the engine measured of its steps with what a client measures of whole requests."""
    chance = random.Random(1)

    async def timed_ms(num_tokens: int, num_answer_tokens: int) -> float:
        prompt = [chance.randrange(100, 1_000) for _ in range(num_tokens)]
        start_s = time.perf_counter()
        await complete(engine, prompt=prompt, max_tokens=num_answer_tokens)
        return (time.perf_counter() - start_s) * 1e3

    async def measured() -> bool:
        found = await index.worker()
        costs = found.step_costs if found else None
        return costs is not None and costs.prefill_tokens_per_s is not None and costs.num_steps > before + 20

    found = await index.worker()
    assert found is not None
    before = found.step_costs.num_steps if found.step_costs else 0
    for _ in range(24):
        await timed_ms(chance.randint(200, 3_600), 8)
    await eventually(measured, 60)
    found = await index.worker()
    assert found is not None
    assert found.step_costs is not None
    costs = Profile(
        prefill_tokens_per_s=found.step_costs.prefill_tokens_per_s,
        attention_ns_per_pair=found.step_costs.attention_ns_per_pair,
        step_ms=found.step_costs.step_ms,
    )
    short, long = [statistics.median([await timed_ms(n, 1) for _ in range(5)]) for n in (400, 3_600)]
    # The difference of two requests is prefill alone: what surrounds it is the same.
    predicted_ms = costs.prefill_ms(3_600, num_pairs(3_600, 0)) - costs.prefill_ms(400, num_pairs(400, 0))
    assert 1 / 3 < predicted_ms / (long - short) < 3  # the machine may be busier now than it was then
    one, many = [statistics.median([await timed_ms(64, n) for _ in range(3)]) for n in (1, 101)]
    assert found.step_costs.step_ms < 3 * (many - one) / 100


async def test_an_engine_without_the_connector_is_published_from_beside_it(redis_url: str):
    index = Index(redis_url)
    port, events_port, replay_port = free_ports(3)
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{events_port}",
        "replay_endpoint": f"tcp://*:{replay_port}",
    }
    publish = [str(Path(sys.executable).with_name("kvlane")), "publish", "--redis-url", redis_url]
    publish += ["--endpoint", f"127.0.0.1:{port}", "--events", f"tcp://127.0.0.1:{events_port}"]
    with start_engine(port, "--kv-events-config", json.dumps(events)) as engine:
        expected = blocks(await complete(engine))
        with running(*publish, "--replay", f"tcp://127.0.0.1:{replay_port}"):
            await eventually(index.worker, 60)
            await eventually(lambda: index.holds(expected))
            expected |= blocks(await complete(engine, prompt=PROMPT[::-1]))
            await eventually(lambda: index.holds(expected))
            found = await index.worker()
            assert found is not None
            assert (found.worker.publisher, found.worker.max_model_len) == ("external", 4096)
            engine.kill()
            await eventually(index.gone, 30)
    await index.reader.close()
