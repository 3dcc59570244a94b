from gateway.tenants.keys import KEY_PREFIX, hash_key, is_key_hash, new_key


def test_keys_are_long_random_and_marked():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith(KEY_PREFIX) and len(key) == len(KEY_PREFIX) + 43 for key in keys)


def test_a_hash_is_sha256_in_hex():
    assert hash_key("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert is_key_hash(hash_key(new_key()))
    assert not is_key_hash(new_key())
    assert not is_key_hash(hash_key("abc") + "\n")
