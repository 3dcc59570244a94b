"""What an LMCache server tells its coordinator, decoded.

Source: LMCache 0.5.6 `lmcache/v1/mp_coordinator/api.py` (`CacheEventBatch`) and `schemas.py`.
"""

from __future__ import annotations

import enum
from typing import Annotated, Literal

import msgspec

from kvindex.chunks import ChunkKey, read_key
from kvindex.errors import MalformedEvent

_Count = Annotated[int, msgspec.Meta(ge=0)]


class EventType(enum.StrEnum):
    """What a batch of events reports."""

    CONFIG = "config"
    """How large a medium is; no keys."""
    STORE = "store"
    ACCESS = "access"
    """Objects were found. In the second level that tells of objects that were stored before this life of
    the server; in the first it may come after their deletion, and tells nothing."""
    DELETE = "delete"


Level = Literal["l1", "l2"]
"""First level: CPU memory. Second: disk or object store."""


class Registration(msgspec.Struct, frozen=True):
    """A server that joins."""

    ip: Annotated[str, msgspec.Meta(min_length=1)]
    http_port: Annotated[int, msgspec.Meta(ge=1, lt=65536)]
    instance_id: str = ""

    @property
    def url(self) -> str:
        """Where its HTTP API is."""
        host = f"[{self.ip}]" if ":" in self.ip else self.ip
        return f"http://{host}:{self.http_port}"


class CacheEvents(msgspec.Struct, frozen=True, kw_only=True):
    """One batch: the same happened to all keys."""

    instance_id: str
    incarnation: int
    """Larger at every start of the server."""
    sequence: int
    """Starts at 1 in every incarnation and grows by one."""
    event_type: EventType
    level: Level
    backend: str
    """Medium of the first level or type of the second level's adapter; empty for accesses of the first."""
    keys: tuple[ChunkKey, ...]
    object_bytes: int
    """Size of the largest of the objects; 0 where the event does not tell."""
    capacity_bytes: int


class _Key(msgspec.Struct, frozen=True):
    chunk_hash_hex: str
    model_name: str
    kv_rank: _Count
    object_group_id: _Count = 0
    cache_salt: str = ""

    def read(self) -> ChunkKey:
        return read_key(
            self.chunk_hash_hex, self.model_name, self.kv_rank, self.object_group_id, self.cache_salt
        )


class _Object(msgspec.Struct, frozen=True):
    key: _Key
    size_bytes: _Count = 0


class _Batch(msgspec.Struct, frozen=True):
    instance_id: Annotated[str, msgspec.Meta(min_length=1)]
    incarnation: _Count
    seq: Annotated[int, msgspec.Meta(ge=1)]
    event_type: EventType
    tier: Level
    backend: str
    entries: list[_Object] = []
    capacity_bytes: _Count = 0


class _Body(msgspec.Struct, frozen=True):
    batches: list[_Batch]


class _Page(msgspec.Struct, frozen=True):
    entries: list[_Object]
    next_page_token: str | None = None


class Listed(msgspec.Struct, frozen=True):
    """An object that a store was found to hold."""

    key: ChunkKey
    num_bytes: int
    """0 where the listing does not tell."""


_BODY = msgspec.json.Decoder(_Body)
_REGISTRATION = msgspec.json.Decoder(Registration)
_PAGE = msgspec.json.Decoder(_Page)


def decode_registration(payload: bytes) -> Registration:
    """Return the body of `POST /instances`.

    Raises:
        MalformedEvent: it is none.
    """
    try:
        return _REGISTRATION.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEvent(f"not a registration of an LMCache server: {error}") from error


def decode_events(payload: bytes) -> list[CacheEvents]:
    """Return the batches in the body of `POST /events`, in order.

    Raises:
        MalformedEvent: it has not the shape that LMCache gives it.
    """
    try:
        return [_events(batch) for batch in _BODY.decode(payload).batches]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise MalformedEvent(f"not events of an LMCache server: {error}") from error


def decode_page(payload: bytes) -> tuple[list[Listed], str | None]:
    """Return one page of a server's listing of a store, and the token of the next.

    Raises:
        MalformedEvent: it is none.
    """
    try:
        page = _PAGE.decode(payload)
        return [Listed(each.key.read(), each.size_bytes) for each in page.entries], page.next_page_token
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise MalformedEvent(f"not a listing by an LMCache server: {error}") from error


def _events(batch: _Batch) -> CacheEvents:
    return CacheEvents(
        instance_id=batch.instance_id,
        incarnation=batch.incarnation,
        sequence=batch.seq,
        event_type=batch.event_type,
        level=batch.tier,
        backend=batch.backend,
        keys=tuple([entry.key.read() for entry in batch.entries]),
        object_bytes=max((entry.size_bytes for entry in batch.entries), default=0),
        capacity_bytes=batch.capacity_bytes,
    )
