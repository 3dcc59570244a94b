"""`kvlane publish` beside a simulated engine, each a process of its own."""

import signal
import sys
from pathlib import Path

import httpx

from connectors.bench.ports import free_ports
from kvindex.blocks import Pool, hash_blocks, root_hash
from kvindex.config import index_config
from kvindex.redis_index import RedisIndexReader
from kvindex.worker import RegisteredWorker
from tests.support.running import running
from tests.support.vllm_engine import tiny_model
from tests.support.waiting import eventually

BLOCK_SIZE = 32
POOL = Pool("tiny", BLOCK_SIZE)
START_PATIENCE_S = 60.0


def engine_command(port: int, events: str, replay: str) -> list[str]:
    model = tiny_model()
    command = [sys.executable, "-m", "tests.support.engine_sim", "--port", str(port)]
    return [*command, "--tokenizer", str(model), "--events", events, "--replay", replay]


async def answers(port: int) -> bool:
    async with httpx.AsyncClient() as client:
        try:
            return (await client.get(f"http://127.0.0.1:{port}/health")).is_success
        except httpx.TransportError:
            return False


async def complete(port: int, tokens: list[int]) -> None:
    async with httpx.AsyncClient(timeout=30) as client:
        body = {"model": "tiny", "prompt": tokens, "max_tokens": 1}
        (await client.post(f"http://127.0.0.1:{port}/v1/completions", json=body)).raise_for_status()


async def test_an_engine_is_followed_through_its_lives(redis_url: str):
    port, events_port, replay_port = free_ports(3)
    events, replay = (f"tcp://127.0.0.1:{each}" for each in (events_port, replay_port))
    reader = RedisIndexReader(index_config(redis_url))
    program = str(Path(sys.executable).with_name("kvlane"))
    publish = [program, "publish", "--endpoint", f"127.0.0.1:{port}", "--events", events]
    publish += ["--replay", replay, "--redis-url", redis_url]

    async def worker() -> RegisteredWorker | None:
        _, workers = await reader.workers(POOL)
        return workers[0] if workers else None

    async def holds(tokens: list[int]) -> bool:
        hashes = hash_blocks(root_hash("tiny"), tokens, BLOCK_SIZE)
        found, match = await worker(), await reader.match(POOL, hashes)
        return found is not None and match.overlap_blocks == {found.slot: len(hashes)}

    before, during, after = (list(range(first, first + 3 * BLOCK_SIZE)) for first in (100, 300, 500))
    with running(*engine_command(port, events, replay)) as engine:
        await eventually(lambda: answers(port), START_PATIENCE_S)
        await complete(port, before)
        with running(*publish) as publisher:
            # What came before the publisher is in the replay buffer.
            await eventually(lambda: holds(before), START_PATIENCE_S)
            await complete(port, during)
            await eventually(lambda: holds(during))
            first = await worker()
            assert first is not None
            assert (first.worker.publisher, first.worker.max_model_len) == ("external", 4096)
            assert first.worker.num_blocks == 1024

            engine.kill()
            engine.wait()

            async def gone() -> bool:
                return await worker() is None

            await eventually(gone)
            with running(*engine_command(port, events, replay)):
                await eventually(lambda: answers(port), START_PATIENCE_S)
                await complete(port, after)
                await eventually(lambda: holds(after), START_PATIENCE_S)
                second = await worker()
                assert second is not None
                assert second.worker.incarnation != first.worker.incarnation
                assert second.num_indexed_blocks == 3
                publisher.send_signal(signal.SIGTERM)
                assert publisher.wait(10) == 0
                assert await gone()
    await reader.close()
