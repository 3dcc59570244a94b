"""Ten thousand bodies that no client should send, through all of the gateway but its sockets."""

from __future__ import annotations

import json
import random

from prometheus_client import REGISTRY

from gateway.config import GatewayConfig
from gateway.decide import KvRouter
from gateway.extproc.metrics import REQUESTS
from gateway.extproc.session import Session
from gateway.fleet import Fleet
from gateway.probe import ModelCard, worker_client
from gateway.profile import Profile
from gateway.protos import ext_proc_pb2 as wire
from gateway.rates import Rates
from gateway.receipts import Receipts
from gateway.tokens.reader import PromptReader
from kvindex.memory_index import MemoryIndex, MemoryIndexReader, MemoryIndexWriter
from tests.support import extproc
from tests.support.fuzz import body
from tests.support.vllm_engine import tiny_model
from tests.support.workers import make_worker

NUM_BODIES = 10_000
MODES = (wire.BUFFERED, wire.FULL_DUPLEX_STREAMED)


def num_series() -> int:
    return sum(len(family.samples) for family in REGISTRY.collect() if family.name.startswith("kvlane_"))


async def test_every_body_is_routed_or_refused_and_leaves_nothing():
    draw = random.Random(2026)
    memory = MemoryIndex()
    # A fuzzed prompt may take longer on a busy machine; that is no part of this.
    config = GatewayConfig(index_deadline_ms=60_000, tokenize_deadline_ms=60_000)
    async with worker_client(config) as client:
        fleet = Fleet(config, MemoryIndexReader(memory), client)
        reader = PromptReader(lambda: fleet.snapshot.models)
        router = KvRouter(
            config,
            MemoryIndexReader(memory),
            fleet,
            reader,
            rates=Rates(Profile(prefill_tokens_per_s=1000)),
            receipts=Receipts(100),
            client=client,
        )
        for name in ("a:1", "b:1"):
            MemoryIndexWriter(memory).open_slot(make_worker(name), lease_ms=3_600_000)
        await fleet.poll()
        card = ModelCard(id="tiny", root=str(tiny_model()))
        fleet._replace(cards=dict.fromkeys(fleet.addresses, (card,)))
        await reader.prepare()
        num_before = num_series()
        failed = REQUESTS.labels("failed")._value.get()
        routed, refused = 0, {}
        for number in range(NUM_BODIES):
            path, content = body(draw)
            session = Session(router, max_body_bytes=config.max_body_bytes)
            head = extproc.request_headers("POST", path, mode=MODES[number % 2])
            answers = [*await session.answer(head), *await session.answer(extproc.request_body(content))]
            await session.finish()
            replies = [each.immediate_response for each in answers if each.HasField("immediate_response")]
            if not replies:
                assert any(each.HasField("dynamic_metadata") for each in answers), content
                routed += 1
                continue
            error = json.loads(replies[0].body)["error"]
            assert error["code"] == replies[0].status.code
            assert error["message"]
            refused.setdefault(error["code"], content)
        await router.stop()
        reader.close()
    assert set(refused) <= {400, 404}, refused
    assert 1_000 < routed < NUM_BODIES - 1_000
    assert REQUESTS.labels("failed")._value.get() == failed
    assert not router.requests_in_flight
    pools = memory.known_pools()
    assert not any(state.charged_requests for pool in pools for state in memory.states(pool))
    # What clients send is in no label.
    assert num_series() <= num_before + 120
