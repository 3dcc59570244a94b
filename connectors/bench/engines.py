"""Real engines: how much later a split answers than one engine alone, and how prefills disturb answers.

Beside two of ours, two of vLLM with its own NixlConnector. Each way is measured in turns, prompt by prompt,
with prompts that no engine has seen.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shlex
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import sub
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from connectors.bench.nixl_pair import NixlPair, nixl_pair
from connectors.bench.ports import free_ports
from connectors.bench.serving import KVLANE, ONE_CORE_EACH, ONE_PROCESS, Engine, serving, together
from connectors.bench.transport import gpu_of
from connectors.errors import BenchFailed
from connectors.params import new_transfer_id
from connectors.ucx_environment import tune
from kvindex.figures import Figure

STEP_TOKENS = 224
NUM_STEPS = 16
"""Of a prompt: so many times its KV leaves."""
ROUNDS = 15
NUM_ANSWERS = 4
NUM_PREFILLS = 10
"""That arrive one behind the other while answers run."""

_WIRE = re.compile(r"kvlane_transfer_wire_(bytes|seconds)_total{.*} ([-+.e\d]+)")

Ask = Callable[[list[int], int], AsyncIterator[float]]
"""Yields the moment of every piece of an answer, of so many tokens, to a prompt."""


@dataclass(frozen=True, slots=True)
class KvlaneEngine(Engine):
    """One of `kvlane serve`."""

    transfer_port: int
    metrics_port: int

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
        console.print("starting four engines")
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        arguments = [
            *("--max-model-len", "4096", "--max-num-batched-tokens", str(STEP_TOKENS)),
            *(ONE_PROCESS if device == "cpu" else ()),
            *shlex.split(engine_args),
        ]
        tune()
        environment = {**(ONE_CORE_EACH if device == "cpu" else {}), **os.environ, "UCX_TLS": link}
        theirs = stack.enter_context(nixl_pair(model, device, arguments, environment, logs))
        prefill, decode = together(
            stack,
            [
                _engine(model, arguments, {**environment, **gpu_of(device, index)}, logs / name)
                for index, name in enumerate(("prefill", "decode"))
            ],
        )
        return asyncio.run(_measure(prefill, decode, theirs, console))


async def _measure(
    prefill: KvlaneEngine, decode: KvlaneEngine, theirs: NixlPair, console: Console
) -> list[Figure]:
    draw = random.Random(1)  # noqa: S311 - prompts

    def prompt() -> list[int]:
        return [draw.randrange(100, 1_000) for _ in range(NUM_STEPS * STEP_TOKENS)]

    async def split(tokens: list[int], max_tokens: int) -> AsyncIterator[float]:
        computing, params = _send(prefill, tokens)
        await asyncio.sleep(0)  # so that it is on its way first
        async for moment in decode.ask(tokens, max_tokens, params):
            yield moment
        await computing

    async def in_sequence(tokens: list[int], max_tokens: int) -> AsyncIterator[float]:
        computing, params = _send(prefill, tokens)
        await computing
        async for moment in decode.ask(tokens, max_tokens, params):
            yield moment

    ways: dict[str, Ask] = {
        "alone": prefill.ask,  # which computes in every case: two engines are never equally fast
        "split": split,
        "sequential": in_sequence,
        "nixl_connector": theirs.ask,
    }
    ttft_ms: dict[str, list[float]] = {name: [] for name in (*ways, "cached")}
    for number in range(ROUNDS + 1):
        console.print(f"time to first token, round {number} of {ROUNDS}")
        if number == 1:
            before = await decode.wire()
        for name, ask in ways.items():
            tokens = prompt()
            ttft_ms[name].append(await _ttft_ms(ask, tokens))
            if name == "split":
                ttft_ms["cached"].append(await _ttft_ms(decode.ask, tokens))
    bytes_and_s = [now - then for now, then in zip(await decode.wire(), before, strict=True)]
    if not bytes_and_s[0]:
        raise BenchFailed("nothing was transferred; the engines' logs say why")
    if theirs.num_loaded_tokens() < ROUNDS * (NUM_STEPS - 1) * STEP_TOKENS:
        raise BenchFailed("NixlConnector did not transfer the prompts' KV")
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
        ttft_ms: times to first token, by rounds: on the prefill worker `alone`, `split`, and split
            `sequential`ly, where the decode worker is asked when the prefill is done, as it is for vLLM's
            `nixl_connector`. And of prompts that are `cached` by the decode worker, which no split can do
            without.
        last_ms: what the last chunk takes to move, which no split can save.
        gaps_ms: times between tokens: `undisturbed`, and while prompts are computed `alone` or `split`.
    """
    medians = {name: statistics.median(measured) for name, measured in ttft_ms.items()}
    extra_ms = {
        # Within a round, as the machine is not equally fast all the time.
        name: statistics.median(map(sub, measured, ttft_ms["alone"])) - last_ms
        for name, measured in ttft_ms.items()
    }
    p99_ms = {name: statistics.quantiles(gaps, n=100)[98] for name, gaps in gaps_ms.items()}
    beside = ("vLLM's NixlConnector", medians["nixl_connector"])
    return [
        Figure("transport.ttft_ms_alone", medians["alone"], "ms"),
        *(
            Figure(f"transport.ttft_ms_{name}", medians[name], "ms", None, *beside)
            for name in ("split", "sequential")
        ),
        Figure("transport.ttft_ms_nixl_connector", medians["nixl_connector"], "ms"),
        Figure("transport.ttft_ms_cached", medians["cached"], "ms"),
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


def _send(prefill: KvlaneEngine, tokens: list[int]) -> tuple[asyncio.Task[float], dict[str, Any]]:
    """Begin the prefill half; return it and what the decode half is told."""
    transfer_id = new_transfer_id()
    half = prefill.ask(tokens, 1, {"kvlane": {"transfer_id": transfer_id, "role": "send"}})
    peer = f"127.0.0.1:{prefill.transfer_port}"
    return (
        asyncio.create_task(_last(half)),
        {"kvlane": {"transfer_id": transfer_id, "role": "receive", "peer": peer}},
    )


async def _last(moments: AsyncIterator[float]) -> float:
    moment = 0.0
    async for each in moments:
        moment = each
    return moment


async def _ttft_ms(ask: Ask, tokens: list[int]) -> float:
    started = time.perf_counter()
    # Of one token: the first of several may come in one piece with the second.
    return (await _last(ask(tokens, 1)) - started) * 1e3


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
    model: Path, arguments: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[KvlaneEngine]:
    port, transfer_port, metrics_port = free_ports(3)
    settings = {
        "kvlane.transfer_port": transfer_port,
        "kvlane.transfer_metrics_port": metrics_port,
        "kvlane.transport": "ucx",
    }
    transfer = json.dumps({"kv_connector_extra_config": settings})
    arguments = [*arguments, "--kv-transfer-config", transfer]
    with serving(KVLANE, model, port, arguments, environment=environment, log=log):
        yield KvlaneEngine(port, transfer_port, metrics_port)
