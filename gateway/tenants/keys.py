"""API keys: made here, and known by their hash alone. Pure."""

from __future__ import annotations

import hashlib
import re
import secrets

KEY_PREFIX = "kvl_"
"""Lets scanners for secrets find a key that was committed or logged."""

_KEY_BYTES = 32
_HASH = re.compile(r"[0-9a-f]{64}")


def new_key() -> str:
    """Return a key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def hash_key(key: str) -> str:
    """Return what is kept of a key: its SHA-256, 64 hex digits.

    One fast hash is enough, without salt or stretching: those protect secrets that can be guessed, and
    nobody guesses 256 random bits. Who is looked up by the hash learns nothing from the time it takes,
    because nobody can choose a key for the beginning of its hash.
    """
    return hashlib.sha256(key.encode()).hexdigest()


def is_key_hash(text: str) -> bool:
    """Say whether `text` has the form of a key's hash."""
    return _HASH.fullmatch(text) is not None
