"""Where a text may be cut so that its segments, tokenised one by one, give the tokens of the whole.

A tokenizer first takes its added tokens out of the text; what follows (normalizer, pre-tokenizer, model)
sees one of the pieces between them at a time. So a cut before an added token changes nothing, provided
that the token is found there whatever stands around it. What comes after the cut begins with the token
and not with text, so even a tokenizer that treats the first piece of a text in its own way is not misled.

Source: tokenizers 0.23 `tokenizers/src/tokenizer/added_vocabulary.rs` (find_matches,
extract_and_normalize), `tokenizers/src/pre_tokenizers/metaspace.rs`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

MIN_SEGMENT_BYTES = 256
"""Shorter segments stay together: each has a price, and little text is tokenised quickly."""

# Everything that is known to look at one piece of text at a time.
_LOCAL = frozenset(
    {
        # normalizers
        *("BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled"),
        *("Prepend", "Replace", "Strip", "StripAccents"),
        # pre-tokenizers
        *("BertPreTokenizer", "CharDelimiterSplit", "Digits", "FixedLength", "Metaspace", "Punctuation"),
        *("Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"),
        # both, and models
        *("Sequence", "BPE", "WordPiece", "WordLevel", "Unigram"),
    }
)

# A token that starts with one of these is neither part of a word nor of white space before it.
_STARTS = frozenset(string.punctuation) - {"_"}

_SAMPLES = (
    "",
    "Hello, world! def f(x):\n    return x  # 12345\n\n",
    " naïve Σίσυφος 日本語のテキスト مرحبا 🎉👨‍👩‍👧‍👦 e\u0301 \u200b\ufeff\u3000tab\tand\r\nnew lines   ",
    "user\n  don't\u00a0STOP.",
)


class Cuts:
    """Cuts texts, in UTF-8, before certain tokens.

    Args:
        tokens: what to cut before; none: texts stay whole.
        min_bytes: length that a segment must have before a cut ends it.
    """

    def __init__(self, tokens: Collection[str], *, min_bytes: int = MIN_SEGMENT_BYTES) -> None:
        self.tokens = frozenset(tokens)
        # A search is fast if it knows the first byte of what it looks for.
        by_start = groupby(sorted(token.encode() for token in tokens), key=itemgetter(0))
        self._searches = [re.compile(b"|".join(map(re.escape, alike))) for _, alike in by_start]
        self._min_bytes = max(min_bytes, 1)

    def split(self, text: bytes) -> list[bytes]:
        """Return the segments of `text`, at least one.

        Where text is appended, all segments but the last stay as they are.
        """
        places = [token.start() for search in self._searches for token in search.finditer(text)]
        if len(self._searches) > 1:
            places.sort()
        segments = []
        start = 0
        for at in places:
            if at - start >= self._min_bytes:
                segments.append(text[start:at])
                start = at
        segments.append(text[start:])
        return segments


def find_cuts(tokenizer: Tokenizer, wanted: Iterable[str]) -> Cuts:
    """Return cuts that are exact for `tokenizer`: before those of the `wanted` tokens that allow it.

    Takes a fraction of a second for large vocabularies.
    """
    if tokenizer.encode_special_tokens or not _is_local(tokenizer):
        return Cuts(())
    tokens = _always_found(set(wanted), tokenizer.get_added_tokens_decoder().values())
    return Cuts(tokens) if tokens and _holds(tokenizer, tokens) else Cuts(())


def _is_local(tokenizer: Tokenizer) -> bool:
    """Whether every part of the tokenizer looks at one piece of text at a time, and always equally."""
    structure = msgspec.json.decode(tokenizer.to_str(), type=_Structure)
    parts = [*_parts(structure.normalizer), *_parts(structure.pre_tokenizer)]
    kinds = {structure.model.type, *(part["type"] for part in parts)}
    return kinds <= _LOCAL and not structure.model.dropout


def _always_found(wanted: set[str], added: Collection[AddedToken]) -> set[str]:
    """Return the `wanted` tokens that are found, at that very place, wherever they stand in a text."""
    tokens = {
        token.content
        for token in added
        if token.content in wanted
        and token.content[:1] in _STARTS
        and not (token.normalized or token.lstrip or token.single_word)
    }
    # Of tokens that overlap, the library takes the leftmost and then the longest. (Normalized ones are
    # looked for afterwards, within pieces.)
    beginnings = {token[:size] for token in tokens for size in range(1, len(token))}
    overlapped: set[str] = set()
    for other in (token.content for token in added if not token.normalized):
        for start in range(len(other)):
            rest = other[start:]
            if rest[0] not in _STARTS:
                continue
            if start and rest in beginnings:
                overlapped |= {token for token in tokens if token.startswith(rest)}
            overlapped |= {rest[:size] for size in range(1, len(rest) + bool(start))}
    return tokens - overlapped


def _holds(tokenizer: Tokenizer, tokens: Collection[str]) -> bool:
    """Try whether segments give the tokens of the whole."""
    cuts = Cuts(tokens, min_bytes=1)
    pieces = [piece for token in sorted(tokens) for sample in _SAMPLES for piece in (sample, token)]
    texts = ["".join(pieces), "".join(reversed(pieces)), *(f" {token} a{token}{token} " for token in tokens)]
    wholes = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for text, whole in zip(texts, wholes, strict=True):
        segments = [segment.decode() for segment in cuts.split(text.encode())]
        encodings = tokenizer.encode_batch_fast(segments, add_special_tokens=False)
        if whole.ids != [token for encoding in encodings for token in encoding.ids]:
            return False
    return True


class _Model(msgspec.Struct):
    type: str | None = None
    dropout: float | None = None


class _Structure(msgspec.Struct):
    model: _Model
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None


def _parts(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    yield part
    for nested in (*part.get("normalizers", ()), *part.get("pretokenizers", ())):
        yield from _parts(nested)
