"""A worker's KV cache: blocks in use, and least recently used ones that may be found again."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

_UNSEEN = itertools.count(-1, -1)
"""Contents that no prompt of a trace has: what an engine generated itself."""


class Allocation:
    """The blocks of one running request."""

    __slots__ = ("blocks", "num_blank")

    def __init__(self, blocks: list[int], num_blank: int) -> None:
        self.blocks = blocks
        """Content of the leading blocks, shared with whoever holds the same."""
        self.num_blank = num_blank
        """Blocks without known content."""


class BlockCache:
    """Blocks of one worker. A block in use stays; of the others the least recently used goes first.

    Source: vLLM 0.32 `vllm/v1/core/block_pool.py`: freed blocks keep their content until they are needed,
    a request's last block goes before its first.

    Args:
        num_blocks: capacity.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.changes: dict[int, bool] = {}
        """Content stored (True) or evicted (False) since the reader last took them away."""
        self._num_blank = num_blocks
        self._in_use: dict[int, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def num_used_blocks(self) -> int:
        """Return the blocks that running requests hold."""
        return self.num_blocks - self._num_blank - len(self._unused)

    @property
    def num_cached_blocks(self) -> int:
        """Return the blocks whose content may be found again."""
        return len(self._in_use) + len(self._unused)

    def take_changes(self) -> dict[int, bool]:
        """Return `changes`, which begin anew."""
        taken, self.changes = self.changes, {}
        return taken

    def num_leading(self, blocks: Sequence[int]) -> int:
        """Return how many of the leading `blocks` are here."""
        in_use, unused = self._in_use, self._unused
        for depth, block in enumerate(blocks):
            if block not in in_use and block not in unused:
                return depth
        return len(blocks)

    def allocate(self, leading: Sequence[int], num_more: int) -> Allocation | None:
        """Hold the blocks `leading`, which are here, and `num_more` blank ones; None if there is no room."""
        num_revived = sum(block in self._unused for block in leading)
        if self._num_blank + len(self._unused) - num_revived < num_more:
            return None
        for block in leading:
            self._unused.pop(block, None)
            self._in_use[block] = self._in_use.get(block, 0) + 1
        while self._num_blank < num_more:
            evicted, _ = self._unused.popitem(last=False)
            self._num_blank += 1
            if evicted >= 0:
                self.changes[evicted] = False
        self._num_blank -= num_more
        return Allocation(list(leading), num_more)

    def fill(self, allocation: Allocation, blocks: Sequence[int]) -> None:
        """Give the next blank blocks of `allocation` the content `blocks`.

        Content that another request has stored meanwhile is shared from here on.
        """
        for block in blocks:
            if block in self._in_use:
                self._in_use[block] += 1
                self._num_blank += 1
            elif block in self._unused:
                del self._unused[block]
                self._in_use[block] = 1
                self._num_blank += 1
            else:
                self._in_use[block] = 1
                if block >= 0:
                    self.changes[block] = True
            allocation.num_blank -= 1
            allocation.blocks.append(block)

    def free(self, allocation: Allocation, num_generated: int) -> None:
        """Take back `allocation`, of which `num_generated` blank blocks hold an answer by now."""
        self._num_blank += allocation.num_blank - num_generated
        for _ in range(num_generated):
            self._unused[next(_UNSEEN)] = None
        for block in reversed(allocation.blocks):
            holders = self._in_use[block] - 1
            if holders:
                self._in_use[block] = holders
            else:
                del self._in_use[block]
                self._unused[block] = None
