import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decision import Caller
from gateway.errors import RequestError
from gateway.tenants.bodies import PATHS, Use, salted, use_of
from gateway.tenants.salts import cache_salt

SECRET = b"s" * 32
ACME = Caller("acme")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def salt(client_salt=None, tenant="acme"):
    return cache_salt(SECRET, tenant, client_salt)


def rewrite(body, caller=ACME):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return json.loads(salted(content, caller, SECRET))


KNOWN = {"cache_salt", "priority", "vllm_xargs", "sampling_params", "messages", "input"}
KNOWN |= {"kv_transfer_params", "ec_transfer_params", "features", "content_parts"}


@given(st.dictionaries(st.text(max_size=8).filter(lambda key: key not in KNOWN), JSON, max_size=6))
def test_everything_but_the_salt_stays_what_it_was(body):
    assert rewrite(body) == {**body, "cache_salt": salt()}


def test_values_keep_their_bytes():
    body = (
        b'{"a": 1.10 , "b":{"x" : [1,  2]}, "\\u00e9": "\\u00e9\\/", "big": 123456789012345678901234567890}'
    )
    found = salted(body, ACME, SECRET)
    for value in (b"1.10", b'{"x" : [1,  2]}', b'"\\u00e9\\/"', b"123456789012345678901234567890"):
        assert value in found


def test_a_client_only_divides_its_own_tenants_cache():
    assert rewrite({"cache_salt": "mine"})["cache_salt"] == salt("mine")
    assert rewrite({"cache_salt": None})["cache_salt"] == salt()
    # The salt of another tenant, were it known, gives nothing of the other tenant.
    assert rewrite({"cache_salt": salt(tenant="beta")})["cache_salt"] not in {salt(tenant="beta"), salt()}


@pytest.mark.parametrize(
    "body",
    [
        b'{"cache_salt": "a", "prompt": "x", "cache_salt": "b"}',
        b'{"cache_salt": "a", "prompt": "x", "cache\\u005fsalt": "b"}',
        b'{"c\\u0061che_salt": "b", "prompt": "x"}',
    ],
)
def test_a_salt_that_is_repeated_or_written_otherwise_is_there_once(body):
    found = salted(body, ACME, SECRET)
    pairs = json.loads(found, object_pairs_hook=lambda pairs: pairs)
    assert sorted(name for name, _ in pairs) == ["cache_salt", "prompt"]
    assert dict(pairs)["cache_salt"] == salt("b")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"[]",
        b"null",
        b'"text"',
        b"{}x",
        b'{"a":1}{"b":2}',
        b'{"a"}',
        b'{"a":NaN}',
        b"\xef\xbb\xbf{}",
        json.dumps({"prompt": "x"}).encode("utf-16"),
        b'{"a":' + b"[" * 100_000,
        b'{"cache_salt": 7}',
        b'{"cache_salt": ["a"]}',
        b'{"priority": "x"}',
        b'{"vllm_xargs": 1}',
    ],
)
def test_what_is_no_object_or_of_a_wrong_type_is_refused(body):
    with pytest.raises(RequestError) as caught:
        salted(body, ACME, SECRET)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "body",
    [
        {"kv_transfer_params": {"do_remote_prefill": True}},
        {"ec_transfer_params": {"a": 1}},
        {"vllm_xargs": {"kv_transfer_params": "x"}},
        {"sampling_params": {"extra_args": {"kv_transfer_params": {"a": 1}}}},
        {"features": {"mm_hashes": {"image": ["abc"]}}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": None, "uuid": "x"}]}]},
        {"messages": [[{"role": "user", "content": [{"type": "image_url", "uuid": "x"}]}]]},
        {"input": [{"role": "user", "content": [{"type": "image_url", "uuid": "x"}]}]},
        b'{"messages": [{"content": [{"u\\u0075id": "x"}]}]}',
        b'{"messages": [{"content": [{"\\u0075\\u0075\\u0069\\u0064": "x"}]}]}',
        b'{"messages": [{"content": "", "content": [{"uui\\u0064": "x"}]}]}',
        b'{"kv\\u005ftransfer_params": {"a": 1}}',
    ],
)
def test_what_names_cached_content_is_refused(body):
    with pytest.raises(RequestError) as caught:
        rewrite(body)
    assert (caught.value.status, caught.value.kind) == (403, "PermissionDeniedError")
    assert caught.value.param


