from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from prometheus_client import REGISTRY

from connectors.bench.ports import free_ports
from gateway.config import GatewayConfig
from gateway.errors import RequestError
from gateway.fleet import Fleet
from gateway.probe import worker_client
from kvindex.errors import IndexUnavailable
from kvindex.memory_index import MemoryIndex, MemoryIndexReader, MemoryIndexWriter
from kvindex.worker import Batch
from tests.support.workers import make_worker

LEASE_MS = 60_000
DEADLINE_S = 5.0


class Outage(MemoryIndexReader):
    """A reader that cannot be reached while `down`."""

    down = False

    async def pools(self):
        if self.down:
            raise IndexUnavailable("redis://nowhere: refused")
        return await super().pools()


@contextlib.asynccontextmanager
async def engine(cards, port: int = 0, status: int = 200):
    """Serve /v1/models as an engine does; yields its endpoint. `cards` may be changed meanwhile."""

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        body = json.dumps({"object": "list", "data": cards}).encode()
        writer.write(f"HTTP/1.1 {status} .\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", port) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture
def memory():
    return MemoryIndex()


@pytest.fixture
async def following(memory):
    """Return a function that starts a fleet on `memory`, fast enough for tests."""
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(worker_client(GatewayConfig()))

        async def start(reader=None, **options) -> Fleet:
            config = GatewayConfig(**({"poll_interval_ms": 5, "probe_interval_s": 0.02} | options))
            fleet = Fleet(config, reader or MemoryIndexReader(memory), client)
            await fleet.start()
            stack.push_async_callback(fleet.stop)
            return fleet

        yield start


def join(memory, endpoint, **fields):
    worker = make_worker(endpoint, **fields)
    slot = MemoryIndexWriter(memory).open_slot(worker, lease_ms=LEASE_MS)
    return worker, slot


async def until(condition):
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.002)


def refused_endpoint() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


async def test_nothing_is_known_before_the_start(memory):
    async with worker_client(GatewayConfig()) as client:
        fleet = Fleet(GatewayConfig(), MemoryIndexReader(memory), client)
        assert fleet.version == 0
        assert fleet.addresses == ()
        assert "not been read" in fleet.failure


async def test_an_unreachable_index_fails_the_start(following, memory):
    reader = Outage(memory)
    reader.down = True
    with pytest.raises(IndexUnavailable):
        await following(reader)


async def test_an_empty_fleet_is_known_after_the_start(following):
    fleet = await following()
    assert fleet.version == 1
    assert fleet.failure is None


async def test_addresses_follow_joins_and_leaves_and_wake_who_waits(following, memory):
    fleet = await following()
    waiting = asyncio.create_task(fleet.changed(fleet.version))
    await asyncio.sleep(0)
    assert not waiting.done()
    endpoints = sorted(refused_endpoint() for _ in range(2))
    slots = [join(memory, endpoint) for endpoint in reversed(endpoints)]
    await asyncio.wait_for(waiting, DEADLINE_S)
    await until(lambda: fleet.addresses == tuple(endpoints))
    seen = fleet.version
    worker, slot = slots[0]
    MemoryIndexWriter(memory).close_slot(worker.pool, slot, worker.incarnation)
    await asyncio.wait_for(fleet.changed(seen), DEADLINE_S)
    assert fleet.addresses == (endpoints[0],)


async def test_an_address_drains_once_all_its_ranks_do_and_that_wakes_who_waits(following, memory):
    endpoint = refused_endpoint()
    for rank in range(2):
        join(memory, endpoint, dp_rank=rank, dp_size=2, incarnation=f"rank{rank}")
    fleet = await following()
    (view,) = fleet.snapshot.pools.values()
    reader = MemoryIndexReader(memory)
    for number, expected in enumerate([frozenset(), frozenset({endpoint})]):
        seen = fleet.version
        await reader.drain(view.pool, f"{endpoint}/dp{number}", is_draining=True)
        if expected:
            await asyncio.wait_for(fleet.changed(seen), DEADLINE_S)
        await fleet.poll()
        assert (fleet.draining, fleet.addresses) == (expected, (endpoint,))


async def test_reservations_that_nobody_settled_are_a_metric(following, memory, monkeypatch):
    monkeypatch.setattr("gateway.fleet.SWEEP_INTERVAL_S", 0.01)
    worker, slot = join(memory, refused_endpoint(), model="leaky")
    await following()
    reader = MemoryIndexReader(memory)
    await reader.reserve(worker.pool, "d", slot, prefill_tokens=1, seen_backlog_tokens=None, ttl_ms=1)
    labels = {"model": "leaky", "block_size": str(worker.block_size)}
    await until(lambda: REGISTRY.get_sample_value("kvlane_gateway_expired_reservations", labels) == 1)


