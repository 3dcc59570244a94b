"""What an LMCache server is made of, asked over its HTTP API, and what its stores hold.

Source: LMCache 0.5.6 `lmcache/v1/multiprocess/http_apis/` (`GET /config`, `/config/adapters`,
`/cache/objects`, `/status`) and `lmcache/v1/distributed/l2_adapters/`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import httpx
import msgspec

from kvindex.chunks import read_file_name, write_key
from kvindex.errors import ConfigError, MalformedEvent, StoreUnavailable
from kvindex.stores import StoreSpeed
from kvindex.tiers.events import Listed, decode_page
from kvindex.worker import Tier

_HASH_ALGORITHM = "blake3"
# Types of adapters that keep files named as `chunks.read_file_name` reads them; LMCache lists none of them.
_FILE_TYPES = frozenset({"fs", "kvlane_disk"})
_PAGE_SIZE = 1000
# Types of adapters behind which is no disk of the node.
_OBJECT_STORES = frozenset(
    {"s3", "bigtable", "hfbucket", "resp", "valkey", "aerospike", "mooncake_store", "sagemaker_hyperpod"}
)


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """One of a server's stores."""

    name: str
    """`Store.name`."""
    backend: str
    """As events name it."""
    tier: Tier
    is_shared: bool = False
    """Whether other servers store there as well."""
    directory: str | None = None
    """Where its files are, of one that LMCache cannot list."""
    listed_as: str | None = None
    """By which name LMCache lists it; None where it would list another of the same type."""


class ServerDescription(msgspec.Struct, frozen=True, kw_only=True):
    """An LMCache server as its settings describe it."""

    instance_id: str
    chunk_size: int
    memory: Place
    """Its first level."""
    places: tuple[Place, ...]
    """Its second level."""

    @property
    def store_names(self) -> tuple[str, ...]:
        """What a worker that loads through this server reaches (`TierAccess.stores`)."""
        return (self.memory.name, *(place.name for place in self.places))


