"""How fast KV comes out of the memory of an LMCache server into the engine, measured while it serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from connectors.pace import Line, Moved, Pace


class LoadTimes:
    """Times loads from when a request has its blocks to when the engine goes on with it.

    What lies on disk or in S3 is in memory by then: a lookup brings it there.

    Everything but `line` is called on the engine's thread, `line` on one other.

    Args:
        bytes_per_token: KV of one token, over all ranks.
        clock: seconds.
    """

    def __init__(self, bytes_per_token: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_per_token = bytes_per_token
        self._clock = clock
        self._pace = Pace(clock)
        self._under_way: dict[str, tuple[float, int]] = {}

    def begin(self, request_id: str, num_tokens: int) -> None:
        """Note that so many tokens of a request begin to be loaded."""
        self._under_way[request_id] = (self._clock(), num_tokens * self._bytes_per_token)

    def end(self, request_ids: Iterable[str]) -> None:
        """Note requests whose blocks were filled by somebody."""
        for request_id in request_ids:
            if (begun := self._under_way.pop(request_id, None)) is not None:
                began_at_s, num_bytes = begun
                self._pace.observe(Moved(num_bytes, self._clock() - began_at_s))

    def give_up(self, *request_ids: str) -> None:
        """Forget requests that end, loaded or not, and loads that failed."""
        for request_id in request_ids:
            self._under_way.pop(request_id, None)

    def line(self) -> Line:
        """Return what loads take, as far as is known."""
        return self._pace.line()
