"""Our own receipts as a trace (`gateway.recording`)."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import xxhash

from gateway.errors import TraceError
from gateway.recording import Recorded
from gateway.replay.trace import TraceRequest
from kvindex.blocks import HASH_BYTES, unpack_hashes

Blocks = tuple[int, ...]


def read_recordings(file: Path, lines: Iterable[str]) -> tuple[int, list[tuple[float, TraceRequest]]]:
    """Return the block size, and each request with its time in ms.

    Raises:
        TraceError: a line is no receipt, or they are of pools with blocks of several sizes.
    """
    found = [_read(file, number, line) for number, line in enumerate(lines, 1)]
    sizes = {each.block_size for each in found if each.block_size}
    if len(sizes) > 1:
        raise TraceError(
            f"{file} is of workers with blocks of {', '.join(map(str, sorted(sizes)))} tokens: "
            "keep the lines of one size"
        )
    (size,) = sizes or {1}
    blocks = dict(_expanded(found))
    return size, [
        (
            each.at_s * 1000,
            TraceRequest(0.0, max(1, each.prompt_tokens), max(1, each.output_tokens), blocks[number]),
        )
        for number, each in enumerate(found)
    ]


def _read(file: Path, number: int, line: str) -> Recorded:
    try:
        each = msgspec.json.decode(line, type=Recorded)
        hashes = base64.b64decode(each.hashes, validate=True)
    except (msgspec.DecodeError, ValueError) as error:
        raise TraceError(f"{file}:{number}: {error}") from error
    if each.stride < 1 or len(hashes) != each.num_blocks // each.stride * HASH_BYTES:
        raise TraceError(f"{file}:{number}: these are not the hashes of {each.num_blocks} blocks")
    return each


def _expanded(found: list[Recorded]) -> Iterator[tuple[int, Blocks]]:
    """Yield the content of every block, by place in `found`.

    A hash stands for all of the prompt before it. So what a long prompt, which has every fourth hash, has
    between two of them is known where a short one has the second of these, too; it is made up elsewhere,
    the same for equal hashes. What follows the last hash is left out.
    """
    strides = sorted({each.stride for each in found})
    groups: dict[tuple[int, int], Blocks] = {}
    for stride in strides:
        for number, each in enumerate(found):
            if each.stride != stride:
                continue
            blocks: list[int] = []
            for block in unpack_hashes(base64.b64decode(each.hashes)):
                blocks += groups.get((stride, block)) or _made_up(block, stride)
            for coarser in strides[strides.index(stride) + 1 :]:
                for end in range(coarser, len(blocks) + 1, coarser):
                    groups.setdefault((coarser, blocks[end - 1]), tuple(blocks[end - coarser : end]))
            yield number, tuple(blocks)


def _made_up(block: int, stride: int) -> Blocks:
    """Return the contents of `stride` blocks, of which `block` is the last."""
    before = (xxhash.xxh3_64_intdigest(f"{block} {index}".encode()) for index in range(stride - 1))
    return *before, block
