"""Tokenizers: loaded once, and equal to transformers' own in what they make of a text."""

from __future__ import annotations

import asyncio
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from gateway.errors import TokenizerError
from gateway.tokens import tokenizer as module
from gateway.tokens.bodies import Chat, Message
from gateway.tokens.cache import ByteCache
from gateway.tokens.models import ServedModel
from gateway.tokens.tokenizer import ModelTokenizer, Tokenizers, Truncation
from tests.support.vllm_engine import tiny_model

TEXT = "def f(x):\n    return x  # wörld 日本語 🎉 <|im_end|> <|im_start|>"


def served(directory: object, **fields: object) -> ModelTokenizer:
    return ModelTokenizer.load(ServedModel("m", "m", str(directory), **fields), ByteCache(1 << 20))


def encode(tokenizer: ModelTokenizer, text: str, **how: object) -> list[int]:
    segments = tokenizer.split(text)
    tokenizer.encode([segments])
    return list(tokenizer.tokens(segments, **how))


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    """A tokenizer that adds a token at both ends, as Llama's and BERT's do."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
    )
    directory = tmp_path_factory.mktemp("bos")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("text", [TEXT, "", "a"])
def test_tokens_are_those_of_transformers(with_bos, text, add_special_tokens):
    reference = AutoTokenizer.from_pretrained(with_bos)
    tokens = encode(served(with_bos), text, add_special_tokens=add_special_tokens)
    assert tokens == reference.encode(text, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("num_tokens", [2, 3, 9, 1000])
@pytest.mark.parametrize("side", ["left", "right"])
def test_default_truncation_keeps_the_special_tokens(with_bos, side, num_tokens, add_special_tokens):
    reference = AutoTokenizer.from_pretrained(with_bos, truncation_side=side)
    expected = reference.encode(
        TEXT, add_special_tokens=add_special_tokens, truncation=True, max_length=num_tokens
    )
    cut = Truncation(num_tokens, side, counts_special_tokens=False)
    tokens = encode(served(with_bos), TEXT, add_special_tokens=add_special_tokens, truncation=cut)
    assert tokens == expected


def test_truncation_to_a_side_cuts_the_special_tokens_too(with_bos):
    tokenizer = served(with_bos)
    whole = encode(tokenizer, TEXT, add_special_tokens=True)
    for num_tokens in (0, 1, 5, 1000):
        left = Truncation(num_tokens, "left", counts_special_tokens=True)
        right = Truncation(num_tokens, "right", counts_special_tokens=True)
        kept = min(num_tokens, len(whole))
        from_right = encode(tokenizer, TEXT, add_special_tokens=True, truncation=left)
        assert from_right == whole[len(whole) - kept :]
        assert encode(tokenizer, TEXT, add_special_tokens=True, truncation=right) == whole[:kept]


@pytest.mark.parametrize("known", ["", "🎉", "<|im_end|>"])
def test_tokens_up_to_a_character_are_counted(with_bos, known):
    tokenizer = served(with_bos)
    text = "<|im_start|>system\n" + "be kind " * 100 + TEXT
    num_chars = text.index(known)
    segments = tokenizer.split(text, counted_chars=num_chars)
    assert segments.num_new_bytes >= len(text)
    tokenizer.encode([segments])
    prompt = tokenizer.counted_prompt(segments, add_special_tokens=True)
    assert list(prompt.tokens) == encode(tokenizer, text, add_special_tokens=True)
    before = [0, *encode(tokenizer, text[:num_chars], add_special_tokens=False)] if known else []
    assert list(prompt.tokens[: prompt.num_comparable_tokens]) == before


def test_a_tokenizer_that_forbids_cuts_gets_whole_texts(tmp_path):
    own = AutoTokenizer.from_pretrained(tiny_model())
    own.add_tokens([AddedToken(name, special=True, lstrip=True) for name in ("<|im_start|>", "<|im_end|>")])
    own.save_pretrained(tmp_path)
    text = "<|im_start|>user\nhello   <|im_end|>\n" * 20
    reference = AutoTokenizer.from_pretrained(tmp_path)
    expected = reference.encode(text, add_special_tokens=False)
    assert expected != AutoTokenizer.from_pretrained(tiny_model()).encode(text, add_special_tokens=False)
    tokenizer = served(tmp_path)
    assert encode(tokenizer, text, add_special_tokens=False) == expected
    assert len(tokenizer.split(text).texts) == 1
    assert len(served(tiny_model()).split(text).texts) > 1


def test_a_tokenizer_that_puts_tokens_into_texts_is_left_to_the_engine(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer of m .*not simply put before and after a text"):
        served(tmp_path)


def test_the_longest_token_is_known():
    assert served(tiny_model()).max_chars_per_token == max(
        map(len, AutoTokenizer.from_pretrained(tiny_model()).get_vocab())
    )


@pytest.mark.parametrize(
    ("file", "text"), [("tokenizer.json", "{}"), ("tokenizer.json", "broken"), ("config.json", "broken")]
)
def test_broken_files_are_a_tokenizer_error(tmp_path, file, text):
    shutil.copytree(
        tiny_model(), tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors")
    )
    (tmp_path / file).write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizers: \{m: DIRECTORY\}"):
        served(tmp_path)


def test_a_missing_directory_or_template_is_a_tokenizer_error(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizers: \{m: DIRECTORY\}"):
        served(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match="No such file"):
        served(tiny_model(), chat_template=tmp_path / "nowhere.jinja")


def test_mistrals_own_format_is_left_to_the_engine(tmp_path):
    shutil.copytree(
        tiny_model(), tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors")
    )
    for file in ("tekken.json", "consolidated.safetensors"):
        (tmp_path / file).touch()
    with pytest.raises(TokenizerError, match="Mistral"):
        served(tmp_path)


def test_chats_that_the_engine_writes_in_code_are_left_to_it(tmp_path):
    shutil.copytree(
        tiny_model(), tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors")
    )
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["GptOssForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = served(tmp_path)
    assert encode(tokenizer, "text", add_special_tokens=True)
    with pytest.raises(TokenizerError, match="in code"):
        tokenizer.render(Chat([Message("user", "a")]), use_own_template=False)


def test_the_engines_chat_template_wins(tmp_path):
    (tmp_path / "given.jinja").write_text("given")
    tokenizer = served(tiny_model(), chat_template=tmp_path / "given.jinja")
    chat = Chat([Message("user", "a")], template="the request's")
    assert tokenizer.render(chat, use_own_template=False) == ("given", None)
    assert tokenizer.render(chat, use_own_template=True) == ("the request's", None)


class PanicException(BaseException):
    """As pyo3 names what Rust code panicked with."""


@pytest.mark.parametrize("failure", [Exception("no"), ValueError("no"), PanicException("no")])
def test_a_tokenizer_that_fails_at_a_text_is_a_tokenizer_error(monkeypatch, failure):
    tokenizer = served(tiny_model())

    def fail(_):
        raise failure

    monkeypatch.setattr(tokenizer._segments, "encode", fail)
    with pytest.raises(TokenizerError, match="fails at this text"):
        tokenizer.encode([])
    failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode([])


async def test_a_tokenizer_is_loaded_once_and_kept(monkeypatch):
    loads = []
    load = ModelTokenizer.load
    monkeypatch.setattr(
        ModelTokenizer, "load", lambda model, cache: loads.append(model) or load(model, cache)
    )
    with ThreadPoolExecutor(2) as pool:
        tokenizers = Tokenizers(pool, ByteCache(0))
        model = ServedModel("a", "a", str(tiny_model()))
        adapter = ServedModel("b", "a", str(tiny_model()), lora_name="b")
        first, *others = await asyncio.gather(*(tokenizers.get(each) for each in (model, model, adapter)))
    assert others == [first, first]
    assert loads == [model]


async def test_giving_up_does_not_stop_the_loading():
    with ThreadPoolExecutor(1) as pool:
        tokenizers = Tokenizers(pool, ByteCache(0))
        model = ServedModel("a", "a", str(tiny_model()))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await tokenizers.get(model)
        assert encode(await tokenizers.get(model), "a", add_special_tokens=True)


async def test_a_failure_is_tried_again_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    model = ServedModel("a", "a", str(tmp_path / "later"))
    with ThreadPoolExecutor(1) as pool:
        tokenizers = Tokenizers(pool, ByteCache(0))
        with pytest.raises(TokenizerError):
            await tokenizers.get(model)
        shutil.copytree(tiny_model(), tmp_path / "later")
        await asyncio.sleep(0.05)
        assert await tokenizers.get(model)
