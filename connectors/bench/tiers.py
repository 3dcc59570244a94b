"""`kvlane bench tiers`: what storing KV in the tiers of a node and loading it from them costs.

Measured from an engine's cache through LMCache's server and back, as an engine's connector does it. Beside
it, in the same run and with the same bytes: memcpy; plain files of a chunk each; plain PUT and GET of awscrt.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
from rich.console import Console

from connectors.bench.ports import adjacent_ports
from connectors.bench.tier_engine import CHUNK_BYTES, TierEngine
from connectors.bench.transport import check_device, memcpy_s
from connectors.errors import BenchFailed
from connectors.tiers.node import server_command
from connectors.tiers.s3_location import S3Location
from connectors.tiers.spec import Bucket, Disk, Tiers
from kvindex.figures import Figure

ROUNDS = 5
_PATIENCE_S = 120.0
_CPU_BYTES = 1 << 30


def run(
    directory: Path | None, bucket: S3Location | None, num_chunks: int, device: str, console: Console
) -> list[Figure]:
    """Measure and return the figures.

    Args:
        directory: where the disk tier's files go for the time; None: a temporary directory.
        bucket: where S3 is; None: S3 is not measured.
        num_chunks: of one transfer, 8 MiB each.
        device: where the engine's cache is, `cpu` or `cuda`.
        console: for progress.

    Raises:
        ConfigError: there is no such device.
        BenchFailed: LMCache's server did not come up, or lost what it was given.
    """
    check_device(device)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        folder = Path(scratch)
        base = Tiers(cpu_bytes=_CPU_BYTES, port=adjacent_ports(2))
        console.print(f"CPU memory, {num_chunks} chunks")
        figures += _cpu(base, num_chunks, device)
        console.print("disk")
        figures += _disk(replace(base, disk=Disk(folder / "tier", 0)), folder / "plain", num_chunks, device)
        if bucket is not None:
            console.print(bucket.url)
            figures += _s3(replace(base, s3=Bucket(bucket, 0)), bucket, num_chunks, device)
    return figures


def _cpu(tiers: Tiers, num_chunks: int, device: str) -> list[Figure]:
    with _engine(tiers, num_chunks, device) as engine:
        store = _rate(num_chunks, lambda: _store(engine, num_chunks))
        load = _rate(num_chunks, lambda: engine.load(num_chunks))
        one_store = _median(lambda: _store(engine, 1))
        one_load = _median(lambda: engine.load(1))
    copy = _rate(num_chunks, lambda: memcpy_s(device, num_chunks * CHUNK_BYTES, to_host=True))
    return [
        Figure("tiers.memcpy_gb_s", copy, "GB/s"),
        Figure("tiers.cpu_store_gb_s", store, "GB/s", None, "memcpy", copy),
        Figure("tiers.cpu_load_gb_s", load, "GB/s", None, "memcpy", copy),
        Figure("tiers.cpu_store_chunk_ms", one_store * 1000, "ms"),
        Figure("tiers.cpu_load_chunk_ms", one_load * 1000, "ms"),
        Figure("tiers.cpu_over_memcpy", min(store, load) / copy, "", ">= 0.5", "memcpy, GB/s", copy),
    ]


def _disk(tiers: Tiers, plain: Path, num_chunks: int, device: str) -> list[Figure]:
    plain.mkdir()
    with _engine(tiers, num_chunks, device) as engine:
        chunks = [memoryview(bytearray(os.urandom(CHUNK_BYTES))) for _ in range(num_chunks)]
        write = _rate(num_chunks, lambda: _write_files(plain, chunks))
        read = _rate(num_chunks, lambda: _read_files(plain, chunks))
        measured = _second_level(engine, num_chunks)
    return [
        Figure("tiers.file_write_gb_s", write, "GB/s"),
        Figure("tiers.file_read_gb_s", read, "GB/s"),
        *_level_figures("disk", "file", "plain file", measured, (write, read)),
    ]


def _s3(tiers: Tiers, bucket: S3Location, num_chunks: int, device: str) -> list[Figure]:
    from connectors.bench.plain_s3 import PlainS3

    client = PlainS3(bucket)
    contents = [os.urandom(CHUNK_BYTES) for _ in range(num_chunks)]
    with _engine(tiers, num_chunks, device) as engine:
        put = _rate(num_chunks, lambda: client.put(contents))
        get = _rate(num_chunks, lambda: client.get(num_chunks, CHUNK_BYTES))
        measured = _second_level(engine, num_chunks)
    client.clear(num_chunks)
    return [
        Figure("tiers.client_put_gb_s", put, "GB/s"),
        Figure("tiers.client_get_gb_s", get, "GB/s"),
        *_level_figures("s3", "client", "plain client", measured, (put, get)),
    ]


def _level_figures(
    tier: str, medium: str, beside: str, measured: tuple[float, float, float], plain: tuple[float, float]
) -> list[Figure]:
    """Return what `_second_level` measured, beside the rates of the plain medium, in and out."""
    store, load, one = measured
    put, get = plain
    worst, rate = min((store / put, put), (load / get, get))
    return [
        Figure(f"tiers.{tier}_store_gb_s", store, "GB/s", None, beside, put),
        Figure(f"tiers.{tier}_load_gb_s", load, "GB/s", None, beside, get),
        Figure(f"tiers.{tier}_load_chunk_ms", one * 1000, "ms"),
        Figure(f"tiers.{tier}_over_{medium}", worst, "", ">= 0.7", f"{beside}, GB/s", rate),
    ]


def _store(engine: TierEngine, num_chunks: int) -> float:
    """Store chunks in memory that was used before, as a server's is when it has been full once."""
    engine.clear_memory()
    return engine.store(num_chunks)


