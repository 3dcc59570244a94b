import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvindex.blocks import (
    Pool,
    format_hash,
    hash_blocks,
    pack_hashes,
    parse_hash,
    root_hash,
    unpack_hashes,
)

ROOT = root_hash("m")
HASHES = st.integers(0, 2**64 - 1)
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_a_block_hash_is_the_digest_of_its_parent_and_its_tokens():
    [first, second] = hash_blocks(ROOT, [1, 2, 3, 4], 2)
    tokens = b"\x01\0\0\0\x02\0\0\0", b"\x03\0\0\0\x04\0\0\0"
    assert first == xxhash.xxh3_64_intdigest(ROOT.to_bytes(8, "little") + tokens[0])
    assert second == xxhash.xxh3_64_intdigest(first.to_bytes(8, "little") + tokens[1])


@given(TOKENS, st.integers(1, 8), st.integers(0, 40))
def test_hashing_may_stop_and_go_on_at_any_block(tokens, block_size, num_first_blocks):
    cut = num_first_blocks * block_size
    whole = hash_blocks(ROOT, tokens, block_size)
    head = hash_blocks(ROOT, tokens[:cut], block_size)
    tail = hash_blocks(head[-1] if head else ROOT, tokens[cut:], block_size)
    assert head + tail == whole
    assert len(whole) == len(tokens) // block_size


@given(TOKENS, st.data())
def test_a_changed_token_changes_its_block_and_all_behind_it(tokens, data):
    if not tokens:
        return
    at = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]]
    before, after = hash_blocks(ROOT, tokens, 4), hash_blocks(ROOT, changed, 4)
    assert before[: at // 4] == after[: at // 4]
    assert not set(before[at // 4 :]) & set(after[at // 4 :])


def test_extra_keys_count_where_they_stand():
    plain = hash_blocks(ROOT, range(6), 2)
    keyed = hash_blocks(ROOT, range(6), 2, [None, ("image", 1), None])
    assert keyed[0] == plain[0]
    assert keyed[1] != plain[1]
    assert keyed[2] != plain[2]
    assert hash_blocks(ROOT, range(6), 2, [None, (), None]) == plain


def test_model_lora_and_salt_separate_roots_and_empty_means_none():
    roots = [
        root_hash("m"),
        root_hash("n"),
        root_hash("m", lora_name="a"),
        root_hash("m", cache_salt="a"),
        root_hash("m", lora_name="a", cache_salt="a"),
    ]
    assert len(set(roots)) == len(roots)
    assert root_hash("m", lora_name="", cache_salt="") == root_hash("m")


@given(st.lists(HASHES))
def test_packing_is_reversible(hashes):
    assert unpack_hashes(pack_hashes(hashes)) == hashes
    assert len(pack_hashes(hashes)) == 8 * len(hashes)


@given(HASHES)
def test_the_text_form_is_reversible(block):
    assert parse_hash(format_hash(block)) == block
    assert parse_hash("0x" + format_hash(block)) == block


@pytest.mark.parametrize("text", ["", "xyz", "-1", "1" * 17])
def test_a_text_that_is_no_hash_is_refused(text):
    with pytest.raises(ValueError, match=r"hex|invalid literal"):
        parse_hash(text)


def test_pools_differ_by_model_block_size_and_scheme():
    ids = {pool.pool_id for pool in (Pool("m", 16), Pool("m", 32), Pool("n", 16), Pool("m", 16, "other"))}
    assert len(ids) == 4
    assert Pool("m", 16).pool_id == Pool("m", 16).pool_id
