"""`kvlane bench transport`: what moving KV costs, from one process's cache into another's.

Measured from end to end (gather, wire, scatter) with the blocks in random places. Beside it, on the same link
and in the same run: memcpy; the best that UCXX moves of one contiguous buffer; and the same blocks as NIXL
descriptor lists, which is how vLLM's NixlConnector moves them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.console import Console

from connectors.bench.ends import BLOCK_BYTES, NixlEnd, RawUcxEnd, StagedEnd
from connectors.errors import BenchFailed
from kvindex.errors import ConfigError
from kvindex.figures import Figure

SIZES_BLOCKS = (4, 16, 64, 256, 1024, 4096)
LARGE_BYTES = 64 << 20
"""From here on a transfer is limited by bandwidth."""
ROUNDS = 7
MEMCPY = "memcpy"
STAGED_OVER_RAW = {"cpu": ">= 0.6", "cuda": ">= 0.8"}
PATIENCE_S = 120.0

ENDS: dict[str, Callable[[str, int], Any]] = {
    "staged": StagedEnd,
    "raw_ucxx": RawUcxEnd,
    "nixl_lists": NixlEnd,
}


def run(device: str, link: str, max_blocks: int, console: Console) -> list[Figure]:
    """Measure and return the figures.

    Args:
        device: `cpu` or `cuda`.
        link: UCX_TLS.
        max_blocks: the largest transfer.
        console: for progress.

    Raises:
        ConfigError: there is no such device.
    """
    check_device(device)
    sizes = [size for size in SIZES_BLOCKS if size <= max_blocks]
    rates: dict[str, dict[int, float]] = {MEMCPY: {}, **{name: {} for name in ENDS}}
    with ExitStack() as stack:
        pairs = {name: stack.enter_context(closing(_Pair(name, device, link, sizes[-1]))) for name in ENDS}
        for size in sizes:
            console.print(f"{size} blocks over {link}")
            times: dict[str, list[float]] = {name: [] for name in rates}
            for _ in range(ROUNDS + 1):
                times[MEMCPY].append(memcpy_s(device, size * BLOCK_BYTES))
                for name, pair in pairs.items():
                    times[name].append(pair.move_s(size))
            for name, measured in times.items():
                rates[name][size] = size * BLOCK_BYTES / statistics.median(measured[1:]) / 1e9
    return _figures(sizes, rates, STAGED_OVER_RAW[device])


def _figures(sizes: list[int], rates: dict[str, dict[int, float]], target: str) -> list[Figure]:
    memcpy, staged, raw, lists = (rates[name] for name in (MEMCPY, "staged", "raw_ucxx", "nixl_lists"))
    figures = []
    for size in sizes:
        label = f"{size}_blocks"
        figures += [
            Figure(f"transport.memcpy_gb_s_{label}", memcpy[size], "GB/s"),
            Figure(f"transport.raw_ucxx_gb_s_{label}", raw[size], "GB/s", None, "memcpy", memcpy[size]),
            Figure(f"transport.staged_gb_s_{label}", staged[size], "GB/s", None, "raw UCXX", raw[size]),
            Figure(f"transport.nixl_lists_gb_s_{label}", lists[size], "GB/s", None, "staged", staged[size]),
        ]
    large = [size for size in sizes if size * BLOCK_BYTES >= LARGE_BYTES]
    if large:
        worst = min(staged[size] for size in large)
        best = max(raw.values())
        figures.append(
            Figure("transport.staged_over_raw_ucx", worst / best, "", target, "best raw UCXX, GB/s", best)
        )
    compared = [size for size in sizes if size >= 64]
    if compared:
        size = min(compared, key=lambda size: staged[size] / lists[size])
        figures.append(
            Figure(
                "transport.min_over_nixl_connector",
                staged[size] / lists[size],
                "",
                ">= 1.0",
                f"NIXL lists of {size} blocks, GB/s",
                lists[size],
            )
        )
    return figures


def check_device(device: str) -> None:
    """Raise ConfigError where this machine has no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch finds no GPU here: use --device cpu")


def memcpy_s(device: str, num_bytes: int, *, to_host: bool = False) -> float:
    """Return the seconds that one thread needs to copy so many bytes, from a GPU to pinned memory if so."""
    torch.set_num_threads(1)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    if to_host and device == "cuda":
        target = target.cpu().pin_memory()
    _synchronize(device)
    started = time.perf_counter()
    target.copy_(source)
    _synchronize(device)
    return time.perf_counter() - started


def gpu_of(device: str, index: int) -> dict[str, str]:
    """Return the environment in which a process has a GPU of its own, if there are as many.

    Args:
        device: `cpu` or `cuda`.
        index: of the process: 0 or 1.
    """
    if device == "cpu":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(each) for each in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": gpus[min(index, len(gpus) - 1)]}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class _Pair:
    """Two processes, one sends to the other. Between transfers both are stopped: NIXL's would spin."""

    def __init__(self, name: str, device: str, link: str, max_blocks: int) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = zip(context.Pipe(), context.Pipe(), strict=True)
        self._sender, self._receiver = ours
        what = (name, device, max_blocks)
        self._ends = [
            context.Process(
                target=_end, args=(what, role, {"UCX_TLS": link, **gpu_of(device, index)}, pipe), daemon=True
            )
            for index, (role, pipe) in enumerate(zip(("send", "receive"), theirs, strict=True))
        ]
        for end in self._ends:
            end.start()
        addresses = self._hear(self._sender), self._hear(self._receiver)
        self._sender.send(addresses[1])
        self._receiver.send(addresses[0])
        self._hear(self._sender)
        self._hear(self._receiver)
        self._signal(signal.SIGSTOP)

    def move_s(self, size: int) -> float:
        """Move so many blocks once; return the seconds that it took the receiver."""
        self._signal(signal.SIGCONT)
        self._sender.send(size)
        self._receiver.send((size, self._hear(self._sender)))
        taken: float = self._hear(self._receiver)
        self._sender.send(None)
        self._hear(self._sender)
        self._signal(signal.SIGSTOP)
        return taken

    def close(self) -> None:
        """End both."""
        for end in self._ends:
            end.kill()
            end.join()

    def _signal(self, what: signal.Signals) -> None:
        for end in self._ends:
            if end.pid is not None:
                os.kill(end.pid, what)

    def _hear(self, pipe: Connection) -> Any:  # noqa: ANN401 - what the ends say differs
        deadline = time.monotonic() + PATIENCE_S
        while not pipe.poll(0.5):
            if not all(end.is_alive() for end in self._ends) or time.monotonic() > deadline:
                raise BenchFailed("a measuring process ended or hangs; its output says why")
        return pipe.recv()


def _end(what: tuple[str, str, int], role: str, environment: dict[str, str], pipe: Connection) -> None:
    """One of the two processes."""
    name, device, max_blocks = what
    os.environ.update(environment)
    end = ENDS[name](device, max_blocks)
    pipe.send(end.address())
    end.connect(pipe.recv())
    pipe.send(None)
    while True:
        if role == "send":
            size = pipe.recv()
            pipe.send(end.begin(size))
            pipe.recv()
            end.finish()
            pipe.send(None)
        else:
            size, ticket = pipe.recv()
            started = time.perf_counter()
            end.fetch(size, ticket)
            pipe.send(time.perf_counter() - started)
