"""Finds the prefixes that many prompts begin with. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from kvindex.blocks import BlockHash
from kvindex.commands.inspect.admin_api import Chain


class Prefix(msgspec.Struct, frozen=True, kw_only=True):
    """Leading blocks that several prompts share."""

    pool_id: str
    block: BlockHash
    """The last of them; its hash stands for all."""
    depth_blocks: int
    num_prompts: int


def hottest(chains: Iterable[Chain], limit: int) -> list[Prefix]:
    """Return the prefixes that most prompts share, each as deep as that many share it.

    A prefix that only one prompt has is not among them.
    """
    chains = list(chains)
    counts = Counter((chain.pool_id, block) for chain in chains for block in chain.hashes)
    found: dict[tuple[str, BlockHash], Prefix] = {}
    for chain in chains:
        places = list(chain.by_depth())
        for (depth, block), (_, following) in zip(places, [*places[1:], (0, None)], strict=True):
            count = counts[chain.pool_id, block]
            is_end = following is None or counts[chain.pool_id, following] < count
            if count > 1 and is_end:
                found[chain.pool_id, block] = Prefix(
                    pool_id=chain.pool_id, block=block, depth_blocks=depth, num_prompts=count
                )
    return sorted(found.values(), key=lambda each: (-each.num_prompts, -each.depth_blocks))[:limit]
