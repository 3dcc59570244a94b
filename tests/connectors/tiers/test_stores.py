"""The disk and the S3 tier behave the same: what they give back is what was stored, or nothing."""

import ctypes
import os
import resource
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
from lmcache.v1.distributed.api import ObjectKey

from connectors.tiers.bucket import BucketTier, BucketTierConfig
from connectors.tiers.disk import DiskTier, DiskTierConfig
from connectors.tiers.seal import SEAL_BYTES
from tests.support.tiers import BUCKET, S3Server, s3_server, wait_until

SIZE = 40_000
PATIENCE_MS = 60_000
PAUSE_S = 0.2


class Memory:
    """A piece of LMCache's CPU memory, with a guard behind it."""

    def __init__(self, content: bytes = bytes(SIZE)) -> None:
        self._buffer = ctypes.create_string_buffer(content + b"guard" * 100, SIZE + 500)

    @property
    def byte_array(self) -> memoryview:
        return memoryview(self._buffer).cast("B")[:SIZE]

    @property
    def data_ptr(self) -> int:
        return ctypes.addressof(self._buffer)

    def get_size(self) -> int:
        return SIZE

    def content(self) -> bytes:
        assert bytes(self._buffer)[SIZE:] == b"guard" * 100
        return bytes(self.byte_array)


def key(index: int, salt: str = "") -> ObjectKey:
    return ObjectKey(bytes([index]) * 32, "org/model-0123", 0x01000100, 0, salt)


def content(index: int) -> bytes:
    return bytes((index + position) % 251 for position in range(SIZE))


class Store(Protocol):
    """One tier, and its medium as somebody else gets at it."""

    def open(self, **options: float) -> Any: ...
    def names(self) -> list[str]: ...
    def read(self, name: str) -> bytes: ...
    def write(self, name: str, body: bytes) -> None: ...
    def broken(self) -> Any: ...


