"""How many gateways share every limit, kept up to date."""

from __future__ import annotations

import asyncio
import contextlib

from kvindex.errors import IndexUnavailable
from kvindex.roll_call import RollCall

INTERVAL_S = 1.0

TTL_S = 5 * INTERVAL_S
"""A gateway that died counts for this long: too little is let through then, never too much."""


class Peers:
    """Counts the gateways, for one event loop. While Redis is away the last count stands."""

    def __init__(self, roll_call: RollCall) -> None:
        self._roll_call = roll_call
        self._num_gateways = 1
        self._task: asyncio.Task[None] | None = None

    def num_gateways(self) -> int:
        """Return how many there are, this one included."""
        return self._num_gateways

    async def start(self, interval_s: float = INTERVAL_S) -> None:
        """Count now and from now on."""
        await self._count()
        self._task = asyncio.create_task(self._keep_counting(interval_s))

    async def stop(self) -> None:
        """Leave, so that the others take over this gateway's part at once."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        with contextlib.suppress(IndexUnavailable):
            await self._roll_call.leave()
        await self._roll_call.close()

    async def _keep_counting(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            await self._count()

    async def _count(self) -> None:
        with contextlib.suppress(IndexUnavailable):
            self._num_gateways = max(await self._roll_call.count(), 1)
