"""Waiting until something is so, on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Condition:
    """`asyncio.Condition` without its lock: what changes between two turns of the loop needs none.

    Who waits is woken when what it waits for is so, not at every change: a prompt's steps change much that
    its receivers do not wait for.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}

    def notify(self) -> None:
        """Say that something has changed."""
        for waiting, is_so in self._waiting.items():
            if not waiting.done() and is_so():
                waiting.set_result(None)

    async def wait_for(self, is_so: Callable[[], bool]) -> None:
        """Return when `is_so` is true."""
        while not is_so():
            waiting = asyncio.get_running_loop().create_future()
            self._waiting[waiting] = is_so
            try:
                await waiting
            finally:
                del self._waiting[waiting]