class DiskStore:
    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, **options: float) -> DiskTier:
        given = {"base_path": str(self.path), "pause_s": PAUSE_S, **options}
        return DiskTier(DiskTierConfig.from_dict(given))

    def names(self) -> list[str]:
        return sorted(each.name for each in self.path.iterdir())

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, body: bytes) -> None:
        (self.path / name).write_bytes(body)

    @contextmanager
    def broken(self) -> Iterator[None]:
        """Let no file grow as large as an object."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class S3Store:
    def __init__(self, server: S3Server, prefix: str) -> None:
        self.server, self.prefix = server, prefix
        self.client = server.client()

    def open(self, **options: float) -> BucketTier:
        location = self.server.location(self.prefix)
        fields = {name: getattr(location, name) for name in ("bucket", "prefix", "region", "endpoint")}
        given = {"location": fields, "pause_s": PAUSE_S, **options}
        return BucketTier(BucketTierConfig.from_dict(given))

    def names(self) -> list[str]:
        return [each.removeprefix(f"{self.prefix}/") for each in self.server.keys(f"{self.prefix}/")]

    def read(self, name: str) -> bytes:
        body: bytes = self.client.get_object(Bucket=BUCKET, Key=f"{self.prefix}/{name}")["Body"].read()
        return body

    def write(self, name: str, body: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=f"{self.prefix}/{name}", Body=body)

    def remove(self, name: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=f"{self.prefix}/{name}")

    @contextmanager
    def broken(self) -> Iterator[None]:
        """Take the bucket away."""
        for each in self.server.keys(""):
            self.client.delete_object(Bucket=BUCKET, Key=each)
        self.client.delete_bucket(Bucket=BUCKET)
        yield
        self.client.create_bucket(Bucket=BUCKET)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return DiskStore(tmp_path)
    return S3Store(request.getfixturevalue("server"), f"run/{tmp_path.name}")


@pytest.fixture
def tier(store: Store) -> Iterator[Any]:
    opened = store.open()
    yield opened
    opened.close()


def _wait(event_fd: int, poll: Callable[[], Any]) -> Any:
    while (outcome := poll()) is None:
        assert select.select([event_fd], [], [], PATIENCE_MS / 1000)[0]
        os.read(event_fd, 8)
    return outcome


def put(tier: Any, *indices: int) -> bool:
    """Store objects; return whether all were."""
    task = tier.submit_store_task(
        [key(each) for each in indices], [Memory(content(each)) for each in indices]
    )
    results: dict[int, Any] = {}

    def poll() -> Any:
        results.update(tier.pop_completed_store_tasks())
        return results.get(task)

    return bool(_wait(tier.get_store_event_fd(), poll).is_successful())


def get(tier: Any, *indices: int) -> list[bytes | None]:
    """Load objects, and check that nothing was written behind their memory."""
    memories = [Memory() for _ in indices]
    task = tier.submit_load_task([key(each) for each in indices], memories)
    loaded = _wait(tier.get_load_event_fd(), lambda: tier.query_load_result(task))
    contents = [memory.content() for memory in memories]
    return [each if loaded.test(index) else None for index, each in enumerate(contents)]


def find(tier: Any, *indices: int) -> list[bool]:
    task = tier.submit_lookup_and_lock_task([key(each) for each in indices], {})
    found = _wait(tier.get_lookup_and_lock_event_fd(), lambda: tier.query_lookup_and_lock_result(task))
    return [bool(found.test(index)) for index in range(len(indices))]


class Listener:
    """What evicts, and what tells the index."""

    def __init__(self) -> None:
        self.stored: dict[ObjectKey, int] = {}

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        self.stored.update(zip(keys, sizes, strict=True))

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None:
        pass

    def on_l2_keys_deleted(self, keys: list[ObjectKey], sizes: list[int] | None = None) -> None:
        for each in keys:
            self.stored.pop(each, None)


def test_what_was_stored_is_loaded(tier: Any, store: Store):
    assert put(tier, 1, 2, 3)
    assert find(tier, 1, 4, 3) == [True, False, True]
    assert get(tier, 3, 1, 2) == [content(3), content(1), content(2)]
    assert [len(store.read(name)) for name in store.names()] == [SIZE + SEAL_BYTES] * 3


def test_another_server_loads_it(tier: Any, store: Store):
    assert put(tier, 1)
    other = store.open()
    assert get(other, 1) == [content(1)]
    other.close()


def test_what_is_not_there_is_not_loaded(tier: Any):
    assert put(tier, 1)
    assert get(tier, 1, 2) == [content(1), None]


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: body[:500] + bytes([body[500] ^ 1]) + body[501:],
        lambda body: body[:-1] + bytes([body[-1] ^ 1]),
        lambda body: body[:-1],
        lambda body: body[: SIZE // 2],
        lambda body: body[:SIZE],
        lambda body: body + b"more" * 1000,
        lambda body: b"x",
        lambda body: body[SEAL_BYTES:],
    ],
    ids=["bit", "seal", "cut", "half", "unsealed", "longer", "tiny", "shifted"],
)
def test_what_is_damaged_is_not_loaded_and_removed(tier: Any, store: Store, damage: Callable[[bytes], bytes]):
    listener = Listener()
    tier.register_listener(listener)
    assert put(tier, 1, 2)
    (damaged,) = (name for name in store.names() if "01" * 32 in name)
    store.write(damaged, damage(store.read(damaged)))
    assert get(tier, 1, 2) == [None, content(2)]
    assert damaged not in store.names()
    assert list(listener.stored) == [key(2)]
    # It is stored anew.
    assert put(tier, 1)
    assert get(tier, 1) == [content(1)]


def test_an_object_in_anothers_place_is_not_loaded(tier: Any, store: Store):
    assert put(tier, 1, 2)
    first, second = store.names()
    store.write(first, store.read(second))
    assert [each is None for each in get(tier, 1, 2)].count(True) == 1


def test_a_medium_that_fails_is_left_alone_and_comes_back(tier: Any, store: Store):
    with store.broken():
        assert not put(tier, 1)
        assert tier._switch.is_off
        assert store.names() == [] if isinstance(store, DiskStore) else True
    wait_until(lambda: not tier._switch.is_off)
    assert put(tier, 1)
    assert get(tier, 1) == [content(1)]


def test_loads_are_measured(tier: Any):
    assert put(tier, 1, 2, 3)
    assert tier.report_status()["load"]["num_loads"] == 0
    assert get(tier, 1) == [content(1)]
    assert get(tier, 1, 2, 3, 4) == [content(1), content(2), content(3), None]
    assert get(tier, 4) == [None]
    load = tier.report_status()["load"]
    assert load["num_loads"] == 2
    assert load["gb_per_s"] > 0
    assert load["latency_ms"] >= 0


def test_what_nobody_loads_is_probed_and_removed_if_it_is_damaged(tier: Any, store: Store):
    assert put(tier, 1, 2)
    (damaged,) = (name for name in store.names() if "01" * 32 in name)
    store.write(damaged, b"x" * (SIZE + SEAL_BYTES))
    store.write("something-else", b"of somebody else")
    again, listener = store.open(probe_interval_s=0.1), Listener()
    again.register_listener(listener)
    wait_until(lambda: damaged not in store.names())
    wait_until(lambda: again.report_status()["load"]["num_loads"] >= 4)
    wait_until(lambda: list(listener.stored) == [key(2)])
    assert get(again, 1, 2) == [None, content(2)]
    again.close()


def test_what_is_there_at_the_start_is_told_to_who_evicts(tier: Any, store: Store):
    assert put(tier, 1, 2)
    store.write("something-else", b"of somebody else")
    again, listener = store.open(), Listener()
    again.register_listener(listener)
    wait_until(lambda: len(listener.stored) == 2)
    assert listener.stored == {key(1): SIZE + SEAL_BYTES, key(2): SIZE + SEAL_BYTES}
    assert again.get_usage().total_bytes_used == 2 * (SIZE + SEAL_BYTES)
    again.delete([key(1)])
    assert get(again, 1, 2) == [None, content(2)]
    assert list(listener.stored) == [key(2)]
    again.close()
