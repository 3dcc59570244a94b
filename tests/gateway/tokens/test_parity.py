"""The gateway's tokens and hashes are those of a real engine."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from gateway.errors import RequestError
from gateway.tokens.models import Models, ServedModel
from gateway.tokens.reader import PromptReader
from kvindex.block_state import BlockState
from kvindex.blocks import hash_blocks, root_hash
from kvindex.event_source import ZmqEventSource
from kvindex.events import BlockStored
from tests.support.chat_templates import FAMILIES
from tests.support.vllm_engine import BLOCK_SIZE, MAX_MODEL_LEN_TOKENS, MODEL_NAME, tiny_model
from tests.support.waiting import eventually

pytestmark = pytest.mark.vllm

UNICODE = "naïve Σίσυφος 日本語のテキスト مرحبا 🎉👨‍👩‍👧‍👦 e\u0301 \u200b\ufeff tab\tand\r\nnew lines   "
SPECIAL = "before <|im_end|>\n<|im_start|>assistant\n inside <|endoftext|> after <|im_start|"
LONG = "The quick brown fox jumps over the lazy dog, and then it returns home. " * 150
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für einen Ort 🌦",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer", "maximum": 1e2}},
            "required": ["place"],
        },
        "strict": True,
        "unknown": 1,
    },
}
CALL = {
    "function": {"name": "get_weather", "arguments": '{"place": "Zürich", "days": 3, "x": [1.50, null]}'},
    "type": "function",
    "id": "call_1",
}
SYSTEM = {"role": "system", "content": "You are terse."}
HELLO = {"role": "user", "content": "hello"}

CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [HELLO]},
    "system": {"messages": [SYSTEM, HELLO]},
    "unicode": {"messages": [{"role": "user", "content": UNICODE}]},
    "special": {"messages": [SYSTEM, {"role": "user", "content": SPECIAL}]},
    "empty": {"messages": [{"role": "user", "content": ""}]},
    "long": {"messages": [SYSTEM, {"role": "user", "content": LONG}]},
    "turns": {
        "messages": [
            SYSTEM,
            HELLO,
            {"role": "assistant", "content": " hi \n", "reasoning_content": "think"},
            {"role": "user", "content": "how are you?", "name": "ann"},
            {"role": "assistant", "content": "fine", "reasoning": "more"},
            {"role": "user", "content": "bye"},
        ]
    },
    "parts": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": " a ", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": ""},
                    {"type": "text", "text": UNICODE},
                ],
            },
        ]
    },
    "tools": {"messages": [SYSTEM, HELLO], "tools": [WEATHER, WEATHER], "tool_choice": "none"},
    "tool calls": {
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": '{"temperature": 21.0}'},
            {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "rain"}]},
            {"role": "assistant", "content": "21 and rain", "tool_calls": []},
            {"role": "user", "content": "thanks"},
        ],
        "tools": [WEATHER],
    },
    "developer": {"messages": [{"role": "developer", "content": "be kind"}, HELLO]},
    "no generation prompt": {"messages": [SYSTEM, HELLO], "add_generation_prompt": False},
    "continued": {
        "messages": [HELLO, {"role": "assistant", "content": "Well, "}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
    "options": {
        "messages": [HELLO],
        "reasoning_effort": "none",
        "documents": [{"title": "t", "text": UNICODE}],
        "chat_template_kwargs": {"date_string": "today", "custom": None},
    },
    "truncated": {"messages": [SYSTEM, HELLO], "truncate_prompt_tokens": 7},
    "truncated right": {
        "messages": [SYSTEM, HELLO],
        "truncate_prompt_tokens": 7,
        "truncation_side": "right",
    },
    "special tokens": {"messages": [HELLO], "add_special_tokens": True},
}
# /tokenize knows these fields alone.
TOKENIZE_FIELDS = {
    *("messages", "tools", "chat_template", "chat_template_kwargs"),
    *("add_generation_prompt", "continue_final_message", "add_special_tokens"),
}
TEXTS = {"plain": "hello", "unicode": UNICODE, "special": SPECIAL, "spaces": "   \n\n\t ", "long": LONG}


@pytest.fixture(scope="module")
def reader():
    model = ServedModel(MODEL_NAME, MODEL_NAME, str(tiny_model()), max_model_len_tokens=MAX_MODEL_LEN_TOKENS)
    reader = PromptReader(lambda: Models([model]), trust_request_chat_template=True)
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def client(publishing_engine):
    with httpx.Client(base_url=publishing_engine.engine.url, timeout=120) as client:
        yield client


async def tokens_here(reader: PromptReader, path: str, body: dict[str, Any]) -> list[int]:
    request = await reader.read(path, msgspec.json.encode(body))
    assert request is not None
    assert request.inexact is None
    (prompt,) = request.prompts
    assert prompt.num_comparable_tokens == len(prompt.tokens)
    return list(prompt.tokens)


def answer(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CHATS)
async def test_conversations(client, reader, family, name):
    body = {"model": MODEL_NAME, **CHATS[name]}
    if FAMILIES[family] is not None:
        body["chat_template"] = FAMILIES[family]
    ours = await tokens_here(reader, "/v1/chat/completions", body)
    sent = body | {"max_tokens": 1, "return_token_ids": True}
    assert answer(client, "/v1/chat/completions", sent)["prompt_token_ids"] == ours

    tokenize = {"model": MODEL_NAME} | {key: body[key] for key in body.keys() & TOKENIZE_FIELDS}
    theirs = answer(client, "/tokenize", tokenize)["tokens"]
    assert await tokens_here(reader, "/tokenize", tokenize) == theirs


@pytest.mark.parametrize("name", TEXTS)
async def test_texts(client, reader, name):
    body = {"model": MODEL_NAME, "prompt": TEXTS[name]}
    ours = await tokens_here(reader, "/v1/completions", body)
    assert answer(client, "/tokenize", body)["tokens"] == ours
    if name == "long":
        assert len(ours) > 2_000


@pytest.mark.parametrize("salt", [None, "salt of a tenant"])
async def test_hashes_are_those_of_the_published_events(client, reader, publishing_engine, salt):
    source = ZmqEventSource(publishing_engine.events, publishing_engine.replay)
    source.open()
    state = BlockState(MODEL_NAME, BLOCK_SIZE)
    prompts = [*TEXTS.values(), list(range(100, 300))]
    expected = set()

    def published() -> bool:
        for event in source.poll(0.05):
            if isinstance(event, BlockStored):
                state.store(event)
        return expected <= set(state.hashes)

    # The engine reports only what is new to its cache.
    salted = {} if salt is None else {"cache_salt": salt}
    for number, prompt in enumerate(prompts):
        fresh = f"{salt} {number} {prompt}" if isinstance(prompt, str) else prompt
        body = {"model": MODEL_NAME, "prompt": fresh, "max_tokens": 1, **salted}
        tokens = await tokens_here(reader, "/v1/completions", body)
        expected |= set(hash_blocks(root_hash(MODEL_NAME, cache_salt=salt), tokens, BLOCK_SIZE))
        answer(client, "/v1/completions", body)
    assert len(expected) > 100
    await eventually(published)
    source.close()
    assert not state.skipped


async def test_what_the_gateway_refuses_the_engine_refuses_too(client, reader):
    too_long = {"model": MODEL_NAME, "prompt": [1] * (MAX_MODEL_LEN_TOKENS + 1)}
    unknown = {"model": "nobody", "prompt": "a"}
    template = {"model": MODEL_NAME, "messages": [HELLO, HELLO], "chat_template": FAMILIES["mistral"]}
    for path, body in (
        ("/v1/completions", too_long),
        ("/v1/completions", unknown),
        ("/v1/completions", {"model": MODEL_NAME, "prompt": ""}),
        ("/v1/completions", {"model": MODEL_NAME, "prompt": [[]]}),
        ("/v1/chat/completions", {"model": MODEL_NAME, "messages": []}),
        ("/v1/chat/completions", template),
    ):
        theirs = client.post(path, json=body)
        with pytest.raises(RequestError) as ours:
            await reader.read(path, msgspec.json.encode(body))
        assert ours.value.status == theirs.status_code
        assert ours.value.kind == theirs.json()["error"]["type"]
