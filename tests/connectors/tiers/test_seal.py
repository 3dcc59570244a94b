"""A seal tells what was stored from everything else."""

import pytest

from connectors.tiers.seal import SEAL_BYTES, is_sealed, seal

CONTENT = bytes(range(256)) * 8


def test_a_seal_fits_what_it_was_made_for():
    made = seal("name", memoryview(CONTENT))
    assert len(made) == SEAL_BYTES
    assert is_sealed("name", memoryview(CONTENT), made)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("other", CONTENT),
        ("name", CONTENT[:-1]),
        ("name", CONTENT + b"\0"),
        ("name", b"\1" + CONTENT[1:]),
        ("name", b""),
    ],
)
def test_nothing_else_fits(name: str, content: bytes):
    assert not is_sealed(name, memoryview(content), seal("name", memoryview(CONTENT)))


def test_a_damaged_seal_fits_nothing():
    made = bytearray(seal("name", memoryview(CONTENT)))
    for index in range(SEAL_BYTES):
        made[index] ^= 1
        assert not is_sealed("name", memoryview(CONTENT), made)
        made[index] ^= 1
