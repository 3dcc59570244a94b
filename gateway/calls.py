"""Calls to the index that outlive the patience of whoever waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Calls:
    """Keeps calls going on one event loop, whatever becomes of their callers.

    A call that is cut off costs its connection, and in an overload every new connection makes the
    overload worse. A reservation that is cut off may have been made all the same.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start `call`; its failure, if nobody waits any more, is nobody's."""
        task = asyncio.create_task(call)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def within(self, deadline_ms: int, task: asyncio.Task[T]) -> T:
        """Return the answer of a call that was started here.

        Raises:
            TimeoutError: it is late, and goes on.
        """
        async with asyncio.timeout(deadline_ms / 1000):
            return await asyncio.shield(task)

    async def finished(self) -> None:
        """Wait until no call is running."""
        while self._running:
            await asyncio.wait(self._running)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()
