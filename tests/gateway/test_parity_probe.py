"""Checks of simulated engines that are right, or wrong in one way each; real Redis, real HTTP and events."""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse

from connectors.bench.ports import free_ports
from gateway.config import GatewayConfig
from gateway.fleet import Fleet
from gateway.parity import Reason, State
from gateway.parity_probe import ParityProber
from gateway.probe import worker_client
from gateway.tokens.reader import PromptReader
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from tests.support.chat_templates import LLAMA_LIKE
from tests.support.engine_here import simulated
from tests.support.envoy import serve
from tests.support.vllm_engine import tiny_model
from tests.support.waiting import eventually
from tests.support.workers import make_worker

# Whatever should come is waited for, however busy the machine; a test that waits in vain says for how long.
KNOWN = {"parity_timeout_s": 30, "parity_tries": 1, "redis_timeout_s": 10}


class Bench:
    """A prober over a real Redis, and the fleet whose models it knows."""

    def __init__(self, config: GatewayConfig, client: httpx.AsyncClient) -> None:
        self.config = config
        self.index = RedisIndexReader(config)
        self.fleet = Fleet(config, self.index, client)
        self.reader = PromptReader(lambda: self.fleet.snapshot.models)
        self.prober = ParityProber(config, self.index, self.reader, client)

    async def close(self) -> None:
        self.reader.close()
        await self.index.close()

    async def check(self, endpoint: str):
        """Check the worker once it is registered, with the first of its adapters."""

        async def registered():
            await self.fleet.poll()
            return next((w for w in self.fleet.snapshot.workers() if w.worker.endpoint == endpoint), None)

        found = await eventually(registered)
        await self.fleet.probe()
        adapters = self.fleet.snapshot.adapters(found.worker)
        return await self.prober.check(found, adapters[0] if adapters else None)


async def probes_of(endpoint):
    """Return the requests that the engine has ended."""
    async with httpx.AsyncClient() as client:
        return (await client.get(f"http://{endpoint}/sim/requests")).json()


@pytest.fixture
async def bench(redis_url):
    """Return a function that makes a bench with these settings."""
    async with contextlib.AsyncExitStack() as exits:

        async def make(**settings) -> Bench:
            config = GatewayConfig(redis_url=redis_url, **(KNOWN | settings))
            bench = Bench(config, await exits.enter_async_context(worker_client(config)))
            exits.push_async_callback(bench.close)
            return bench

        yield make


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--lora", "sql"),
        ("--block-size", "128"),
        ("--block-size", "1"),
        ("--no-tokenize",),
        # A context that has room for one block and not for two.
        ("--max-model-len", "120", "--block-size", "64"),
    ],
)
async def test_an_engine_as_it_should_be_is_exact(bench, redis_url, flags):
    at = await bench()
    async with simulated(redis_url, *flags) as endpoint:
        parity = await at.check(endpoint)
        assert (parity.state, parity.detail) == (State.EXACT, "")
        assert parity.checked_at is not None
        probes = await probes_of(endpoint)
    assert [each["model"] for each in probes] == ["tiny", *(["sql"] if "--lora" in flags else [])]
    assert all(each["cached_tokens"] == 0 for each in probes)


