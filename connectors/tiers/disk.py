"""The disk tier: LMCache's `fs` adapter with sealed files, a limit, and a switch. Runs in LMCache's server.

Files are named as LMCache names them and end in a seal (`connectors.tiers.seal`).

Source: LMCache 0.5.6 `lmcache/v1/distributed/l2_adapters/fs_l2_adapter.py`.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any

import structlog
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import (
    FSL2Adapter,
    FSL2AdapterConfig,
    _filename_to_object_key,
)

from connectors.tiers import metrics
from connectors.tiers.meter import PROBE_INTERVAL_S, LoadMeter, Scratch
from connectors.tiers.seal import SEAL_BYTES, is_sealed, seal
from connectors.tiers.switch import Switch

_log = structlog.get_logger(__name__)


TYPE = "kvlane_disk"
"""What LMCache calls it, in settings and events."""

_PROBED_AMONG = 1000
"""Files that a probe looks at to choose from: a directory may have millions."""


class DiskTierConfig(FSL2AdapterConfig):
    """Its `--l2-adapter`."""

    max_bytes: int = 0
    num_threads: int = 4
    pause_s: float = 10.0
    probe_interval_s: float = PROBE_INTERVAL_S

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> DiskTierConfig:
        """Read `base_path`, `max_bytes` (0: no limit), `num_threads`, `pause_s` and `probe_interval_s`."""
        config = cls(given["base_path"])
        for name in ("max_bytes", "num_threads", "pause_s", "probe_interval_s"):
            setattr(config, name, given.get(name, getattr(cls, name)))
        return config


class DiskTier(FSL2Adapter):
    """Chunks as files of one directory."""

    def __init__(self, config: DiskTierConfig) -> None:
        super().__init__(config)
        self._max_capacity_bytes = config.max_bytes
        self._switch = Switch("disk", str(config.base_path), config.pause_s)
        self._pool = ThreadPoolExecutor(config.num_threads, thread_name_prefix="disk-tier")
        self._meter = LoadMeter("disk", self._probe, config.probe_interval_s)
        self._is_counted = False

    def report_status(self) -> dict[str, Any]:
        """Return what the server's `/status` shows of it."""
        return {**super().report_status(), "load": self._meter.status()}

    def register_listener(self, listener: Any) -> None:  # noqa: ANN401 - LMCache's
        """Tell the listener, which evicts, of the files that are there already."""
        super().register_listener(listener)
        if not self._is_counted:
            self._is_counted = True
            threading.Thread(target=self._count_files, name="disk-tier-count", daemon=True).start()
            self._meter.start()

    def close(self) -> None:
        """Let what is under way end."""
        self._meter.stop()
        super().close()
        self._pool.shutdown()

    def _count_files(self) -> None:
        """Count what an earlier server has left, the oldest first, as they will be evicted."""
        found = []
        for entry in os.scandir(self._base_path):
            if (key := _filename_to_object_key(entry.name)) is not None:
                status = entry.stat()
                found.append((status.st_mtime, key, status.st_size))
        found.sort(key=lambda each: each[0])
        if found:
            self._notify_keys_stored([key for _, key, _ in found], [size for _, _, size in found])

    async def _execute_store(self, keys: list[Any], objects: list[Any], task_id: int) -> None:
        run = asyncio.get_running_loop().run_in_executor
        sizes = await asyncio.gather(
            *(run(self._pool, self._write, key, each) for key, each in zip(keys, objects, strict=True))
        )
        stored = [(key, size) for key, size in zip(keys, sizes, strict=True) if size]
        if stored:
            self._notify_keys_stored([key for key, _ in stored], [size for _, size in stored])
        with self._lock:
            self._completed_store_tasks[task_id] = L2StoreResult(None not in sizes, sum(filter(None, sizes)))
        self._store_efd.notify()

    async def _execute_load(self, keys: list[Any], objects: list[Any], task_id: int) -> None:
        outcomes = await self._load(keys, objects)
        loaded = Bitmap(len(keys))
        for index, is_loaded in enumerate(outcomes):
            if is_loaded:
                loaded.set(index)
        accessed = [key for key, is_loaded in zip(keys, outcomes, strict=True) if is_loaded]
        if accessed:
            self._notify_keys_accessed(accessed)
        with self._lock:
            self._completed_load_tasks[task_id] = loaded
        self._load_efd.notify()

    async def _load(self, keys: list[Any], objects: list[Any]) -> list[bool]:
        """Load objects; return which of them are loaded."""
        run = asyncio.get_running_loop().run_in_executor
        began_at_s = time.perf_counter()
        outcomes = await asyncio.gather(
            *(run(self._pool, self._read, key, each) for key, each in zip(keys, objects, strict=True))
        )
        num_bytes = sum(
            len(each.byte_array) for each, (is_loaded, _) in zip(objects, outcomes, strict=True) if is_loaded
        )
        self._meter.observe(num_bytes, time.perf_counter() - began_at_s)
        dropped = [(key, size) for key, (_, size) in zip(keys, outcomes, strict=True) if size is not None]
        if dropped:
            self._notify_keys_deleted([key for key, _ in dropped], [size for _, size in dropped])
        return [is_loaded for is_loaded, _ in outcomes]

    def _probe(self, num_objects: int) -> None:
        try:
            with os.scandir(self._base_path) as entries:
                found = [
                    (key, entry.stat().st_size)
                    for entry in islice(entries, _PROBED_AMONG)
                    if (key := _filename_to_object_key(entry.name)) is not None
                ]
        except FileNotFoundError:
            return  # one was evicted meanwhile
        except OSError as error:
            self._switch.failed(str(error))
            return
        chosen = random.sample(found, min(num_objects, len(found)))
        scratch = [Scratch(max(0, size - SEAL_BYTES)) for _, size in chosen]
        loading = self._load([key for key, _ in chosen], scratch)
        asyncio.run_coroutine_threadsafe(loading, self._loop).result()

    def _write(self, key: Any, memory: Any) -> int | None:  # noqa: ANN401 - LMCache's
        """Store one object; return the bytes written, 0 if it is there already, None if it is not."""
        path, scratch = self._key_to_file_and_tmp_path(key)
        if path.exists():
            return 0
        if self._switch.is_off:
            return None
        content = memory.byte_array
        parts = [memoryview(content).cast("B"), memoryview(seal(path.name, content))]
        try:
            with scratch.open("wb", buffering=0) as file:
                _whole(os.writev, file.fileno(), parts)
            scratch.replace(path)
        except OSError as error:
            with suppress(OSError):
                scratch.unlink()
            self._switch.failed(str(error))
            return None
        self._switch.worked()
        return len(content) + SEAL_BYTES

    def _read(self, key: Any, memory: Any) -> tuple[bool, int | None]:  # noqa: ANN401 - LMCache's
        """Load one object.

        Returns:
            Whether it was loaded; the size of its file, if that is not what was stored and was removed.
        """
        path = self._key_to_path(key)
        content = memoryview(memory.byte_array).cast("B")
        found = bytearray(SEAL_BYTES)
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                is_whole = size == len(content) + SEAL_BYTES and _whole(
                    os.readv, file.fileno(), [content, memoryview(found)]
                )
        except FileNotFoundError:
            return False, None
        except OSError as error:
            self._switch.failed(str(error))
            return False, None
        if is_whole and is_sealed(path.name, content, found):
            return True, None
        metrics.DAMAGED.labels("disk").inc()
        _log.warning("tier_object_damaged", tier="disk", object=path.name, size_bytes=size)
        with suppress(OSError):
            path.unlink()
        return False, size


def _whole(move: Callable[[int, list[memoryview]], int], file: int, parts: list[memoryview]) -> bool:
    """Read or write all of several buffers; return False where the file ends before them."""
    while parts:
        moved = move(file, parts)
        if not moved:
            return False
        while parts and moved >= len(parts[0]):
            moved -= len(parts.pop(0))
        if moved:
            parts[0] = parts[0][moved:]
    return True
