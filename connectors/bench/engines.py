"""Two real engines: how much later a split answers than one engine alone, and how prefills disturb answers.

Each is measured in turns, prompt by prompt, with prompts that no engine has seen.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from connectors.bench.ports import free_ports
from connectors.bench.transport import gpu_of
from connectors.errors import BenchFailed
from connectors.params import new_transfer_id
from kvindex.figures import Figure

STEP_TOKENS = 224
NUM_STEPS = 16
"""Of a prompt: so many times its KV leaves."""
ROUNDS = 7
NUM_ANSWERS = 4
NUM_PREFILLS = 10
"""That arrive one behind the other while answers run."""
START_TIMEOUT_S = 600.0
NAME = "measured"

ONE_CORE_EACH = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""What engines on a CPU get where it is not set."""

ONE_PROCESS = (
    "--distributed-executor-backend",
    "vllm.v1.executor.uniproc_executor.UniProcExecutor",
)
"""Scheduler and worker together, as on one GPU. On a CPU vLLM gives the worker a process of its own, which
spins while it waits.
"""

_WIRE = re.compile(r"kvlane_transfer_wire_(bytes|seconds)_total{.*} ([-+.e\d]+)")

Ask = Callable[[list[int], int], AsyncIterator[float]]
"""Yields the moment of every piece of an answer, of so many tokens, to a prompt."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A running `kvlane serve`."""

    port: int
    transfer_port: int
    metrics_port: int

    async def ask(
        self, tokens: list[int], max_tokens: int, params: dict[str, Any] | None = None
    ) -> AsyncIterator[float]:
        """Yield the moment of every piece of an answer."""
        body = {"model": NAME, "prompt": tokens, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        if params:
            body["kv_transfer_params"] = {"kvlane": params}
        async with (
            httpx.AsyncClient(timeout=None) as client,  # noqa: S113 - an answer takes as long as it takes
            client.stream("POST", f"http://127.0.0.1:{self.port}/v1/completions", json=body) as answer,
        ):
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    yield time.perf_counter()

    async def wire(self) -> tuple[float, float]:
        """Return the bytes that came, and the seconds that they were on their way."""
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://127.0.0.1:{self.metrics_port}/metrics")).text
        found = {kind: float(value) for kind, value in _WIRE.findall(text)}
        return found.get("bytes", 0.0), found.get("seconds", 0.0)


def run(model: Path, device: str, link: str, engine_args: str, console: Console) -> list[Figure]:
    """Start the engines, measure and return the figures.

    Args:
        model: directory of a model whose context takes 4,000 tokens.
        device: `cpu` or `cuda`.
        link: UCX_TLS.
        engine_args: more arguments of `vllm serve`.
        console: for progress.

    Raises:
        BenchFailed: an engine does not start.
    """
    with ExitStack() as stack:
        console.print("starting two engines")
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prefill, decode = (
            stack.enter_context(
                _engine(model, device, {"UCX_TLS": link, **gpu_of(device, index)}, engine_args, logs / name)
            )
            for index, name in enumerate(("prefill", "decode"))
        )
        return asyncio.run(_measure(prefill, decode, console))


async def _measure(prefill: Engine, decode: Engine, console: Console) -> list[Figure]:
    draw = random.Random(1)  # noqa: S311 - prompts

    def prompt() -> list[int]:
        return [draw.randrange(100, 1_000) for _ in range(NUM_STEPS * STEP_TOKENS)]

    async def split(tokens: list[int], max_tokens: int) -> AsyncIterator[float]:
        computing, params = _send(prefill, tokens)
        async for moment in decode.ask(tokens, max_tokens, params):
            yield moment
        await computing

    async def in_sequence(tokens: list[int], max_tokens: int) -> AsyncIterator[float]:
        computing, params = _send(prefill, tokens)
        await computing
        async for moment in decode.ask(tokens, max_tokens, params):
            yield moment

    ways: dict[str, Ask] = {"alone": decode.ask, "split": split, "sequential": in_sequence}
    ttft_ms: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        console.print(f"time to first token, round {number} of {ROUNDS}")
        if number == 1:
            before = await decode.wire()
        for name, ask in ways.items():
            ttft_ms[name].append(await _ttft_ms(ask, prompt()))
    bytes_and_s = [now - then for now, then in zip(await decode.wire(), before, strict=True)]
    if not bytes_and_s[0]:
        raise BenchFailed("nothing was transferred; the engines' logs say why")
    last_ms = bytes_and_s[1] * 1e3 / (2 * ROUNDS * NUM_STEPS)
    gaps_ms = {"undisturbed": await _gaps_ms(decode, None, prompt)}
    for name, ask in (("alone", decode.ask), ("split", split)):
        console.print(f"answers beside prefills, {name}")
        gaps_ms[name] = await _gaps_ms(decode, ask, prompt)
    return figures({name: measured[1:] for name, measured in ttft_ms.items()}, last_ms, gaps_ms)


def figures(
    ttft_ms: Mapping[str, Sequence[float]], last_ms: float, gaps_ms: Mapping[str, Sequence[float]]
) -> list[Figure]:
    """Return what was found.

    Args:
        ttft_ms: times to first token: on one engine `alone`, `split`, and split `sequential`ly, where the
            decode worker is asked when the prefill is done.
        last_ms: what the last chunk takes to move, which no split can save.
        gaps_ms: times between tokens: `undisturbed`, and while prompts are computed `alone` or `split`.
    """
    medians = {name: statistics.median(measured) for name, measured in ttft_ms.items()}
    extra_ms = {name: median - medians["alone"] - last_ms for name, median in medians.items()}
    p99_ms = {name: statistics.quantiles(gaps, n=100)[98] for name, gaps in gaps_ms.items()}
    return [
        *(Figure(f"transport.ttft_ms_{name}", median, "ms") for name, median in medians.items()),
        Figure("transport.last_chunk_ms", last_ms, "ms"),
        Figure(
            "transport.streaming_extra_ttft_ms",
            extra_ms["split"],
            "ms",
            "<= 10",
            "one after the other",
            extra_ms["sequential"],
        ),
        *(
            Figure(
                f"transport.itl_p99_ms_{name}", p99_ms[name], "ms", None, "no prefills", p99_ms["undisturbed"]
            )
            for name in ("alone", "split")
        ),
    ]


def _send(prefill: Engine, tokens: list[int]) -> tuple[asyncio.Task[float], dict[str, Any]]:
    """Begin the prefill half; return it and what the decode half is told."""
    transfer_id = new_transfer_id()
    half = prefill.ask(tokens, 1, {"transfer_id": transfer_id, "role": "send"})
    peer = f"127.0.0.1:{prefill.transfer_port}"
    return (
        asyncio.create_task(_last(half)),
        {"transfer_id": transfer_id, "role": "receive", "peer": peer},
    )


async def _last(moments: AsyncIterator[float]) -> float:
    moment = 0.0
    async for each in moments:
        moment = each
    return moment


async def _ttft_ms(ask: Ask, tokens: list[int]) -> float:
    started = time.perf_counter()
    moments = [moment async for moment in ask(tokens, 2)]
    return (moments[0] - started) * 1e3


async def _gaps_ms(decode: Engine, ask: Ask | None, prompt: Callable[[], list[int]]) -> list[float]:
    """Return the times between tokens of running answers, while prompts are asked in this way or none is."""
    gaps_ms: list[float] = []
    is_counted = False

    async def answer() -> None:
        former = None
        async for moment in decode.ask(prompt()[:32], 3_000):
            if former is not None and is_counted:
                gaps_ms.append((moment - former) * 1e3)
            former = moment

    answers = [asyncio.create_task(answer()) for _ in range(NUM_ANSWERS)]
    try:
        await asyncio.sleep(1)
        is_counted = True
        if ask is None:
            await asyncio.sleep(5)
        else:
            for _ in range(NUM_PREFILLS):
                await _last(ask(prompt(), 1))
    finally:
        for each in answers:
            each.cancel()
        await asyncio.gather(*answers, return_exceptions=True)
    return gaps_ms


@contextmanager
def _engine(
    model: Path, device: str, environment: Mapping[str, str], engine_args: str, log: Path
) -> Iterator[Engine]:
    port, transfer_port, metrics_port = free_ports(3)
    settings = {
        "kvlane.transfer_port": transfer_port,
        "kvlane.transfer_metrics_port": metrics_port,
        "kvlane.transport": "ucx",
    }
    arguments = [
        *("--max-model-len", "4096", "--max-num-batched-tokens", str(STEP_TOKENS)),
        *("--kv-transfer-config", json.dumps({"kv_connector_extra_config": settings})),
        *(ONE_PROCESS if device == "cpu" else ()),
        *shlex.split(engine_args),
    ]
    environment = {**(ONE_CORE_EACH if device == "cpu" else {}), **os.environ, **environment}
    with serving(model, port, arguments, environment, log):
        yield Engine(port, transfer_port, metrics_port)


@contextmanager
def serving(
    model: Path, port: int, arguments: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[None]:
    """Run `kvlane serve` as `NAME` on 127.0.0.1:`port` until the block ends; ready when entered.

    Raises:
        BenchFailed: it does not start; its last words are quoted.
    """
    # By module: a host that only measures needs our packages on its path, and nothing installed.
    command = [
        *(sys.executable, "-m", "vllm_plugin.serve", str(model), "--served-model-name", NAME),
        *("--host", "127.0.0.1", "--port", str(port), *arguments),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_healthy(process, port, log)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-100:])
    raise BenchFailed(f"an engine does not start:\n{tail}")
