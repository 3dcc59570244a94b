"""From a prompt to what stores outside the engines hold of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import structlog

from gateway import metrics
from gateway.chains import Chain, make_chain
from gateway.fleet import Fleet
from gateway.tiers import TierRun, tier_runs
from gateway.tokens.request import Prompt
from kvindex.blocks import BlockHash, Pool
from kvindex.chunks import chunk_blocks, chunk_pool, chunk_salt, hash_chunks
from kvindex.errors import IndexUnavailable
from kvindex.index import IndexReader
from kvindex.worker import TierAccess

Runs = Mapping[TierAccess, tuple[TierRun, ...]]


class InTiers(NamedTuple):
    """What stores hold of a prompt."""

    runs: Runs
    """For each way to reach stores, the leading tokens that it would load."""
    chains: tuple[Chain, ...]
    """The prompt that was looked up, in each pool of chunks; without contents."""


_log = structlog.get_logger(__name__)


class TierLookup:
    """Finds what workers would load. Holds no state of its own."""

    def __init__(self, index: IndexReader, fleet: Fleet, *, max_hashes: int) -> None:
        self._index = index
        self._fleet = fleet
        self._max_hashes = max_hashes

    async def find(
        self, accesses: Iterable[TierAccess], prompt: Prompt, lora_name: str | None, cache_salt: str | None
    ) -> InTiers:
        """Return what the stores that workers reach hold of a prompt.

        An index that does not answer costs the tiers, and nothing else.
        """
        salt = chunk_salt(lora_name, cache_salt)
        tokens = prompt.tokens[: prompt.num_comparable_tokens]
        groups: dict[tuple[Pool, int], list[TierAccess]] = {}
        for access in set(accesses):
            pool = chunk_pool(access.model, access.chunk_size)
            if self._fleet.snapshot.stores.get(pool):
                groups.setdefault((pool, access.world_size), []).append(access)
        hashes = {size: hash_chunks(tokens, size) for size in {pool.block_size for pool, _ in groups}}
        chunks = {
            (pool, world_size): chunk_blocks(hashes[pool.block_size], salt, world_size)
            for pool, world_size in groups
        }
        found = await asyncio.gather(
            *(self._find_in(at[0], chunks[at], group) for at, group in groups.items())
        )
        return InTiers(
            {access: runs for each in found for access, runs in each.items()},
            tuple(self._chain(pool, blocks) for (pool, _), blocks in chunks.items()),
        )

    def _chain(self, pool: Pool, chunks: list[BlockHash]) -> Chain:
        return make_chain(pool, chunks, (), None, max_hashes=self._max_hashes, overlap_stride=1)

    async def _find_in(self, pool: Pool, chunks: list[BlockHash], accesses: Iterable[TierAccess]) -> Runs:
        try:
            slots = await self._index.holders_of(pool, chunks)
        except IndexUnavailable as error:
            metrics.TIER_LOOKUP_FAILURES.inc()
            _log.debug("the index does not tell what tiers hold", reason=str(error))
            return {}
        stores = self._fleet.snapshot.stores.get(pool, {})
        holders = [[stores[slot] for slot in slots[chunk] if slot in stores] for chunk in chunks]
        return {
            access: tuple(tier_runs(holders, frozenset(access.stores), access.chunk_size))
            for access in accesses
        }
