"""How much of a prompt's KV leaves at a time while it is computed. Pure."""

from __future__ import annotations

from math import sqrt

CHUNK_COST_S = 1e-3
"""What a chunk costs the prefill, whose thread waits for the interpreter meanwhile (docs/performance.md)."""

ASSUMED_GB_PER_S = 10.0
"""Of a wire that nothing has been seen of yet."""


def least_fill(total_bytes: int, gb_per_s: float) -> float:
    """Return how many bytes are worth a chunk of their own.

    In pieces of x bytes, `total_bytes / x` of them take `CHUNK_COST_S` each, and the last one leaves when all
    is computed and takes `x / bandwidth`. The sum is least where both are equal.

    Args:
        total_bytes: of the whole prompt.
        gb_per_s: of the wire; 0 if nobody knows.
    """
    return sqrt(total_bytes * CHUNK_COST_S * (gb_per_s or ASSUMED_GB_PER_S) * 1e9)
