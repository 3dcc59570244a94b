"""What of a transfer has not arrived, by blocks. Pure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from connectors.geometry import block_span


class Gaps:
    """Counts, for each block that a transfer fills, what is still missing.

    In arrays: a long prompt has thousands of blocks, and each chunk fills a hundred of them.

    Args:
        tokens: positions that are wanted.
        block_size: tokens of a block.
        num_parts: pieces in which a token may come: heads of layers.
    """

    def __init__(self, tokens: range, block_size: int, num_parts: int) -> None:
        self._block_size = block_size
        self._first_block = block_span(tokens, block_size).start
        self._num_missing = self._tokens_by_block(tokens) * num_parts

    def fill(self, tokens: range, num_parts: int) -> None:
        """Count so many parts of these tokens, which are among the wanted ones, as arrived."""
        span = block_span(tokens, self._block_size)
        first = span.start - self._first_block
        self._num_missing[first : first + len(span)] -= self._tokens_by_block(tokens) * num_parts

    def blocks(self) -> list[int]:
        """Return the positions, in the request, of blocks that something is missing of."""
        found: list[int] = (np.flatnonzero(self._num_missing > 0) + self._first_block).tolist()
        return found

    def _tokens_by_block(self, tokens: range) -> npt.NDArray[np.int64]:
        span = block_span(tokens, self._block_size)
        starts = np.arange(span.start, span.stop) * self._block_size
        num_tokens: npt.NDArray[np.int64] = np.minimum(starts + self._block_size, tokens.stop)
        num_tokens -= np.maximum(starts, tokens.start)
        return num_tokens