async def test_a_probe_is_at_least_two_blocks_long_and_matches_nobody(bench, redis_url):
    at = await bench()
    async with simulated(redis_url, "--block-size", "64") as endpoint:
        for _ in range(2):
            assert (await at.check(endpoint)).state is State.EXACT
        await at.fleet.poll()
        (worker,) = at.fleet.snapshot.workers()
        probes = await probes_of(endpoint)
        # Each leaves blocks of its own.
        assert worker.num_indexed_blocks == sum(each["prompt_tokens"] // 64 for each in probes) >= 4
        assert [each["cached_tokens"] for each in probes] == [0, 0]


@pytest.mark.parametrize(
    ("flags", "reason", "timeout_s"),
    [
        (("--no-events",), Reason.NO_BLOCKS, 1),
        (("--no-prefix-caching",), Reason.PREFIX_CACHING, 1),
        (("--registered-block-size", "16"), Reason.BLOCK_SIZE, 1),
        (("--registered-model", "other"), Reason.MODEL, 30),
        (("--ignore-salt",), Reason.SALT, 30),
        (("--ignore-lora", "--lora", "sql"), Reason.LORA, 30),
        (("--foreign-events",), Reason.HASHES, 3),
        (("--event-delay-s", "60"), Reason.NO_BLOCKS, 1),
    ],
)
async def test_an_engine_that_is_wrong_is_degraded_for_that_reason(
    bench, redis_url, flags, reason, timeout_s
):
    # An engine under another name does not tell where its tokenizer is.
    at = await bench(tokenizers={"other": str(tiny_model())}, parity_timeout_s=timeout_s)
    async with simulated(redis_url, *flags) as endpoint:
        parity = await at.check(endpoint)
    assert (parity.state, parity.reason) == (State.DEGRADED, reason)
    assert parity.detail
    assert parity.cure


async def test_events_that_come_late_are_waited_for(bench, redis_url):
    at = await bench()
    async with simulated(redis_url, "--event-delay-s", "0.5") as endpoint:
        parity = await at.check(endpoint)
    assert parity.state is State.EXACT
    assert parity.lag_ms > 300


@pytest.mark.parametrize(("flags", "reason"), [((), Reason.TOKENS), (("--no-tokenize",), Reason.HASHES)])
async def test_another_chat_template_is_found_with_and_without_tokenize(
    bench, redis_url, tmp_path, flags, reason
):
    template = tmp_path / "other.jinja"
    template.write_text(LLAMA_LIKE)
    at = await bench(parity_timeout_s=3)
    async with simulated(redis_url, "--chat-template", str(template), *flags) as endpoint:
        assert (await at.check(endpoint)).reason is reason
        told = await bench(chat_templates={"tiny": template})
        assert (await told.check(endpoint)).state is State.EXACT


async def test_another_tokenizer_is_found(bench, redis_url, tmp_path):
    for file in tiny_model().iterdir():
        if file.suffix in {".json", ".jinja"}:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    at = await bench(tokenizers={"tiny": str(tmp_path)})
    async with simulated(redis_url) as endpoint:
        parity = await at.check(endpoint)
    assert (parity.state, parity.reason) == (State.DEGRADED, Reason.TOKENS)


async def test_without_a_tokenizer_here_the_hashes_are_checked_all_the_same(bench, redis_url, tmp_path):
    at = await bench(tokenizers={"tiny": str(tmp_path / "nothing")})
    async with simulated(redis_url) as endpoint:
        parity = await at.check(endpoint)
        assert (parity.reason, parity.ignores_overlap) == (Reason.TOKENIZER, False)
        assert parity.lag_ms is None
    at = await bench(tokenizers={"tiny": str(tmp_path / "nothing")}, parity_timeout_s=3)
    async with simulated(redis_url, "--foreign-events") as endpoint:
        assert (await at.check(endpoint)).reason is Reason.HASHES


def registered(redis_url, endpoint):
    """Register a worker that nobody publishes for."""
    with contextlib.closing(RedisIndexWriter(GatewayConfig(redis_url=redis_url))) as writer:
        writer.open_slot(make_worker(endpoint), lease_ms=60_000)


@pytest.mark.parametrize(
    ("answer", "reason", "said"),
    [
        (JSONResponse({"error": "Unauthorized"}, 401), Reason.REFUSED, "401"),
        (PlainTextResponse("Not Found", 404), Reason.REFUSED, "neither chats, completions nor embeddings"),
        (JSONResponse({"error": {"message": "overloaded"}}, 503), Reason.REFUSED, "overloaded"),
    ],
)
async def test_a_worker_that_refuses_is_not_called_wrong(bench, redis_url, answer, reason, said):
    async def refuse(_):
        return answer

    at = await bench(tokenizers={"tiny": str(tiny_model())})
    async with serve(refuse) as endpoint:
        registered(redis_url, endpoint)
        parity = await at.check(endpoint)
    assert (parity.state, parity.reason) == (State.CHECKING, reason)
    assert said in parity.detail


async def test_a_busy_or_absent_worker_is_not_called_wrong(bench, redis_url):
    async def hang(_):
        await asyncio.sleep(5)

    at = await bench(tokenizers={"tiny": str(tiny_model())}, parity_timeout_s=0.2, probe_timeout_s=0.2)
    async with serve(hang) as endpoint:
        registered(redis_url, endpoint)
        assert (await at.check(endpoint)).reason is Reason.NO_ANSWER
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    registered(redis_url, nobody)
    parity = await at.check(nobody)
    assert (parity.state, parity.reason) == (State.CHECKING, Reason.NO_ANSWER)


async def test_the_workers_get_their_key(bench, redis_url):
    seen = []

    async def note(request):
        seen.append((request.url.path, request.headers.get("authorization")))
        return JSONResponse({}, 401)

    at = await bench(tokenizers={"tiny": str(tiny_model())}, worker_api_key="secret")
    async with serve(note) as endpoint:
        registered(redis_url, endpoint)
        await at.check(endpoint)
    assert {path for path, _ in seen} == {"/v1/models", "/tokenize", "/v1/chat/completions"}
    assert {key for _, key in seen} == {"Bearer secret"}
