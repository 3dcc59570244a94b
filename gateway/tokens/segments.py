"""Tokenises texts segment by segment, and each segment once."""

from __future__ import annotations

import secrets
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING

import xxhash

from gateway import metrics
from gateway.tokens.cache import ByteCache
from gateway.tokens.cuts import Cuts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKEN_BYTES = array("I").itemsize

SHARED_CHARS = 8_192
"""More text than this is shared among the cores; less is done sooner by one alone."""


@dataclass(slots=True)
class Segments:
    """One text on its way to tokens, in UTF-8; owned by one request.

    `tokens` holds packed u32 in the machine's byte order, or None where a segment is still to be encoded.
    """

    texts: list[bytes]
    keys: list[bytes]
    tokens: list[bytes | None]
    num_counted: int
    """Leading segments whose tokens all count: all of them, or those before the text's unknown part."""
    num_border_bytes: int = 0
    """Leading part of the segment after them that counts too."""
    num_border_tokens: int = 0

    @property
    def num_new_bytes(self) -> int:
        """How much text `SegmentEncoder.encode` has to look at."""
        border = len(self.texts[self.num_counted]) if self.num_border_bytes else 0
        new = (len(text) for text, tokens in zip(self.texts, self.tokens, strict=True) if tokens is None)
        return border + sum(new)

    @property
    def packed(self) -> bytes:
        """All tokens; complete once everything is encoded."""
        return b"".join(filter(None, self.tokens))

    @property
    def num_counted_tokens(self) -> int:
        """Tokens that end within the part that counts."""
        return _num_tokens(self.tokens[: self.num_counted]) + self.num_border_tokens


class SegmentEncoder:
    """A tokenizer that remembers; it adds no special tokens around texts. Thread-safe.

    Args:
        tokenizer: what encodes.
        cuts: exact for `tokenizer`.
        cache: where tokens are remembered.
    """

    def __init__(self, tokenizer: Tokenizer, cuts: Cuts, cache: ByteCache) -> None:
        self._tokenizer = tokenizer
        self._cuts = cuts
        self._cache = cache
        # Tokenizers share the cache, and nobody outside can foresee which texts have equal keys.
        self._seed = secrets.randbits(64)

    def split(
        self, text: str, *, counted_chars: int | None = None, cache_salt: str | None = None
    ) -> Segments:
        """Return the segments of `text`, with their tokens where these are known.

        Args:
            text: what to tokenise.
            counted_chars: leading part that counts; None: all.
            cache_salt: of the request. What is known under one salt is not under another, or the time that
                an answer takes would tell whether somebody else has sent the same.

        Raises:
            UnicodeEncodeError: lone surrogates, which are not text.
        """
        texts = self._cuts.split(text.encode())
        seed = self._seed
        if cache_salt is not None:
            seed = xxhash.xxh3_64_intdigest(cache_salt.encode(errors="surrogatepass"), self._seed)
        keys = [xxhash.xxh3_128_digest(segment, seed) for segment in texts]
        segments = Segments(texts, keys, self._cache.get(keys), len(texts))
        if counted_chars is not None:
            left = len(text[:counted_chars].encode())
            ends = list(accumulate(map(len, texts)))
            segments.num_counted = bisect_right(ends, left)
            segments.num_border_bytes = (
                left - ends[segments.num_counted - 1] if segments.num_counted else left
            )
        return segments

    def encode(self, batch: Sequence[Segments]) -> None:
        """Encode what is new in all of `batch`.

        Blocking, without the GIL: 1 MB of new text takes about half a second, less if several cores can
        share its segments.
        """
        for segments in batch:
            metrics.TOKEN_CACHE_HITS.inc(_num_tokens(segments.tokens))
        new = {
            key: text
            for segments in batch
            for key, text, tokens in zip(segments.keys, segments.texts, segments.tokens, strict=True)
            if tokens is None
        }
        if new:
            packed = self._encoded([text.decode() for text in new.values()])
            metrics.TOKEN_CACHE_MISSES.inc(_num_tokens(packed))
            found = dict(zip(new, packed, strict=True))
            self._cache.put(found)
            for segments in batch:
                segments.tokens = [
                    found[key] if tokens is None else tokens
                    for key, tokens in zip(segments.keys, segments.tokens, strict=True)
                ]
        for segments in batch:
            if segments.num_border_bytes:
                segments.num_border_tokens = self._count(
                    segments.texts[segments.num_counted], segments.num_border_bytes
                )

    def _encoded(self, texts: list[str]) -> list[bytes]:
        is_shared = sum(map(len, texts)) > SHARED_CHARS
        return [
            array("I", encoding.ids).tobytes()
            for batch in ([texts] if is_shared else [[text] for text in texts])
            # Unlike encode, the batch call frees the GIL; "fast" leaves out offsets, which nobody reads.
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        ]

    def _count(self, text: bytes, num_bytes: int) -> int:
        """Return how many tokens of `text` end within its first `num_bytes`."""
        num_chars = len(text[:num_bytes].decode())
        (encoding,) = self._tokenizer.encode_batch([text.decode()], add_special_tokens=False)
        return sum(1 for _ in takewhile(lambda offsets: offsets[1] <= num_chars, encoding.offsets))


def _num_tokens(packed: Iterable[bytes | None]) -> int:
    return sum(map(len, filter(None, packed))) // TOKEN_BYTES
