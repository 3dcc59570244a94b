"""Each segment is tokenised once, and what comes out does not depend on what was remembered."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from gateway import metrics
from gateway.tokens.cache import ByteCache
from gateway.tokens.cuts import MIN_SEGMENT_BYTES, find_cuts
from gateway.tokens.segments import SHARED_CHARS, SegmentEncoder, Segments
from tests.support.vllm_engine import tiny_model


class Recording:
    """A tokenizer that notes what it is given."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.batches = []

    def text(self):
        return "".join(text for batch in self.batches for text in batch)

    def encode_batch_fast(self, texts, **how):
        self.batches.append(texts)
        return self.tokenizer.encode_batch_fast(texts, **how)

    def encode_batch(self, texts, **how):
        return self.tokenizer.encode_batch(texts, **how)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_model()).backend_tokenizer


@pytest.fixture
def recording(tokenizer):
    return Recording(tokenizer)


@pytest.fixture
def encoder(tokenizer, recording):
    cuts = find_cuts(tokenizer, ["<|im_start|>", "<|im_end|>"])
    assert cuts.tokens
    return SegmentEncoder(recording, cuts, ByteCache(1 << 20))


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def encoded(encoder: SegmentEncoder, *texts: str) -> list[Segments]:
    batch = [encoder.split(text) for text in texts]
    encoder.encode(batch)
    return batch


def ids(segments: Segments) -> list[int]:
    return [*memoryview(segments.packed).cast("I")]


def tokens_of(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_only_the_new_turn_is_tokenised(encoder, recording, tokenizer):
    text = "".join(turn("user", f"question {number} " * 50) for number in range(20))
    (first,) = encoded(encoder, text)
    assert ids(first) == tokens_of(tokenizer, text)
    recording.batches.clear()
    more = turn("assistant", "wörld 🎉 " * 100) + "<|im_start|>user\n"
    (second,) = encoded(encoder, text + more)
    assert ids(second) == tokens_of(tokenizer, text + more)
    assert len(recording.text()) <= len(more) + MIN_SEGMENT_BYTES


def test_an_edit_leaves_what_follows_known(encoder, recording):
    turns = [turn("user", f"question {number} " * 50) for number in range(20)]
    encoded(encoder, "".join(turns))
    recording.batches.clear()
    turns[3] = turn("user", "another question " * 40)
    del turns[10]
    encoded(encoder, "".join(turns))
    assert len(recording.text()) <= len(turns[3]) + 2 * MIN_SEGMENT_BYTES


def test_much_text_is_encoded_in_one_call_and_each_segment_once(encoder, recording, tokenizer):
    texts = ["a", "b " * SHARED_CHARS, "a", ""]
    batch = encoded(encoder, *texts)
    assert [ids(segments) for segments in batch] == [tokens_of(tokenizer, text) for text in texts]
    assert recording.batches == [["a", "b " * SHARED_CHARS, ""]]
    encoded(encoder, *texts)
    assert len(recording.batches) == 1


def test_little_text_is_not_shared_among_cores(encoder, recording, tokenizer):
    texts = ["a", "b", "a"]
    batch = encoded(encoder, *texts)
    assert [ids(segments) for segments in batch] == [tokens_of(tokenizer, text) for text in texts]
    assert recording.batches == [["a"], ["b"]]


def test_new_text_is_counted_in_bytes(encoder):
    assert encoder.split("wörld").num_new_bytes == 6
    encoded(encoder, "wörld")
    assert encoder.split("wörld").num_new_bytes == 0
    # To count tokens, known text has to be looked at again.
    assert encoder.split("wörld", counted_chars=2).num_new_bytes == 6
    assert encoder.split("wörld", counted_chars=0).num_new_bytes == 0


def test_what_is_known_under_one_salt_is_new_under_another(encoder, tokenizer):
    salts = [None, "", "acme", "beta", "\ud800"]
    for number, salt in enumerate(salts):
        new = [encoder.split("wörld", cache_salt=each).num_new_bytes for each in salts]
        assert new == [0] * number + [6] * (len(salts) - number)
        segments = encoder.split("wörld", cache_salt=salt)
        encoder.encode([segments])
        assert ids(segments) == tokens_of(tokenizer, "wörld")


def test_tokens_of_a_leading_part_are_counted(encoder, tokenizer):
    text = turn("system", "be kind " * 60) + turn("user", "wörld 🎉 " * 60) + turn("user", "look")
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=False)
    for counted_chars in range(0, len(text) + 1, 7):
        segments = encoder.split(text, counted_chars=counted_chars)
        encoder.encode([segments])
        assert segments.num_counted_tokens == sum(end <= counted_chars for _, end in encoding.offsets)


def test_lone_surrogates_are_no_text(encoder):
    with pytest.raises(UnicodeEncodeError):
        encoder.split("a\ud800")


def test_hits_misses_and_size_are_measured(encoder):
    def measured():
        return (
            metrics.TOKEN_CACHE_HITS._value.get(),
            metrics.TOKEN_CACHE_MISSES._value.get(),
            metrics.TOKEN_CACHE_BYTES._value.get(),
        )

    hits, misses, _ = measured()
    (segments,) = encoded(encoder, "hello there")
    num_tokens = len(ids(segments))
    assert measured()[:2] == (hits, misses + num_tokens)
    assert measured()[2] > 0
    encoded(encoder, "hello there")
    assert measured()[:2] == (hits + num_tokens, misses + num_tokens)


def test_tokenizers_share_a_cache_but_no_entries(tokenizer):
    cache = ByteCache(1 << 20)
    cuts = find_cuts(tokenizer, [])
    recordings = [Recording(tokenizer), Recording(tokenizer)]
    for recording in recordings:
        encoded(SegmentEncoder(recording, cuts, cache), "hello")
    assert [recording.batches for recording in recordings] == [[["hello"]], [["hello"]]]