def _second_level(engine: TierEngine, num_chunks: int) -> tuple[float, float, float]:
    """Return what is behind CPU memory: rates of store and load, and the seconds to load one chunk."""

    def store() -> float:
        stored_s = _store(engine, num_chunks)
        started = time.perf_counter()
        engine.settle()
        return stored_s + time.perf_counter() - started

    def load(size: int) -> float:
        engine.clear_memory()
        return engine.load(size)

    stored = _rate(num_chunks, store)
    engine.store(1)
    engine.settle()
    return stored, _rate(num_chunks, lambda: load(num_chunks)), _median(lambda: load(1))


@contextmanager
def _engine(tiers: Tiers, num_chunks: int, device: str) -> Iterator[TierEngine]:
    command = server_command(tiers, None, ())
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.NamedTemporaryFile(prefix="kvlane-bench-", suffix=".log"))
        environment = {"LMCACHE_TRACK_USAGE": "false", **os.environ}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)  # noqa: S603 - our own
        stack.callback(server.wait)
        stack.callback(server.terminate)
        api = f"http://127.0.0.1:{tiers.port + 1}"
        deadline_s = time.monotonic() + _PATIENCE_S
        while not _is_up(api):
            if server.poll() is not None or time.monotonic() > deadline_s:
                raise BenchFailed(f"LMCache's server did not come up: {Path(log.name).read_text()[-500:]}")
            time.sleep(0.2)
        engine = TierEngine(tiers.address, api, num_chunks, device)
        stack.callback(engine.close)
        yield engine


def _is_up(api: str) -> bool:
    try:
        return httpx.get(f"{api}/healthcheck", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _rate(num_chunks: int, measure: Callable[[], float]) -> float:
    return num_chunks * CHUNK_BYTES / _median(measure) / 1e9


def _median(measure: Callable[[], float]) -> float:
    """Return the median of several rounds; the first warms up."""
    measure()
    return statistics.median(measure() for _ in range(ROUNDS))


def _write_files(folder: Path, chunks: Sequence[memoryview]) -> float:
    started = time.perf_counter()
    for index, chunk in enumerate(chunks):
        scratch = folder / f"{index}.tmp"
        with scratch.open("wb", buffering=0) as file:
            file.write(chunk)
        scratch.replace(folder / str(index))
    return time.perf_counter() - started


def _read_files(folder: Path, chunks: Sequence[memoryview]) -> float:
    """Read each into memory of its own: all of it in one chunk's would stay in the processor's cache."""
    started = time.perf_counter()
    for index, chunk in enumerate(chunks):
        with (folder / str(index)).open("rb", buffering=0) as file:
            file.readinto(chunk)
    return time.perf_counter() - started
