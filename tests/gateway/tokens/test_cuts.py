"""Texts are cut only where the segments' tokens are those of the whole."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from gateway.tokens import cuts as module
from gateway.tokens.cuts import Cuts, find_cuts

START, END, TOOL, SPACED = "<|start|>", "<|end|>", "[TOOL]", "  "
CORPUS = ["the quick brown fox don't jump over 12345 lazy dogs.\n\n\tSTOP naïve 日本語 " * 3]
WORDS = [
    "the",
    "Quick ",
    " fox",
    "   ",
    "\n\n",
    "don't",
    "12345",
    "naïve",
    "e\u0301",
    "日本語",
    "🎉",
    "<|",
    "|>",
    "▁",
]

metaspace = pre_tokenizers.Metaspace


def bpe(pre_tokenizer=None, normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", byte_fallback=False))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["[UNK]"], show_progress=False, initial_alphabet=[*"ab ▁"]
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    )
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["[UNK]"], unk_token="[UNK]", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


# In the manner of well-known families.
KINDS = {
    "gpt": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefix space": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "qwen": lambda: bpe(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+(?!\S)|\s+|\p{L}+|[^\s\p{L}\p{N}]+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        normalizers.NFC(),
    ),
    "llama 2": lambda: bpe(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "first": lambda: bpe(metaspace(prepend_scheme="first")),
    "first, unsplit": lambda: bpe(metaspace(prepend_scheme="first", split=False)),
    "always": lambda: bpe(metaspace(prepend_scheme="always")),
    "never": lambda: bpe(metaspace(prepend_scheme="never")),
    "bert": wordpiece,
    "unigram": unigram,
}


def with_tokens(tokenizer: Tokenizer, *tokens: AddedToken) -> Tokenizer:
    tokenizer.add_tokens([*tokens])
    return tokenizer


def token(content: str, **how: bool) -> AddedToken:
    return AddedToken(content, **{"normalized": False, "special": True, **how})


@pytest.fixture(scope="module", params=KINDS)
def cut_tokenizer(request):
    """A tokenizer and its cuts. One of its tokens takes the space behind it, others that before it."""
    tokenizer = with_tokens(
        KINDS[request.param](),
        *(token(START, rstrip=True), token(END), token(TOOL, special=False)),
        *(token(SPACED, special=False), token("<|left|>", lstrip=True), token("<|word|>", single_word=True)),
        token("Quick", special=False, normalized=True),
    )
    return tokenizer, find_cuts(tokenizer, [START, END, TOOL, SPACED, "<|left|>", "<|word|>", "Quick", "the"])


def ids(tokenizer: Tokenizer, texts: Iterable[str]) -> list[int]:
    return [each for text in texts for each in tokenizer.encode(text, add_special_tokens=False).ids]


def parts(cuts: Cuts, text: str) -> list[str]:
    return [segment.decode() for segment in cuts.split(text.encode())]


TEXTS = st.lists(
    st.sampled_from([*WORDS, START, END, TOOL, SPACED, "<|left|>", "<|word|>", "[TOOL"])
    | st.text(max_size=5),
    max_size=30,
).map("".join)


@settings(deadline=None, max_examples=60)
@given(text=TEXTS)
def test_segments_give_the_tokens_of_the_whole(cut_tokenizer, text):
    tokenizer, cuts = cut_tokenizer
    assert cuts.tokens == {START, END, TOOL}
    segments = parts(Cuts(cuts.tokens, min_bytes=1), text)
    assert "".join(segments) == text
    assert ids(tokenizer, segments) == ids(tokenizer, [text])


@pytest.mark.parametrize(
    ("tokens", "allowed"),
    [
        ([token(START)], True),
        ([token(START, rstrip=True)], True),
        ([token(START, lstrip=True)], False),
        ([token(START, single_word=True)], False),
        ([token(START, normalized=True)], False),
        # Another token can begin before it and end within it, ...
        ([token(START), token("x<|")], False),
        # ... contain it, ...
        ([token(START), token(f"x{START}y")], False),
        ([token(START), token(f"x{START}")], False),
        # ... or begin with it.
        ([token(START), token(f"{START}y")], False),
        ([token(START), token("<|sta"), token("t|>")], True),
        # These are looked for later, between the others.
        ([token(START), token("x<|", normalized=True)], True),
    ],
)
def test_only_tokens_that_are_always_found_are_cut_before(tokens, allowed):
    tokenizer = with_tokens(KINDS["gpt"](), *tokens)
    assert find_cuts(tokenizer, [START]).tokens == ({START} if allowed else set())


@pytest.mark.parametrize("content", ["a<b>", " <b>", "_<b>", "<b<"])
def test_tokens_that_touch_words_or_themselves_are_not_cut_before(content):
    tokenizer = with_tokens(KINDS["gpt"](), token(content))
    assert not find_cuts(tokenizer, [content]).tokens


def test_nothing_is_cut_where_special_tokens_are_text():
    tokenizer = with_tokens(KINDS["gpt"](), token(START))
    tokenizer.encode_special_tokens = True
    assert not find_cuts(tokenizer, [START]).tokens


def test_nothing_is_cut_for_what_is_not_known():
    dropping = with_tokens(KINDS["gpt"](), token(START))
    dropping.model.dropout = 0.5
    assert not find_cuts(dropping, [START]).tokens


def test_an_unknown_part_forbids_cuts(monkeypatch):
    tokenizer = with_tokens(KINDS["gpt"](), token(START))
    monkeypatch.setattr(module, "_LOCAL", module._LOCAL - {"ByteLevel"})
    assert not find_cuts(tokenizer, [START]).tokens


def test_cuts_are_tried_before_they_are_trusted(monkeypatch):
    tokenizer = with_tokens(KINDS["gpt"](), token(START, lstrip=True))
    text = f"the   {START}"
    assert ids(tokenizer, parts(Cuts([START], min_bytes=1), text)) != ids(tokenizer, [text])
    monkeypatch.setattr(module, "_always_found", lambda wanted, added: wanted)
    assert not find_cuts(tokenizer, [START]).tokens


def test_short_segments_stay_together():
    cuts = Cuts([START, END, TOOL], min_bytes=18)
    text = f"{START}a{END}b{TOOL}{'c' * 30}{END}d{START}"
    assert parts(cuts, text) == [f"{START}a{END}b", f"{TOOL}{'c' * 30}", f"{END}d{START}"]
    assert parts(cuts, "") == [""]
    assert parts(Cuts([]), text) == [text]


@settings(deadline=None, max_examples=60)
@given(text=TEXTS, more=TEXTS)
def test_appending_changes_the_last_segment_alone(text, more):
    cuts = Cuts([START, END], min_bytes=10)
    *kept, _ = parts(cuts, text)
    assert parts(cuts, text + more)[: len(kept)] == kept
