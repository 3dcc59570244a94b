"""Requests to workers that load from stores, from the prompt to the body that the engine gets."""

from __future__ import annotations

import json

import httpx
import msgspec
import pytest

from gateway import metrics
from gateway.admin.why import Memory, explain
from gateway.config import GatewayConfig
from gateway.decision import End, Served
from gateway.probe import ModelCard, worker_client
from kvindex.blocks import unpack_hashes
from kvindex.chunks import chunk_blocks, chunk_salt, hash_chunks
from kvindex.errors import IndexUnavailable
from kvindex.stores import LOAD_KEY, Store, StoreSpeed
from kvindex.worker import Batch, Load, Role, Tier, TierAccess
from tests.support.router_bench import LEASE_MS, PROMPT, Bench, blocks_of

CHUNK = 64
COUNTED = (metrics.LOADED_TOKENS, Tier.CPU), (metrics.UNLOADED_TOKENS, Tier.OBJECT)


@pytest.fixture
async def make():
    async with worker_client(GatewayConfig()) as client:
        yield lambda **options: Bench(client, **options)


@pytest.fixture
def bench(make):
    return make()


def access(*stores: str, world_size: int = 1, server: str = "") -> TierAccess:
    return TierAccess(
        model="/models/tiny", chunk_size=CHUNK, world_size=world_size, stores=stores, server=server
    )


async def keep(
    bench: Bench,
    name: str,
    tier: Tier,
    *,
    num_chunks: int = 6,
    lora: str | None = None,
    salt: str | None = None,
    world_size: int = 1,
    teller: str = "",
) -> Store:
    """Have a store hold the first chunks of the prompt."""
    store = Store(
        name=name, teller=teller, tier=tier, model="/models/tiny", chunk_size=CHUNK, incarnation=name
    )
    slot = bench.writer.open_slot(store, lease_ms=LEASE_MS)
    hashes = hash_chunks(PROMPT, CHUNK)[:num_chunks]
    blocks = chunk_blocks(hashes, chunk_salt(lora, salt), world_size)
    bench.writer.apply(store.pool, slot, store.incarnation, Batch(sequence=1, stored=tuple(blocks)))
    await bench.fleet.poll()
    return store


async def test_a_store_makes_those_candidates_that_reach_it(bench):
    await bench.join("a:1", tiers=access("a/cpu", "s3://b"))
    await bench.join("b:1", tiers=access("b/cpu", "s3://b"))
    await bench.join("none:1")
    await keep(bench, "a/cpu", Tier.CPU)
    decision = await bench.decide()
    assert decision.destinations[0] == "a:1"
    loaded = {
        choice.candidate.worker.endpoint: choice.loaded_tokens for choice in bench.receipt(decision).choices
    }
    assert loaded == {"a:1": 384, "b:1": 0, "none:1": 0}
    await bench.router.finish(decision.decision_id, End.COMPLETE)
    await keep(bench, "s3://b", Tier.OBJECT)
    loads = {
        choice.candidate.worker.endpoint: [each.store for each in choice.loads]
        for choice in bench.receipt(await bench.decide()).choices
    }
    assert loads == {"a:1": ["a/cpu"], "b:1": ["s3://b"], "none:1": []}


async def test_the_tiers_of_a_worker_count_together(bench):
    await bench.join("a:1", tiers=access("a/cpu", "a/fs", "s3://b"))
    await keep(bench, "a/cpu", Tier.CPU, num_chunks=2)
    await keep(bench, "a/fs", Tier.DISK, num_chunks=5)
    receipt = bench.receipt(await bench.decide())
    assert [(each.store, each.num_tokens) for each in receipt.choice.loads] == [("a/cpu", 128), ("a/fs", 192)]
    view = receipt.view()["candidates"][0]
    assert view["loaded_tokens"] == 320
    assert view["loads"][0] == {
        "store": "a/cpu",
        "tier": "cpu",
        "num_tokens": 128,
        "num_bytes": 128 * 1024,
        "ms": pytest.approx(5.01, abs=0.1),
        "known": {"gb_per_s": 10, "latency_ms": 5},
        "source": "settings",
    }
    assert view["terms"]["load_ms"] > 0


