import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvindex.errors import MalformedEvent
from kvindex.tiers.events import EventType, decode_events, decode_page, decode_registration
from tests.support.lmcache_recording import recorded_lines

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def bodies(path: str) -> list[bytes]:
    return [json.dumps(line["b"]).encode() for line in recorded_lines() if line.get("p") == path]


def test_everything_that_was_recorded_is_read():
    batches = [batch for body in bodies("/events") for batch in decode_events(body)]
    assert {batch.event_type for batch in batches} == set(EventType)
    assert {(batch.level, batch.backend) for batch in batches} == {
        ("l1", "dram"),
        ("l1", ""),
        ("l2", "fs"),
        ("l2", "s3"),
    }
    assert {key.model for batch in batches for key in batch.keys} == {"tinykv"}
    assert {key.salt for batch in batches for key in batch.keys} == {"", "tenantA"}
    [first, *_] = [batch for batch in batches if batch.event_type is EventType.STORE]
    assert (first.instance_id, first.sequence, len(first.keys), first.object_bytes) == (
        "mp-fs",
        3,
        2,
        8 << 20,
    )
    assert [batch.capacity_bytes for batch in batches[:2]] == [2 << 30, 0]


def test_a_registration_says_where_the_server_is():
    assert {decode_registration(body).url for body in bodies("/instances")} == {
        "http://127.0.0.1:6580",
        "http://127.0.0.1:6680",
    }
    assert decode_registration(b'{"ip": "::1", "http_port": 1}').url == "http://[::1]:1"


@pytest.mark.parametrize("decode", [decode_events, decode_registration, decode_page])
@given(body=st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_anything_else_is_refused(decode, body):
    with pytest.raises(MalformedEvent):
        decode(body)


@given(st.data())
def test_a_body_with_one_value_replaced_is_read_or_refused(data):
    body = json.loads(data.draw(st.sampled_from(bodies("/events"))))
    at = body
    while isinstance(at, dict | list) and at:
        place = data.draw(
            st.sampled_from(sorted(at)) if isinstance(at, dict) else st.integers(0, len(at) - 1)
        )
        if not isinstance(at[place], dict | list) or not at[place] or data.draw(st.booleans()):
            at[place] = data.draw(JSON)
            break
        at = at[place]
    with contextlib.suppress(MalformedEvent):
        decode_events(json.dumps(body).encode())
