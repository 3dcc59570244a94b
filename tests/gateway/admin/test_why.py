"""Why a worker did not hold more of a prompt: real decisions on both indexes, through the admin API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from types import SimpleNamespace

import httpx
import msgspec
import pytest

from gateway.admin.app import create_app
from gateway.config import GatewayConfig
from gateway.decide import KvRouter
from gateway.decision import End, HttpRequest, Served
from gateway.fleet import Fleet
from gateway.probe import ModelCard, worker_client
from gateway.profile import Profile
from gateway.rates import Rates
from gateway.readiness import Readiness
from gateway.receipts import Receipts
from gateway.tokens.request import Api, Prompt, ReadRequest
from kvindex.blocks import format_hash, hash_blocks, root_hash
from kvindex.config import IndexConfig
from kvindex.history import EventKind, Opening
from kvindex.memory_index import MemoryIndex, MemoryIndexReader, MemoryIndexWriter
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Batch
from tests.support.workers import make_worker

LEASE_MS = 60_000
CARDS = (
    ModelCard(id="tiny", root="tiny", parent=None),
    ModelCard(id="sql", root="/lora/sql", parent="tiny"),
)

TICK_S = 0.003
"""Times are compared by milliseconds, in which all of this would happen at once."""


class TokenReader:
    """Reads `{"model", "tokens", "cache_salt"}`."""

    async def read(self, path, body):
        fields = json.loads(body)
        tokens = tuple(fields["tokens"])
        return ReadRequest(
            Api.COMPLETION, fields["model"], (Prompt(tokens, len(tokens)),), cache_salt=fields["cache_salt"]
        )


class Engine:
    """A worker whose cache the test writes to the index."""

    def __init__(self, writer, name: str, life: str) -> None:
        self.writer = writer
        self.worker = make_worker(name, incarnation=f"{life}-of-{name}", max_model_len=100_000)
        self.open()

    @property
    def name(self) -> str:
        return self.worker.worker_id

    def open(self, because: Opening | None = None) -> None:
        self.slot = self.writer.open_slot(
            self.worker, lease_ms=LEASE_MS, takeover=True, because=because or Opening()
        )
        self.sequence = 0

    def change(self, **blocks) -> None:
        self.sequence += 1
        batch = Batch(sequence=self.sequence, **{name: tuple(each) for name, each in blocks.items()})
        self.writer.apply(self.worker.pool, self.slot, self.worker.incarnation, batch)

    def hold(self, blocks) -> None:
        self.change(stored=blocks)

    def evict(self, blocks) -> None:
        self.change(removed=blocks)


class Gateway:
    """A router with its admin API."""

    def __init__(self, reader, writer, client, receipt_hashes: int) -> None:
        self.writer = writer
        config = GatewayConfig(index_deadline_ms=10_000, receipt_hashes=receipt_hashes)
        self.fleet = Fleet(config, reader, client)
        self.receipts = Receipts(1000)
        parts = {"rates": Rates(Profile(prefill_tokens_per_s=1000)), "receipts": self.receipts}
        self.router = KvRouter(config, reader, self.fleet, TokenReader(), client=client, **parts)
        self.app = create_app(self.router, self.fleet, reader, **parts, readiness=Readiness())

    async def join(self, name: str, life: str = "first") -> Engine:
        engine = Engine(self.writer, name, life)
        self.fleet._replace(cards={**self.fleet.snapshot.cards, name: CARDS})
        await self.fleet.poll()
        await asyncio.sleep(TICK_S)
        return engine

    async def ask(
        self, tokens, *, to: Engine | None = None, model: str = "tiny", salt: str | None = None, answered=True
    ) -> str:
        """Send a request, to one worker alone if told so, and have it answered at once; return its id."""
        body = json.dumps({"model": model, "tokens": list(tokens), "cache_salt": salt}).encode()
        only = frozenset({to.worker.endpoint}) if to else None
        decision = await self.router.decide(HttpRequest("POST", "/v1/completions", {}, body, only))
        decision_id = decision.decision_id
        if answered:
            since_ms = 1000 * (time.time() - self.receipts.get(decision_id).at)
            worker = decision.destinations[0]
            self.router.record(Served(decision_id, 200, worker, since_ms, since_ms, 0, 0))
            await self.router.finish(decision_id, End.COMPLETE)
            await self.router.stop()  # which waits for the settling
        await asyncio.sleep(TICK_S)
        return decision_id

    async def why(self, decision_id: str, engine: Engine | None = None) -> SimpleNamespace:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            params = {"worker": engine.name} if engine else None
            answer = await client.get(f"/why/{decision_id}", params=params)
        assert answer.status_code == 200, answer.text
        self.text = answer.text
        findings = answer.json()["findings"]
        wanted = [each for each in findings.values() if engine is None or each["worker"] == engine.name]
        return SimpleNamespace(**wanted[0], others=findings)


@contextlib.asynccontextmanager
async def gateway_on(kind: str, request, receipt_hashes: int = 512):
    async with worker_client(GatewayConfig()) as client, contextlib.AsyncExitStack() as exits:
        if kind == "memory":
            memory = MemoryIndex(time.time)
            reader, writer = MemoryIndexReader(memory), MemoryIndexWriter(memory)
        else:
            config = IndexConfig(redis_url=request.getfixturevalue("redis_url"), redis_timeout_s=10)
            reader, writer = RedisIndexReader(config), RedisIndexWriter(config)
        exits.push_async_callback(reader.close)
        exits.callback(writer.close)
        gateway = Gateway(reader, writer, client, receipt_hashes)
        exits.push_async_callback(gateway.router.stop)
        yield gateway


@pytest.fixture(params=["memory", "redis"])
async def gateway(request):
    async with gateway_on(request.param, request) as made:
        yield made


def prompt(num_blocks: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(16 * num_blocks)]


def blocks(tokens, **identity):
    return hash_blocks(root_hash("tiny", **identity), tokens, 16)


async def test_a_prompt_that_was_held_needs_no_reason(gateway):
    engine = await gateway.join("a:1")
    engine.hold(blocks(prompt(10)))
    found = await gateway.why(await gateway.ask(prompt(10)))
    assert (found.reason, found.overlap_blocks, found.block, found.missed_tokens) == ("held", 10, None, None)
    short = await gateway.why(await gateway.ask(prompt(1)[:15]))
    assert (short.reason, short.detail) == ("held", "the prompt has no full block that could be held")


async def test_a_prompt_that_nobody_sent_before(gateway):
    await gateway.join("a:1")
    await gateway.ask(prompt(5, seed=1))
    found = await gateway.why(await gateway.ask(prompt(10)))
    assert (found.reason, found.earlier, found.missed_tokens) == ("never_stored", None, [0, 16])
    assert found.block == format_hash(blocks(prompt(10))[0])


async def test_a_prompt_that_goes_on_where_an_earlier_one_ended(gateway):
    engine = await gateway.join("a:1")
    first = await gateway.ask(prompt(10)[:100])
    engine.hold(blocks(prompt(10)[:100]))
    found = await gateway.why(await gateway.ask(prompt(10)))
    assert (found.reason, found.earlier, found.missed_tokens) == ("never_stored", first, [96, 112])
    assert "ends after the 96 tokens" in found.detail


async def test_tokens_that_differ_are_bracketed_by_a_block(gateway):
    engine = await gateway.join("a:1")
    closest = prompt(6) + prompt(4, seed=1)
    await gateway.ask(prompt(2) + prompt(8, seed=2))
    earlier = await gateway.ask(closest)
    engine.hold(blocks(closest))
    found = await gateway.why(await gateway.ask(prompt(10)))
    assert (found.reason, found.earlier, found.missed_tokens) == ("tokens_differ", earlier, [96, 112])
    assert "within 96 to 111" in found.detail


@pytest.mark.parametrize(
    ("model", "salt", "reason", "said"),
    [
        ("tiny", "tenant-b", "other_salt", "another cache salt"),
        ("tiny", None, "other_salt", "another cache salt"),
        ("sql", "tenant-a", "other_lora", "for `sql`, not `tiny`"),
        ("sql", None, "other_lora", "and under another cache salt"),
    ],
)
async def test_the_same_tokens_of_another_identity(gateway, model, salt, reason, said):
    engine = await gateway.join("a:1")
    twin = await gateway.ask(prompt(10), model=model, salt=salt)
    lora = "sql" if model == "sql" else None
    engine.hold(blocks(prompt(10), lora_name=lora, cache_salt=salt))
    found = await gateway.why(await gateway.ask(prompt(10), salt="tenant-a"))
    assert (found.reason, found.earlier, found.overlap_blocks) == (reason, twin, 0)
    assert said in found.detail
    assert "tenant" not in gateway.text
    assert str(prompt(1)[0]) + "," not in gateway.text.replace("[0,16]", "")


async def test_a_prompt_that_went_elsewhere(gateway):
    ours, theirs = await gateway.join("a:1"), await gateway.join("b:1")
    earlier = await gateway.ask(prompt(10), to=theirs)
    theirs.hold(blocks(prompt(10)))
    decision = await gateway.ask(prompt(10))
    found = await gateway.why(decision, ours)
    assert (found.reason, found.earlier, found.holders_now) == ("elsewhere", earlier, ["b:1"])
    assert "went to b:1" in found.detail
    assert found.others["chosen"]["reason"] == "held"


async def test_the_best_holder_is_explained_beside_the_chosen(gateway):
    ours, theirs = await gateway.join("a:1"), await gateway.join("b:1")
    await gateway.ask(prompt(10), to=theirs)
    theirs.hold(blocks(prompt(10))[:6])
    for _ in range(20):  # so much that waiting for it would take longer
        await gateway.router.decide(
            HttpRequest(
                "POST",
                "/v1/completions",
                {},
                json.dumps({"model": "tiny", "tokens": prompt(60, seed=3), "cache_salt": None}).encode(),
                frozenset({theirs.worker.endpoint}),
            )
        )
    found = await gateway.why(await gateway.ask(prompt(10)))
    assert found.worker == ours.name
    best = found.others["best_holder"]
    assert (best["worker"], best["overlap_blocks"], best["reason"]) == ("b:1", 6, "behind")


async def test_an_evicted_block_is_evicted_by_whom_and_when(gateway):
    engine = await gateway.join("a:1")
    earlier = await gateway.ask(prompt(10))
    engine.hold(blocks(prompt(10)))
    engine.evict(blocks(prompt(10))[:3:-1])
    told_ms = 1000 * time.time()
    found = await gateway.why(await gateway.ask(prompt(10)))
    assert (found.reason, found.earlier, found.overlap_blocks) == ("evicted", earlier, 4)
    assert found.missed_tokens == [64, 80]
    assert "a:1 evicted it at" in found.detail
    assert abs(found.at_ms - told_ms) < 5_000


async def test_an_eviction_is_known_even_if_no_request_is(gateway):
    engine = await gateway.join("a:1")
    engine.hold(blocks(prompt(10)))
    engine.evict(blocks(prompt(10))[5:])
    await asyncio.sleep(TICK_S)
    found = await gateway.why(await gateway.ask(prompt(10)))
    assert (found.reason, found.earlier) == ("evicted", None)


async def test_an_eviction_after_the_decision_is_no_reason(gateway):
    engine = await gateway.join("a:1")
    decision = await gateway.ask(prompt(10))
    engine.hold(blocks(prompt(10)))
    engine.evict(blocks(prompt(10)))
    assert (await gateway.why(decision)).reason == "never_stored"


async def test_a_reset_cache(gateway):
    engine = await gateway.join("a:1")
    earlier = await gateway.ask(prompt(10))
    engine.hold(blocks(prompt(10)))
    engine.open(Opening(EventKind.CLEARED))
    await asyncio.sleep(TICK_S)
    found = await gateway.why(await gateway.ask(prompt(10)))
    assert (found.reason, found.earlier) == ("cleared", earlier)


async def test_a_resync(gateway):
    engine = await gateway.join("a:1")
    await gateway.ask(prompt(10))
    engine.hold(blocks(prompt(10)))
    await gateway.ask(prompt(10))
    engine.open(Opening(EventKind.DRIFT, "1 block lost"))
    await asyncio.sleep(TICK_S)
    decision = await gateway.ask(prompt(10))
    engine.hold(blocks(prompt(10)))
    found = await gateway.why(decision)
    assert (found.reason, "1 block lost" in found.detail) == ("resynced", True)
    assert found.holders_now == ["a:1"]


async def test_a_restarted_worker(gateway):
    engine = await gateway.join("a:1")
    earlier = await gateway.ask(prompt(10))
    engine.hold(blocks(prompt(10)))
    await gateway.join("a:1", life="second")
    await asyncio.sleep(TICK_S)
    found = await gateway.why(await gateway.ask(prompt(10)))
    assert (found.reason, found.earlier) == ("restarted", earlier)
    assert "restarted at" in found.detail


async def test_a_worker_that_joined_later(gateway):
    old = await gateway.join("a:1")
    earlier = await gateway.ask(prompt(10))
    old.hold(blocks(prompt(10)))
    new = await gateway.join("b:1")
    await asyncio.sleep(TICK_S)
    found = await gateway.why(await gateway.ask(prompt(10)), new)
    assert (found.reason, found.earlier) == ("joined", earlier)
    assert "went to a:1" in found.detail


async def test_a_prompt_that_is_still_being_computed(gateway):
    await gateway.join("a:1")
    earlier = await gateway.ask(prompt(10), answered=False)
    found = await gateway.why(await gateway.ask(prompt(10)))
    assert (found.reason, found.earlier) == ("computing", earlier)


async def test_an_index_that_was_behind(gateway):
    engine = await gateway.join("a:1")
    earlier = await gateway.ask(prompt(10))
    decision = await gateway.ask(prompt(10))
    engine.hold(blocks(prompt(10)))
    found = await gateway.why(decision)
    assert (found.reason, found.earlier, found.holders_now) == ("behind", earlier, ["a:1"])
    assert "after the decision" in found.detail


async def test_a_block_that_is_gone_without_a_trace(gateway):
    """The index lost it by itself, or no longer remembers."""
    engine = await gateway.join("a:1")
    engine.hold(blocks(prompt(10)))
    earlier = await gateway.ask(prompt(10))
    engine.evict(blocks(prompt(10)))
    await asyncio.sleep(TICK_S)
    decision = await gateway.ask(prompt(10))
    # It is forgotten that the block was among the removed.
    removals = gateway.fleet._index.removals
    gateway.fleet._index.removals = lambda *args, **kwargs: _none_of(removals, *args, **kwargs)
    found = await gateway.why(decision)
    assert (found.reason, found.earlier) == ("gone", earlier)


async def _none_of(removals, *args, **kwargs):
    return [msgspec.structs.replace(each, blocks=()) for each in await removals(*args, **kwargs)]


@pytest.mark.parametrize("num_blocks", [300, 1000])
async def test_long_prompts_are_explained_within_a_stride(request, num_blocks):
    async with gateway_on("redis", request, receipt_hashes=64) as gateway:
        engine = await gateway.join("a:1", life="first")
        held = num_blocks // 2 + 3
        earlier = prompt(held) + prompt(num_blocks - held, seed=1)
        await gateway.ask(earlier)
        hashes = blocks(earlier)
        for at in range(0, len(hashes), 128):
            engine.hold(hashes[at : at + 128])
        found = await gateway.why(await gateway.ask(prompt(num_blocks)))
        first, last = found.missed_tokens
        assert found.reason == "tokens_differ"
        assert first <= 16 * held < last
        assert last - first <= 16 * 2 * 16


async def test_without_a_lookup_there_is_nothing_to_explain(gateway):
    engine = await gateway.join("a:1")
    decision = await gateway.router.decide(HttpRequest("GET", "/health", {}, b""))
    transport = httpx.ASGITransport(gateway.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
        assert (await client.get(f"/why/{decision.decision_id}")).json()["findings"] == {}
        assert (await client.get("/why/nobody")).status_code == 404
    assert engine.name == "a:1"


async def test_receipts_keep_neither_text_nor_tokens(gateway):
    await gateway.join("a:1")
    decision = await gateway.ask([77_777] * 64, salt="tenant-secret")
    kept = repr(gateway.receipts.get(decision))
    assert "77777" not in kept
    assert "tenant-secret" not in kept