@pytest.mark.parametrize(
    "body",
    [
        {"kv_transfer_params": None, "vllm_xargs": None, "sampling_params": {"temperature": 0}},
        {"vllm_xargs": {"mine": 1}, "sampling_params": {"extra_args": None}},
        {"messages": [{"role": "user", "content": "what is a uuid?"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a uuid", "uuid": None}]}]},
    ],
)
def test_what_only_looks_like_it_passes(body):
    assert rewrite(body) == {**body, "cache_salt": salt()}


@pytest.mark.parametrize(
    ("floor", "asked", "given"),
    [
        (0, {}, None),
        (0, {"priority": 5}, 5),
        (0, {"priority": -5}, None),
        (0, {"priority": None}, None),
        (10, {}, 10),
        (10, {"priority": 3}, 10),
        (10, {"priority": 12}, 12),
        (-1, {}, -1),
        (-1, {"priority": 0}, None),
        (-1, {"priority": -9}, -1),
    ],
)
def test_a_request_may_ask_for_later_and_never_for_sooner(floor, asked, given):
    assert rewrite(asked, Caller("acme", priority=floor)).get("priority") == given


def test_only_named_paths_are_open():
    assert use_of("POST", "/v1/completions?x=1") is Use.SALTED
    assert use_of("GET", "/v1/models") is Use.NONE
    for method, path in [
        ("POST", "/v1/responses"),
        ("GET", "/v1/responses/resp_1"),
        ("POST", "/v1/messages"),
        ("POST", "/v1/audio/transcriptions"),
        ("POST", "/reset_prefix_cache"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/completions/"),
        ("POST", "//v1/completions"),
        ("POST", "/v1/%63ompletions"),
        ("POST", "/V1/completions"),
        ("GET", "/v1/completions"),
        ("GET", "/metrics"),
        ("", ""),
    ]:
        with pytest.raises(RequestError, match="not open") as caught:
            use_of(method, path)
        assert caught.value.status == 403


def test_every_path_that_computes_prompts_is_salted():
    assert {path for (_, path), use in PATHS.items() if use is Use.NONE} == {
        "/tokenize",
        "/detokenize",
        "/v1/models",
        "/health",
        "/version",
    }


SEEDS = [
    b'{"model": "m", "prompt": "hello", "cache_salt": "mine", "priority": 3}',
    b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\u00e9"}]}], "stream": true}',
    b'{"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 1, "extra_args": {"a": {"b": []}}}}',
    b'{"cache_salt": "a", "x": "}", "cache\\u005fsalt": null, "vllm_xargs": {"k": 1.5e3}}',
]
PIECES = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\\u0063",
    b'"cache_salt":',
    b"null",
    b"\x00",
    b"\xff",
]


def mutated(draw):
    body = bytearray(draw.choice(SEEDS))
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(len(body) + 1)
        match draw.randrange(4):
            case 0:
                body[at : at + draw.randrange(4)] = draw.choice(PIECES)
            case 1:
                body[at:at] = draw.choice(PIECES)
            case 2:
                body[at : at + 1] = bytes([draw.randrange(256)])
            case _:
                other = draw.choice(SEEDS)
                start = draw.randrange(len(other))
                body[at:at] = other[start : start + draw.randrange(30)]
    return bytes(body)


def test_of_10_000_broken_bodies_none_reaches_an_engine_without_the_salt():
    draw = random.Random(5)
    passed, refused = 0, []
    for _ in range(10_000):
        try:
            found = salted(mutated(draw), ACME, SECRET)
        except RequestError as error:
            refused.append(error.status)
            continue
        try:
            pairs = json.loads(found, object_pairs_hook=lambda pairs: pairs)
        except ValueError:
            continue  # inside a value: the engine's reader refuses it as well
        # The outermost object comes last.
        salts = [value for name, value in pairs if name == "cache_salt"]
        assert len(salts) == 1
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}", salts[0])
        passed += 1
    assert passed > 500
    assert len(refused) > 5_000
    assert set(refused) <= {400, 403}
