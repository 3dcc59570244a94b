"""Prefixes that a worker has been asked to compute and does not hold yet. Pure.

Requests that share a new prefix often arrive together, before the first of them has stored a block. What each
was sent for is kept beside its reservation, so that the others can follow it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from kvindex.blocks import BlockHash

MOST_PENDING = 64
"""Pending prefixes that a pool keeps at a time: 110 bytes each at most, read by every `match`. More are
refused, not queued: their requests are placed all the same."""

SIXTEENTHS = (1, 2, 4, 8, 12, 14, 15, 16)
"""Where the part to be computed is sampled: fine at its end, for siblings mostly share all but their last
turn, and finer than halves at its beginning, for long prompts on a short common start."""


class Sample(msgspec.Struct, frozen=True):
    """A few blocks of a prompt, by depth."""

    depths: tuple[int, ...]
    """Blocks of the prefix that each hash ends, ascending."""
    hashes: tuple[BlockHash, ...]


class Pending(msgspec.Struct, frozen=True):
    """A sample of what a worker has been asked to compute."""

    slot: int
    sample: Sample


def take_sample(hashes: Sequence[BlockHash], num_held: int) -> Sample:
    """Return a sample of the blocks of a prompt behind the first `num_held`; empty if there are none."""
    num_new = len(hashes) - num_held
    depths = sorted({num_held + -(-num_new * part // 16) for part in SIXTEENTHS}) if num_new > 0 else []
    return Sample(tuple(depths), tuple(hashes[depth - 1] for depth in depths))


def pending_blocks(pending: Iterable[Pending], hashes: Sequence[BlockHash]) -> dict[int, int]:
    """Return, by slot, how many leading blocks of a prompt are known to be on their way there."""
    found: dict[int, int] = {}
    for each in pending:
        if depth := _common_depth(each.sample, hashes):
            found[each.slot] = max(depth, found.get(each.slot, 0))
    return found


def _common_depth(sample: Sample, hashes: Sequence[BlockHash]) -> int:
    # Hashes are chained: the deepest that is equal tells of all before it.
    for depth, block in zip(reversed(sample.depths), reversed(sample.hashes), strict=True):
        if depth <= len(hashes) and hashes[depth - 1] == block:
            return depth
    return 0
