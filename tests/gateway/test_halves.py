import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.params import new_transfer_id, parse_params
from gateway.halves import divisible, make_halves, with_load_limit, without_transfer_params
from kvindex.stores import LOAD_KEY

BODY = {"model": "tiny", "prompt": "Hello", "max_tokens": 50, "temperature": 0.5, "stream": True}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def made(load_limits=(None, None), **fields):
    body = json.dumps(BODY | fields).encode()
    if (fields := divisible(body)) is None:
        return None
    found = make_halves(
        fields,
        transfer_id=new_transfer_id(),
        peer="10.0.0.1:7000",
        peer_tp_size=2,
        load_limits=load_limits,
    )
    return tuple(map(json.loads, found))


def test_both_halves_name_one_transfer_as_the_engines_read_it():
    first, second = made()
    send, receive = parse_params(first["kv_transfer_params"]), parse_params(second["kv_transfer_params"])
    assert (send.role, receive.role) == ("send", "receive")
    assert send.transfer_id == receive.transfer_id
    assert (receive.address, receive.peer_tp_size) == (("10.0.0.1", 7000), 2)


def test_each_half_is_told_how_far_to_read_its_tiers():
    told = [each["kv_transfer_params"] for each in made(load_limits=(256, 0))]
    assert [each.pop(LOAD_KEY) for each in told] == [256, 0]
    assert all(parse_params(each) for each in told)
    assert not any(LOAD_KEY in each["kv_transfer_params"] for each in made())


def test_the_prefill_half_asks_for_one_token_and_for_no_stream():
    first, _ = made(
        min_tokens=9, stream_options={"include_usage": True}, max_completion_tokens=70, logprobs=5
    )
    assert first["max_tokens"] == 1
    assert first["stream"] is False
    assert not first.keys() & {"min_tokens", "stream_options", "max_completion_tokens", "logprobs"}


@given(st.dictionaries(st.text().filter(lambda name: name not in {"n", "best_of", "echo"}), JSON, max_size=5))
def test_the_decode_half_is_the_clients_request(fields):
    fields = {name: value for name, value in fields.items() if name != "prompt_logprobs"}
    _, second = made(**fields)
    del second["kv_transfer_params"]
    assert second == BODY | {name: value for name, value in fields.items() if name != "kv_transfer_params"}


@pytest.mark.parametrize(
    "fields", [{"n": 2}, {"best_of": 3}, {"use_beam_search": True}, {"echo": True}, {"prompt_logprobs": 0}]
)
def test_what_is_several_or_needs_the_whole_prompt_stays_whole(fields):
    assert made(**fields) is None


def test_what_is_no_object_stays_whole():
    assert divisible(b"[1]") is divisible(b"{") is None


@pytest.mark.parametrize(
    "name", ["kv_transfer_params", "kv\\u005ftransfer_params", "\\u006bv_transfer_params"]
)
def test_a_clients_transfer_parameters_go_however_they_are_written(name: str):
    body = b'{"prompt": "Hi", "%s": {"kvlane": {"role": "send"}}, "n": 1}' % name.encode()
    assert "kv_transfer_params" in json.loads(body)
    assert json.loads(without_transfer_params(body)) == {"prompt": "Hi", "n": 1}


def test_other_bodies_stay_untouched():
    for body in (b"", b"[]", b'{"prompt": "kv_transfer_params"}', json.dumps(BODY).encode()):
        assert without_transfer_params(body) is None


def test_a_prompt_that_is_not_to_be_loaded_says_so_and_nothing_else():
    told = json.loads(with_load_limit(json.dumps(BODY).encode(), 512))
    assert told == BODY | {"kv_transfer_params": {LOAD_KEY: 512}}
    assert with_load_limit(b"[1]", 0) is None
