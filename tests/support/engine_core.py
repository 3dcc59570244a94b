"""The inside of a simulated vLLM: admission, prefix cache, KV events, load, metrics. No model, no HTTP.

Source: vLLM 0.32 `distributed/kv_events.py`, `v1/core/kv_cache_manager.py`, `v1/metrics/loggers.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import prometheus_client
import zmq

from kvindex.publisher import LoadReport
from kvindex.worker import Load, new_incarnation
from tests.support.block_cache import BlockCache
from tests.support.engine_flaws import distorted

DECISION_ID = re.compile(r"-kv([0-9a-f]{16})$")
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True):
    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, omit_defaults=True):
    pass


class EventStream:
    """Publishes event batches as vLLM does, and replays them to who asks. Used from one thread.

    Args:
        options: `events` and `replay` say where; flaws (`engine_flaws`), what comes out instead.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        endpoint, replay_endpoint = options.events, options.replay
        context = zmq.Context.instance()
        self._pub = context.socket(zmq.PUB)
        self._pub.bind(endpoint)
        self._sent: deque[tuple[bytes, bytes]] = deque(maxlen=10_000)
        self._sequence = 0
        if replay_endpoint:
            router = context.socket(zmq.ROUTER)
            router.bind(replay_endpoint)
            threading.Thread(target=self._replay, args=(router,), daemon=True).start()

    def publish(self, *events: object) -> None:
        told = [flawed for event in events if (flawed := distorted(self._options, event)) is not None]
        if told and self._options.event_delay_s:
            asyncio.get_running_loop().call_later(self._options.event_delay_s, self._send, told)
        elif told:
            self._send(told)

    def _send(self, events: list[object]) -> None:
        payload = msgspec.msgpack.encode((time.time(), events, 0))
        sequence = self._sequence.to_bytes(8, "big")
        self._sequence += 1
        self._sent.append((sequence, payload))
        self._pub.send_multipart((b"", sequence, payload))

    def close(self) -> None:
        self._pub.close(linger=0)

    def _replay(self, router: zmq.Socket[bytes]) -> None:
        while True:
            client, _, start = router.recv_multipart()
            for sequence, payload in list(self._sent):
                if sequence >= start:
                    router.send_multipart((client, b"", sequence, payload))
            router.send_multipart((client, b"", END_OF_REPLAY, b""))


@dataclass(eq=False)
class Running:
    """A request inside the engine."""

    request_id: str
    tokens: list[int]
    lora_name: str | None
    cache_salt: str | None
    num_cached_tokens: int = 0
    phase: str = "waiting"
    blocks: list[int] = field(default_factory=list)


