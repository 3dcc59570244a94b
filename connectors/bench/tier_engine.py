"""An engine's cache without an engine: stores blocks to LMCache's server and loads them, as a connector does.

Source: LMCache 0.5.6 `lmcache/integration/vllm/vllm_multi_process_adapter.py`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

import httpx
import torch
import zmq
from lmcache.integration.vllm.vllm_multi_process_adapter import (
    LMCacheMPSchedulerAdapter,
    LMCacheMPWorkerAdapter,
    LoadStoreOp,
    ParallelStrategy,
)

from connectors.errors import BenchFailed

T = TypeVar("T")

CHUNK_SIZE = 256
BLOCK_SIZE = 32
NUM_LAYERS = 8
NUM_HEADS = 8
HEAD_BYTES = 512
"""K and V of 128 bfloat16 numbers each: an 8B model's, with a quarter of its layers."""
CHUNK_BYTES = CHUNK_SIZE * NUM_LAYERS * NUM_HEADS * HEAD_BYTES
_BLOCKS_PER_CHUNK = CHUNK_SIZE // BLOCK_SIZE
_PATIENCE_S = 60.0
_SETTLE_S = 0.002


class TierEngine:
    """A cache of random blocks, and the connection to a server.

    Args:
        address: of LMCache's server.
        api: its HTTP API.
        max_chunks: of one transfer.
        device: where its cache is, `cpu` or `cuda`.
    """

    def __init__(self, address: str, api: str, max_chunks: int, device: str) -> None:
        self._api = api
        torch.set_num_threads(1)  # as memcpy beside it
        # Two halves: what is loaded goes elsewhere than what was stored.
        num_blocks = 2 * max_chunks * _BLOCKS_PER_CHUNK + 1
        # As vLLM's attention has them, and as LMCache reads them: a CPU's blocks by heads, a GPU's by tokens.
        rows = (NUM_HEADS, BLOCK_SIZE) if device == "cpu" else (BLOCK_SIZE, NUM_HEADS)
        shape = (num_blocks, *rows, HEAD_BYTES // 2)
        self._layers = {
            f"model.layers.{index}.self_attn.attn": torch.randn(shape, dtype=torch.bfloat16, device=device)
            for index in range(NUM_LAYERS)
        }
        order = list(range(1, num_blocks))
        random.Random(1).shuffle(order)  # noqa: S311 - places, not secrets
        self._sources, self._targets = order[: num_blocks // 2], order[num_blocks // 2 :]
        strategy = ParallelStrategy(
            mla_only=False,
            vllm_world_size=1,
            vllm_worker_id=0,
            tp_size=1,
            pp_size=1,
            n_servers=1,
            dcp_size=1,
        )
        settings = {"lmcache.mp.mq_timeout": 30, "lmcache.mp.heartbeat_interval": 5}
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        url = f"tcp://{address}"
        self._scheduler = LMCacheMPSchedulerAdapter(
            [url], context, "bench", BLOCK_SIZE, strategy, extra_config=settings
        )
        self._worker = LMCacheMPWorkerAdapter(
            url, context, "bench", BLOCK_SIZE, strategy, extra_config=settings
        )
        self._worker.register_kv_caches(self._layers, layout_hints={})
        self._prompts: dict[int, list[int]] = {}
        self._num_requests = 0

    def close(self) -> None:
        """Let go of the server."""
        self._worker.shutdown()
        self._scheduler.shutdown()

    def store(self, num_chunks: int) -> float:
        """Store new chunks in CPU memory; return the seconds that took."""
        tokens = [random.randrange(1 << 17) for _ in range(num_chunks * CHUNK_SIZE)]  # noqa: S311
        self._prompts[num_chunks] = tokens
        request_id = self._request_id()
        order = LoadStoreOp(tokens, [self._sources[: num_chunks * _BLOCKS_PER_CHUNK]], 0, len(tokens))
        started = time.perf_counter()
        self._worker.submit_store_request(request_id, order, self._worker.create_recorded_event())
        self._wait(lambda: request_id in (self._worker.get_finished({request_id})[0] or ()))
        taken = time.perf_counter() - started
        self._scheduler.end_session(request_id)
        # From a GPU's cache the copies may be under way still.
        self._wait(lambda: self._find(self._request_id(), tokens, is_to_be_loaded=False) == len(tokens))
        return taken

    def load(self, num_chunks: int) -> float:
        """Load the chunks that were stored last, from wherever they are; return the seconds that took.

        Raises:
            BenchFailed: they are not there, or not what was stored.
        """
        tokens = self._prompts[num_chunks]
        request_id = self._request_id()
        targets = self._targets[: num_chunks * _BLOCKS_PER_CHUNK]
        started = time.perf_counter()
        found = self._find(request_id, tokens, is_to_be_loaded=True)
        if found != len(tokens):
            raise BenchFailed(f"{found} of {len(tokens)} tokens were found")
        order = LoadStoreOp(tokens, [targets], 0, len(tokens))
        self._worker.submit_retrieve_request(request_id, order, self._worker.create_recorded_event())
        self._wait(lambda: request_id in (self._worker.get_finished(set())[1] or ()))
        taken = time.perf_counter() - started
        self._scheduler.cleanup_lookup_result(request_id)
        self._scheduler.end_session(request_id)
        if self._worker.get_block_ids_with_load_errors():
            raise BenchFailed("LMCache could not load what it has")
        self._check(self._sources[: len(targets)], targets)
        return taken

    def settle(self) -> None:
        """Wait until everything is stored behind CPU memory as well."""

        def is_settled() -> bool:
            status = httpx.get(f"{self._api}/status", timeout=_PATIENCE_S).json()
            controllers = status["storage_manager"]["store_controllers"].values()
            return not any(each["pending_keys_count"] + each["in_flight_task_count"] for each in controllers)

        self._wait(is_settled, _SETTLE_S)

    def clear_memory(self) -> None:
        """Drop what is in CPU memory."""
        httpx.post(f"{self._api}/cache/clear", timeout=_PATIENCE_S).raise_for_status()

    def _check(self, sources: list[int], targets: list[int]) -> None:
        for layer in self._layers.values():
            if not torch.equal(layer[sources], layer[targets]):
                raise BenchFailed("what was loaded is not what was stored")
            layer[targets] = 0

    def _find(self, request_id: str, tokens: list[int], *, is_to_be_loaded: bool) -> int:
        """Return how many tokens a lookup finds; what it has locked for loading is let go if nobody will."""

        def looked_up() -> tuple[int] | None:
            found = self._scheduler.check_lookup_result(request_id)
            return None if found is None else (found,)

        self._scheduler.maybe_submit_lookup_request(request_id, tokens)
        (found,) = self._wait(looked_up)
        if not is_to_be_loaded:
            self._scheduler.free_lookup_locks(tokens, 0, found, request_id)
            self._scheduler.cleanup_lookup_result(request_id)
            self._scheduler.end_session(request_id)
        return found

    def _request_id(self) -> str:
        self._num_requests += 1
        return f"bench-{self._num_requests}"

    @staticmethod
    def _wait(condition: Callable[[], T | None], interval_s: float = 0.0002) -> T:
        """Return the condition's first true outcome."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while not (outcome := condition()):
            if time.monotonic() > deadline_s:
                raise BenchFailed("LMCache's server does not answer")
            time.sleep(interval_s)
        return outcome
