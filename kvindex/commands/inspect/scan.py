"""Reads everything that the index holds of a pool, a slice at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from kvindex.blocks import Pool
from kvindex.index import IndexReader
from kvindex.worker import Entries

BUCKETS_PER_SLICE = 64
"""About 4,000 blocks, each bucket read by a command of its own."""


async def scan(reader: IndexReader, pool: Pool, *, max_buckets: int | None = None) -> AsyncIterator[Entries]:
    """Yield the pool's entries in slices, of `max_buckets` buckets at most.

    After each slice Redis is left alone for as long as it took, so that others get at least half of it.
    """
    bucket: int | None = 0
    while bucket is not None and (max_buckets is None or bucket < max_buckets):
        started_s = time.monotonic()
        left = BUCKETS_PER_SLICE if max_buckets is None else min(BUCKETS_PER_SLICE, max_buckets - bucket)
        entries = await reader.entries(pool, first_bucket=bucket, max_buckets=left)
        took_s = time.monotonic() - started_s
        yield entries
        bucket = entries.next_bucket
        await asyncio.sleep(took_s)