def describe_server(client: httpx.Client, url: str) -> ServerDescription:
    """Ask a server for its settings.

    Raises:
        StoreUnavailable: it does not answer.
        ConfigError: its chunks cannot be indexed; the message says why.
    """
    config = _get_json(client, f"{url}/config")
    types = _get_json(client, f"{url}/config/adapters")
    try:
        main = config["mp"]
        adapters = config["storage_manager"]["l2_adapter_config"]["adapters"]
        names = [adapter["type_name"] for adapter in types["adapters"]]
        if main["hash_algorithm"] != _HASH_ALGORITHM:
            raise ConfigError(
                f"the LMCache server at {url} hashes with {main['hash_algorithm']}: "
                f"start it with --hash-algorithm {_HASH_ALGORITHM}"
            )
        instance_id = str(main["instance_id"])
        return ServerDescription(
            instance_id=instance_id,
            chunk_size=int(main["chunk_size"]),
            memory=Place(name=f"{instance_id}/cpu", backend="dram", tier=Tier.CPU),
            places=tuple(
                _place(instance_id, name, adapter, is_first=name not in names[:index])
                for index, (name, adapter) in enumerate(zip(names, adapters, strict=True))
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreUnavailable(f"{url} does not describe itself as LMCache 0.5.6 does: {error!r}") from error


def list_place(client: httpx.Client, url: str, place: Place) -> list[Listed]:
    """Return what a store holds, once for every object. Blocks, for as long as a large store takes.

    Raises:
        StoreUnavailable: it cannot be listed, now or ever.
    """
    if place.directory is not None:
        return list(_list_directory(place.directory))
    if place.listed_as is None:
        raise StoreUnavailable(
            f"LMCache lists the first adapter of a type, and {place.name} is not the first"
        )
    found: list[Listed] = []
    token: str | None = None
    while True:
        query: dict[str, str | int] = {"tier": "l2", "adapter": place.listed_as, "page_size": _PAGE_SIZE}
        answer = _get(client, f"{url}/cache/objects", query | ({"page_token": token} if token else {}))
        try:
            page, token = decode_page(answer)
        except MalformedEvent as error:
            raise StoreUnavailable(str(error)) from error
        found += page
        if token is None:
            return found


def read_speeds(client: httpx.Client, url: str, description: ServerDescription) -> dict[Place, StoreSpeed]:
    """Return how fast the places of a server's second level are, those that have measured it.

    Raises:
        StoreUnavailable: it does not answer.
    """
    status = _get_json(client, f"{url}/status")
    adapters = status.get("storage_manager", {}).get("l2_adapters", ())
    found = {}
    # In the order of their settings, as `describe_server` reads them; only ours say how fast they load.
    for place, adapter in zip(description.places, adapters, strict=False):
        try:
            speed = msgspec.convert(adapter.get("load"), StoreSpeed)
        except msgspec.ValidationError:
            continue
        if speed.num_loads:
            found[place] = speed
    return found


def clear_memory(client: httpx.Client, url: str) -> None:
    """Have a server forget what it has in memory, but for what is being read or written.

    Raises:
        StoreUnavailable: it does not.
    """
    _send(client, "POST", f"{url}/cache/clear", {"tier": "l1"})


def empty_place(client: httpx.Client, url: str, place: Place) -> int:
    """Delete everything that a store of the second level holds; return how many objects that were.

    Raises:
        StoreUnavailable: it cannot be listed, or not all was deleted.
    """
    if place.listed_as is None:
        raise StoreUnavailable(
            f"LMCache deletes from the first adapter of a type, and {place.name} is not the first"
        )
    keys = [write_key(listed.key) for listed in list_place(client, url, place)]
    for first in range(0, len(keys), _PAGE_SIZE):
        body = {"tier": "l2", "adapter": place.listed_as, "keys": keys[first : first + _PAGE_SIZE]}
        answer = msgspec.json.decode(_send(client, "DELETE", f"{url}/cache/objects", body))
        if not answer.get("ok"):
            raise StoreUnavailable(f"{place.name}: {answer.get('error', 'not everything was deleted')}")
    return len(keys)


def _place(instance_id: str, backend: str, adapter: dict[str, Any], *, is_first: bool) -> Place:
    """Read an adapter's settings; it is called by its type in events."""
    directory, bucket = adapter.get("base_path"), adapter.get("s3_endpoint")
    is_shared = bool(adapter.get("shared"))
    # Ours say what their place is called: of a host with many buckets the endpoint says too little.
    where = adapter.get("url") or f"{backend}://{str(bucket or directory or '').removeprefix('s3://')}"
    return Place(
        name=where if is_shared else f"{instance_id}/{backend}",
        backend=backend,
        tier=Tier.OBJECT if bucket or backend in _OBJECT_STORES else Tier.DISK,
        is_shared=is_shared,
        directory=directory if backend in _FILE_TYPES else None,
        listed_as=backend if is_first else None,
    )


def _list_directory(directory: str) -> Iterator[Listed]:
    """Read file names; the size of one file stands for those of its model."""
    sizes: dict[str, int] = {}
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    key = read_file_name(entry.name)
                except ValueError:
                    continue  # not LMCache's, or not complete yet
                if key.model not in sizes:
                    sizes[key.model] = entry.stat().st_size
                yield Listed(key, sizes[key.model])
    except OSError as error:
        raise StoreUnavailable(f"{directory} cannot be listed: {error}") from error


def _get_json(client: httpx.Client, url: str) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = msgspec.json.decode(_get(client, url, {}), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise StoreUnavailable(f"{url} answers with something else than LMCache's JSON: {error}") from error
    return answer


def _get(client: httpx.Client, url: str, query: dict[str, str | int]) -> bytes:
    return _answer(client, client.build_request("GET", url, params=query))


def _send(client: httpx.Client, method: str, url: str, body: dict[str, Any]) -> bytes:
    return _answer(client, client.build_request(method, url, json=body))


def _answer(client: httpx.Client, request: httpx.Request) -> bytes:
    try:
        answer = client.send(request)
    except httpx.HTTPError as error:
        raise StoreUnavailable(f"{request.url} does not answer: {error}") from error
    if answer.status_code != HTTPStatus.OK:
        raise StoreUnavailable(f"{request.url} answers {answer.status_code}: {answer.text[:200]}")
    return answer.content
