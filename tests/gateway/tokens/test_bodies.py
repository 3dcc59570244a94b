"""Every shape of body, and what is wrong with the others."""

from __future__ import annotations

import json

import pytest

from gateway.errors import RequestError
from gateway.tokens.bodies import Chat, ParsedRequest, parse
from gateway.tokens.request import Api

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
EMBEDDING = "/v1/embeddings"
TOKENIZE = "/tokenize"
GENERATE = "/inference/v1/generate"
HELLO = [{"role": "user", "content": "hello"}]


def read(path: str, **body: object) -> ParsedRequest:
    parsed = parse(path, json.dumps({"model": "m", **body}).encode())
    assert parsed is not None
    return parsed


def refusal(path: str, body: bytes) -> RequestError:
    with pytest.raises(RequestError) as refused:
        parse(path, body)
    return refused.value


@pytest.mark.parametrize(
    "path", ["/v1/models", "/health", "/v1/responses", "/v1/chat/completions/batch", "/"]
)
def test_other_paths_are_not_read(path):
    assert parse(path, b"anything") is None


def test_a_query_does_not_hide_the_path():
    assert parse(f"{COMPLETION}?x=1", b'{"model": "m", "prompt": "a"}') is not None


def test_tokens_for_tokens_are_read_as_they_are():
    parsed = read(GENERATE, token_ids=[1, 2, 3], sampling_params={}, cache_salt="s", stream=True)
    assert (parsed.api, parsed.inputs, parsed.cache_salt) == (Api.GENERATE, ([1, 2, 3],), "s")


@pytest.mark.parametrize("field", ["features", "content_parts"])
def test_tokens_that_stand_for_media_are_not_read(field):
    assert parse(GENERATE, json.dumps({"model": "m", "token_ids": [1], field: [{}]}).encode()) is None


def test_tokens_for_whatever_model_are_not_read():
    assert parse(GENERATE, b'{"token_ids": [1]}') is None


@pytest.mark.parametrize("body", [b'{"model": "m"}', b'{"model": "m", "token_ids": [-1]}'])
def test_tokens_for_tokens_need_tokens(body):
    assert refusal(GENERATE, body).param in {None, "token_ids"}


@pytest.mark.parametrize(
    ("prompt", "inputs"),
    [
        ("text", ("text",)),
        (["one", "two"], ("one", "two")),
        ([1, 2, 3], ([1, 2, 3],)),
        ([[1, 2], [3]], ([1, 2], [3])),
        (["5"], ("5",)),
        ([1.0], ([1],)),
    ],
)
@pytest.mark.parametrize(("path", "name"), [(COMPLETION, "prompt"), (EMBEDDING, "input")])
def test_prompts_are_text_or_tokens_or_lists_of_them(path, name, prompt, inputs):
    parsed = read(path, **{name: prompt})
    assert parsed.inputs == inputs
    assert parsed.add_special_tokens


def test_a_conversation_is_read():
    parsed = read(CHAT, messages=HELLO, max_tokens=5, stream=True, cache_salt="s")
    (chat,) = parsed.inputs
    assert isinstance(chat, Chat)
    assert chat.messages[0].content == "hello"
    assert chat.template_kwargs == {"add_generation_prompt": True, "continue_final_message": False}
    assert not parsed.add_special_tokens
    assert (parsed.api, parsed.max_output_tokens) == (Api.CHAT, 5)
    assert (parsed.stream, parsed.cache_salt) == (True, "s")


def test_defaults_of_the_apis_differ():
    assert read(COMPLETION, prompt="a").max_output_tokens == 16
    assert read(CHAT, messages=HELLO).max_output_tokens is None
    assert read(CHAT, messages=HELLO, max_tokens=5, max_completion_tokens=7).max_output_tokens == 7
    embedded, tokenized = (read(path, messages=HELLO).inputs[0] for path in (EMBEDDING, TOKENIZE))
    assert isinstance(embedded, Chat)
    assert not embedded.template_kwargs["add_generation_prompt"]
    assert isinstance(tokenized, Chat)
    assert tokenized.template_kwargs["add_generation_prompt"]
    assert read(TOKENIZE, prompt="").inputs == ("",)


