import pytest
from hypothesis import given
from hypothesis import strategies as st
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import _object_key_to_filename
from lmcache.v1.multiprocess.token_hasher import TokenHasher

from kvindex.blocks import Pool
from kvindex.chunks import (
    CHUNK_SCHEME,
    chunk_blocks,
    chunk_pool,
    chunk_salt,
    hash_chunks,
    read_file_name,
    read_key,
)
from tests.support.lmcache_recording import recorded_entries

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=80)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="@\0"), min_size=1).filter(
    lambda name: "-SEP-" not in name
)
SALTS = st.text(st.characters(codec="utf-8", exclude_characters="@/\\\0"), max_size=128)


@given(TOKENS, st.integers(1, 9))
def test_chunks_are_hashed_as_lmcache_does(tokens, chunk_size):
    assert hash_chunks(tokens, chunk_size) == TokenHasher(chunk_size).compute_chunk_hashes(tokens)


def test_the_names_of_lmcache_say_what_its_events_say():
    for entry in recorded_entries():
        key = entry["key"]
        theirs = ObjectKey(
            bytes.fromhex(key["chunk_hash_hex"]),
            key["model_name"],
            key["kv_rank"],
            key["object_group_id"],
            key["cache_salt"],
        )
        assert read_file_name(_object_key_to_filename(theirs)) == read_key(*key.values())


@given(NAMES, st.binary(min_size=32, max_size=32), st.integers(1, 8), st.integers(0, 7), SALTS)
def test_every_file_name_of_lmcache_can_be_read(model, chunk_hash, world_size, rank, salt):
    rank %= world_size
    kv_rank = ObjectKey.ComputeKVRank(world_size, rank, world_size, rank)
    key = read_file_name(_object_key_to_filename(ObjectKey(chunk_hash, model, kv_rank, 3, salt)))
    assert (key.chunk_hash, key.model, key.world_size, key.rank) == (chunk_hash, model, world_size, rank)
    assert (key.group_idx, key.salt) == (3, salt)


@given(st.text())
def test_other_file_names_are_refused(name):
    with pytest.raises(ValueError):  # noqa: PT011 (whatever is wrong with it)
        read_file_name(name)


@pytest.mark.parametrize(
    ("chunk_hash", "kv_rank", "group_idx"),
    [("zz" * 32, 0x01000100, 0), ("ab" * 31, 0x01000100, 0), ("ab" * 32, 0, 0), ("ab" * 32, 0x01010100, 0)],
)
def test_other_keys_are_refused(chunk_hash, kv_rank, group_idx):
    with pytest.raises(ValueError):  # noqa: PT011
        read_key(chunk_hash, "m", kv_rank, group_idx, "")


def test_rank_and_group_of_a_chunk_are_not_in_its_hash_and_all_else_is():
    def block(chunk_hash="ab" * 32, kv_rank=0x02000200, group_idx=0, salt=""):
        return read_key(chunk_hash, "m", kv_rank, group_idx, salt).block

    assert block() == block(kv_rank=0x02010201) == block(group_idx=1)
    others = [block(chunk_hash="ac" * 32), block(kv_rank=0x01000100), block(salt="s")]
    assert len({block(), *others}) == 4
    assert [block(salt="s")] == chunk_blocks([bytes.fromhex("ab" * 32)], "s", 2)


@given(st.none() | st.text(), st.none() | st.text(), st.none() | st.text(), st.none() | st.text())
def test_salts_separate_adapters_and_tenants_and_are_what_lmcache_takes(lora, salt, other_lora, other_salt):
    ours = chunk_salt(lora, salt)
    ObjectKey(b"", "m", 0, 0, ours)  # raises if it could not keep it
    same = ((lora or None), (salt or None)) == ((other_lora or None), (other_salt or None))
    assert (ours == chunk_salt(other_lora, other_salt)) == same
    assert (ours == "") == (not lora and not salt)


def test_a_pool_of_chunks_is_no_pool_of_blocks():
    assert chunk_pool("m", 256).pool_id != Pool("m", 256).pool_id
    assert chunk_pool("/models/m", 256) == Pool("models/m", 256, CHUNK_SCHEME)
