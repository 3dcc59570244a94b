from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import xor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvindex.block_state import BlockState
from kvindex.blocks import BlockHash, hash_blocks, root_hash
from kvindex.events import AllBlocksCleared, BlockRemoved, BlockStored, EngineHash, decode_batch
from tests.support.recordings import (
    BLOCK_SIZE,
    HYBRID,
    MODEL,
    NUM_BLOCKS,
    VERSIONS,
    cached_tokens_of,
    recorded_payloads,
    recorded_steps,
)


def store(
    hashes: list[EngineHash], tokens: list[int], parent: EngineHash | None = None, **fields: object
) -> BlockStored:
    values = {"block_size": 2, "medium": "GPU", "group_idx": 0} | fields
    return BlockStored(block_hashes=hashes, parent_block_hash=parent, token_ids=tokens, **values)  # type: ignore[arg-type]


def remove(*hashes: EngineHash, medium: str | None = "GPU", group_idx: int | None = 0) -> BlockRemoved:
    return BlockRemoved(block_hashes=list(hashes), medium=medium, group_idx=group_idx)


def apply(state: BlockState, payloads: Iterable[bytes]) -> None:
    for payload in payloads:
        for event in decode_batch(payload):
            match event:
                case BlockStored():
                    state.store(event)
                case BlockRemoved():
                    state.remove(event)
                case AllBlocksCleared():
                    state.clear()


@pytest.mark.parametrize("version", VERSIONS)
def test_after_the_recording_the_state_is_what_the_last_step_left(version: str):
    state = BlockState(MODEL, BLOCK_SIZE)
    apply(state, recorded_payloads(version))
    after_the_reset = cached_tokens_of(recorded_steps(version)[-1])
    assert set(state.hashes) == set(hash_blocks(root_hash(MODEL), after_the_reset, BLOCK_SIZE))
    assert not state.skipped


@pytest.mark.parametrize("version", VERSIONS)
def test_at_every_moment_of_the_recording_vllms_own_hits_are_held(version: str):
    """Before each step the state covers exactly the prompt tokens that vLLM then served from its cache."""
    state = BlockState(MODEL, BLOCK_SIZE)
    payloads = list(recorded_payloads(version))
    for step in recorded_steps(version):
        if step["step"] == "reset_prefix_cache":
            state.clear()  # the recorded event travels with the next step's first
            continue
        root = root_hash(MODEL, cache_salt=step["extra"].get("cache_salt"))
        prompt = hash_blocks(root, step["prompt_token_ids"], BLOCK_SIZE)
        assert num_hits(state, prompt) * BLOCK_SIZE == step["cached_tokens"]
        computed = hash_blocks(root, cached_tokens_of(step), BLOCK_SIZE)
        while not holds_all(state, computed):
            apply(state, [payloads.pop(0)])
            assert state.num_blocks <= NUM_BLOCKS


def test_of_a_hybrid_engine_the_group_with_full_attention_is_followed():
    """What vLLM served from its cache was held: all that was held, but where a sliding window was gone."""
    state = BlockState(MODEL, BLOCK_SIZE)
    payloads = list(recorded_payloads(HYBRID))
    hits, served = [], []
    for step in recorded_steps(HYBRID):
        prompt = hash_blocks(root_hash(MODEL), step["prompt_token_ids"], BLOCK_SIZE)
        hits.append(num_hits(state, prompt) * BLOCK_SIZE)
        served.append(step["cached_tokens"])
        computed = hash_blocks(root_hash(MODEL), cached_tokens_of(step), BLOCK_SIZE)
        while not holds_all(state, computed):
            apply(state, [payloads.pop(0)])
    assert hits == [0, 288, 0, 288, 0, 192, 288]
    assert served == [0, 288, 0, 288, 0, 0, 288]
    assert set(state.skipped) == {"attention", "group"}


def holds_all(state: BlockState, hashes: list[BlockHash]) -> bool:
    return all(block in state.hashes for block in hashes)


def num_hits(state: BlockState, hashes: list[BlockHash]) -> int:
    return next((index for index, block in enumerate(hashes) if block not in state.hashes), len(hashes))


def test_lora_name_salt_and_extra_keys_reach_the_hash():
    state = BlockState(MODEL, 2)
    keys = [["adapter", "salt"], ["adapter", ["image", 0]]]
    appeared = state.store(store([1, 2], [1, 2, 3, 4], lora_name="adapter", extra_keys=keys))
    root = root_hash(MODEL, lora_name="adapter", cache_salt="salt")
    assert appeared == hash_blocks(root, [1, 2, 3, 4], 2, [None, [["image", 0]]])
    assert state.store(store([3], [5, 6], parent=2, lora_name="adapter", extra_keys=[["adapter"]])) == (
        hash_blocks(appeared[-1], [5, 6], 2)
    )


def test_a_block_stays_until_its_last_copy_goes():
    state = BlockState(MODEL, 2)
    (block,) = state.store(store([1], [1, 2]))
    assert state.store(store([1], [1, 2])) == []
    assert state.remove(remove(1)) == []
    assert (state.num_blocks, state.digest) == (1, block)
    assert state.remove(remove(1)) == [block]
    assert (state.num_blocks, state.digest) == (0, 0)


