"""A real S3 server, real LMCache servers that keep the tiers of a node, and engines that use them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from connectors.bench.ports import free_ports
from connectors.tiers.node import NodeFiles, is_locked
from connectors.tiers.s3_location import S3Location
from tests.support.running import running
from tests.support.vllm_engine import MODEL_NAME, Engine
from tests.support.waiting import eventually

BUCKET = "kv-cache"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
PATIENCE_S = 120.0
BIN = Path(sys.executable).parent


def wait_until(condition: Callable[[], object]) -> None:
    """Wait outside of an event loop, in a fixture."""
    asyncio.run(eventually(condition, PATIENCE_S))


@dataclass(slots=True)
class S3Server:
    """moto's server, which speaks S3."""

    port: int
    process: subprocess.Popen[bytes]
    _client: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def location(self, prefix: str) -> S3Location:
        return S3Location(BUCKET, prefix, "us-east-1", self.url)

    def client(self) -> Any:
        """Return the one client of boto3; another takes 0.2 s of a core."""
        if self._client is None:
            self._client = self.location("").client()
        return self._client

    def keys(self, prefix: str) -> list[str]:
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run an S3 server with an empty bucket; its clients find `CREDENTIALS` in the environment."""
    os.environ.update(CREDENTIALS)
    (port,) = free_ports(1)
    command = [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with running(*command) as process:
        server = S3Server(port, process)
        wait_until(lambda: _status(server.url) is not None)
        server.client().create_bucket(Bucket=BUCKET)
        yield server


@dataclass(frozen=True, slots=True)
class TierNode:
    """The LMCache server of one node, and how to look into it."""

    port: int

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port + 1}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def is_up(self) -> bool:
        return _status(f"{self.api}/healthcheck") == 200

    def clear_memory(self) -> None:
        """Drop what is in CPU memory."""
        httpx.post(f"{self.api}/cache/clear", timeout=PATIENCE_S).raise_for_status()

    def num_loads(self, tier: str) -> float:
        """Return how often something was loaded from a tier of LMCache's second level, `disk` or `s3`."""
        text = httpx.get(f"{self.api}/metrics", timeout=PATIENCE_S).text
        found = re.findall(
            rf"^lmcache_mp_l2_load_completed_requests_total{{.*kvlane_{tier}.*}} ([\d.e+]+)$", text, re.M
        )
        return sum(map(float, found))

    def num_damaged(self, tier: str) -> float:
        """Return how many files or objects of a tier were found damaged."""
        text = httpx.get(f"{self.api}/metrics", timeout=PATIENCE_S).text
        found = re.findall(rf'^kvlane_store_damaged_objects_total{{tier="{tier}"}} ([\d.e+]+)$', text, re.M)
        return sum(map(float, found))

    def is_off(self, tier: str) -> bool:
        """Whether a tier, `disk` or `s3`, is left alone because it failed."""
        text = httpx.get(f"{self.api}/metrics", timeout=PATIENCE_S).text
        return f'kvlane_store_off{{tier="{tier}"}} 1.0' in text

    def server_pid(self) -> int:
        """Return the process of LMCache's server."""
        listed = subprocess.run(
            ["pgrep", "-f", f"lmcache_server server .* --port {self.port} "],
            check=True,
            capture_output=True,
            text=True,
        )
        return int(listed.stdout.split()[0])

    def stop(self) -> None:
        """End the keeper that an engine has started, and wait until its server is gone."""
        files = NodeFiles(self.port)
        if (state := files.read_state()) is not None:
            with suppress(ProcessLookupError):
                os.kill(state.pid, signal.SIGTERM)
        wait_until(lambda: not is_locked(files.lock))
        for file in (files.lock, files.users, files.log, files.state):
            file.unlink(missing_ok=True)


@contextmanager
def tier_node(
    spec: str, port: int, *arguments: str, redis_url: str = "redis://127.0.0.1:1/0"
) -> Iterator[TierNode]:
    """Keep these tiers at a port until the block ends; by default there is no index."""
    node = TierNode(port)
    command = [str(BIN / "kvlane"), "tier", "serve", f"{spec},port={port}", "--redis-url", redis_url]
    command += ["--", *arguments]
    with running(*command) as keeper:
        try:
            wait_until(lambda: node.is_up() or keeper.poll() is not None)
            assert keeper.poll() is None, "kvlane tier serve has ended"
            yield node
        finally:
            node.stop()


@dataclass(frozen=True, slots=True)
class TierEngine:
    """An engine that loads from tiers and stores to them."""

    engine: Engine
    node: TierNode

    async def complete(self, prompt: list[int], max_tokens: int = 8, **fields: Any) -> list[int]:
        """Return the output tokens of a greedy completion."""
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True, **fields}
        async with httpx.AsyncClient(base_url=self.engine.url, timeout=PATIENCE_S) as client:
            answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
        tokens: list[int] = answer["choices"][0]["token_ids"]
        return tokens

    async def complete_all(self, prompts: list[list[int]], **fields: Any) -> list[list[int]]:
        return await asyncio.gather(*(self.complete(prompt, **fields) for prompt in prompts))

    async def num_hit_tokens(self) -> float:
        """Return vLLM's count of prompt tokens that came from outside of the engine."""
        return await self._metric("vllm:external_prefix_cache_hits_total")

    async def num_running(self) -> float:
        """Return how many requests are running, of those that were taken."""
        return await self._metric("vllm:num_requests_running")

    async def _metric(self, name: str) -> float:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            text = (await client.get(f"{self.engine.url}/metrics")).text
        found = re.search(rf"^{name}{{.*}} ([\d.e+]+)$", text, re.M)
        return float(found[1]) if found else 0.0

    async def forget(self) -> None:
        """Drop the engine's own cache."""

        async def is_reset() -> bool:
            async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
                answer = await client.post(f"{self.engine.url}/reset_prefix_cache")
            return answer.status_code == 200

        await eventually(is_reset, PATIENCE_S)


def environment(redis_url: str) -> Mapping[str, str]:
    """Return what such an engine finds in its environment."""
    settings = {"KVLANE_REDIS_URL": redis_url, "KVLANE_LIST_INTERVAL_S": "1"}
    return {**settings, "VLLM_SERVER_DEV_MODE": "1", **CREDENTIALS}


def _status(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.TransportError:
        return None
