from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.labels import ANY_LABELS, parse_selector

H200 = {"gpu": "h200", "zone": "a", "note": ""}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("gpu=h200", True),
        ("gpu==h200", True),
        ("gpu=h100", False),
        ("gpu!=h100", True),
        ("gpu!=h200", False),
        ("gpu", True),
        ("!gpu", False),
        ("! rack", True),
        ("rack", False),
        ("rack!=7", True),
        ("rack=7", False),
        ("note=", True),
        ("gpu=", False),
        ("gpu = h200 , zone != b", True),
        ("gpu=h200,zone!=a", False),
        ("gpu=H200", False),
    ],
)
def test_what_a_selector_selects(text: str, matches: bool):
    assert parse_selector(text).matches(H200) is matches


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "gpu=h200,",
        "=h200",
        "gpu=a=b",
        "gpu>3",
        "gpu in (a,b)",
        "!gpu=h200",
        "gpu=a b",
        "-a",
        "a-=b",
    ],
)
def test_what_is_no_selector_is_repeated_with_what_would_be_one(text: str):
    with pytest.raises(ValueError, match=r"is no condition on a label: write key=value"):
        parse_selector(text)


def test_without_conditions_every_worker_will_do():
    assert ANY_LABELS.matches({})
    assert ANY_LABELS.matches(H200)


names = st.text(string.ascii_letters + string.digits, min_size=1, max_size=3)
conditions = st.tuples(names, st.sampled_from(["=", "!="]), names)


@given(st.lists(conditions, min_size=1, max_size=4), st.dictionaries(names, names, max_size=4))
def test_all_conditions_must_hold(wanted: list[tuple[str, str, str]], labels: dict[str, str]):
    selector = parse_selector(",".join(key + relation + value for key, relation, value in wanted))
    assert selector.matches(labels) is all(
        (labels.get(key) == value) is (relation == "=") for key, relation, value in wanted
    )