def test_two_engine_hashes_of_the_same_content_are_one_block():
    state = BlockState(MODEL, 2)
    (block,) = state.store(store([1], [1, 2]))
    assert state.store(store([2], [1, 2])) == []
    assert state.remove(remove(1)) == []
    assert state.store(store([3], [3, 4], parent=2)) == hash_blocks(block, [3, 4], 2)
    assert state.store(store([4], [3, 4], parent=1)) == []
    assert state.skipped["parent"] == 1
    assert state.remove(remove(2)) == [block]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (store([1], [1, 2], medium="CPU"), "medium"),
        (store([1], [1, 2], group_idx=1), "group"),
        (store([1], [1, 2], kv_cache_spec_kind="sliding_window"), "attention"),
        (store([1], [1, 2, 3, 4], block_size=4), "block_size"),
        (store([1], [1, 2, 3]), "shape"),
        (store([1], [1, 2], extra_keys=[None, None]), "shape"),
        (store([1], [1, 2], parent=9), "parent"),
    ],
)
def test_what_cannot_be_indexed_is_skipped_and_counted(event: BlockStored, reason: str):
    state = BlockState(MODEL, 2)
    assert state.store(event) == []
    assert (state.skipped, state.num_blocks) == (Counter({reason: 1}), 0)


def test_removals_elsewhere_or_of_unknown_blocks_change_nothing():
    state = BlockState(MODEL, 2)
    state.store(store([1], [1, 2]))
    assert state.remove(remove(1, medium="CPU")) == []
    assert state.remove(remove(1, group_idx=2)) == []
    assert state.remove(remove(8)) == []
    assert state.num_blocks == 1
    assert state.skipped == Counter(medium=1, group=1, unknown=1)


def test_of_a_hybrid_model_the_group_of_the_whole_prefix_is_followed():
    """As vLLM tells of two sliding-window groups before the full one, and of a second full one."""
    state = BlockState(MODEL, 2)
    windows = {"kv_cache_spec_kind": "sliding_window"}
    full = {"kv_cache_spec_kind": "full_attention"}
    assert not state.is_following
    assert state.store(store([1], [1, 2], group_idx=0, **windows)) == []
    assert not state.is_following
    assert state.store(store([1], [1, 2], group_idx=1, block_size=1, **full)) == []
    (block,) = state.store(store([1], [1, 2], group_idx=2, **full))
    assert state.is_following
    assert state.store(store([1], [1, 2], group_idx=3, **full)) == []
    for elsewhere in (0, 1, 3):
        assert state.remove(remove(1, group_idx=elsewhere)) == []
    assert state.remove(remove(1, group_idx=2)) == [block]
    assert state.skipped == Counter(attention=1, block_size=1, group=4)


def test_an_engine_that_calls_its_only_group_nothing_is_followed():
    state = BlockState(MODEL, 2)
    (block,) = state.store(store([1], [1, 2], group_idx=None))
    assert state.remove(remove(1, group_idx=0)) == [block]


def test_an_engine_hash_that_changes_its_meaning_leaves_nothing_behind():
    state = BlockState(MODEL, 2)
    (block,) = state.store(store([1], [1, 2]))
    assert state.store(store([1], [3, 4])) == []
    assert state.remove(remove(1)) == []
    assert state.remove(remove(1)) == [block]
    assert (state.num_blocks, state.digest) == (0, 0)


def test_blocks_reported_again_by_a_request_that_reuses_them_stay_until_the_cache_is_cleared():
    """The documented price of vLLM's `kv_cache_report_mode` "full"; the connector switches it off."""
    state = BlockState(MODEL, 2)
    for _ in range(2):
        state.store(store([1], [1, 2]))
    assert state.remove(remove(1)) == []
    assert state.num_blocks == 1
    state.clear()
    assert state.num_blocks == 0


@dataclass
class PhysicalBlock:
    engine_hash: int
    ours: BlockHash


@given(st.data())
def test_against_a_model_that_keeps_physical_blocks(data: st.DataObject):
    """The naive model is a list of physical blocks; a block is present if any of them is it."""
    state, physical = BlockState(MODEL, 2), list[PhysicalBlock]()
    present = set[BlockHash]()
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["store", "store", "remove", "clear"]))
        if action == "store":
            parent = data.draw(st.sampled_from([None, *physical]))
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=6).filter(even))
            hashes = hash_blocks(parent.ours if parent else root_hash(MODEL), tokens, 2)
            engine_hashes = [block ^ 0xFFFF for block in hashes]
            appeared = state.store(store(engine_hashes, tokens, parent.engine_hash if parent else None))
            physical += [PhysicalBlock(*pair) for pair in zip(engine_hashes, hashes, strict=True)]
            present.update(appeared)
        elif action == "remove" and physical:
            gone = physical.pop(data.draw(st.integers(0, len(physical) - 1)))
            present.difference_update(state.remove(remove(gone.engine_hash)))
        elif action == "clear":
            state.clear()
            physical.clear()
            present.clear()
        assert set(state.hashes) == present == {block.ours for block in physical}
        assert state.num_blocks == len(present)
        assert state.digest == reduce(xor, present, 0)


def even(tokens: list[int]) -> bool:
    return len(tokens) % 2 == 0
