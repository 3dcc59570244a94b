"""A router on a memory index, whose reader and index do as a test tells them."""

from __future__ import annotations

import asyncio
import json

from gateway.config import GatewayConfig
from gateway.decide import KvRouter
from gateway.decision import HttpRequest
from gateway.fleet import Fleet
from gateway.rates import Rates
from gateway.receipts import Receipts
from gateway.tokens.request import Api, Prompt, ReadRequest
from kvindex.blocks import hash_blocks, root_hash
from kvindex.errors import IndexUnavailable
from kvindex.memory_index import MemoryIndex, MemoryIndexReader, MemoryIndexWriter
from kvindex.worker import Batch
from tests.support.workers import make_worker

LEASE_MS = 60_000
PROMPT = tuple(range(1000, 1400))  # 25 blocks
PATH = "/v1/completions"


class ScriptedReader:
    """Reads `{"model", "prompts": [[ids]], ...}`; fails as told."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.failure: Exception | None = None
        self.delay_s = 0.0

    async def read(self, path, body):
        await asyncio.sleep(self.delay_s)
        if self.failure:
            raise self.failure
        if path != PATH:
            return None
        fields = json.loads(body)
        self.fleet.snapshot.models.find(fields["model"])
        return ReadRequest(
            api=Api.COMPLETION,
            model=fields["model"],
            prompts=tuple(
                Prompt(tuple(ids), fields.get("comparable", len(ids))) for ids in fields["prompts"]
            ),
            cache_salt=fields.get("cache_salt"),
            stream=fields.get("stream", False),
        )


class ScriptedIndex(MemoryIndexReader):
    """A reader of the memory index that can be slow, away, or held up before or after it charges."""

    def __init__(self, memory: MemoryIndex) -> None:
        super().__init__(memory)
        self.away = False
        self.match_delay_s = 0.0
        self.charging = asyncio.Event()
        self.release = asyncio.Event()
        self.release.set()
        self.num_matches = 0
        self.num_reserves = 0

    def _reach(self):
        if self.away:
            raise IndexUnavailable("redis://nowhere: refused")

    async def pools(self):
        self._reach()
        return await super().pools()

    async def match(self, pool, hashes):
        self._reach()
        await asyncio.sleep(self.match_delay_s)
        self.num_matches += 1
        return await super().match(pool, hashes)

    async def reserve(self, *args, **kwargs):
        self._reach()
        self.num_reserves += 1
        self.charging.set()
        await self.release.wait()
        answer = await super().reserve(*args, **kwargs)
        await asyncio.sleep(0)
        return answer

    async def settle(self, pool, decision_id):
        self._reach()
        return await super().settle(pool, decision_id)


class Bench:
    """A router on a memory index, with the means to set up its fleet."""

    def __init__(self, client, **options) -> None:
        self.memory = MemoryIndex()
        self.index = ScriptedIndex(self.memory)
        self.writer = MemoryIndexWriter(self.memory)
        patience = {"index_deadline_ms": 2_000, "tokenize_deadline_ms": 2_000}
        self.config = GatewayConfig(**(patience | {"prefill_tokens_per_s": 1000} | options))
        self.fleet = Fleet(self.config, self.index, client)
        self.reader = ScriptedReader(self.fleet)
        self.receipts = Receipts(100)
        self.rates = Rates(self.config.default_profile)
        self.router = KvRouter(
            self.config,
            self.index,
            self.fleet,
            self.reader,
            rates=self.rates,
            receipts=self.receipts,
            client=client,
        )
        self.slots = {}

    async def join(self, *names, blocks=(), load=None, cards=(), **fields):
        for name in names:
            worker = make_worker(name, **fields)
            slot = self.writer.open_slot(worker, lease_ms=LEASE_MS)
            self.slots[name] = (worker, slot)
            if blocks:
                batch = Batch(sequence=1, stored=tuple(blocks))
                self.writer.apply(worker.pool, slot, worker.incarnation, batch)
            if load:
                self.writer.heartbeat(worker.pool, slot, worker.incarnation, load, lease_ms=LEASE_MS)
            self.fleet._replace(cards={**self.fleet.snapshot.cards, name: tuple(cards)})
        await self.fleet.poll()

    def leave(self, name):
        worker, slot = self.slots.pop(name)
        self.writer.close_slot(worker.pool, slot, worker.incarnation)

    def charges(self) -> dict[str, int]:
        """Return charged requests by worker, those at nothing left out."""
        pools = self.memory.known_pools()
        states = {(pool, state.slot): state for pool in pools for state in self.memory.states(pool)}
        found = {name: states[w.pool, slot].charged_requests for name, (w, slot) in self.slots.items()}
        return {name: count for name, count in found.items() if count}

    async def decide(self, prompt=PROMPT, **fields):
        return await self.router.decide(completion(prompt, **fields))

    def receipt(self, decision):
        return self.receipts.get(decision.decision_id)


def completion(*prompts, headers=None, candidates=None, model="tiny", **fields) -> HttpRequest:
    body = json.dumps({"model": model, "prompts": prompts, **fields}).encode()
    return HttpRequest("POST", PATH, headers or {}, body, candidates)


def blocks_of(prompt=PROMPT, **identity):
    return hash_blocks(root_hash("tiny", **identity), prompt, 16)
