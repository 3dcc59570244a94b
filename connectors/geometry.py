"""How KV caches lie in memory, and who sends what to whom. Pure.

A cache has one tensor per layer. The axes of such a tensor are named by letters: B blocks, K key or value, T
tokens of a block, H heads of this rank, D numbers of a head. On the wire a chunk is in the **canonical**
layout, (layer, K, token, head, D), whatever the two caches look like; or, between two caches that look alike,
in **blocks** as they lie, which saves rearranging them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod

import msgspec

from kvindex.errors import ConfigError


class Layout(StrEnum):
    """The axes of a layer's tensor, outermost first."""

    NHD = "KBTHD"
    HND = "KBHTD"
    BLOCKS_NHD = "BKTHD"
    BLOCKS_HND = "BKHTD"
    NHD_PAIRS = "BTHKD"
    HND_PAIRS = "BHTKD"
    PACKED = "BHX"
    """vLLM's CPU cache: X is a head's keys and values of one block, in an order that its kernels choose."""
    MLA = "BTD"
    """One latent vector per token, which every tensor-parallel rank has whole."""


class Geometry(msgspec.Struct, frozen=True):
    """The cache of one tensor-parallel rank. Travels in the handshake."""

    layout: Layout
    num_layers: int
    block_size: int
    """Tokens of a block."""
    num_heads: int
    """KV heads of the whole model; 1 for MLA."""
    head_size: int
    """Numbers in a head's key, or in its value; in the latent vector for MLA."""
    dtype: str
    """As torch calls it: `bfloat16`."""
    itemsize: int
    """Bytes of a number."""
    packing: str = ""
    """What the order in `X` depends on."""
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def heads(self) -> range:
        """The model's KV heads that this rank holds; with fewer heads than ranks, several hold the same."""
        if self.layout is Layout.MLA:
            return range(1)
        if self.tp_size > self.num_heads:
            head = self.tp_rank * self.num_heads // self.tp_size
            return range(head, head + 1)
        share = self.num_heads // self.tp_size
        return range(self.tp_rank * share, (self.tp_rank + 1) * share)

    @property
    def num_kinds(self) -> int:
        """Length of axis K."""
        return 1 if self.layout is Layout.MLA else 2

    @property
    def num_planes(self) -> int:
        """Pieces of a layer's tensor that begin with axis B."""
        return 2 if self.layout.startswith("K") else 1

    @property
    def block_axes(self) -> str:
        """The axes of one block of a plane, with K and H also where their length is 1."""
        if self.layout is Layout.MLA:
            return "KTHD"
        if self.layout is Layout.PACKED:
            return "HX"
        axes = self.layout.replace("B", "")
        return axes if self.num_planes == 1 else "K" + axes.replace("K", "")

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Lengths of `block_axes`."""
        lengths = {
            "K": self.num_kinds // self.num_planes,
            "T": self.block_size,
            "H": len(self.heads),
            "D": self.head_size,
            "X": 2 * self.block_size * self.head_size,
        }
        return tuple(lengths[axis] for axis in self.block_axes)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer, all planes."""
        return prod(self.block_shape) * self.num_planes * self.itemsize

    def row_bytes(self, num_heads: int) -> int:
        """Bytes of one token of one layer, for so many heads."""
        return self.num_kinds * num_heads * self.head_size * self.itemsize

    def check(self) -> None:
        """Raise if no cache can be like this.

        Raises:
            ConfigError: heads cannot be divided among the ranks.
        """
        larger, smaller = max(self.num_heads, self.tp_size), min(self.num_heads, self.tp_size)
        if self.layout is not Layout.MLA and larger % smaller:
            raise ConfigError(
                f"{self.num_heads} KV heads cannot be divided among {self.tp_size} tensor-parallel ranks"
            )


def mismatch(ours: Geometry, theirs: Geometry) -> str | None:
    """Return why KV cannot be converted between the two, or None if it can be."""
    names = ["num_layers", "num_heads", "head_size", "dtype", "itemsize", "packing"]
    if Layout.PACKED in (ours.layout, theirs.layout):
        names.append("block_size")  # of such blocks, only heads can be taken out
    for name in names:
        here, there = getattr(ours, name), getattr(theirs, name)
        if here != there:
            return f"{name} is {here} here and {there} there"
    if ours.num_kinds != theirs.num_kinds or (ours.layout is Layout.PACKED) != (
        theirs.layout is Layout.PACKED
    ):
        return f"the cache is {ours.layout.name} here and {theirs.layout.name} there"
    return None


class Source(msgspec.Struct, frozen=True):
    """A sending rank, and which of the model's heads a receiver has from it; none: only to say so."""

    tp_rank: int
    first_head: int
    num_heads: int


