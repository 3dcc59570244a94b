"""Blocks of many layers out of a GPU's cache, and back, in one kernel.

A launch takes the interpreter as long as the GPU needs for some megabytes, and a chunk of 32 layers would be
32 launches of one, in the time of the engine's own thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog
import torch
import triton
import triton.language as tl

WORD_BYTES = 8
WORDS = 1024
"""Of a program."""

_log = structlog.get_logger(__name__)


@triton.jit(do_not_specialize=["first_plane", "num_blocks"])  # type: ignore[untyped-decorator]
def _move(  # noqa: PLR0917 - Triton's launcher takes them in this order
    planes: torch.Tensor,
    first_plane: int,
    ids: torch.Tensor,
    buffer: torch.Tensor,
    num_blocks: int,
    block_words: int,
    block_stride: int,
    is_gather: tl.constexpr,
    words: tl.constexpr,
) -> None:
    position = tl.program_id(0).to(tl.int64)
    plane = tl.program_id(1).to(tl.int64)
    offsets = tl.program_id(2) * words + tl.arange(0, words)
    is_inside = offsets < block_words
    cache = tl.load(planes + first_plane + plane).to(tl.pointer_type(tl.int64))
    cached = cache + tl.load(ids + position) * block_stride + offsets
    staged = buffer + (plane * num_blocks + position) * block_words + offsets
    if is_gather:
        tl.store(staged, tl.load(cached, is_inside), is_inside)
    else:
        tl.store(cached, tl.load(staged, is_inside), is_inside)


class BlockCopy:
    """Copies whole blocks of planes that are alike.

    Args:
        planes: tensors of (blocks, *block), for which `is_possible`. Not owned; they must stay where they
            are.
    """

    def __init__(self, planes: Sequence[torch.Tensor]) -> None:
        first = planes[0]
        self._planes = torch.tensor([plane.data_ptr() for plane in planes], device=first.device)
        self._block_words = first[0].nbytes // WORD_BYTES
        self._block_stride = first.stride(0) * first.itemsize // WORD_BYTES

    @classmethod
    def tried(cls, planes: Sequence[torch.Tensor]) -> BlockCopy | None:
        """Return one for these planes, or None and say so in the log where the kernel does not work.

        It must show that with others like them. That also compiles it, which takes about a second.
        """
        wanted = cls(planes)
        try:
            fault = None if wanted._works(planes[0].device) else "it copies wrongly"
        except Exception as error:  # of Triton, that has many: no compiler, a GPU that it does not know
            fault = f"{type(error).__name__}: {error}"
        if fault is None:
            return wanted
        _log.error("block_copy_off", reason=fault, device=str(planes[0].device), triton=triton.__version__)
        return None

    def _works(self, device: torch.device) -> bool:
        """Whether a copy of some blocks of this size out and back is what torch makes of it."""
        own = torch.Generator(device)  # the engine's, which samples its answers, must not notice
        shape = (3, 4, self._block_stride * WORD_BYTES)
        memory = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=own)
        blocks = memory[..., : self._block_words * WORD_BYTES]
        ids = torch.tensor([2, 0], device=device)
        picked = blocks[1:, ids]
        expected = memory.clone()
        expected[1:, ids, : picked.shape[-1]] = ~picked
        buffer = torch.empty(picked.numel(), dtype=torch.uint8, device=device)
        copy = BlockCopy(list(blocks))
        copy.gather(1, 2, ids, buffer)
        is_gathered = torch.equal(buffer.view_as(picked), picked)
        copy.scatter(1, 2, ids, buffer.bitwise_not_())
        return is_gathered and torch.equal(memory, expected)

    @staticmethod
    def is_possible(planes: Sequence[torch.Tensor]) -> bool:
        """Whether blocks are contiguous, equally far apart in all planes, and whole words."""
        blocks = [plane[0] for plane in planes]
        distances = {plane.stride(0) * plane.itemsize for plane in planes}
        in_bytes = [*distances, *(block.nbytes for block in blocks), *(block.data_ptr() for block in blocks)]
        is_alike = len(distances) == 1 and all(block.is_contiguous() for block in blocks)
        return is_alike and not any(number % WORD_BYTES for number in in_bytes)

    def gather(self, first_plane: int, num_planes: int, ids: torch.Tensor, buffer: torch.Tensor) -> None:
        """Enqueue copying blocks out of some planes.

        Args:
            first_plane: and so many from there on.
            num_planes: how many.
            ids: of the blocks; int64, on the planes' device.
            buffer: contiguous uint8, becomes (planes, blocks, *block).
        """
        self._enqueue(first_plane, num_planes, ids, buffer, is_gather=True)

    def scatter(self, first_plane: int, num_planes: int, ids: torch.Tensor, buffer: torch.Tensor) -> None:
        """Enqueue copying blocks back; the arguments are those of `gather`."""
        self._enqueue(first_plane, num_planes, ids, buffer, is_gather=False)

    def _enqueue(
        self, first_plane: int, num_planes: int, ids: torch.Tensor, buffer: torch.Tensor, *, is_gather: bool
    ) -> None:
        grid = (len(ids), num_planes, triton.cdiv(self._block_words, WORDS))
        _move[grid](
            self._planes,
            first_plane,
            ids,
            buffer.view(torch.int64),
            len(ids),
            self._block_words,
            self._block_stride,
            is_gather=is_gather,
            words=WORDS,
        )
