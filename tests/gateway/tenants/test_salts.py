import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from gateway.tenants.salts import cache_salt

SECRET = b"s" * 32
NAMES = st.text(min_size=1, max_size=8)
SALTS = st.none() | st.text(max_size=8)


@given(left=st.tuples(NAMES, SALTS), right=st.tuples(NAMES, SALTS))
def test_two_salts_are_equal_only_for_equal_tenant_and_client_salt(left, right):
    assert (cache_salt(SECRET, *left) == cache_salt(SECRET, *right)) == (left == right)


def test_moving_a_border_between_tenant_and_client_salt_changes_the_salt():
    pairs = [("ab", "c"), ("a", "bc"), ("abc", None), ("abc", ""), ("abc", "None")]
    assert all(cache_salt(SECRET, *a) != cache_salt(SECRET, *b) for a, b in itertools.combinations(pairs, 2))


def test_another_secret_makes_another_salt():
    assert cache_salt(SECRET, "acme", None) != cache_salt(b"t" * 32, "acme", None)


def test_the_engine_takes_it():
    # vLLM: at most 128 characters, none of @ / \ and NUL.
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", cache_salt(SECRET, "acme", "x" * 10_000))