def sources(receiver: Geometry, sender_tp_size: int) -> list[Source]:
    """Return from whom a receiving rank gets its heads.

    Every sending rank hears from somebody, those as well whose heads another rank has too; so each knows when
    it is no longer needed. Each head of the receiver comes from one rank.
    """
    wanted = receiver.heads
    found = []
    for rank in range(sender_tp_size):
        held = msgspec.structs.replace(receiver, tp_rank=rank, tp_size=sender_tp_size).heads
        is_copy = rank > 0 and (
            msgspec.structs.replace(receiver, tp_rank=rank - 1, tp_size=sender_tp_size).heads == held
        )
        common = range(max(wanted.start, held.start), min(wanted.stop, held.stop))
        if common and not is_copy:
            found.append(Source(rank, common.start, len(common)))
        elif is_copy and rank % receiver.tp_size == receiver.tp_rank:
            found.append(Source(rank, held.start, 0))
    return found


def num_receivers(sender: Geometry, receiver_tp_size: int) -> int:
    """Return how many receiving ranks name this sending rank among their sources."""
    receivers = (
        msgspec.structs.replace(sender, tp_rank=rank, tp_size=receiver_tp_size)
        for rank in range(receiver_tp_size)
    )
    return sum(
        any(source.tp_rank == sender.tp_rank for source in sources(receiver, sender.tp_size))
        for receiver in receivers
    )


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """What one staging buffer carries: some tokens of some layers."""

    first_layer: int
    num_layers: int
    first_token: int
    num_tokens: int

    @property
    def tokens(self) -> range:
        """Positions in the prompt."""
        return range(self.first_token, self.first_token + self.num_tokens)

    @property
    def layers(self) -> range:
        """Indices of the layers."""
        return range(self.first_layer, self.first_layer + self.num_layers)


@dataclass(frozen=True, slots=True)
class Wire:
    """What two ranks exchange."""

    is_blocks: bool
    """Blocks as they lie in both caches, instead of the canonical layout."""
    first_head: int
    num_heads: int
    """Of the model's heads."""

    @classmethod
    def between(cls, sender: Geometry, receiver: Geometry, source: Source) -> Wire:
        """Return how a receiver gets its heads from a sender with which there is no mismatch."""
        is_blocks = (sender.layout, sender.block_size) == (receiver.layout, receiver.block_size) and (
            sender.heads == receiver.heads or sender.layout is Layout.PACKED
        )
        return cls(is_blocks, source.first_head, source.num_heads)

    def chunk_bytes(self, geometry: Geometry, chunk: Chunk) -> int:
        """Return the size of a chunk, the same from either end's geometry."""
        num_tokens = chunk.num_tokens
        if self.is_blocks:
            num_tokens = len(block_span(chunk.tokens, geometry.block_size)) * geometry.block_size
        return chunk.num_layers * num_tokens * geometry.row_bytes(self.num_heads)


def block_span(tokens: range, block_size: int) -> range:
    """Return which of a request's blocks hold these tokens."""
    return range(tokens.start // block_size, -(-tokens.stop // block_size))


def plan_chunks(geometry: Geometry, wire: Wire, tokens: range, max_bytes: int) -> Iterator[Chunk]:
    """Cut tokens into chunks of at most `max_bytes`: as many blocks as fit, then as many layers.

    Raises:
        ConfigError: one layer of one block does not fit.
    """
    size = geometry.block_size
    block_bytes = size * geometry.row_bytes(wire.num_heads)
    max_blocks = max_bytes // block_bytes
    if not max_blocks:
        raise ConfigError(
            f"a block of one layer has {block_bytes} bytes and a staging buffer {max_bytes}: "
            "raise kvlane.chunk_bytes"
        )
    blocks = block_span(tokens, size)
    for first in range(blocks.start, blocks.stop, max_blocks):
        last = min(first + max_blocks, blocks.stop)
        start, stop = max(first * size, tokens.start), min(last * size, tokens.stop)
        num_layers = min(geometry.num_layers, max(1, max_blocks // (last - first)))
        for layer in range(0, geometry.num_layers, num_layers):
            yield Chunk(layer, min(num_layers, geometry.num_layers - layer), start, stop - start)


@dataclass(frozen=True, slots=True)
class Piece:
    """Adjacent tokens of one block or of several whole ones, and where they are in a chunk."""

    blocks: Sequence[int]
    """Physical blocks."""
    first_slot: int
    num_slots: int
    """Tokens of each block: all of it, or a part of a single one."""
    offset_tokens: int
    """Position in the chunk."""


def pieces(tokens: range, block_ids: Sequence[int], block_size: int) -> Iterator[Piece]:
    """Cut a token range at the blocks that are only partly in it: a head, whole blocks, a tail.

    Args:
        tokens: positions in the prompt.
        block_ids: the request's physical blocks, from position 0 on.
        block_size: tokens of a block.
    """
    position = tokens.start
    while position < tokens.stop:
        block, slot = divmod(position, block_size)
        num_whole = (tokens.stop - position) // block_size if slot == 0 else 0
        if num_whole:
            blocks, num_slots = block_ids[block : block + num_whole], block_size
        else:
            blocks, num_slots = block_ids[block : block + 1], min(block_size - slot, tokens.stop - position)
        yield Piece(blocks, slot, num_slots, position - tokens.start)
        position += len(blocks) * num_slots
