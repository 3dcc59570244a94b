"""What an engine's prefix cache holds, in our hashes, followed event by event. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from kvindex.blocks import BlockHash, hash_blocks, root_hash
from kvindex.events import BlockRemoved, BlockStored, EngineHash, split_extra_keys

_DEVICE_MEDIA = frozenset({None, "GPU"})
# Kinds of attention whose block is of use only with every block before it, and is kept as long as they are.
_WHOLE_PREFIX_KINDS = frozenset({"full_attention", "mla_attention", "sink_full_attention"})


class BlockState:
    """Follows one engine's device cache.

    The engine keeps identical blocks apart: it reports each physical copy when it is stored and when it
    is evicted. A block is present while it has at least one copy. (Copies that are reported twice, as vLLM
    does for requests with `kv_cache_report_mode` "full", are counted twice and stay until the cache is
    cleared.)

    A hybrid model keeps the blocks of each KV cache group apart. One group is followed, the first whose
    attention is over the whole prefix, whatever its index: its blocks say how far a prefix may be reused.
    Blocks of a sliding window or a recurrent state stand for a place and not for what is before it.
    Engines that do not name the kind of attention have their first group followed.

    Args:
        model: the base model's served name.
        block_size: tokens per block; events about blocks of another size are skipped.
    """

    def __init__(self, model: str, block_size: int) -> None:
        self._model = model
        self._block_size = block_size
        # One of our hashes may stand for several of the engine's: a LoRA name that was given to another
        # adapter changes the engine's hash and not ours. So both sides are counted.
        self._ours: dict[EngineHash, BlockHash] = {}
        self._engine_copies: Counter[EngineHash] = Counter()
        self._copies: Counter[BlockHash] = Counter()
        self._digest = 0
        self._group_idx: int | None = None
        self.skipped: Counter[str] = Counter()
        """Blocks left out, by reason: medium, group, attention, block_size, shape, parent, unknown."""

    @property
    def is_following(self) -> bool:
        """Whether the engine has shown a KV cache group that can be indexed."""
        return self._group_idx is not None

    @property
    def num_blocks(self) -> int:
        """Distinct blocks present."""
        return len(self._copies)

    @property
    def digest(self) -> int:
        """XOR of the hashes present, as the index keeps it."""
        return self._digest

    @property
    def hashes(self) -> Collection[BlockHash]:
        """The blocks present; a live view."""
        return self._copies.keys()

    def clear(self) -> None:
        """Forget every block."""
        self._ours.clear()
        self._engine_copies.clear()
        self._copies.clear()
        self._digest = 0

    def store(self, event: BlockStored) -> list[BlockHash]:
        """Count the event's blocks in; return those that were absent."""
        if reason := self._why_skipped(event):
            self.skipped[reason] += len(event.block_hashes)
            return []
        salt, extra_keys = split_extra_keys(event)
        parent = (
            root_hash(self._model, lora_name=event.lora_name, cache_salt=salt)
            if event.parent_block_hash is None
            else self._ours[event.parent_block_hash]
        )
        hashes = hash_blocks(parent, event.token_ids, self._block_size, extra_keys)
        appeared: list[BlockHash] = []
        for engine_hash, stored in zip(event.block_hashes, hashes, strict=True):
            # An engine's hash keeps its meaning while it has copies: removals find what stores counted.
            block = self._ours.setdefault(engine_hash, stored)
            self._engine_copies[engine_hash] += 1
            self._copies[block] += 1
            if self._copies[block] == 1:
                self._digest ^= block
                appeared.append(block)
        return appeared

    def remove(self, event: BlockRemoved) -> list[BlockHash]:
        """Count one copy of each of the event's blocks out; return those that have none left."""
        if reason := self._why_elsewhere(event):
            self.skipped[reason] += len(event.block_hashes)
            return []
        vanished: list[BlockHash] = []
        for engine_hash in event.block_hashes:
            block = self._ours.get(engine_hash)
            if block is None:
                self.skipped["unknown"] += 1
                continue
            self._engine_copies[engine_hash] -= 1
            if not self._engine_copies[engine_hash]:
                del self._engine_copies[engine_hash], self._ours[engine_hash]
            self._copies[block] -= 1
            if not self._copies[block]:
                del self._copies[block]
                self._digest ^= block
                vanished.append(block)
        return vanished

    def _why_skipped(self, event: BlockStored) -> str | None:
        """Return why these blocks cannot be indexed, None if they can."""
        if reason := self._why_elsewhere(event) or self._why_unsuitable(event):
            return reason
        self._group_idx = _group_of(event)
        num_blocks = len(event.block_hashes)
        if len(event.token_ids) != num_blocks * self._block_size or (
            event.extra_keys and len(event.extra_keys) != num_blocks
        ):
            return "shape"
        if event.parent_block_hash is not None and event.parent_block_hash not in self._ours:
            return "parent"
        return None

    def _why_unsuitable(self, event: BlockStored) -> str | None:
        """Return why the event's KV cache group cannot be followed."""
        if event.kv_cache_spec_kind is None:
            if _group_of(event):
                return "group"
        elif event.kv_cache_spec_kind not in _WHOLE_PREFIX_KINDS:
            return "attention"
        return "block_size" if event.block_size != self._block_size else None

    def _why_elsewhere(self, event: BlockStored | BlockRemoved) -> str | None:
        """Return why the event is not about the part of the cache that is followed."""
        if event.medium not in _DEVICE_MEDIA:
            return "medium"
        return "group" if self._group_idx not in (None, _group_of(event)) else None


def _group_of(event: BlockStored | BlockRemoved) -> int:
    return event.group_idx or 0
