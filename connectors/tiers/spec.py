"""What `--tiers` says. Pure.

The tiers of this node, or the server that keeps them already:

    cpu=20GB,disk=/var/kv:200GB,s3=s3://bucket/prefix
    lmcache=HOST:PORT,api=HOST:PORT
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from connectors.tiers.s3_location import S3Location
from kvindex.errors import ConfigError

FORMS = "cpu=20GB,disk=/var/kv:200GB,s3=s3://bucket/prefix or lmcache=HOST:PORT"
DEFAULT_CHUNK = 256
DEFAULT_PORT = 6555

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(I?)B?", re.IGNORECASE)
_ADDRESS = re.compile(r"([^\s:/]+|\[[0-9a-fA-F:]+\]):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Disk:
    """A directory that keeps chunks."""

    path: Path
    max_bytes: int
    """0: as much as fits."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A place in S3 that keeps chunks."""

    location: S3Location
    max_bytes: int
    """0: no limit; then a lifecycle rule of the bucket is what removes chunks."""


@dataclass(frozen=True, slots=True)
class Tiers:
    """The tiers of a node, which one LMCache server keeps."""

    cpu_bytes: int
    disk: Disk | None = None
    s3: Bucket | None = None
    chunk_size: int = DEFAULT_CHUNK
    """Tokens."""
    port: int = DEFAULT_PORT
    """At which the server is reached on this node."""

    @property
    def address(self) -> str:
        """`host:port` of the server."""
        return f"127.0.0.1:{self.port}"

    @property
    def api(self) -> str:
        """URL of the server's own HTTP API, on loopback."""
        return f"http://127.0.0.1:{self.port + 1}"


@dataclass(frozen=True, slots=True)
class JoinedTiers:
    """The tiers of an LMCache server that somebody else runs."""

    address: str
    """`host:port`"""
    api: str = ""
    """URL of its HTTP API, which tells what it keeps; empty where the index need not know."""


def parse_tiers(text: str, environment: Mapping[str, str] = os.environ) -> Tiers | JoinedTiers:
    """Read what `--tiers` says.

    Args:
        text: names and values, separated by commas.
        environment: where S3 is, if the URL does not say: AWS_REGION, AWS_ENDPOINT_URL_S3 and the like.

    Raises:
        ConfigError: it cannot be read; the message says what to write.
    """
    given: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or not value:
            raise ConfigError(f"--tiers: {part.strip()!r} is not NAME=VALUE; write {FORMS}")
        if name in given:
            raise ConfigError(f"--tiers names {name} twice")
        given[name] = value
    known = {"cpu", "disk", "s3", "chunk", "port", "lmcache", "api"}
    if unknown := sorted(given.keys() - known):
        raise ConfigError(f"--tiers: there is no tier {unknown[0]!r}; write {FORMS}")
    if "lmcache" in given or "api" in given:
        return _joined(given)
    if "cpu" not in given:
        raise ConfigError("--tiers needs cpu=SIZE: what comes from disk or S3 goes through it")
    return Tiers(
        cpu_bytes=_size("cpu", given["cpu"]),
        disk=_disk(given["disk"]) if "disk" in given else None,
        s3=parse_bucket(given["s3"], environment) if "s3" in given else None,
        chunk_size=_number("chunk", given.get("chunk", str(DEFAULT_CHUNK)), 1 << 20),
        port=_number("port", given.get("port", str(DEFAULT_PORT)), 65535),
    )


def _joined(given: dict[str, str]) -> JoinedTiers:
    if given.keys() - {"lmcache", "api"} or "lmcache" not in given:
        raise ConfigError("--tiers: lmcache=HOST:PORT joins a server as it is, with no tier beside it")
    for name, address in given.items():
        if (found := _ADDRESS.fullmatch(address)) is None or not 0 < int(found[2]) < 65536:
            raise ConfigError(f"--tiers: {name}={address} is not HOST:PORT")
    return JoinedTiers(given["lmcache"], f"http://{given['api']}" if "api" in given else "")


def _size(tier: str, text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    size = 0
    if found is not None:
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2].upper()])
    if size <= 0:
        raise ConfigError(f"--tiers: {tier}: {text!r} is no size; write 20GB or 20GiB")
    return size


def _number(name: str, text: str, most: int) -> int:
    if not text.isdecimal() or not 0 < int(text) <= most:
        raise ConfigError(f"--tiers: {name}={text} is not a number from 1 to {most}")
    return int(text)


def _disk(value: str) -> Disk:
    path, colon, size = value.rpartition(":")
    path, max_bytes = (path, _size("disk", size)) if colon else (value, 0)
    if not path.startswith("/"):
        raise ConfigError(f"--tiers: disk={value}: write an absolute path and a size, /var/kv:200GB")
    return Disk(Path(path), max_bytes)


def parse_bucket(value: str, environment: Mapping[str, str] = os.environ) -> Bucket:
    """Read where a bucket is: s3://BUCKET/PREFIX?region=REGION&endpoint=URL:SIZE.

    Raises:
        ConfigError: it cannot be read; the message says what to write.
    """
    max_bytes = 0
    if sized := re.fullmatch(r"(s3://.*):([0-9.]+\s*[KMGTP]i?B?)", value, re.IGNORECASE):
        value, max_bytes = sized[1], _size("s3", sized[2])
    url = urlsplit(value)
    if url.scheme != "s3" or not url.netloc:
        raise ConfigError(f"--tiers: s3={value}: write s3://BUCKET/PREFIX?region=REGION&endpoint=URL")
    options = {name: values[-1] for name, values in parse_qs(url.query).items()}
    if unknown := sorted(options.keys() - {"region", "endpoint"}):
        raise ConfigError(f"--tiers: s3: there is no option {unknown[0]!r}; there are region and endpoint")
    endpoint = (
        options.get("endpoint")
        or environment.get("AWS_ENDPOINT_URL_S3")
        or environment.get("AWS_ENDPOINT_URL", "")
    )
    if endpoint and urlsplit(endpoint).scheme not in ("http", "https"):
        raise ConfigError(f"--tiers: s3: the endpoint {endpoint!r} is not a URL of http or https")
    region = (
        options.get("region") or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION", "")
    )
    if not region and not endpoint:
        raise ConfigError("--tiers: s3: in which region? Set AWS_REGION, or write s3://BUCKET?region=REGION")
    return Bucket(
        S3Location(
            bucket=url.netloc,
            prefix=url.path.strip("/"),
            region=region or "us-east-1",
            endpoint=endpoint.rstrip("/"),
        ),
        max_bytes,
    )
