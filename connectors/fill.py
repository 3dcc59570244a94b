"""How much of a prompt's KV leaves at a time while it is computed. Pure."""

from __future__ import annotations

from math import sqrt

CHUNK_COST_S = 1e-3
"""What a chunk costs the prefill, whose thread waits for the interpreter meanwhile (docs/performance.md)."""

ASSUMED_GB_PER_S = 10.0
"""Of a wire that nothing has been seen of yet."""

_KEPT = 0.9
"""What an observation still counts when the next one comes."""


class WireRate:
    """Bytes over time of the latest chunks. Cruder than `Pace`, which takes as long as a chunk to say."""

    def __init__(self) -> None:
        self._num_bytes = 0.0
        self._seconds = 0.0

    def observe(self, num_bytes: int, seconds: float) -> None:
        """Take a chunk into account that was so long on its way."""
        self._num_bytes = self._num_bytes * _KEPT + num_bytes
        self._seconds = self._seconds * _KEPT + seconds

    @property
    def gb_per_s(self) -> float:
        """0 until something was observed."""
        return self._num_bytes / self._seconds / 1e9 if self._seconds else 0.0


def least_fill(total_bytes: int, gb_per_s: float) -> float:
    """Return how many bytes are worth a chunk of their own.

    In pieces of x bytes, `total_bytes / x` of them take `CHUNK_COST_S` each, and the last one leaves when all
    is computed and takes `x / bandwidth`. The sum is least where both are equal.

    Args:
        total_bytes: of the whole prompt.
        gb_per_s: of the wire; 0 if nobody knows.
    """
    return sqrt(total_bytes * CHUNK_COST_S * (gb_per_s or ASSUMED_GB_PER_S) * 1e9)


def whole_buffers(num_tokens: int, buffer_tokens: int) -> int:
    """Return how many of these tokens fill buffers; all where they do not fill one.

    What is over goes with the next ones: alone it costs as much as a full buffer.

    Args:
        num_tokens: that could leave, while more are being computed.
        buffer_tokens: of a buffer, all layers together.
    """
    return num_tokens // buffer_tokens * buffer_tokens or num_tokens
