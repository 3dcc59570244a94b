"""The coordinator of LMCache servers: against scripted servers, and against a real one."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import _object_key_to_filename

from kvindex.chunks import chunk_blocks, chunk_pool, hash_chunks
from kvindex.config import IndexConfig, TierAgentConfig
from kvindex.errors import ConfigError
from kvindex.memory_index import MemoryIndex, MemoryIndexReader, MemoryIndexWriter
from kvindex.redis_index import RedisIndexReader
from kvindex.stores import StoreSpeed
from kvindex.tiers.agent import TierAgent
from kvindex.tiers.server import clear_memory, describe_server, empty_place
from kvindex.worker import Tier
from tests.support.lmcache_server import start_lmcache
from tests.support.waiting import eventually

POOL = chunk_pool("m", 256)
PATIENCE_S = 60.0


def raw_key(number: int) -> dict[str, Any]:
    return {
        "chunk_hash_hex": number.to_bytes(32, "big").hex(),
        "model_name": "m",
        "kv_rank": 0x01000100,
        "object_group_id": 0,
        "cache_salt": "",
    }


def block(number: int) -> int:
    return chunk_blocks([number.to_bytes(32, "big")], "", 1)[0]


class ScriptedServer:
    """What an LMCache server with memory, a disk and a bucket does over HTTP, as a test says."""

    def __init__(self, agent_url: str, instance_id: str = "node") -> None:
        self.agent = httpx.Client(base_url=agent_url, timeout=30)
        self.instance_id = instance_id
        self.in_bucket: list[int] = []
        self.lists = True
        self.loads: list[dict[str, Any]] = []
        """What its adapters say of themselves."""
        self.num_listings = 0
        self.hash_algorithm = "blake3"
        self.sequence = 0
        self.incarnation = 1
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = owner.answer(self.path)
                self.send_response(200 if answer is not None else 503)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, path: str) -> dict[str, Any] | None:
        if path.startswith("/config/adapters"):
            return {"adapters": [{"type_name": "raw_block"}, {"type_name": "s3"}]}
        if path.startswith("/config"):
            adapters = [{"shared": False}, {"shared": True, "s3_endpoint": "s3://bucket.host"}]
            return {
                "mp": {
                    "instance_id": self.instance_id,
                    "chunk_size": 256,
                    "hash_algorithm": self.hash_algorithm,
                },
                "storage_manager": {"l2_adapter_config": {"adapters": adapters}},
            }
        if path.startswith("/status") and self.loads:
            return {"storage_manager": {"l2_adapters": self.loads}}
        if not self.lists or "adapter=s3" not in path:
            return None
        self.num_listings += 1
        # Two to a page, so that there is more than one.
        first = int(httpx.URL(path).params.get("page_token", 0))
        page = self.in_bucket[first : first + 2]
        more = str(first + 2) if first + 2 < len(self.in_bucket) else None
        entries = [{"key": raw_key(number), "size_bytes": 8} for number in page]
        return {"adapter": "s3", "shared": True, "entries": entries, "next_page_token": more}

    def register(self) -> None:
        body = {"instance_id": self.instance_id, "ip": "127.0.0.1", "http_port": self.http.server_port}
        answer = self.agent.post("/instances", json=body).raise_for_status().json()
        assert answer["instance_id"] == self.instance_id

    def beat(self) -> int:
        return self.agent.put(f"/instances/{self.instance_id}/heartbeat").status_code

    def tell(self, event_type: str, backend: str, *numbers: int, skip: int = 0) -> None:
        self.sequence += 1 + skip
        batch = {
            "instance_id": self.instance_id,
            "incarnation": self.incarnation,
            "seq": self.sequence,
            "event_type": event_type,
            "tier": "l1" if backend == "dram" else "l2",
            "backend": backend,
            "entries": [{"key": raw_key(number), "size_bytes": 8} for number in numbers],
        }
        self.agent.post("/events", json={"batches": [batch]}).raise_for_status()

    def close(self) -> None:
        self.agent.close()
        self.http.shutdown()
        self.http.server_close()


class Bench:
    """Agents over one index in memory."""

    def __init__(self) -> None:
        self.index = MemoryIndex()
        self.reader = MemoryIndexReader(self.index)

    @contextmanager
    def agent(self, **options: float) -> Iterator[TierAgent]:
        config = TierAgentConfig(
            **({"lease_ms": 1000, "heartbeat_ms": 100, "list_interval_s": 3600} | options)
        )
        agent = TierAgent(config, writer=lambda: MemoryIndexWriter(self.index))
        agent.start()
        try:
            yield agent
        finally:
            agent.stop()

    async def held(self) -> dict[str, set[int]]:
        """Return what the index holds of every live store, by the numbers of the keys."""
        _, stores = await self.reader.stores(POOL)
        names = {block(number): number for number in range(50)}
        return {
            each.store.holder_id: {
                names[at] for at in names if each.slot in await self.reader.holders(POOL, at)
            }
            for each in stores
        }


@pytest.fixture
def bench() -> Bench:
    return Bench()


@contextmanager
def scripted(agent: TierAgent, instance_id: str = "node") -> Iterator[ScriptedServer]:
    server = ScriptedServer(agent.url, instance_id)
    try:
        yield server
    finally:
        server.close()


async def test_stores_come_into_the_index_tier_by_tier(bench: Bench):
    with bench.agent() as agent, scripted(agent) as server:
        server.register()
        server.tell("store", "dram", 1, 2)
        server.tell("store", "raw_block", 1)
        server.tell("store", "s3", 3)
        expected = {"node/cpu": {1, 2}, "node/raw_block": {1}, "s3://bucket.host by node": {3}}
        await eventually(lambda: is_held(bench, expected))
        server.tell("delete", "dram", 1, 2)
        await eventually(lambda: is_held(bench, expected | {"node/cpu": set()}))
        _, stores = await bench.reader.stores(POOL)
        tiers = {each.store.name: each.store.tier for each in stores}
        assert tiers == {"node/cpu": Tier.CPU, "node/raw_block": Tier.DISK, "s3://bucket.host": Tier.OBJECT}
        assert await bench.reader.chunk_pools() == [POOL]
        assert await bench.reader.pools() == []


async def is_held(bench: Bench, expected: dict[str, set[int]]) -> bool:
    return await bench.held() == expected


async def test_how_fast_a_server_reads_its_stores_comes_into_the_index(bench: Bench):
    with bench.agent() as agent, scripted(agent) as server:
        told = {"num_loads": 4, "gb_per_s": 0.25, "latency_ms": 80.0}
        # LMCache's own adapters do not say.
        server.loads = [{"type": "RawBlock"}, {"type": "S3L2Adapter", "load": told}]
        server.register()
        server.tell("store", "raw_block", 1)
        server.tell("store", "s3", 1)

        async def speeds() -> dict[str, StoreSpeed | None]:
            _, stores = await bench.reader.stores(POOL)
            return {each.store.holder_id: each.speed for each in stores}

        async def are_known() -> bool:
            wanted = {"node/raw_block": None, "s3://bucket.host by node": StoreSpeed(**told)}
            return await speeds() == wanted

        await eventually(are_known, PATIENCE_S)
        shown = await asyncio.to_thread(httpx.get, f"{agent.url}/metrics")
        assert 'kvlane_store_load_cost_seconds{part="load",store="s3://bucket.host"} 0.08' in shown.text


async def test_what_a_bucket_held_before_is_known_before_any_event(bench: Bench):
    with bench.agent() as agent, scripted(agent) as server:
        server.in_bucket = [1, 2, 3, 4, 5]
        server.register()
        await eventually(lambda: is_held(bench, {"s3://bucket.host": {1, 2, 3, 4, 5}}))


async def test_one_agent_tells_a_listing_and_another_takes_it_over(bench: Bench):
    listing, other_events = "s3://bucket.host", "s3://bucket.host by b"
    with (
        bench.agent(list_interval_s=0.1) as first,
        bench.agent(list_interval_s=0.1) as second,
        scripted(first, "a") as one,
        scripted(second, "b") as other,
    ):
        one.in_bucket = other.in_bucket = [1, 2]
        one.register()
        await eventually(lambda: is_held(bench, {listing: {1, 2}}))
        other.register()
        await eventually(lambda: other.num_listings)
        other.tell("store", "s3", 3)
        await eventually(lambda: is_held(bench, {listing: {1, 2}, other_events: set()}))
        one.in_bucket = other.in_bucket = [1, 3]
        await eventually(lambda: is_held(bench, {listing: {1, 3}, other_events: set()}))
        one.agent.delete("/instances/a").raise_for_status()
        other.in_bucket = [4]
        await eventually(lambda: is_held(bench, {listing: {4}, other_events: set()}))


async def test_what_a_server_stores_in_a_bucket_is_known_before_the_next_listing(bench: Bench):
    with bench.agent() as agent, scripted(agent) as server:
        server.in_bucket = [1]
        server.register()
        await eventually(lambda: is_held(bench, {"s3://bucket.host": {1}}))
        server.tell("store", "s3", 2)
        await eventually(lambda: is_held(bench, {"s3://bucket.host": {1}, "s3://bucket.host by node": {2}}))


async def test_a_server_that_leaves_or_falls_silent_takes_its_stores_along(bench: Bench):
    with bench.agent(server_timeout_s=1.5) as agent, scripted(agent) as server:
        server.register()
        server.tell("store", "dram", 1)
        await eventually(lambda: is_held(bench, {"node/cpu": {1}}))
        server.agent.delete("/instances/node").raise_for_status()
        assert await bench.held() == {}
        assert server.beat() == 404
        server.register()
        assert server.beat() == 200
        server.tell("store", "dram", 2)
        await eventually(lambda: is_held(bench, {"node/cpu": {2}}))
        await eventually(lambda: is_held(bench, {}))
        assert server.beat() == 404


async def test_a_server_that_starts_anew_has_nothing_in_memory(bench: Bench):
    with bench.agent() as agent, scripted(agent) as server:
        server.in_bucket = [7]
        server.register()
        server.tell("store", "dram", 1)
        await eventually(lambda: is_held(bench, {"node/cpu": {1}, "s3://bucket.host": {7}}))
        server.incarnation, server.sequence = 2, 0
        server.register()
        server.tell("store", "dram", 2)
        await eventually(lambda: is_held(bench, {"node/cpu": {2}, "s3://bucket.host": {7}}))


async def test_after_lost_events_only_what_can_be_read_again_is_believed(bench: Bench):
    with bench.agent() as agent, scripted(agent) as server:
        server.in_bucket = [7]
        server.register()
        server.tell("store", "dram", 1)
        server.tell("store", "raw_block", 1)
        held = {"node/cpu": {1}, "node/raw_block": {1}, "s3://bucket.host": {7}}
        await eventually(lambda: is_held(bench, held))
        server.in_bucket = [8]
        server.tell("store", "dram", 2, skip=1)
        await eventually(
            lambda: is_held(bench, {"node/cpu": {2}, "node/raw_block": set(), "s3://bucket.host": {8}})
        )


async def test_a_server_whose_hashes_are_not_ours_is_left_out(bench: Bench):
    with bench.agent() as agent, scripted(agent) as server:
        server.hash_algorithm = "sha256_cbor"
        with httpx.Client() as client, pytest.raises(ConfigError, match="--hash-algorithm blake3"):
            describe_server(client, f"http://127.0.0.1:{server.http.server_port}")
        server.register()
        server.tell("store", "dram", 1)
        assert server.beat() == 200
        assert await bench.held() == {}


def test_what_cannot_be_read_is_refused(bench: Bench):
    with bench.agent() as agent, httpx.Client(base_url=agent.url) as client:
        assert client.post("/events", content=b'{"batches": [{}]}').status_code == 422
        assert client.post("/instances", content=b"[]").status_code == 422
        assert client.post("/events", json={"batches": []}).json()["applied"] == 0
        assert client.delete("/instances/nobody").status_code == 204
        assert "kvlane_store_gaps" in client.get("/metrics").text


def test_an_address_that_is_taken_is_named(bench: Bench):
    with bench.agent() as agent, pytest.raises(ConfigError, match="cannot listen at 127"):
        TierAgent(TierAgentConfig(tier_agent_port=int(agent.url.rpartition(":")[2]))).start()


async def test_a_real_server_with_a_warm_disk(redis_url: str, tmp_path: Path):
    """Its disk is known before any request, its deletions, its death and its return are seen."""
    tokens = list(range(1024))
    hashes = hash_chunks(tokens, 256)
    blocks = chunk_blocks(hashes, "", 1)
    directory = tmp_path / "kv"
    directory.mkdir()
    keys = [ObjectKey(each, "m", ObjectKey.ComputeKVRank(1, 0, 1, 0)) for each in hashes]
    for each in keys:
        (directory / _object_key_to_filename(each)).write_bytes(b"kv" * 100)
    (directory / "half written.tmp").write_bytes(b"")
    adapter = {"type": "fs", "base_path": str(directory)}
    config = TierAgentConfig(redis_url=redis_url, redis_timeout_s=PATIENCE_S, server_timeout_s=3)
    reader = RedisIndexReader(IndexConfig(redis_url=redis_url, redis_timeout_s=PATIENCE_S))

    async def holders() -> list[str]:
        _, stores = await reader.stores(POOL)
        names = {each.slot: each.store.name for each in stores}
        found = await reader.holders_of(POOL, blocks)
        return [",".join(names.get(slot, "?") for slot in found[each]) for each in blocks]

    async def is_known(*expected: str) -> bool:
        return await holders() == list(expected)

    agent = TierAgent(config)
    agent.start()
    try:
        with start_lmcache("node", agent.url, adapter, log=tmp_path / "log") as server:
            with httpx.Client() as client:
                assert describe_server(client, server.url).store_names == ("node/cpu", "node/fs")
            await eventually(lambda: is_known(*["node/fs"] * 4), PATIENCE_S)
            body = {
                "keys": [{"chunk_hash_hex": hashes[3].hex(), "model_name": "m", "kv_rank": keys[3].kv_rank}]
            }
            async with httpx.AsyncClient() as client:
                (await client.request("DELETE", f"{server.url}/cache/objects", json=body)).raise_for_status()
            await eventually(lambda: is_known(*["node/fs"] * 3, ""), PATIENCE_S)
            server.kill()
            await eventually(lambda: is_known("", "", "", ""), PATIENCE_S)
        with start_lmcache("node", agent.url, adapter, log=tmp_path / "log") as server:
            await eventually(lambda: is_known(*["node/fs"] * 3, ""), PATIENCE_S)
            with httpx.Client(timeout=PATIENCE_S) as client:
                (disk,) = describe_server(client, server.url).places
                clear_memory(client, server.url)
                assert empty_place(client, server.url, disk) == 3
            await eventually(lambda: is_known("", "", "", ""), PATIENCE_S)
            assert [file.name for file in directory.iterdir()] == ["half written.tmp"]
        await eventually(lambda: is_known("", "", "", ""), PATIENCE_S)
    finally:
        agent.stop()
        await reader.close()
