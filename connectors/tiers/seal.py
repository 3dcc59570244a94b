"""The last bytes of every object in a tier: what tells its content from damage. Pure."""

from __future__ import annotations

import xxhash

_MARK = b"KVL1"
SEAL_BYTES = len(_MARK) + 16


def seal(name: str, content: memoryview) -> bytes:
    """Return what is stored behind the content of an object.

    The name is sealed with it: an object that took another's place is as wrong as a damaged one.
    """
    digest = xxhash.xxh3_128(name.encode())
    digest.update(content)
    return _MARK + digest.digest()


def is_sealed(name: str, content: memoryview, found: bytes | bytearray) -> bool:
    """Whether this content was stored under this name, to the last byte."""
    return bytes(found) == seal(name, content)
