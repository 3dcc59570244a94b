"""Blocks that two read or fill: a request is let go when both have named it. Pure."""

from __future__ import annotations


class Holds:
    """Requests whose blocks both a transfer and a tier need still, or fill."""

    def __init__(self) -> None:
        self._twice: set[str] = set()

    def add(self, request_ids: set[str]) -> None:
        """Note requests that both hold."""
        self._twice |= request_ids

    def release(self, by_transfer: set[str], by_tier: set[str]) -> set[str]:
        """Return the requests that nobody holds any more, of those that a transfer or a tier lets go now."""
        named = by_transfer | by_tier
        waiting = (by_transfer ^ by_tier) & self._twice
        self._twice -= named
        return named - waiting


class Frees:
    """What vLLM may be told to free, of requests that are filled from elsewhere and stored: each once.

    vLLM frees the blocks of a request that was aborted while they were filled when that has ended.
    LMCache 0.5.6 names such a request as stored as well, before or after: the blocks would be free while they
    are filled, and an engine that is told twice ends.
    """

    def __init__(self) -> None:
        self._loading: set[str] = set()
        self._held: set[str] = set()

    def load(self, request_id: str) -> None:
        """Note that blocks are being filled."""
        self._loading.add(request_id)

    def hold(self, request_id: str) -> None:
        """Note a request that has ended and whose blocks are needed still."""
        self._held.add(request_id)

    def release(self, sent: set[str], loaded: set[str]) -> set[str]:
        """Return the requests to free, of those sent or stored; vLLM sees to those that are loaded."""
        self._loading -= loaded
        self._held -= loaded
        freed = (sent & self._held) - self._loading
        self._held -= freed
        return freed
