"""`kvlane bench transport`: what moving KV costs, from one process's cache into another's.

Measured from end to end (gather, wire, scatter) with the blocks in random places. Beside it, on the same link
and in the same run: memcpy; the best that UCXX moves of one contiguous buffer; and the same blocks moved by
vLLM's own NixlConnector. Each shows first that what it moves arrives.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pkgutil import resolve_name
from typing import Any, NoReturn

import torch
from rich.console import Console

from connectors.bench.ends import BLOCK_BYTES, End
from connectors.errors import BenchFailed
from kvindex.errors import ConfigError, KvlaneError
from kvindex.figures import Figure

SIZES_BLOCKS = (4, 16, 64, 256, 1024, 4096)
LARGE_BYTES = 64 << 20
"""From here on a transfer is limited by bandwidth."""
ROUNDS = 7
MEMCPY = "memcpy"
STAGED_OVER_RAW = {"cpu": ">= 0.6", "cuda": ">= 0.8"}
PATIENCE_S = 300.0

ENDS = {
    "staged": "connectors.bench.ends:StagedEnd",
    "raw_ucxx": "connectors.bench.ends:RawUcxEnd",
    "raw_ucxx_parts": "connectors.bench.ends:RawPartsEnd",
    "nixl_connector": "vllm_plugin.nixl_end:NixlConnectorEnd",
}
"""What each process makes of a device and a number of blocks, an `End`. By name: vLLM is vllm_plugin's."""


def run(device: str, link: str, max_blocks: int, console: Console) -> list[Figure]:
    """Measure and return the figures.

    Args:
        device: `cpu` or `cuda`.
        link: UCX_TLS.
        max_blocks: the largest transfer.
        console: for progress.

    Raises:
        ConfigError: there is no such device, or no vLLM.
        BenchFailed: an end fails, or moves something else.
    """
    check_device(device)
    if find_spec("vllm") is None:
        raise ConfigError(
            "vLLM, whose NixlConnector is measured too, is not installed here: pip install vllm"
        )
    sizes = [size for size in SIZES_BLOCKS if size <= max_blocks]
    rates: dict[str, dict[int, float]] = {MEMCPY: {}, **{name: {} for name in ENDS}}
    with ExitStack() as stack:
        pairs = {
            name: stack.enter_context(closing(Pair(end, device, link, sizes[-1])))
            for name, end in ENDS.items()
        }
        for size in sizes:
            console.print(f"{size} blocks over {link}")
            times: dict[str, list[float]] = {name: [] for name in rates}
            for _ in range(ROUNDS + 1):
                times[MEMCPY].append(memcpy_s(device, size * BLOCK_BYTES))
                for name, pair in pairs.items():
                    times[name].append(pair.move_s(size))
            for name, measured in times.items():
                rates[name][size] = size * BLOCK_BYTES / statistics.median(measured[1:]) / 1e9
    return figures(rates, STAGED_OVER_RAW[device])


def figures(rates: Mapping[str, Mapping[int, float]], target: str) -> list[Figure]:
    """Return what was found.

    Args:
        rates: in GB/s, by what moved so many blocks, and by their number.
        target: for what of raw UCXX's best is left.
    """
    memcpy, staged, whole, parts, connector = (rates[name] for name in (MEMCPY, *ENDS))
    sizes = list(staged)
    raw = {size: max(whole[size], parts[size]) for size in sizes}
    found = []
    for size in sizes:
        label = f"{size}_blocks"
        found += [
            Figure(f"transport.memcpy_gb_s_{label}", memcpy[size], "GB/s"),
            Figure(f"transport.raw_ucxx_gb_s_{label}", raw[size], "GB/s", None, "memcpy", memcpy[size]),
            Figure(f"transport.staged_gb_s_{label}", staged[size], "GB/s", None, "raw UCXX", raw[size]),
            Figure(
                f"transport.nixl_connector_gb_s_{label}",
                connector[size],
                "GB/s",
                None,
                "staged",
                staged[size],
            ),
        ]
    large = [size for size in sizes if size * BLOCK_BYTES >= LARGE_BYTES]
    if large:
        worst = min(staged[size] for size in large)
        best = max(raw.values())
        found.append(
            Figure("transport.staged_over_raw_ucx", worst / best, "", target, "best raw UCXX, GB/s", best)
        )
    compared = [size for size in sizes if size >= 64]
    if compared:
        size = min(compared, key=lambda size: staged[size] / connector[size])
        found.append(
            Figure(
                "transport.min_over_nixl_connector",
                staged[size] / connector[size],
                "",
                ">= 1.0",
                f"NixlConnector with {size} blocks, GB/s",
                connector[size],
            )
        )
    return found


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


