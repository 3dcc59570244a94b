"""A real engine with tiers: how soon it answers a prompt that it computes, and one that it loads.

Prompt by prompt in turns: computed; loaded from CPU memory; loaded from disk. Before each a real gateway is
asked when it would expect the first token, by what engine and LMCache server have measured until then.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import httpx
from rich.console import Console

from connectors.bench.gateway import Gateway, predicting
from connectors.bench.ports import adjacent_ports, free_ports
from connectors.bench.serving import KVLANE, NAME, ONE_CORE_EACH, serving
from connectors.errors import BenchFailed
from connectors.tiers.node import NodeFiles
from connectors.tiers.spec import DEFAULT_CHUNK
from kvindex.embedded import embedded_redis
from kvindex.figures import Figure

NUM_CHUNKS = (1, 2, 4, 8, 14)
"""Of the prompts."""
REST_TOKENS = 32
"""Behind the last chunk; they are computed in any case."""
ROUNDS = 5
WARM_UP_ROUNDS = 4
"""Over all lengths: from 16 prompt steps on an engine says what they cost."""
_PATIENCE_S = 120.0
_HITS = re.compile(r"^vllm:external_prefix_cache_hits_total{.*} ([\d.e+]+)$", re.MULTILINE)


def run(model: Path, device: str, directory: Path | None, engine_args: str, console: Console) -> list[Figure]:
    """Start an engine, measure and return the figures.

    Args:
        model: directory of a model whose context takes 4,000 tokens.
        device: `cpu` or `cuda`.
        directory: where the disk tier's files go for the time; None: a temporary directory.
        engine_args: more arguments of `vllm serve`.
        console: for progress.

    Raises:
        BenchFailed: the engine does not start, or computes what it should load.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory)))
        (port,), tiers_port = free_ports(1), adjacent_ports(2)
        disk = scratch / "tier"
        tiers = f"cpu=1GiB,disk={disk}:8GiB,port={tiers_port}"
        arguments = ("--max-model-len", "4096", "--tiers", tiers, *shlex.split(engine_args))
        redis_url = stack.enter_context(embedded_redis())
        environment = {
            **(ONE_CORE_EACH if device == "cpu" else {}),
            **os.environ,
            "VLLM_SERVER_DEV_MODE": "1",
            "KVLANE_REDIS_URL": redis_url,
        }
        console.print("starting an engine with tiers")
        stack.callback(_end_keeper, tiers_port)
        stack.enter_context(
            serving(KVLANE, model, port, arguments, environment=environment, log=scratch / "log")
        )
        client = stack.enter_context(httpx.Client(timeout=_PATIENCE_S))
        gateway = stack.enter_context(predicting(redis_url, NAME, scratch / "gateway.log"))
        server = f"http://127.0.0.1:{tiers_port + 1}"
        bench = _Bench(client, f"http://127.0.0.1:{port}", server, disk, gateway)
        console.print("warming up")
        for num_chunks in NUM_CHUNKS * WARM_UP_ROUNDS:
            bench.measure(num_chunks)
        _wait(gateway.has_measured)
        ttft_ms: dict[int, dict[str, list[Timed]]] = {}
        for num_chunks in NUM_CHUNKS:
            console.print(f"{num_chunks} chunks")
            rounds = [bench.measure(num_chunks) for _ in range(ROUNDS)]
            num_tokens = num_chunks * DEFAULT_CHUNK + REST_TOKENS
            ttft_ms[num_tokens] = {way: [each[way] for each in rounds] for way in rounds[0]}
        return figures(ttft_ms)


class Timed(NamedTuple):
    """When a first token came."""

    measured_ms: float
    predicted_ms: float