class Engine:
    """The engine core: admits requests one after the other, computes, caches, tells."""

    def __init__(self, options: argparse.Namespace, events: EventStream) -> None:
        self.options = options
        self.cache = BlockCache(options.num_blocks)
        self.events = events
        self.requests: set[Running] = set()
        self._accepted: list[str] = []
        self._prefill = asyncio.Lock()
        self._freed = asyncio.Event()
        self._secret = new_incarnation()
        self.metrics = Metrics(options)

    def hashes(self, request: Running) -> list[int]:
        """Return this engine's own hashes, which no other engine shares."""
        size = self.options.block_size
        parent, found = 0, []
        for start in range(0, len(request.tokens) - size + 1, size):
            keys = (self._secret, parent, request.tokens[start : start + size], extra_keys(request, start))
            parent = int.from_bytes(hashlib.sha256(msgspec.msgpack.encode(keys)).digest()[:8], "big")
            found.append(parent)
        return found

    @contextlib.asynccontextmanager
    async def admitted(self, request: Running) -> AsyncIterator[None]:
        """Compute the prompt; while the block runs the request is decoding."""
        self.requests.add(request)
        if found := DECISION_ID.search(request.request_id):
            self._accepted.append(found[1])
        try:
            async with self._prefill:
                await self._compute_prompt(request)
            request.phase = "decode"
            yield
            self._store_from(request, len(request.blocks))
        finally:
            self.requests.remove(request)
            self.cache.release(request.blocks)
            self._freed.set()

    async def _compute_prompt(self, request: Running) -> None:
        size = self.options.block_size
        hashes = self.hashes(request)
        # The last prompt token is always computed: it gives the first output token.
        usable = (len(request.tokens) - 1) // size
        matched = self.cache.match(hashes[:usable])
        while not self.cache.can_allocate(matched, len(hashes) - len(matched)):
            self._freed.clear()
            await self._freed.wait()
            matched = self.cache.match(hashes[:usable])
        request.phase = "prefill"
        request.num_cached_tokens = len(matched) * size
        self.metrics.count_prompt(request)
        self._take(request, matched, len(hashes) - len(matched))
        computed = len(request.tokens) - request.num_cached_tokens
        await asyncio.sleep(computed / self.options.prefill_tokens_per_s)
        self._store(request, hashes, len(matched))

    def _take(self, request: Running, matched: list[int], num_new: int) -> None:
        blocks, evicted = self.cache.allocate(matched, num_new)
        request.blocks += blocks
        for each in evicted:
            self.events.publish(BlockRemoved([each], "GPU", 0))

    def _store_from(self, request: Running, first: int) -> None:
        """Cache the blocks that decoding has filled, if there is room."""
        hashes = self.hashes(request)
        if len(hashes) > first and self.cache.can_allocate((), len(hashes) - first):
            self._take(request, [], len(hashes) - first)
            self._store(request, hashes, first)

    def _store(self, request: Running, hashes: list[int], first: int) -> None:
        if len(hashes) == first:
            return
        size = self.options.block_size
        for position in range(first, len(hashes)):
            self.cache.store(request.blocks[position], hashes[position])
        self.events.publish(
            BlockStored(
                block_hashes=hashes[first:],
                parent_block_hash=hashes[first - 1] if first else None,
                token_ids=request.tokens[first * size : len(hashes) * size],
                block_size=size,
                lora_id=1 if request.lora_name else None,
                medium="GPU",
                lora_name=request.lora_name,
                extra_keys=[extra_keys(request, each * size) for each in range(first, len(hashes))],
                group_idx=0,
                kv_cache_spec_kind="full_attention",
            )
        )

    def clear(self) -> bool:
        cleared = self.cache.clear()
        if cleared:
            self.events.publish(AllBlocksCleared())
        return cleared

    def load(self) -> Load:
        requests = list(self.requests)
        unfinished = [each for each in requests if each.phase != "decode"]
        return Load(
            waiting_requests=sum(each.phase == "waiting" for each in requests),
            running_requests=sum(each.phase != "waiting" for each in requests),
            waiting_prefill_tokens=sum(len(each.tokens) - each.num_cached_tokens for each in unfinished),
            running_tokens=sum(len(each.tokens) for each in requests if each.phase == "decode"),
            kv_usage=1 - self.cache.num_free_blocks / self.cache.num_blocks,
        )

    def report(self) -> LoadReport:
        """Called by the publisher's thread."""
        accepted, self._accepted = self._accepted, []
        return LoadReport(load=self.load(), accepted=tuple(accepted))


def extra_keys(request: Running, start: int) -> tuple[str, ...] | None:
    lora = (request.lora_name,) if request.lora_name else ()
    salt = (request.cache_salt,) if request.cache_salt and start == 0 else ()
    return (*lora, *salt) or None


class Metrics:
    """vLLM's names, as far as kvlane and the tests read them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._labels = {"engine": "0", "model_name": options.model}
        self._queries = self._make(prometheus_client.Counter, "vllm:prefix_cache_queries")
        self._hits = self._make(prometheus_client.Counter, "vllm:prefix_cache_hits")
        self._prompt = self._make(prometheus_client.Counter, "vllm:prompt_tokens")
        self._running = self._make(prometheus_client.Gauge, "vllm:num_requests_running")
        self._waiting = self._make(prometheus_client.Gauge, "vllm:num_requests_waiting")
        self._usage = self._make(prometheus_client.Gauge, "vllm:kv_cache_usage_perc")
        config = {"block_size": str(options.block_size), "num_gpu_blocks": str(options.num_blocks)}
        info = {**config, "enable_prefix_caching": str(not options.no_prefix_caching), "engine": "0"}
        name = "vllm:cache_config_info"
        prometheus_client.Gauge(name, "cache", list(info), registry=self.registry).labels(**info).set(1)

    def _make(self, kind: Any, name: str) -> Any:
        return kind(name, name, list(self._labels), registry=self.registry).labels(**self._labels)

    def count_prompt(self, request: Running) -> None:
        self._queries.inc(len(request.tokens))
        self._hits.inc(request.num_cached_tokens)
        self._prompt.inc(len(request.tokens))

    def render(self, load: Load) -> bytes:
        self._running.set(load.running_requests)
        self._waiting.set(load.waiting_requests)
        self._usage.set(load.kv_usage)
        return prometheus_client.generate_latest(self.registry)
