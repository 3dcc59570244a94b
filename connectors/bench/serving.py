"""Engines of a bench: started, asked, ended."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from connectors.errors import BenchFailed

T = TypeVar("T")

START_TIMEOUT_S = 600.0
NAME = "measured"

KVLANE = ("vllm_plugin.serve",)
VLLM = ("vllm.entrypoints.cli.main", "serve")
"""Modules that serve a model, and what they are told first."""

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


_CONTEXT = ssl.create_default_context()
"""No engine here speaks TLS, but a client without this makes one, which takes as long as a short prompt."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A running engine."""

    port: int

    async def ask(
        self, tokens: list[int], max_tokens: int, transfer: dict[str, Any] | None = None
    ) -> AsyncIterator[float]:
        """Yield the moment of every piece of an answer.

        Args:
            transfer: the request's `kv_transfer_params`.

        Raises:
            BenchFailed: the engine gives the answer up.
        """
        body = {**_body(tokens, max_tokens, transfer), "stream": True}
        async with (
            _client() as client,
            client.stream("POST", self.url, json=body) as answer,
        ):
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith('data: {"error"'):
                    raise BenchFailed(f"an engine gave up: {line}")
                if line.startswith("data: {"):
                    yield time.perf_counter()

    async def prefill(self, tokens: list[int], transfer: dict[str, Any]) -> dict[str, Any]:
        """Compute a prompt; return the `kv_transfer_params` of the answer."""
        async with _client() as client:
            answer = await client.post(self.url, json=_body(tokens, 1, transfer))
        told: dict[str, Any] = answer.raise_for_status().json()["kv_transfer_params"]
        return told

    @property
    def url(self) -> str:
        """Where completions are asked for."""
        return f"http://127.0.0.1:{self.port}/v1/completions"


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=None, verify=_CONTEXT)  # noqa: S113 - answers take as long as they take


def _body(tokens: list[int], max_tokens: int, transfer: dict[str, Any] | None) -> dict[str, Any]:
    body = {"model": NAME, "prompt": tokens, "max_tokens": max_tokens, "ignore_eos": True}
    return {**body, "kv_transfer_params": transfer} if transfer else body


@contextmanager
def serving(
    program: Sequence[str],
    model: Path,
    port: int,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
) -> Iterator[int]:
    """Run an engine as `NAME` on 127.0.0.1:`port` until the block ends; ready when entered.

    Args:
        program: `KVLANE` or `VLLM`. By module: a host that only measures needs our packages on its path, and
            nothing installed.
        model: its directory.
        port: of its OpenAI server.
        arguments: more of them.
        environment: all of it.
        log: where its output goes.

    Yields:
        Its process group.

    Raises:
        BenchFailed: it does not start; its last words are quoted.
    """
    command = [
        *(sys.executable, "-m", *program, str(model), "--served-model-name", NAME),
        *("--host", "127.0.0.1", "--port", str(port), *arguments),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_healthy(process, port, log)
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def together(stack: ExitStack, engines: Sequence[AbstractContextManager[T]]) -> list[T]:
    """Start engines at the same time; they end with the stack."""
    with ThreadPoolExecutor(len(engines)) as starting:
        return list(starting.map(stack.enter_context, engines))


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", verify=_CONTEXT).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-100:])
    raise BenchFailed(f"an engine does not start:\n{tail}")
