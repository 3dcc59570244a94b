"""The reader as the router sees it: tokens, what is known of them, limits and errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gateway import metrics
from gateway.errors import RequestError, TokenizerError
from gateway.tokens import hashing
from gateway.tokens.bodies import parse
from gateway.tokens.models import Models, ServedModel
from gateway.tokens.reader import PromptReader
from gateway.tokens.request import Api, ReadRequest
from gateway.tokens.template import render
from kvindex.blocks import hash_blocks, root_hash
from tests.support.vllm_engine import tiny_model

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
PATHS = [CHAT, COMPLETION, "/v1/embeddings", "/tokenize"]
LIMIT_TOKENS = 64


def models() -> Models:
    tiny = str(tiny_model())
    return Models(
        [
            ServedModel("tiny", "tiny", tiny, max_model_len_tokens=LIMIT_TOKENS),
            ServedModel("adapter", "tiny", tiny, lora_name="adapter", max_model_len_tokens=LIMIT_TOKENS),
            ServedModel("lost", "lost", "/nowhere", max_model_len_tokens=LIMIT_TOKENS),
        ]
    )


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_model())


@pytest.fixture
def reader():
    reader = PromptReader(models)
    yield reader
    reader.close()


async def read(reader: PromptReader, path: str, **body: object) -> ReadRequest:
    request = await reader.read(path, json.dumps({"model": "tiny", **body}).encode())
    assert request is not None
    return request


@pytest.mark.parametrize("inline_bytes", [0, 10_000])
async def test_text_is_tokenised_inline_or_in_a_thread(tokenizer, inline_bytes):
    reader = PromptReader(models, inline_bytes=inline_bytes)
    request = await read(reader, COMPLETION, prompt=["hello", "wörld 🎉"], model="adapter")
    reader.close()
    assert [list(prompt.tokens) for prompt in request.prompts] == [
        tokenizer.encode(t) for t in ("hello", "wörld 🎉")
    ]
    assert all(prompt.num_comparable_tokens == len(prompt.tokens) for prompt in request.prompts)
    assert (request.api, request.model, request.inexact) == (Api.COMPLETION, "adapter", None)


async def test_a_conversation_is_rendered_and_tokenised(reader, tokenizer):
    messages = [{"role": "user", "content": "hello"}]
    request = await read(reader, CHAT, messages=messages)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert list(request.prompts[0].tokens) == tokenizer.encode(rendered, add_special_tokens=False)


async def test_token_ids_need_no_tokenizer(reader):
    request = await read(reader, COMPLETION, prompt=[[1, 2, 3], [4]], model="lost", truncate_prompt_tokens=2)
    assert [list(prompt.tokens) for prompt in request.prompts] == [[2, 3], [4]]
    with pytest.raises(TokenizerError, match="lost"):
        await read(reader, COMPLETION, prompt="text", model="lost")


async def test_unknown_models_are_not_found(reader):
    with pytest.raises(RequestError, match="`nobody` does not exist") as refused:
        await read(reader, COMPLETION, prompt="a", model="nobody")
    assert (refused.value.status, refused.value.kind) == (404, "NotFoundError")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETION, {"prompt": [1] * (LIMIT_TOKENS + 1)}),
        (COMPLETION, {"prompt": "a b " * LIMIT_TOKENS}),
        (COMPLETION, {"prompt": "x" * 1_000_000}),
        (CHAT, {"messages": [{"role": "user", "content": "a b " * LIMIT_TOKENS}]}),
    ],
)
async def test_prompts_longer_than_the_context_are_refused(reader, path, body):
    with pytest.raises(RequestError, match=f"maximum context length is {LIMIT_TOKENS} tokens") as refused:
        await read(reader, path, **body)
    assert refused.value.status == 400


async def test_prompts_as_long_as_the_context_are_not(reader):
    assert (await read(reader, COMPLETION, prompt=[1] * LIMIT_TOKENS)).num_tokens == LIMIT_TOKENS
    assert (await read(reader, "/tokenize", prompt="a b " * LIMIT_TOKENS)).num_tokens > LIMIT_TOKENS
    assert (await read(reader, "/v1/embeddings", input=[1] * 2 * LIMIT_TOKENS)).num_tokens > LIMIT_TOKENS


@pytest.mark.parametrize("prompt", [[""], [[]], ["a", ""]])
async def test_empty_prompts_are_refused(reader, prompt):
    with pytest.raises(RequestError, match="must not be empty"):
        await read(reader, COMPLETION, prompt=prompt)


@pytest.mark.parametrize(
    ("path", "fields", "kept"),
    [
        (COMPLETION, {"truncate_prompt_tokens": 3}, [7, 8, 9]),
        (COMPLETION, {"truncate_prompt_tokens": 3, "truncation_side": "right"}, [0, 1, 2]),
        (COMPLETION, {"truncate_prompt_tokens": 30}, [*range(10)]),
        ("/v1/embeddings", {"truncate_prompt_tokens": 3}, [0, 1, 2]),
    ],
)
async def test_truncation_keeps_what_the_engine_keeps(reader, path, fields, kept):
    field = "prompt" if path == COMPLETION else "input"
    request = await read(reader, path, **{field: [*range(10)]}, **fields)
    assert list(request.prompts[0].tokens) == kept
    assert request.inexact is None


async def test_truncation_to_the_context_leaves_room_for_an_answer(reader):
    whole = [*range(2 * LIMIT_TOKENS)]
    request = await read(reader, COMPLETION, prompt=whole, truncate_prompt_tokens=-1)
    assert list(request.prompts[0].tokens) == whole[-LIMIT_TOKENS + 1 :]
    assert "truncate_prompt_tokens" in str(request.inexact)


async def test_only_text_before_an_image_is_comparable(reader, tokenizer):
    content = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "u"}}]
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": content}]
    request = await read(reader, CHAT, messages=messages)
    (prompt,) = request.prompts
    known = tokenizer.encode("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n")
    assert list(prompt.tokens[: prompt.num_comparable_tokens]) == known
    assert "images" in str(request.inexact)


async def test_templates_of_requests_run_only_when_trusted(reader, tokenizer):
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template": "trusted"}
    request = await read(reader, CHAT, **body)
    assert request.prompts[0].num_comparable_tokens == 0
    assert request.num_tokens
    assert "own chat template" in str(request.inexact)
    trusting = PromptReader(models, trust_request_chat_template=True)
    request = await read(trusting, CHAT, **body)
    trusting.close()
    assert list(request.prompts[0].tokens) == tokenizer.encode("trusted")
    assert request.inexact is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETION, {"prompt": "a", "suffix": "b"}),
        (COMPLETION, {"prompt_embeds": "AAAA"}),
        (
            CHAT,
            {
                "messages": [{"role": "user", "content": "a"}],
                "kv_transfer_params": {"prompt_token_ids": [1]},
            },
        ),
    ],
)
async def test_what_the_engine_alone_knows_is_not_comparable(reader, path, body):
    request = await read(reader, path, **body)
    assert [prompt.num_comparable_tokens for prompt in request.prompts] == [0]
    assert request.inexact


WORDS = [
    "wörld 🎉 ",
    "日本語 ",
    "e\u0301",
    "def f(x):\n    ",
    "<|im_end|>\n<|im_start|>user\n",
    "<|im_start|",
    "\r\n ",
]
CONTENT = st.just("") | st.builds(
    lambda words, times: "".join(words) * times,
    st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=6),
    st.sampled_from([1, 40]),
)
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": CONTENT},
    optional={"tool_calls": st.just([CALL])},
)
# Where in the conversation, and what is done there.
EDITS = st.tuples(st.integers(0, 20), st.none() | st.just("delete") | st.just("change") | TURNS)
IDENTITIES = st.tuples(
    st.sampled_from([None, "adapter"]), st.sampled_from([None, "salt"]), st.sampled_from([1, 16, 48])
)


def edited(chat: list[dict], edit: tuple[int, object]) -> list[dict]:
    """Append, insert, change or delete a message; never the last."""
    at, what = edit
    at %= len(chat)
    if what == "delete":
        return chat[:at] + chat[at + 1 :] if len(chat) > 1 else chat
    if what == "change":
        return [*chat[:at], chat[at] | {"content": chat[at]["content"][1:] + "!"}, *chat[at + 1 :]]
    if what is None:
        return [*chat, {"role": "user", "content": "next " * (at + 1)}]
    return [*chat[:at], what, *chat[at:]]


def unlimited() -> Models:
    return Models([ServedModel("tiny", "tiny", str(tiny_model()))])


@pytest.fixture(scope="module", params=[1 << 20, 20_000, 0])
def remembering(request):
    reader = PromptReader(unlimited, cache_bytes=request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "CHUNK_TOKENS", 64)
        yield reader
    reader.close()


@settings(max_examples=40, deadline=None)
@given(chat=st.lists(TURNS, min_size=1, max_size=6), edits=st.lists(EDITS, max_size=6), data=st.data())
async def test_edited_conversations_are_read_as_if_for_the_first_time(
    remembering, tokenizer, chat, edits, data
):
    tools = data.draw(st.sampled_from([None, [{"type": "function", "function": {"name": "f"}}]]))
    for edit in [None, *edits]:
        chat = chat if edit is None else edited(chat, edit)
        body = json.dumps({"model": "tiny", "messages": chat, "tools": tools}).encode()
        (prompt,) = (await remembering.read(CHAT, body)).prompts
        (whole,) = parse(CHAT, body).inputs
        text, _ = render(tokenizer, whole, None)
        assert list(prompt.tokens) == tokenizer.encode(text, add_special_tokens=False)
        lora_name, salt, block_size = data.draw(IDENTITIES)
        root = root_hash("tiny", lora_name=lora_name, cache_salt=salt)
        assert list(prompt.hashes(root, block_size)) == hash_blocks(root, prompt.tokens, block_size)


async def test_a_next_turn_is_tokenised_and_hashed_for_its_new_text_alone(monkeypatch):
    hashed = []

    def counting(parent, tokens, block_size):
        hashed.append(len(tokens))
        return hash_blocks(parent, tokens, block_size)

    monkeypatch.setattr(hashing, "hash_blocks", counting)
    reader = PromptReader(unlimited)
    chat = [{"role": "user", "content": f"{number} wörld " * 200} for number in range(20)]

    async def cost() -> tuple[int, int, int]:
        hashed.clear()
        before = metrics.TOKEN_CACHE_MISSES._value.get()
        request = await read(reader, CHAT, messages=chat)
        request.prompts[0].hashes(root_hash("tiny"), 16)
        return request.num_tokens, int(metrics.TOKEN_CACHE_MISSES._value.get() - before), sum(hashed)

    num_tokens, num_encoded, num_hashed = await cost()
    assert num_tokens == num_encoded == num_hashed > 20_000
    for turn in ("one ", "two ", "three "):
        chat += [{"role": "assistant", "content": turn * 50}, {"role": "user", "content": "and?"}]
        more_tokens, num_encoded, num_hashed = await cost()
        num_new = more_tokens - num_tokens
        assert num_new <= num_encoded < num_new + 256
        assert num_new <= num_hashed < num_new + hashing.CHUNK_TOKENS
        num_tokens = more_tokens
    reader.close()


async def test_templates_that_yield_no_text_are_a_bad_request(trusting):
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ '\\ud800' }}"}
    with pytest.raises(RequestError, match="not text"):
        await read(trusting, CHAT, **body)


async def test_a_body_of_16_mb_is_read_in_a_thread(reader):
    prompt = "a " * (8 << 20)
    with pytest.raises(RequestError, match="maximum context length"):
        await read(reader, COMPLETION, prompt=prompt)


def test_neither_torch_nor_vllm_is_needed():
    script = (
        "import sys; sys.modules.update(torch=None, vllm=None)\n"
        "from gateway.tokens.cache import ByteCache\n"
        "from gateway.tokens.models import ServedModel\n"
        "from gateway.tokens.tokenizer import ModelTokenizer\n"
        f"tokenizer = ModelTokenizer.load(ServedModel('m', 'm', {str(tiny_model())!r}), ByteCache(0))\n"
        "text = tokenizer.split('hello')\n"
        "tokenizer.encode([text])\n"
        "sys.exit(not tokenizer.tokens(text, add_special_tokens=True))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
PARTS = st.fixed_dictionaries(
    {},
    optional={"type": st.sampled_from(["text", "image_url", "thinking"]) | JSON, "text": JSON, "uuid": JSON},
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]) | JSON},
    optional={
        "content": st.text(max_size=20) | st.lists(PARTS | st.text(max_size=5), max_size=3) | JSON,
        "tool_calls": st.lists(st.fixed_dictionaries({}, optional={"id": JSON, "function": JSON}), max_size=2)
        | JSON,
        "tools": JSON,
        "name": JSON,
        "reasoning": JSON,
    },
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "model": st.just("tiny") | JSON,
        "messages": st.lists(MESSAGES, max_size=3) | JSON,
        "prompt": st.text(max_size=50) | JSON,
        "input": st.text(max_size=50) | JSON,
        "tools": st.just([{"type": "function", "function": {"name": "f"}}]) | JSON,
        "chat_template": st.sampled_from(["{{ messages }}", "{{ messages[5].x.y }}", "{{", "{% for a"])
        | JSON,
        "chat_template_kwargs": st.dictionaries(
            st.sampled_from(
                ["tools", "documents", "messages", "tokenize", "continue_final_message", "bos_token"]
            ),
            JSON,
        )
        | JSON,
        "documents": JSON,
        "continue_final_message": st.booleans() | JSON,
        "add_generation_prompt": st.booleans() | JSON,
        "truncate_prompt_tokens": st.integers(-1, 70) | JSON,
        "truncation_side": st.sampled_from(["left", "right"]) | JSON,
        "max_tokens": JSON,
        "suffix": JSON,
        "cache_salt": JSON,
    },
)


@pytest.fixture(scope="module")
def trusting():
    reader = PromptReader(models, trust_request_chat_template=True)
    yield reader
    reader.close()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(path=st.sampled_from(PATHS), body=BODIES | JSON)
async def test_any_json_is_read_or_refused(trusting, path, body):
    await read_or_refuse(trusting, path, json.dumps(body).encode())


@settings(max_examples=200, deadline=None)
@given(path=st.sampled_from(PATHS), body=st.binary(max_size=200))
async def test_any_bytes_are_read_or_refused(trusting, path, body):
    await read_or_refuse(trusting, path, body)


async def read_or_refuse(reader: PromptReader, path: str, body: bytes) -> None:
    outcome: ReadRequest | RequestError | None
    try:
        outcome = await reader.read(path, body)
    except RequestError as refused:
        outcome = refused
    if isinstance(outcome, RequestError):
        assert outcome.status in (400, 404)
        json.loads(outcome.body())
    elif outcome is not None:
        assert outcome.prompts
        for prompt in outcome.prompts:
            assert 0 <= prompt.num_comparable_tokens <= len(prompt.tokens)
