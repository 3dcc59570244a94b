"""Waiting for a condition instead of for a time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 10.0


async def eventually(condition: Callable[[], T | Awaitable[T]], patience_s: float = PATIENCE_S) -> T:
    """Return the condition's first true outcome; the condition may be a coroutine function."""
    deadline = time.monotonic() + patience_s
    while True:
        outcome = condition()
        value: T = await outcome if isawaitable(outcome) else outcome  # type: ignore[assignment]
        if value:
            return value
        assert time.monotonic() < deadline, f"the condition did not hold within {patience_s} s"
        await asyncio.sleep(0.005)