@pytest.mark.parametrize(
    ("kept", "asked", "is_found"),
    [
        ({}, {}, True),
        ({"salt": "s"}, {"cache_salt": "s"}, True),
        ({"lora": "adapter"}, {"model": "adapter"}, True),
        ({}, {"cache_salt": "s"}, False),
        ({"salt": "s"}, {}, False),
        ({}, {"model": "adapter"}, False),
        ({"lora": "adapter"}, {}, False),
        ({"salt": "adapter"}, {"model": "adapter"}, False),
        ({"world_size": 2}, {}, False),
    ],
)
async def test_salts_adapters_and_ranks_part_what_is_stored(bench, kept, asked, is_found):
    cards = [ModelCard(id="adapter", parent="tiny")]
    await bench.join("a:1", tiers=access("a/cpu"), cards=cards)
    await keep(bench, "a/cpu", Tier.CPU, **kept)
    choice = bench.receipt(await bench.decide(**asked)).choice
    assert choice.loaded_tokens == (384 if is_found else 0)


async def test_what_is_slower_to_load_is_computed_and_the_engine_is_told(make):
    bench = make(tier_speeds={"object": {"gb_per_s": 0.001, "latency_ms": 1000}})
    await bench.join("a:1", tiers=access("s3://b"))
    await keep(bench, "s3://b", Tier.OBJECT)
    decision = await bench.decide()
    assert json.loads(decision.body)["kv_transfer_params"] == {LOAD_KEY: 0}
    assert json.loads(decision.body)["model"] == "tiny"
    view = bench.receipt(decision).view()["candidates"][0]
    assert (view["loaded_tokens"], view["loads"], view["terms"]["load_ms"]) == (0, (), 0)
    assert view["passed_over"][0]["store"] == "s3://b"
    assert [cut["end_token"] for cut in view["cuts"]] == [0, 384]


async def test_an_engine_is_told_where_to_stop(make):
    bench = make(tier_speeds={"object": {"gb_per_s": 0.001, "latency_ms": 1000}})
    await bench.join("a:1", tiers=access("a/cpu", "s3://b"))
    await keep(bench, "a/cpu", Tier.CPU, num_chunks=2)
    await keep(bench, "s3://b", Tier.OBJECT)
    loaded, computed = (metric.labels(tier) for metric, tier in COUNTED)
    before = loaded._value.get(), computed._value.get()
    decision = await bench.decide()
    assert json.loads(decision.body)["kv_transfer_params"] == {LOAD_KEY: 128}
    choice = bench.receipt(decision).choice
    assert (choice.loaded_tokens, choice.uncached_tokens) == (128, len(PROMPT) - 128)
    assert (loaded._value.get() - before[0], computed._value.get() - before[1]) == (128, 256)


async def test_a_body_stays_as_it_is_where_all_of_the_tiers_is_loaded_or_they_have_nothing_new(bench):
    await bench.join("a:1", tiers=access("a/cpu"))
    assert (await bench.decide()).body is None
    await keep(bench, "a/cpu", Tier.CPU)
    assert (await bench.decide()).body is None
    bench.leave("a:1")
    await bench.join("a:1", tiers=access("a/cpu"), blocks=blocks_of(), incarnation="next")
    decision = await bench.decide()
    assert decision.body is None
    assert bench.receipt(decision).choice.loads == ()


async def test_what_a_worker_has_cached_is_not_fetched_from_far_away(bench):
    await bench.join("a:1", tiers=access("s3://b"), blocks=blocks_of())
    await keep(bench, "s3://b", Tier.OBJECT)
    assert json.loads((await bench.decide()).body)["kv_transfer_params"] == {LOAD_KEY: 0}


async def test_a_store_that_is_found_slow_turns_itself_off(bench):
    await bench.join("a:1", tiers=access("s3://b"))
    await keep(bench, "s3://b", Tier.OBJECT)
    num_loading = 0
    while (decision := await bench.decide(stream=True)).body is None:
        num_loading += 1
        assert num_loading < 50
        await bench.router.finish(decision.decision_id, End.COMPLETE)
        bench.router.record(
            Served(decision.decision_id, 200, "a:1", 5_000.0, None, request_bytes=0, response_bytes=0)
        )
    assert num_loading
    assert bench.rates.profile(bench.slots["a:1"][0]).prefill_tokens_per_s == 1000


