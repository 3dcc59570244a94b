"""A rank's KV cache as tensors: blocks out of it into a staging buffer, and back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from connectors.geometry import Chunk, Geometry, Layout, Wire, block_span, pieces
from kvindex.errors import ConfigError

if TYPE_CHECKING:
    from connectors.block_copy import BlockCopy

CANONICAL = "KTHD"


class KVCache:
    """The tensors of an engine's cache, one per layer, on one device; it owns none of them.

    `gather` and `scatter` enqueue their work on the current stream of a GPU, and have done it on a CPU.

    Args:
        layers: tensors with the axes that `geometry.layout` names. In the packed layout K and D may be one
            axis. geometry: what they are.

    Raises:
        ConfigError: a tensor is not what the geometry says.
    """

    def __init__(self, layers: Sequence[torch.Tensor], geometry: Geometry) -> None:
        self.geometry = geometry
        self.device = layers[0].device
        self._planes = [self._planes_of(layer) for layer in layers]
        """Per layer, per plane: (blocks, *block_shape)."""
        self._block_copy = _block_copy([plane for planes in self._planes for plane in planes])

    @property
    def num_blocks(self) -> int:
        """Physical blocks."""
        return self._planes[0][0].shape[0]

    def gather(self, chunk: Chunk, block_ids: Sequence[int], wire: Wire, buffer: torch.Tensor) -> None:
        """Copy a chunk's tokens out of the cache.

        Args:
            chunk: which layers and tokens.
            block_ids: the request's physical blocks, from position 0 on.
            wire: the layout that was agreed on.
            buffer: `wire.chunk_bytes` uint8 on the cache's device.
        """
        if wire.is_blocks:
            span = block_span(chunk.tokens, self.geometry.block_size)
            ids = self._index(block_ids[span.start : span.stop])
            is_whole = self._is_whole(wire)
            if self._block_copy is not None and is_whole:
                self._block_copy.gather(*self._plane_span(chunk), ids, buffer)
                return
            for plane, part in self._parts(chunk, len(ids), wire, buffer):
                if is_whole:
                    torch.index_select(plane, 0, ids, out=part)
                else:
                    part.copy_(plane.index_select(0, ids)[:, self._heads(wire)])
            return
        rows = self._rows(chunk, wire, buffer)
        heads = self._heads(wire)
        for piece in pieces(chunk.tokens, block_ids, self.geometry.block_size):
            ids = self._index(piece.blocks)
            slots = slice(piece.first_slot, piece.first_slot + piece.num_slots)
            for layer, row in zip(chunk.layers, rows, strict=True):
                target = row[:, piece.offset_tokens :][:, : len(ids) * piece.num_slots]
                kinds = target.split(self.geometry.num_kinds // self.geometry.num_planes)
                for plane, part in zip(self._planes[layer], kinds, strict=True):
                    blocks = self._canonical(plane.index_select(0, ids))[:, :, slots, heads]
                    part.unflatten(1, (len(ids), piece.num_slots)).copy_(blocks.transpose(0, 1))

    def scatter(self, chunk: Chunk, block_ids: Sequence[int], wire: Wire, buffer: torch.Tensor) -> None:
        """Copy a chunk's tokens into the cache; the arguments are those of `gather`."""
        if wire.is_blocks:
            span = block_span(chunk.tokens, self.geometry.block_size)
            ids = self._index(block_ids[span.start : span.stop])
            is_whole = self._is_whole(wire)
            if self._block_copy is not None and is_whole:
                self._block_copy.scatter(*self._plane_span(chunk), ids, buffer)
                return
            for plane, part in self._parts(chunk, len(ids), wire, buffer):
                if is_whole:
                    _put_blocks(plane, ids, part)
                else:
                    plane[ids, self._heads(wire)] = part
            return
        rows = self._rows(chunk, wire, buffer)
        heads = self._heads(wire)
        for piece in pieces(chunk.tokens, block_ids, self.geometry.block_size):
            ids = self._index(piece.blocks)
            slots = slice(piece.first_slot, piece.first_slot + piece.num_slots)
            for layer, row in zip(chunk.layers, rows, strict=True):
                source = row[:, piece.offset_tokens :][:, : len(ids) * piece.num_slots]
                kinds = source.split(self.geometry.num_kinds // self.geometry.num_planes)
                for plane, part in zip(self._planes[layer], kinds, strict=True):
                    blocks = part.unflatten(1, (len(ids), piece.num_slots)).transpose(0, 1)
                    self._canonical(plane)[ids, :, slots, heads] = blocks

    def _planes_of(self, layer: torch.Tensor) -> list[torch.Tensor]:
        geometry = self.geometry
        planes = list(layer.unbind(0)) if geometry.num_planes == 2 else [layer]
        shape = geometry.block_shape
        expected = (layer.shape[1] if geometry.num_planes == 2 else layer.shape[0], *shape)
        try:
            viewed = [plane.view(expected) for plane in planes]
        except RuntimeError:
            viewed = []
        if not viewed or str(layer.dtype) != f"torch.{geometry.dtype}":
            raise ConfigError(
                f"a cache tensor of shape {tuple(layer.shape)}, strides {layer.stride()} and {layer.dtype} "
                f"is not {geometry.layout.name} with blocks of {shape} {geometry.dtype}"
            )
        return viewed

    def _index(self, block_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(block_ids, dtype=torch.int64).to(self.device, non_blocking=True)

    def _is_whole(self, wire: Wire) -> bool:
        """Whether blocks on the wire have all heads of those in the cache."""
        return self.geometry.layout is not Layout.PACKED or wire.num_heads == len(self.geometry.heads)

    def _plane_span(self, chunk: Chunk) -> tuple[int, int]:
        """Return the first of a chunk's planes, among those of all layers, and how many they are."""
        num_planes = self.geometry.num_planes
        return chunk.first_layer * num_planes, chunk.num_layers * num_planes

    def _heads(self, wire: Wire) -> slice:
        if self.geometry.layout is Layout.MLA:
            return slice(0, 1)
        first = wire.first_head - self.geometry.heads.start
        return slice(first, first + wire.num_heads)

    def _canonical(self, plane: torch.Tensor) -> torch.Tensor:
        """View (blocks, *block_axes) as (blocks, K, T, H, D)."""
        axes = self.geometry.block_axes
        return plane.permute(0, *(1 + axes.index(axis) for axis in CANONICAL))

    def _rows(self, chunk: Chunk, wire: Wire, buffer: torch.Tensor) -> torch.Tensor:
        """View a staging buffer as (layer, K, token, head, D)."""
        geometry = self.geometry
        num_heads = 1 if geometry.layout is Layout.MLA else wire.num_heads
        shape = (chunk.num_layers, geometry.num_kinds, chunk.num_tokens, num_heads, geometry.head_size)
        return buffer.view(self._planes[0][0].dtype).view(shape)

    def _parts(
        self, chunk: Chunk, num_blocks: int, wire: Wire, buffer: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return each plane of a chunk's layers with its (blocks, *block_shape) of a staging buffer.

        Of packed blocks, a part of the heads may be meant.
        """
        planes = [plane for layer in chunk.layers for plane in self._planes[layer]]
        shape = list(self.geometry.block_shape)
        if self.geometry.layout is Layout.PACKED:
            shape[0] = wire.num_heads
        parts = buffer.view(planes[0].dtype).view(len(planes), num_blocks, *shape)
        return list(zip(planes, parts, strict=True))


def _block_copy(planes: Sequence[torch.Tensor]) -> BlockCopy | None:
    if not planes[0].is_cuda:
        return None
    from connectors.block_copy import BlockCopy  # Triton is there where torch has a GPU

    return BlockCopy.tried(planes) if BlockCopy.is_possible(planes) else None


def _put_blocks(plane: torch.Tensor, ids: torch.Tensor, blocks: torch.Tensor) -> None:
    """Write whole blocks.

    On a CPU by memmove, which lets go of the interpreter so that the wire goes on meanwhile. `index_copy_`
    copies numbers one by one and is slower; numpy is fast but keeps the wire waiting.
    """
    if plane.is_cuda:
        plane.index_copy_(0, ids, blocks)
        return
    size, target, source = plane[0].nbytes, plane.data_ptr(), blocks.data_ptr()
    for position, block in enumerate(ids.tolist()):
        ctypes.memmove(target + block * size, source + position * size, size)