def figures(ttft_ms: Mapping[int, Mapping[str, Sequence[Timed]]]) -> list[Figure]:
    """Return what was found.

    Args:
        ttft_ms: times to first token, by tokens of the prompt and by way: `computed`, or the tier.
    """
    medians = {
        num_tokens: {
            way: statistics.median(each.measured_ms for each in timed) for way, timed in ways.items()
        }
        for num_tokens, ways in ttft_ms.items()
    }
    found = []
    for num_tokens, ways in medians.items():
        for way, median in ways.items():
            beside = (None, None) if way == "computed" else ("computed", ways["computed"])
            found.append(Figure(f"tiers.ttft_ms_{num_tokens}_{way}", median, "ms", None, *beside))
    for num_tokens, all_ways in ttft_ms.items():
        for way, timed in all_ways.items():
            predicted = statistics.median(each.predicted_ms for each in timed)
            name = f"tiers.predicted_over_measured_{num_tokens}_{way}"
            ratio = predicted / medians[num_tokens][way]
            found.append(Figure(name, ratio, "", None, "predicted, ms", predicted))
    for tier in ("cpu", "disk"):
        worth = [num_tokens for num_tokens, ways in medians.items() if ways[tier] < ways["computed"]]
        if worth:
            found.append(Figure(f"tiers.crossover_tokens_{tier}", min(worth), "tokens"))
    return found


class _Bench:
    """An engine, and the LMCache server behind it."""

    def __init__(self, client: httpx.Client, engine: str, server: str, disk: Path, gateway: Gateway) -> None:
        self._client = client
        self._gateway = gateway
        self._engine = engine
        self._server = server
        self._disk = disk
        self._num_stored = 0
        self._draw = random.Random(1)  # noqa: S311 - prompts

    def measure(self, num_chunks: int) -> dict[str, Timed]:
        """Return the times to first token of a prompt that nobody has seen, by way."""
        num_tokens = num_chunks * DEFAULT_CHUNK + REST_TOKENS
        prompt = [self._draw.randrange(100, 1_000) for _ in range(num_tokens)]
        predicted_ms = self._gateway.predict(prompt, {})
        computed = Timed(self._ttft_ms(prompt), predicted_ms)
        self._num_stored += num_chunks
        _wait(lambda: len(list(self._disk.glob("*.data"))) >= self._num_stored)
        self._forget()
        from_cpu = self._load(prompt, num_chunks, "cpu")
        self._forget()
        self._client.post(f"{self._server}/cache/clear").raise_for_status()
        return {"computed": computed, "cpu": from_cpu, "disk": self._load(prompt, num_chunks, "disk")}

    def _forget(self) -> None:
        _wait(lambda: self._client.post(f"{self._engine}/reset_prefix_cache").is_success)
        self._ttft_ms([self._draw.randrange(100, 1_000)])  # the next step tells that the cache is empty

    def _load(self, prompt: list[int], num_chunks: int, tier: str) -> Timed:
        num_tokens = num_chunks * DEFAULT_CHUNK
        predicted_ms = self._gateway.predict(prompt, {tier: num_tokens})
        before = self._num_hits()
        timed = Timed(self._ttft_ms(prompt), predicted_ms)
        if self._num_hits() - before < num_tokens:
            raise BenchFailed("the engine computed what its tiers hold")
        return timed

    def _num_hits(self) -> float:
        found = _HITS.search(self._client.get(f"{self._engine}/metrics").text)
        return float(found[1]) if found else 0.0

    def _ttft_ms(self, prompt: list[int]) -> float:
        body = {"model": NAME, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        started = time.perf_counter()
        self._client.post(f"{self._engine}/v1/completions", json=body).raise_for_status()
        return (time.perf_counter() - started) * 1e3


def _end_keeper(port: int) -> None:
    """End the process that the engine has started, which would wait for another engine."""
    if (state := NodeFiles(port).read_state()) is not None:
        with suppress(ProcessLookupError):
            os.kill(state.pid, signal.SIGTERM)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise BenchFailed("the tiers do not store what the engine computes")
        time.sleep(0.05)