async def test_a_store_that_its_server_finds_slow_is_left_alone_and_the_receipt_says_so(bench):
    await bench.join("a:1", tiers=access("s3://b", server="node"))
    store = await keep(bench, "s3://b", Tier.OBJECT, teller="node")
    [slot] = bench.fleet.snapshot.stores[store.pool]
    for gb_per_s, latency_ms, num_loaded in ((0.5, 10, 384), (0.5, 5000, 0), (2.0, 20, 384)):
        speed = StoreSpeed(num_loads=3, gb_per_s=gb_per_s, latency_ms=latency_ms)
        bench.writer.report_costs(store.pool, slot, store.incarnation, speed)
        await bench.fleet.poll()
        decision = await bench.decide()
        await bench.router.finish(decision.decision_id, End.COMPLETE)
        view = bench.receipt(decision).view()["candidates"][0]
        assert view["loaded_tokens"] == num_loaded
        [load] = view["loads" if num_loaded else "passed_over"]
        assert (load["source"], load["known"]["latency_ms"]) == ("measured", latency_ms + 5)


async def test_an_index_that_does_not_tell_of_chunks_costs_the_tiers_alone(bench, monkeypatch):
    await bench.join("a:1", tiers=access("a/cpu"), blocks=blocks_of()[:4])
    await keep(bench, "a/cpu", Tier.CPU)

    async def refuse(*_):
        raise IndexUnavailable("the node of the chunks is away")

    monkeypatch.setattr(bench.index, "holders_of", refuse)
    receipt = bench.receipt(await bench.decide())
    assert (receipt.mode, receipt.matched_tokens, receipt.choice.loads) == ("overlap", 64, ())


async def test_a_store_that_has_left_is_not_counted(bench):
    await bench.join("a:1", tiers=access("a/cpu"))
    store = await keep(bench, "a/cpu", Tier.CPU)
    assert bench.receipt(await bench.decide()).choice.loaded_tokens == 384
    [slot] = bench.fleet.snapshot.stores[store.pool]
    bench.writer.close_slot(store.pool, slot, store.incarnation)
    assert bench.receipt(await bench.decide()).choice.loads == ()
    await bench.fleet.poll()
    assert bench.fleet.snapshot.stores[store.pool] == {}


async def test_why_says_what_tiers_had_and_what_the_plan_made_of_it(make):
    for gb_per_s, made in ((100, ": loaded"), (0.001, ": computed, since that was predicted to be faster")):
        bench = make(tier_speeds={"object": {"gb_per_s": gb_per_s, "latency_ms": 0}})
        await bench.join("a:1", tiers=access("s3://b"), blocks=blocks_of()[:4])
        await keep(bench, "s3://b", Tier.OBJECT)
        receipt = bench.receipt(await bench.decide())
        finding = explain(receipt, receipt.choice, Memory())
        assert finding.overlap_blocks == 4
        (line,) = finding.tiers
        assert line.startswith("320 tokens in s3://b (object), ")
        assert line.endswith(made)


async def test_the_decode_half_of_a_split_reads_what_comes_in_time():
    """From memory, and not from the bucket behind it, which is slower than the wire."""
    slow = {"cpu": {"gb_per_s": 100}, "object": {"gb_per_s": 0.001, "latency_ms": 1000}}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json={}))
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
        bench = Bench(client, transfer_gb_per_s=1, transfer_latency_ms=0, tier_speeds=slow)
        await bench.join("p:1", role=Role.PREFILL, transfer_address="p:7000")
        await bench.join(
            "d:1",
            role=Role.DECODE,
            transfer_address="d:7000",
            load=Load(running_requests=60),
            tiers=access("d/cpu", "s3://b"),
        )
        await keep(bench, "d/cpu", Tier.CPU, num_chunks=2)
        await keep(bench, "s3://b", Tier.OBJECT)
        decision = await bench.decide()
        assert decision.destinations[0] == "d:1"
        assert json.loads(decision.body)["kv_transfer_params"][LOAD_KEY] == 2 * CHUNK
        assert bench.receipt(decision).view()["split"]["sent_from_token"] == 2 * CHUNK
        await bench.router.stop()


async def test_receipts_keep_the_hashes_of_chunks(bench):
    """For the heatmap; an eighth of what they keep of blocks, and counted like these."""
    await bench.join("a:1", tiers=access("a/cpu"))
    store = await keep(bench, "a/cpu", Tier.CPU)
    receipt = bench.receipt(await bench.decide())
    [chain] = receipt.chunk_chains
    assert (chain.pool, chain.contents) == (store.pool, b"")
    assert unpack_hashes(chain.hashes) == chunk_blocks(hash_chunks(PROMPT, CHUNK), chunk_salt(None, None), 1)
    without = msgspec.structs.replace(receipt, chunk_chains=())
    assert receipt.num_bytes == without.num_bytes + len(chain.hashes)
