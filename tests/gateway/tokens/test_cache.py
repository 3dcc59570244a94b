"""The cache keeps what was used last, and no more than it may."""

from __future__ import annotations

from gateway.tokens.cache import ENTRY_BYTES, ByteCache

SIZE = 100


def room_for(num_entries: int) -> ByteCache:
    return ByteCache(num_entries * (ENTRY_BYTES + SIZE))


def entries(*names: str) -> dict[bytes, bytes]:
    return {name.encode(): name.encode() * SIZE for name in names}


def known(cache: ByteCache, names: str) -> str:
    found = cache.get([name.encode() for name in names])
    assert all(
        value is None or value == name.encode() * SIZE for name, value in zip(names, found, strict=True)
    )
    return "".join(name for name, value in zip(names, found, strict=True) if value is not None)


def test_what_was_used_last_is_kept():
    cache = room_for(3)
    for name in "abc":
        cache.put(entries(name))
    assert known(cache, "a") == "a"
    cache.put(entries("d"))
    assert known(cache, "abcd") == "acd"


def test_of_one_prompt_the_beginning_is_kept_longest():
    cache = room_for(3)
    cache.put(entries(*"abc"))
    cache.put(entries("d"))
    assert known(cache, "abcd") == "abd"
    cache.put(entries("e"))
    assert known(cache, "abde") == "abe"


def test_bytes_are_counted():
    cache = room_for(2)
    cache.put(entries("a"))
    cache.put(entries("a"))
    assert cache.num_bytes == ENTRY_BYTES + SIZE
    cache.put(entries(*"bcd"))
    assert cache.num_bytes == 2 * (ENTRY_BYTES + SIZE)
    cache.put({b"large": bytes(10 * SIZE + ENTRY_BYTES)})
    assert cache.num_bytes == 0


def test_nothing_is_remembered_without_a_budget():
    cache = ByteCache(0)
    cache.put(entries("a"))
    assert known(cache, "a") == ""
    assert cache.num_bytes == 0
