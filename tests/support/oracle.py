"""What `match` may answer, found by looking at every block."""

from __future__ import annotations

from collections.abc import Container, Sequence


def true_overlap(hashes: Sequence[int], held: Container[int]) -> int:
    """Return how many leading blocks are held."""
    return next((depth for depth, block in enumerate(hashes) if block not in held), len(hashes))


def has_hole(hashes: Sequence[int], held: Container[int]) -> bool:
    """Say whether a block is held behind one that is not."""
    return any(block in held for block in hashes[true_overlap(hashes, held) :])


def check_overlap(hashes: Sequence[int], held: Container[int], overlap: int, stride: int) -> None:
    """Assert the documented bound: less than a stride below the truth, above it only at a later run's end."""
    truth = true_overlap(hashes, held)
    assert truth - stride < overlap
    if not has_hole(hashes, held):
        assert overlap <= truth
    assert overlap == 0 or hashes[overlap - 1] in held
    following = min(overlap + stride, len(hashes))
    assert overlap == len(hashes) or hashes[following - 1] not in held