class Pair:
    """Two processes, one sends to the other. Between transfers both are stopped: NIXL's would spin.

    Args:
        end: `module:class` of an `End`.
        device: `cpu` or `cuda`.
        link: UCX_TLS.
        max_blocks: the largest transfer.

    Raises:
        BenchFailed: an end does not start.
    """

    def __init__(self, end: str, device: str, link: str, max_blocks: int) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = zip(context.Pipe(), context.Pipe(), strict=True)
        self._sender, self._receiver = ours
        what = (end, device, max_blocks)
        self._processes = [
            context.Process(
                target=_end, args=(what, role, {"UCX_TLS": link, **gpu_of(device, index)}, pipe), daemon=True
            )
            for index, (role, pipe) in enumerate(zip(("send", "receive"), theirs, strict=True))
        ]
        for process, pipe in zip(self._processes, theirs, strict=True):
            process.start()
            pipe.close()  # so that the end of a process is the pipe's
        addresses = self._hear(self._sender), self._hear(self._receiver)
        self._sender.send(addresses[1])
        self._receiver.send(addresses[0])
        self._hear(self._sender)
        self._hear(self._receiver)
        self._signal(signal.SIGSTOP)

    def move_s(self, size: int) -> float:
        """Move so many blocks once; return the seconds that it took the receiver.

        Raises:
            BenchFailed: an end fails, or moves something else.
        """
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
        for process in self._processes:
            process.kill()
            process.join()

    def _signal(self, what: signal.Signals) -> None:
        for process in self._processes:
            if process.pid is not None:
                os.kill(process.pid, what)

    def _hear(self, pipe: Connection) -> Any:  # noqa: ANN401 - what the ends say differs
        deadline = time.monotonic() + PATIENCE_S
        try:
            while not pipe.poll(0.5):
                are_alive = all(process.is_alive() for process in self._processes)
                if not are_alive or time.monotonic() > deadline:
                    raise BenchFailed("a measuring process ended or hangs; its output says why")
            told = pipe.recv()
        except EOFError as error:
            raise BenchFailed("a measuring process ended; its output says why") from error
        if isinstance(told, KvlaneError):
            raise told
        return told


def _end(what: tuple[str, str, int], role: str, environment: dict[str, str], pipe: Connection) -> None:
    """One of the two processes."""
    name, device, max_blocks = what
    os.environ.update(environment)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        end: End = resolve_name(name)(device, max_blocks)
        pipe.send(end.address())
        end.connect(pipe.recv())
        pipe.send(None)
        if role == "send":
            _send(end, pipe)
        else:
            _receive(end, pipe)
    except KvlaneError as error:
        pipe.send(error)


def _send(end: End, pipe: Connection) -> NoReturn:
    for index, layer in enumerate(end.layers):
        marks = _marks(index, layer)
        layer.copy_(marks.view(-1, *(1 for _ in layer.shape[1:])))
    _synchronize(end.layers[0].device.type)
    while True:
        size = pipe.recv()
        pipe.send(end.begin(size))
        pipe.recv()
        end.finish()
        pipe.send(None)


def _receive(end: End, pipe: Connection) -> NoReturn:
    shown: set[int] = set()
    while True:
        size, ticket = pipe.recv()
        if is_new := size not in shown:
            shown.add(size)
            _clear(end)
        started = time.perf_counter()
        end.fetch(size, ticket)
        taken = time.perf_counter() - started
        if is_new:
            _check(end, size)
        pipe.send(taken)


def _clear(end: End) -> None:
    for layer in end.layers:
        layer.zero_()
        _synchronize(layer.device.type)


def _check(end: End, size: int) -> None:
    """Raise unless those blocks, and no others, are the sender's."""
    blocks = end.blocks(size)
    for index, layer in enumerate(end.layers):
        marks = _marks(index, layer)
        expected = torch.zeros_like(marks)
        expected[blocks] = marks[blocks]
        flat = layer.flatten(1)
        if not (torch.equal(flat.amin(1), expected) and torch.equal(flat.amax(1), expected)):
            raise BenchFailed(f"of {size} blocks others were moved than those asked for")


def _marks(index: int, layer: torch.Tensor) -> torch.Tensor:
    """Return what the sender's blocks of a layer are full of: neighbours, and layers, differ."""
    return ((torch.arange(len(layer), device=layer.device) * 7 + index * 31) % 250 + 1).to(layer.dtype)
