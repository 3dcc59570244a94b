"""The S3 tier: LMCache's `s3` adapter with sealed objects, a prefix, path-style endpoints, and a switch.

Runs in LMCache's server. Objects are named as LMCache names them, behind the prefix, and end in a seal
(`connectors.tiers.seal`). LMCache's adapter gives S3 up for good after three failures; this one pauses.

Source: LMCache 0.5.6 `lmcache/v1/distributed/l2_adapters/s3_l2_adapter.py`;
awscrt 0.38 `awscrt/s3.py`.
"""

from __future__ import annotations

import asyncio
import ctypes
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import structlog
from awscrt import s3
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.s3_l2_adapter import (
    S3L2Adapter,
    S3L2AdapterConfig,
    _object_key_to_string,
    _string_to_object_key,
)

from connectors.tiers import metrics
from connectors.tiers.meter import PROBE_INTERVAL_S, LoadMeter, Scratch
from connectors.tiers.s3_location import S3Location
from connectors.tiers.seal import SEAL_BYTES, is_sealed, seal
from connectors.tiers.switch import Switch

_log = structlog.get_logger(__name__)

_SMALLEST_PART_BYTES = 5 << 20
"""S3's own limit."""


_credentials: list[Any] = []
"""Of all tiers there were. A request that is cancelled while it is signed may be the last to have them, and
lets go of what they call without the interpreter's lock, which ends the process.

Source: awscrt 0.38 `source/auth_credentials.c`, `s_credentials_provider_shutdown_complete`.
"""

TYPE = "kvlane_s3"
"""What LMCache calls it, in settings and events."""


class BucketTierConfig(S3L2AdapterConfig):
    """Its `--l2-adapter`."""

    location: S3Location
    url: str
    """What the place is called in the index."""
    max_bytes: int = 0
    deadline_s: float = 20.0
    lookup_s: float = 2.0
    pause_s: float = 10.0
    probe_interval_s: float = PROBE_INTERVAL_S

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> BucketTierConfig:
        """Read `location` (of `S3Location`) and the rest, which may be left out.

        `max_bytes` (0: no limit), `num_threads`, `deadline_s` of one request, `lookup_s` of what a lookup
        waits for, `pause_s` after a failure, `probe_interval_s`.
        """
        location = S3Location(**given["location"])
        config = cls(
            location.url,
            location.region,
            s3_num_io_threads=given.get("num_threads", 4),
            s3_prefer_http2=False,
            disable_tls=not location.is_tls,
        )
        config.location, config.url = location, location.url
        for name in ("max_bytes", "deadline_s", "lookup_s", "pause_s", "probe_interval_s"):
            setattr(config, name, given.get(name, getattr(cls, name)))
        return config


