"""Staging: a bounded ring of buffers between cache and wire, and who copies to and from them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from connectors.errors import StagingExhausted
from connectors.transport import Request

POISON = 0xA5
EAGER_QUERIES = 20
"""So often a copy's end is asked for without a pause; then the thread waits for it."""


class StagingRing:
    """Buffers of equal size in one piece of memory. One event loop's.

    A buffer that is given back while a request still has it goes to quarantine and comes back when the
    request is finished, however long that takes: until then the wire may read or write it.

    Args:
        num_buffers: how many.
        buffer_bytes: size of each.
        device: where.
        poison: fill buffers when they come back, and raise if one was written after that. For tests.
    """

    def __init__(
        self, num_buffers: int, buffer_bytes: int, device: torch.device, *, poison: bool = False
    ) -> None:
        self.memory = torch.zeros(num_buffers, buffer_bytes, dtype=torch.uint8, device=device)
        self.num_quarantined = 0
        self._poison = poison
        self._free = deque(range(num_buffers))
        self._waiting: deque[asyncio.Future[int]] = deque()
        if poison:
            self.memory.fill_(POISON)

    @property
    def num_buffers(self) -> int:
        """All of them."""
        return self.memory.shape[0]

    @property
    def num_free(self) -> int:
        """Those that can be had at once."""
        return len(self._free)

    @property
    def buffer_bytes(self) -> int:
        """Size of each."""
        return self.memory.shape[1]

    async def acquire(self, timeout_s: float) -> int:
        """Return the index of a free buffer; who waits longest is served first.

        Raises:
            StagingExhausted: none came free in time, or all are in quarantine.
        """
        if self._free:
            index = self._free.popleft()
        else:
            index = await self._wait(timeout_s)
        if self._poison and not bool((self.memory[index] == POISON).all()):
            raise AssertionError(f"staging buffer {index} was written after it was given back")
        return index

    def release(self, index: int, request: Request | None = None) -> None:
        """Give a buffer back; it is free again once `request` is finished.

        Args:
            index: the buffer.
            request: the last one that had it.
        """
        if request is None or request.finished.done():
            self._put_back(index)
            return
        self.num_quarantined += 1

        def end_quarantine(_: asyncio.Future[None]) -> None:
            self.num_quarantined -= 1
            self._put_back(index)

        request.finished.add_done_callback(end_quarantine)

    async def _wait(self, timeout_s: float) -> int:
        if self.num_quarantined == self.num_buffers:
            raise StagingExhausted(f"all {self.num_buffers} staging buffers are held by lost peers")
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    return await turn
                except asyncio.CancelledError:
                    if not turn.cancelled():  # it came in the same moment
                        self._put_back(turn.result())
                    raise
        except TimeoutError as error:
            raise StagingExhausted(f"no staging buffer came free within {timeout_s:g} s") from error

    def _put_back(self, index: int) -> None:
        if self._poison:
            self.memory[index].fill_(POISON)
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(index)
                return
        self._free.append(index)


class Copier:
    """Copies between cache and staging, one way. On one event loop, which looks after the wire meanwhile.

    On a CPU a thread copies. On a GPU the event loop itself enqueues the copy on a stream of its own, behind
    the work that it must wait for: handing it to a thread takes longer. The thread waits for the end, which
    may be as far away as a step's: who asked for it again and again would keep the interpreter from the
    engine.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = None
        if device.type == "cuda":
            # Before the engine's kernels: a copy is short, and a peer waits for it.
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        # One thread beside the engine's: torch would start as many again for each.
        self._executor = ThreadPoolExecutor(1, "kvlane-copy", initializer=lambda: torch.set_num_threads(1))

    async def run(self, copy: Callable[[], None], after: torch.cuda.Event | None = None) -> None:
        """Run `copy`, on a GPU after the work that `after` marks; return when it is complete."""
        run_in_thread = asyncio.get_running_loop().run_in_executor
        if self._stream is None:
            await run_in_thread(self._executor, copy)
            return
        is_soon = after is None or after.query()  # type: ignore[no-untyped-call]
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            if not is_soon:
                self._stream.wait_event(after)
            copy()
            copied.record()
        for _ in range(EAGER_QUERIES if is_soon else 0):
            if copied.query():  # type: ignore[no-untyped-call]
                return
            await asyncio.sleep(0)
        await run_in_thread(self._executor, copied.synchronize)

    def close(self) -> None:
        """End the thread when its copies are done. Idempotent."""
        self._executor.shutdown()
