"""Gathers what `why` needs to know: earlier receipts, the pool's log, who holds the blocks now."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from itertools import dropwhile
from typing import Any

import msgspec

from gateway.admin.why import Memory, Missed, explain, first_missed, subjects
from gateway.fleet import Fleet
from gateway.receipts import Receipt, Receipts
from kvindex.blocks import BlockHash, Pool
from kvindex.history import PoolEvent, Removal
from kvindex.index import IndexReader
from kvindex.keys import LOG_EVENTS, LOG_REMOVALS

LINES_PER_CALL = 500
"""Of a log: half a megabyte at most, and well under a millisecond of Redis."""


class Historian:
    """Explains decisions that this gateway remembers."""

    def __init__(self, index: IndexReader, fleet: Fleet, receipts: Receipts) -> None:
        self._index = index
        self._fleet = fleet
        self._receipts = receipts

    async def why(self, receipt: Receipt, worker: str | None = None) -> dict[str, Any]:
        """Return what is known of the chosen worker, of one that held more, and of `worker` if a candidate.

        Raises:
            IndexUnavailable: the index does not answer.
        """
        choices = subjects(receipt, worker)
        found = (first_missed(receipt, choice) for choice in choices.values())
        memory = await self._remember(receipt, [missed for missed in found if missed is not None])
        # Comparing thousands of chains takes milliseconds, which belong to the requests.
        findings = {
            role: await asyncio.to_thread(explain, receipt, choice, memory)
            for role, choice in choices.items()
        }
        oldest = memory.earlier[-1].at if memory.earlier else receipt.at
        return {
            "decision_id": receipt.decision_id,
            "request_id": receipt.request_id,
            "at": receipt.at,
            "model": receipt.model,
            "mode": receipt.mode,
            "fallback": receipt.fallback,
            "prompt_tokens": receipt.prompt_tokens,
            "matched_tokens": receipt.matched_tokens,
            "receipts_since": oldest,
            "findings": msgspec.to_builtins(findings),
        }

    async def _remember(self, receipt: Receipt, missed: list[Missed]) -> Memory:
        older = dropwhile(lambda each: each is not receipt, self._receipts.latest())
        earlier = [each for each in older if each is not receipt]
        events: list[PoolEvent] = []
        removals: list[Removal] = []
        holders: dict[BlockHash, Collection[str]] = {}
        since_ms = 0
        wanted = {each.chain.pool: {other.block for other in missed} for each in missed}
        for pool, blocks in wanted.items():
            events += await self._events(pool)
            found, pool_since_ms = await self._removals(pool, blocks)
            removals += found
            since_ms = max(since_ms, pool_since_ms)
            holders |= await self._holders(pool, blocks)
        return Memory(earlier, events, removals, since_ms, holders)

    async def _events(self, pool: Pool) -> list[PoolEvent]:
        events: list[PoolEvent] = []
        after = "0"
        while len(events) <= 2 * LOG_EVENTS:
            page = await self._index.events(pool, after=after, max_events=LINES_PER_CALL)
            events += page
            if len(page) < LINES_PER_CALL:
                break
            after = page[-1].event_id
        return events

    async def _removals(self, pool: Pool, blocks: Collection[BlockHash]) -> tuple[list[Removal], int]:
        """Return the removals of `blocks`, and since when removals are remembered at all."""
        found: list[Removal] = []
        num_read, since_ms, after = 0, 0, "0"
        while num_read <= 2 * LOG_REMOVALS:
            page = await self._index.removals(pool, after=after, max_events=LINES_PER_CALL)
            if num_read == 0 and page:
                since_ms = page[0].at_ms
            num_read += len(page)
            found += [each for each in page if not set(each.blocks).isdisjoint(blocks)]
            if len(page) < LINES_PER_CALL:
                break
            after = page[-1].event_id
        return found, since_ms if num_read >= LOG_REMOVALS else 0

    async def _holders(self, pool: Pool, blocks: Collection[BlockHash]) -> dict[BlockHash, Collection[str]]:
        view = self._fleet.snapshot.pools.get(pool)
        names = {slot: each.worker.worker_id for slot, each in view.workers.items()} if view else {}
        held = await self._index.holders_of(pool, sorted(blocks))
        return {block: [names[slot] for slot in slots if slot in names] for block, slots in held.items()}
