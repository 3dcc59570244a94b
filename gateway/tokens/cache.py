"""Remembers byte strings within a budget: tokens of texts and hashes of prompts, both dear to compute."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock

from gateway import metrics

ENTRY_BYTES = 256
"""What an entry takes beside its content: two objects and their place in the table."""


class ByteCache:
    """Byte strings by 16-byte keys; the least recently used go first. Thread-safe.

    Keys are digests that nobody outside can predict, so equal keys mean equal content.

    Args:
        budget_bytes: most that all entries may take; 0 remembers nothing.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()
        self._num_bytes = 0
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        """What all entries take now."""
        return self._num_bytes

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return what is known under each key. Of these entries the first will be forgotten last."""
        with self._lock:
            found = [self._entries.get(key) for key in keys]
            for key, value in zip(reversed(keys), reversed(found), strict=True):
                if value is not None:
                    self._entries.move_to_end(key)
        return found

    def put(self, entries: Mapping[bytes, bytes]) -> None:
        """Remember `entries`. Of these the first will be forgotten last."""
        with self._lock:
            for key in reversed(list(entries)):
                self._drop(key)
                self._entries[key] = entries[key]
                self._num_bytes += ENTRY_BYTES + len(entries[key])
            while self._num_bytes > self._budget_bytes:
                self._drop(next(iter(self._entries)))
            metrics.TOKEN_CACHE_BYTES.set(self._num_bytes)

    def _drop(self, key: bytes) -> None:
        if (value := self._entries.pop(key, None)) is not None:
            self._num_bytes -= ENTRY_BYTES + len(value)