def test_types_are_as_lenient_as_the_engine():
    parsed = read(COMPLETION, prompt="a", max_tokens="7", stream="true", add_special_tokens=0)
    assert (parsed.max_output_tokens, parsed.stream, parsed.add_special_tokens) == (7, True, False)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"chat_template_kwargs": {"a": 1, "b": None, "c": "auto"}}, {"a": 1}),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, {"add_generation_prompt": True}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low", "enable_thinking": True}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
            {"reasoning_effort": "low", "enable_thinking": False},
        ),
        ({"documents": [{"title": "t"}]}, {"documents": [{"title": "t"}]}),
    ],
)
def test_options_reach_the_template(fields, expected):
    (chat,) = read(CHAT, messages=HELLO, **fields).inputs
    assert isinstance(chat, Chat)
    usual = {"add_generation_prompt": True, "continue_final_message": False}
    assert chat.template_kwargs == usual | expected


def test_tools_reach_the_template_as_the_engine_writes_them():
    function = {"parameters": {"z": 1, "a": 2}, "name": "f", "unknown": 1, "strict": True}
    (chat,) = read(CHAT, messages=HELLO, tools=[{"function": function, "defer_loading": True}]).inputs
    assert isinstance(chat, Chat)
    assert json.dumps(chat.tools) == (
        '[{"type": "function", "function": {"name": "f", "description": null, '
        '"parameters": {"z": 1, "a": 2}, "strict": true, "defer_loading": true}, "defer_loading": true}]'
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (EMBEDDING, {"input": HELLO}),
        (EMBEDDING, {"input": [HELLO, HELLO]}),
        (EMBEDDING, {"messages": [HELLO, HELLO]}),
    ],
)
def test_batches_of_conversations_pass_unread(path, body):
    assert parse(path, json.dumps({"model": "m", **body}).encode()) is None


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        (CHAT, {"messages": HELLO, "kv_transfer_params": {"prompt_token_ids": [1]}}, "kv_transfer_params"),
        (COMPLETION, {"prompt": "a", "suffix": "b"}, "suffix"),
        (COMPLETION, {"prompt_embeds": "AAAA"}, "embeddings"),
    ],
)
def test_what_only_the_engine_can_know_is_marked(path, body, reason):
    assert reason in str(read(path, **body).inexact)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b'{"model": "m", "prompt": "\\ud800"}',
        b'{"prompt_embeds": ' + b"[" * 100_000,
    ],
)
def test_malformed_json_is_refused(body):
    error = refusal(COMPLETION, body)
    assert error.status == 400
    assert "not valid JSON" in error.message


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETION, "[]", None),
        (COMPLETION, "null", None),
        (COMPLETION, '{"model": 5, "prompt": "a"}', "model"),
        (COMPLETION, '{"prompt": "a"}', "model"),
        (COMPLETION, '{"model": "", "prompt": "a"}', "model"),
        (COMPLETION, '{"model": "m"}', "prompt"),
        (COMPLETION, '{"model": "m", "prompt": ""}', "prompt"),
        (COMPLETION, '{"model": "m", "prompt": []}', "prompt"),
        (COMPLETION, '{"model": "m", "prompt": 5}', "prompt"),
        (COMPLETION, '{"model": "m", "prompt": ["a", 1]}', "prompt"),
        (COMPLETION, '{"model": "m", "prompt": [-1]}', "prompt"),
        (COMPLETION, '{"model": "m", "prompt": [4294967296]}', "prompt"),
        (COMPLETION, '{"model": "m", "prompt": "a", "max_tokens": "many"}', "max_tokens"),
        (COMPLETION, '{"model": "m", "prompt": "a", "truncate_prompt_tokens": -2}', "truncate_prompt_tokens"),
        (CHAT, '{"model": "m"}', "messages"),
        (CHAT, '{"model": "m", "messages": []}', "messages"),
        (CHAT, '{"model": "m", "messages": "hello"}', "messages"),
        (CHAT, '{"model": "m", "messages": [{"content": "a"}]}', "messages"),
        (CHAT, '{"model": "m", "messages": [{"role": "user", "content": 5}]}', "messages"),
        (CHAT, '{"model": "m", "messages": [{"role": "user"}], "tools": [{}]}', "tools"),
        (EMBEDDING, '{"model": "m"}', "messages"),
        (EMBEDDING, '{"model": "m", "input": ""}', "input"),
        (TOKENIZE, '{"model": "m"}', "prompt"),
        (TOKENIZE, '{"model": "m", "prompt": ["a"]}', "prompt"),
    ],
)
def test_the_field_at_fault_is_named(path, body, param):
    error = refusal(path, body.encode())
    assert (error.status, error.kind, error.param) == (400, "BadRequestError", param)