class BucketTier(S3L2Adapter):
    """Chunks as objects of one bucket."""

    def __init__(self, config: BucketTierConfig) -> None:
        self._switch = Switch("s3", config.location.url, config.pause_s)
        self._location = config.location
        self._deadline_s = config.deadline_s
        self._lookup_s = config.lookup_s
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="bucket-tier")
        self._meter = LoadMeter("s3", self._probe, config.probe_interval_s)
        self._is_counted = False
        super().__init__(config)
        _credentials.append(self._credentials_provider)
        self._endpoint = config.location.host
        self._max_capacity_bytes = config.max_bytes

    @property
    def _connection_disabled(self) -> bool:
        """What the adapter asks before it does anything; there, it would never come back."""
        return self._switch.is_off

    @_connection_disabled.setter
    def _connection_disabled(self, value: bool) -> None:
        """The switch knows."""

    def _record_connection_outcome(self, error_msg: str | None) -> None:
        if error_msg is None:
            self._switch.worked()
        else:
            self._switch.failed(error_msg)

    def report_status(self) -> dict[str, Any]:
        """Return what the server's `/status` shows of it."""
        return {**super().report_status(), "load": self._meter.status()}

    def register_listener(self, listener: Any) -> None:  # noqa: ANN401 - LMCache's
        """Tell the listener, which evicts, of the objects that are there already."""
        super().register_listener(listener)
        if not self._is_counted:
            self._is_counted = True
            threading.Thread(target=self._count_objects, name="bucket-tier-count", daemon=True).start()

    def close(self) -> None:
        """Cancel what is under way, and wait until awscrt's client has ended. Idempotent."""
        if self._closed:
            return
        self._meter.stop()
        client_ended = self._s3_client.shutdown_event
        super().close()
        self._pool.shutdown()
        if not client_ended.wait(self._deadline_s):
            _log.warning("tier_client_not_ended", tier=self._location.url)

    def _count_objects(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            pages = self._location.client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._location.bucket, Prefix=self._location.base):
                found = self._entries(page)
                with self._lock:
                    self._key_sizes.update(found)
                if found:
                    self._notify_keys_stored([key for key, _ in found], [size for _, size in found])
        except (BotoCoreError, ClientError) as error:
            _log.warning("tier_not_counted", tier=self._location.url, reason=str(error))
        self._meter.start()

    def _entries(self, page: dict[str, Any]) -> list[tuple[Any, int]]:
        """Return keys and sizes of a listing's chunks; other objects are none of ours."""
        found = []
        for entry in page.get("Contents", ()):
            try:
                key = _string_to_object_key(entry["Key"].removeprefix(self._location.base))
            except ValueError:
                continue
            found.append((key, int(entry["Size"])))
        return found

    async def _execute_list(
        self, prefix: str | None, max_keys: int, continuation_token: str | None
    ) -> tuple[list[tuple[Any, int]], str | None]:
        asked = {"ContinuationToken": continuation_token} if continuation_token else {}
        page = await asyncio.to_thread(
            self._location.client().list_objects_v2,
            Bucket=self._location.bucket,
            Prefix=self._location.base + (prefix or ""),
            MaxKeys=max_keys,
            **asked,
        )
        return self._entries(page), page.get("NextContinuationToken")

    def _make_request(self, method: str, key_str: str, **options: Any) -> Any:  # noqa: ANN401 - awscrt's
        return super()._make_request(method, self._location.path_base + key_str, **options)

    async def _execute_store(self, keys: list[Any], objects: list[Any], task_id: int) -> None:
        outcomes = await asyncio.gather(
            *(self._put(key, each) for key, each in zip(keys, objects, strict=True)), return_exceptions=True
        )
        errors = [each for each in outcomes if isinstance(each, BaseException)]
        self._record_connection_outcome(_reason(errors[0]) if errors else None)
        stored = [
            (key, size)
            for key, size in zip(keys, outcomes, strict=True)
            if not isinstance(size, BaseException)
        ]
        with self._lock:
            new = [(key, size) for key, size in stored if key not in self._key_sizes]
            for key, size in stored:
                self._key_sizes[key] = size
                self._object_size_cache[_object_key_to_string(key)] = size
            self._completed_store_tasks[task_id] = L2StoreResult(not errors, sum(size for _, size in stored))
        if new:
            self._notify_keys_stored([key for key, _ in new], [size for _, size in new])
        self._store_efd.notify()

    async def _execute_lookup(self, keys: list[Any], task_id: int) -> None:
        """Say what is there. What S3 has not said in time is not, this time; it is remembered for the next.

        A prompt that memory or a disk has, or nobody, would wait for a slow S3 otherwise: LMCache asks all.
        """
        looking = asyncio.ensure_future(super()._execute_lookup(keys, task_id))
        await asyncio.wait([looking], timeout=self._lookup_s)
        if looking.done():
            looking.result()
            return
        known = Bitmap(len(keys))
        with self._lock:
            for index, key in enumerate(keys):
                if _object_key_to_string(key) in self._object_size_cache:
                    known.set(index)
                    self._locked_keys[key] += 1
            self._completed_lookup_tasks[task_id] = known
        self._lookup_efd.notify()
        await looking
        # One of the two answers was taken; what the other has locked is let go.
        with self._lock:
            late = self._completed_lookup_tasks.pop(task_id, None)
        locked = known if late is None else late
        self.submit_unlock([key for index, key in enumerate(keys) if locked.test(index)])

    async def _execute_load(self, keys: list[Any], objects: list[Any], task_id: int) -> None:
        loaded = Bitmap(len(keys))
        for index, is_loaded in enumerate(await self._load(keys, objects)):
            if is_loaded:
                loaded.set(index)
        with self._lock:
            self._completed_load_tasks[task_id] = loaded
        self._load_efd.notify()

    async def _load(self, keys: list[Any], objects: list[Any]) -> list[bool]:
        """Load objects; return which of them are loaded."""
        began_at_s = time.perf_counter()
        outcomes = await asyncio.gather(
            *(self._get(key, each) for key, each in zip(keys, objects, strict=True)), return_exceptions=True
        )
        lost = []
        errors = []
        num_bytes = 0
        for key, each, outcome in zip(keys, objects, outcomes, strict=True):
            if outcome is True:
                num_bytes += len(each.byte_array)
            elif outcome is False:
                lost.append(key)
            else:
                errors.append(outcome)
        if errors:
            self._record_connection_outcome(_reason(errors[0]))
        elif num_bytes:
            self._record_connection_outcome(None)
        self._meter.observe(num_bytes, time.perf_counter() - began_at_s)
        if lost:
            self._forget(lost)
        return [outcome is True for outcome in outcomes]

    def _probe(self, num_objects: int) -> None:
        if self._switch.is_off:
            return
        with self._lock:
            found = list(self._key_sizes.items())
        chosen = random.sample(found, min(num_objects, len(found)))
        scratch = [Scratch(max(0, size - SEAL_BYTES)) for _, size in chosen]
        loading = self._load([key for key, _ in chosen], scratch)
        asyncio.run_coroutine_threadsafe(loading, self._loop).result()

    def _forget(self, keys: list[Any]) -> None:
        with self._lock:
            sizes = [self._key_sizes.pop(key, 0) for key in keys]
            for key in keys:
                self._object_size_cache.pop(_object_key_to_string(key), None)
        self._notify_keys_deleted(keys, sizes)

    def _head_request(self, name: str) -> tuple[Any, dict[str, int | None]]:
        """Begin to ask for an object's size; return what LMCache waits for, and what it looks at then.

        LMCache's own waits for as long as awscrt tries, which takes minutes.
        """
        found: dict[str, int | None] = {"len": None, "status": None}
        asking = self._loop.create_task(self._head(name, found))
        return SimpleNamespace(finished_future=asking), found

    async def _head(self, name: str, found: dict[str, int | None]) -> None:
        def take(status_code: int, headers: list[tuple[str, str]], **_: Any) -> None:  # noqa: ANN401 - awscrt's
            sizes = [int(value) for header, value in headers if header.lower() == "content-length"]
            found.update(status=status_code, len=sizes[0] if sizes else None)

        request = self._make_request("HEAD", name)
        try:
            await self._perform(s3.S3RequestType.DEFAULT, request, operation="HeadObject", on_headers=take)
        except s3.S3ResponseError as error:
            key = _string_to_object_key(name)
            if error.status_code != HTTPStatus.NOT_FOUND:
                raise ConnectionError(_reason(error)) from error
            if key in self._key_sizes:
                metrics.MISSING.labels("s3").inc()
                self._forget([key])
            raise

    async def _put(self, key: Any, memory: Any) -> int:  # noqa: ANN401 - LMCache's
        """Store one object; return its size."""
        name = _object_key_to_string(key)
        content = memoryview(memory.byte_array).cast("B")
        run = asyncio.get_running_loop().run_in_executor
        body = _Body(content, await run(self._pool, seal, name, content))
        request = self._make_request(
            "PUT",
            name,
            body_stream=body,
            extra_headers=[
                ("Content-Length", str(len(body))),
                ("Content-Type", "application/octet-stream"),
            ],
        )
        await self._perform(s3.S3RequestType.PUT_OBJECT, request, len(body))
        return len(body)

    async def _get(self, key: Any, memory: Any) -> bool:  # noqa: ANN401 - LMCache's
        """Load one object; return False if it is gone, or is not what was stored, and was removed."""
        name = _object_key_to_string(key)
        content = memoryview(memory.byte_array).cast("B")
        found = bytearray(SEAL_BYTES)
        size = len(content)
        num_received = 0

        def take(chunk: bytes, offset: int, **_: Any) -> None:  # noqa: ANN401 - awscrt's
            nonlocal num_received
            num_received += len(chunk)
            # What is too long is not stored: behind this memory is another chunk's.
            inside = max(0, min(len(chunk), size - offset))
            ctypes.memmove(memory.data_ptr + offset, chunk, inside)
            rest = chunk[inside : size + SEAL_BYTES - offset]
            start = offset + inside - size
            found[start : start + len(rest)] = rest

        request = self._make_request("GET", name)
        try:
            await self._perform(s3.S3RequestType.GET_OBJECT, request, size + SEAL_BYTES, on_body=take)
        except s3.S3ResponseError as error:
            if error.status_code != HTTPStatus.NOT_FOUND:
                raise
            metrics.MISSING.labels("s3").inc()
            return False
        run = asyncio.get_running_loop().run_in_executor
        if num_received == size + SEAL_BYTES and await run(self._pool, is_sealed, name, content, found):
            return True
        metrics.DAMAGED.labels("s3").inc()
        _log.warning("tier_object_damaged", tier="s3", object=name, size_bytes=num_received)
        await self._perform(
            s3.S3RequestType.DEFAULT, self._make_request("DELETE", name), operation="DeleteObject"
        )
        return False

    async def _perform(
        self,
        kind: s3.S3RequestType,
        request: Any,  # noqa: ANN401 - awscrt's
        size: int = 0,
        operation: str | None = None,
        **callbacks: Any,  # noqa: ANN401 - awscrt's
    ) -> None:
        """Carry out a request; return or raise only when its buffers are not touched any more."""
        part_bytes = max(size, _SMALLEST_PART_BYTES)
        handle = s3.S3Request(
            client=self._s3_client,
            type=kind,
            request=request,
            operation_name=operation,
            credential_provider=self._credentials_provider,
            region=self._region,
            part_size=part_bytes,
            multipart_upload_threshold=part_bytes + 1,
            **callbacks,
        )
        ended = asyncio.wrap_future(handle.finished_future)
        try:
            await asyncio.wait([ended], timeout=self._deadline_s)
        finally:
            # Late, or `close` cancels this task.
            if is_cancelled := not ended.done():
                handle.cancel()
                await asyncio.wait([ended])
            # awscrt keeps the error for as long as there is a handle, and the error's traceback this frame.
            del handle
            error = ended.exception()
        if error is not None:
            raise TimeoutError(f"no answer in {self._deadline_s:.0f} s") if is_cancelled else error


class _Body:
    """What awscrt reads a request's body from: content and seal, without a copy of both together."""

    def __init__(self, content: memoryview, seal: bytes) -> None:
        self._parts = (content, memoryview(seal))
        self._size = len(content) + len(seal)
        self._position = 0

    def __len__(self) -> int:
        return self._size

    def read(self, size: int | None = None) -> memoryview:
        content, end = self._parts
        part, start = (content, 0) if self._position < len(content) else (end, len(content))
        begin = self._position - start
        chunk = part[begin:] if size is None else part[begin : begin + max(0, size)]
        self._position += len(chunk)
        return chunk

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position


def _reason(error: object) -> str:
    if isinstance(error, s3.S3ResponseError):
        return f"S3 answers {error.status_code}"
    return str(error) or type(error).__name__