async def test_ranks_of_one_engine_are_one_address(following, memory):
    endpoint = refused_endpoint()
    for rank in range(2):
        join(memory, endpoint, dp_rank=rank, dp_size=2, incarnation=f"rank{rank}")
    fleet = await following()
    assert fleet.addresses == (endpoint,)
    assert len(list(fleet.snapshot.workers())) == 2


async def test_an_outage_keeps_the_last_snapshot_and_says_why(following, memory):
    reader = Outage(memory)
    endpoint = refused_endpoint()
    join(memory, endpoint)
    fleet = await following(reader)
    reader.down = True
    await until(lambda: fleet.failure is not None)
    assert "refused" in fleet.failure
    assert fleet.addresses == (endpoint,)
    reader.down = False
    await until(lambda: fleet.failure is None)


async def test_models_come_from_the_workers_with_roots_and_adapters(following, memory):
    cards = [
        {"id": "tiny", "root": "/models/tiny", "parent": None, "max_model_len": 4096},
        {"id": "alias", "root": "/models/tiny", "parent": None},
        {"id": "french", "root": "/adapters/french", "parent": "tiny"},
    ]
    async with engine(cards) as endpoint:
        join(memory, endpoint)
        fleet = await following()
        models = fleet.snapshot.models
        assert models.find("tiny").tokenizer == "/models/tiny"
        assert (models.find("alias").base, models.find("alias").lora_name) == ("tiny", None)
        assert (models.find("french").base, models.find("french").lora_name) == ("tiny", "french")
        assert models.find("french").tokenizer == "/models/tiny"
        assert models.find("french").max_model_len_tokens == 4096
        with pytest.raises(RequestError):
            models.find("german")
        cards.append({"id": "german", "root": "/adapters/german", "parent": "tiny"})
        await until(lambda: any(model.name == "german" for model in fleet.snapshot.models))


async def test_a_change_of_the_models_wakes_who_waits(following, memory):
    fleet = await following()
    models = fleet.snapshot.models
    waiting = asyncio.create_task(fleet.models_changed(models))
    await fleet.poll()
    assert fleet.snapshot.models is models
    join(memory, refused_endpoint())
    changed = await asyncio.wait_for(waiting, DEADLINE_S)
    assert [model.name for model in changed] == ["tiny"]


async def test_configuration_names_another_tokenizer_and_template(following, memory, tmp_path):
    async with engine([{"id": "tiny", "root": "/models/tiny"}]) as endpoint:
        join(memory, endpoint)
        template = tmp_path / "chat.jinja"
        fleet = await following(tokenizers={"tiny": "/here"}, chat_templates={"tiny": template})
        model = fleet.snapshot.models.find("tiny")
        assert (model.tokenizer, model.chat_template) == ("/here", template)


async def test_a_worker_that_does_not_tell_serves_its_base_model(following, memory):
    async with engine([], status=401) as endpoint:
        join(memory, endpoint)
        fleet = await following()
        assert fleet.snapshot.models.find("tiny").tokenizer == "tiny"
        assert fleet.snapshot.unreachable == frozenset()


async def test_the_longest_context_of_the_workers_counts(following, memory):
    join(memory, refused_endpoint(), max_model_len=1000)
    join(memory, refused_endpoint(), max_model_len=3000)
    fleet = await following()
    assert fleet.snapshot.models.find("tiny").max_model_len_tokens == 3000


async def test_a_worker_that_refuses_connections_is_noted_until_it_answers(following, memory):
    (port,) = free_ports(1)
    endpoint = f"127.0.0.1:{port}"
    join(memory, endpoint)
    fleet = await following()
    assert fleet.snapshot.unreachable == {endpoint}
    async with engine([], port=port):
        await until(lambda: fleet.snapshot.unreachable == frozenset())
    await until(lambda: fleet.snapshot.unreachable == {endpoint})


async def test_a_suspicion_brings_the_next_probe_forward(following, memory, monkeypatch):
    monkeypatch.setattr("gateway.fleet.PROBE_AGAIN_AFTER_S", 0.0)
    cards = []
    async with engine(cards) as endpoint:
        join(memory, endpoint)
        fleet = await following(probe_interval_s=60)
        cards.append({"id": "new", "parent": "tiny"})
        fleet.suspect()
        await until(lambda: any(model.name == "new" for model in fleet.snapshot.models))
        cards.append({"id": "newer", "parent": "tiny"})
        await fleet.look_again()
        assert fleet.snapshot.models.find("newer").lora_name == "newer"


async def test_dead_slots_are_swept(following, memory, monkeypatch):
    monkeypatch.setattr("gateway.fleet.SWEEP_INTERVAL_S", 0.005)
    worker, slot = join(memory, refused_endpoint())
    writer = MemoryIndexWriter(memory)
    writer.apply(worker.pool, slot, worker.incarnation, Batch(sequence=1, stored=(1, 2, 3)))
    fleet = await following()
    writer.close_slot(worker.pool, slot, worker.incarnation)
    await until(lambda: not memory.pool(worker.pool).dead)
    await until(lambda: not fleet.snapshot.pools)
