"""A prefix cache as vLLM keeps it: physical blocks, reference counts, least recently used evicted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockCache:
    """Blocks of one engine. Identical blocks that were computed side by side are kept apart, as in vLLM.

    Source: vLLM 0.32 `vllm/v1/core/block_pool.py`.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._references = [0] * num_blocks
        self._hashes: dict[int, int] = {}
        self._copies: dict[int, list[int]] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def match(self, hashes: Sequence[int]) -> list[int]:
        """Return the blocks that hold the longest prefix of `hashes`; they are not taken yet."""
        found: list[int] = []
        for each in hashes:
            if each not in self._copies:
                break
            found.append(self._copies[each][0])
        return found

    def can_allocate(self, matched: Sequence[int], num_new: int) -> bool:
        """Whether `num_new` blocks are left once `matched` are taken."""
        idle = sum(not self._references[block] for block in matched)
        return len(self._free) - idle >= num_new

    def allocate(self, matched: Sequence[int], num_new: int) -> tuple[list[int], list[int]]:
        """Take `matched` and `num_new` fresh blocks; return all, and the hashes evicted for them."""
        for block in matched:
            self._free.pop(block, None)
        evicted: list[int] = []
        fresh = [self._free.popitem(last=False)[0] for _ in range(num_new)]
        for block in fresh:
            if (content := self._hashes.pop(block, None)) is not None:
                copies = self._copies[content]
                copies.remove(block)
                if not copies:
                    del self._copies[content]
                evicted.append(content)
        for block in (*matched, *fresh):
            self._references[block] += 1
        return [*matched, *fresh], evicted

    def store(self, block: int, content: int) -> None:
        """Make a taken block findable by its hash."""
        self._hashes[block] = content
        self._copies.setdefault(content, []).append(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Give a sequence's blocks back; its tail will be evicted before its head."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None

    def clear(self) -> bool:
        """Forget all contents; False, and nothing happens, while any block is taken."""
        if len(self._free) < self.num_blocks:
            return False
        self._hashes.clear()
        self._copies.clear()
        return True
