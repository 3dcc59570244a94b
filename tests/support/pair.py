"""Two real engines, one to prefill and one to decode, and what a gateway would tell them."""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from connectors.bench.ports import adjacent_ports, free_ports
from connectors.params import new_transfer_id
from tests.support.vllm_engine import MODEL_NAME, Engine, start_engine, tiny_model

PATIENCE_S = 120.0
_OF_VLLM = "kv_cache_usage_perc|prefix_cache_hits_total|spec_decode_num_draft_tokens_total"
_SAMPLE = re.compile(rf"(kvlane_transfer\w*(?:{{.*?}})?|vllm:(?:{_OF_VLLM})){{?.*?}}? ([-+.e\d]+)$")


@dataclass(frozen=True, slots=True)
class TransferEngine:
    """An engine that sends and receives."""

    engine: Engine
    transfer_port: int
    metrics_port: int
    tp_size: int = 1

    @property
    def peer(self) -> str:
        return f"127.0.0.1:{self.transfer_port}"

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.engine.url, timeout=PATIENCE_S, limits=limits)

    async def complete(self, prompt: list[int], max_tokens: int = 12, **fields: Any) -> list[int]:
        """Return the output tokens of a greedy completion."""
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True, **fields}
        async with self.client() as client:
            answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
        tokens: list[int] = answer["choices"][0]["token_ids"]
        return tokens

    async def metrics(self) -> dict[str, float]:
        """Return the connector's metrics, by name and labels, summed over ranks, and some of vLLM's."""
        ports = [self.engine.port, *range(self.metrics_port, self.metrics_port + self.tp_size)]
        values: dict[str, float] = defaultdict(float)
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            for port in ports:
                for line in (await client.get(f"http://127.0.0.1:{port}/metrics")).text.splitlines():
                    if found := _SAMPLE.match(line):
                        values[found[1].replace('"', "")] += float(found[2])
        return values

    async def is_clean(self) -> bool:
        """Whether no transfer is live, every staging buffer free, and no block in use."""
        now = await self.metrics()
        return (
            now["kvlane_transfer_live{role=send}"] == now["kvlane_transfer_live{role=receive}"] == 0
            and now["kvlane_transfer_quarantined_buffers{role=send}"] == 0
            and now["kvlane_transfer_quarantined_buffers{role=receive}"] == 0
            and now["kvlane_transfer_free_buffers{role=send}"] == 8 * self.tp_size
            and now["kvlane_transfer_free_buffers{role=receive}"] == 8 * self.tp_size
            and now["vllm:kv_cache_usage_perc"] == 0
        )


@contextmanager
def transfer_engine(
    redis_url: str, settings: Mapping[str, Any], *arguments: str, tp_size: int = 1
) -> Iterator[TransferEngine]:
    """Run an engine with these `kvlane.` settings."""
    (port,) = free_ports(1)
    transfer_port = adjacent_ports(2 * tp_size)
    metrics_port = transfer_port + tp_size
    extra = {
        "kvlane.endpoint": f"127.0.0.1:{port}",
        "kvlane.transfer_port": transfer_port,
        "kvlane.transfer_metrics_port": metrics_port,
        "kvlane.staging_poison": True,
        **{f"kvlane.{name}": value for name, value in settings.items()},
    }
    config = {"kv_connector_extra_config": extra}
    with start_engine(
        port,
        *("--kv-transfer-config", json.dumps(config)),
        *(("--tensor-parallel-size", str(tp_size)) if tp_size > 1 else ()),
        *arguments,
        command=("kvlane", "serve"),
        env={"KVLANE_REDIS_URL": redis_url, "UCX_TLS": "tcp,self"},
    ) as engine:
        yield TransferEngine(engine, transfer_port, metrics_port, tp_size)


@dataclass(frozen=True, slots=True)
class Pair:
    """A prefill worker and a decode worker."""

    prefill: TransferEngine
    decode: TransferEngine

    async def complete(self, prompt: list[int], max_tokens: int = 12, **fields: Any) -> list[int]:
        """Return the output of a disaggregated completion: both halves are sent at once."""
        transfer_id = new_transfer_id()
        send = {"kvlane": {"transfer_id": transfer_id, "role": "send"}}
        receive = {
            "kvlane": {
                "transfer_id": transfer_id,
                "role": "receive",
                "peer": self.prefill.peer,
                "peer_tp_size": self.prefill.tp_size,
            }
        }
        _, tokens = await asyncio.gather(
            self.prefill.complete(prompt, 1, kv_transfer_params=send, **fields),
            self.decode.complete(prompt, max_tokens, kv_transfer_params=receive, **fields),
        )
        return tokens


@contextmanager
def pair(redis_url: str, settings: Mapping[str, Any], *arguments: str) -> Iterator[Pair]:
    """Run two engines with these `kvlane.` settings; they start at the same time."""
    tiny_model()  # once, not in two threads
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        starts = [
            pool.submit(stack.enter_context, transfer_engine(redis_url, settings, *arguments))
            for _ in range(2)
        ]
        prefill, decode = [start.result() for start in starts]
        yield Pair(prefill, decode)
