"""Places outside the engines that keep KV: what they are and how they stand in the index. Plain values."""

from __future__ import annotations

import msgspec

from kvindex.blocks import Pool
from kvindex.chunks import chunk_pool
from kvindex.worker import Tier

LOAD_KEY = "kvlane.load_tokens"
"""In a request's `kv_transfer_params`: how many leading tokens of its prompt stores may be read for. What
they hold behind these is computed, with 0 everything; without it, whatever they hold is read."""


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """The chunks of one model in a node's CPU memory, on its disk, or in a bucket, as somebody tells of them.

    What a store that several servers share holds is told by each of them for its own part, and by whoever
    lists it; it holds what any of them says.
    """

    name: str
    """Of the place. Workers name it as one that they reach (`TierAccess.stores`)."""
    teller: str = ""
    """The LMCache server whose events tell of it; empty: a listing of the place."""
    tier: Tier
    model: str
    """As LMCache knows it."""
    chunk_size: int
    """Tokens per chunk."""
    incarnation: str

    @property
    def holder_id(self) -> str:
        """Stable across restarts."""
        return f"{self.name} by {self.teller}" if self.teller else self.name

    @property
    def pool(self) -> Pool:
        """The pool of the model's chunks."""
        return chunk_pool(self.model, self.chunk_size)


class StoreSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """How fast KV comes from a store into the memory of an LMCache server, as that has measured it."""

    num_loads: int
    """Measured since the server's start, probes included."""
    gb_per_s: float
    latency_ms: float
    """Of a load, whatever its size."""

    def parts_s(self) -> dict[str, float]:
        """Return what a load and each of its bytes take, in seconds."""
        return {"load": self.latency_ms / 1e3, "byte": 1e-9 / self.gb_per_s}


class RegisteredStore(msgspec.Struct, frozen=True, kw_only=True):
    """A store with its place in the index."""

    store: Store
    slot: int
    lease_ms: int
    lease_left_ms: int
    num_indexed_blocks: int
    digest: str
    """Order-independent digest of the indexed chunks, 16 hex digits."""
    speed: StoreSpeed | None = None
    """As its teller measured it; None where it has not, or not yet."""

    @property
    def holder(self) -> Store:
        """The store, as what has the slot."""
        return self.store
