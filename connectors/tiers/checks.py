"""Whether a node can keep its tiers, before anything is started: one clear line otherwise."""

from __future__ import annotations

import shutil
import socket
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from connectors.tiers.s3_location import S3Location
from connectors.tiers.spec import Disk, JoinedTiers, Tiers
from kvindex.errors import ConfigError

LMCACHE = "0.5.6"
INSTALL = f"pip install 'kvlane[tiers]' && pip install --no-deps lmcache=={LMCACHE}"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies
_ANSWER_S = 5.0
_LARGEST_BLOCK_SIZE = 128
"""That vLLM chooses by itself: 16 on most GPUs, more where a kernel wants it, this on a CPU."""


def check_lmcache() -> None:
    """Raise if LMCache is not here, or none that we know.

    Raises:
        ConfigError: it is not.
    """
    try:
        found = version("lmcache")
    except PackageNotFoundError:
        raise ConfigError(f"tiers need LMCache: {INSTALL}") from None
    if found.split(".")[:2] != LMCACHE.split(".")[:2] or _numbers(found) < _numbers(LMCACHE):
        raise ConfigError(f"tiers need LMCache {LMCACHE} or a later 0.5, here is {found}: {INSTALL}")


def check_block_size(chunk_size: int, block_size: int | None) -> None:
    """Raise if chunks are not made of whole blocks.

    Args:
        chunk_size: tokens.
        block_size: tokens; None: what vLLM chooses, a power of two up to 128.

    Raises:
        ConfigError: they are not.
    """
    if block_size is None and chunk_size % _LARGEST_BLOCK_SIZE:
        raise ConfigError(
            f"--tiers: chunks of {chunk_size} tokens may not be whole blocks: set --block-size, or "
            f"chunk= to a multiple of {_LARGEST_BLOCK_SIZE}"
        )
    if block_size is not None and chunk_size % block_size:
        raise ConfigError(
            f"--tiers: chunks of {chunk_size} tokens are not whole blocks of {block_size}: set chunk= to a "
            "multiple"
        )


def check_join(tiers: JoinedTiers) -> None:
    """Raise if nobody listens at the address.

    Raises:
        ConfigError: nobody does.
    """
    host, _, port = tiers.address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise ConfigError(f"--tiers: no LMCache server answers at {tiers.address}: {error}") from error


def check_tiers(tiers: Tiers, *, has_gpu: bool) -> None:
    """Raise if a server could not keep these tiers.

    Raises:
        ConfigError: it could not.
    """
    if not has_gpu and (room := shutil.disk_usage(_SHARED_MEMORY).total) < tiers.cpu_bytes:
        raise ConfigError(
            f"--tiers: cpu={tiers.cpu_bytes / 1e9:.1f} GB is more than {_SHARED_MEMORY} holds "
            f"({room / 1e9:.1f} GB): less, or mount it larger (--shm-size in Docker)"
        )
    if tiers.disk is not None:
        _check_disk(tiers.disk)
    if tiers.s3 is not None:
        try:
            check_bucket(tiers.s3.location)
        except ConfigError as error:
            raise ConfigError(f"--tiers: s3={error}") from error


def _check_disk(disk: Disk) -> None:
    try:
        disk.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=disk.path):
            pass
    except OSError as error:
        raise ConfigError(f"--tiers: disk={disk.path} cannot be written to: {error.strerror}") from error
    if disk.max_bytes > (room := shutil.disk_usage(disk.path).total):
        raise ConfigError(
            f"--tiers: disk={disk.path}:{disk.max_bytes / 1e9:.1f}GB is more than its file system holds "
            f"({room / 1e9:.1f} GB)"
        )


def check_bucket(where: S3Location) -> None:
    """Raise if there is no such bucket, or these credentials may not use it.

    Raises:
        ConfigError: so it is.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        where.client().head_bucket(Bucket=where.bucket)
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        reason = {
            404: f"there is no bucket {where.bucket!r}",
            403: "these credentials may not use it",
            301: f"it is in another region than {where.region}",
        }.get(status, str(error))
        raise ConfigError(f"{where.url}: {reason}") from error
    except BotoCoreError as error:
        raise ConfigError(f"{where.url}: {error}") from error


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(".")[:3] if part.isdecimal()]
