"""Receipts as a trace: what `kvlane replay` needs of past requests, in hashes and counts. Pure.

Neither text nor token ids nor ids of requests are in it; hashes of blocks are those of the index.
"""

from __future__ import annotations

import base64

import msgspec

from gateway.chains import Chain
from gateway.receipts import Receipt

# vLLM 0.32 sends a token in a server-sent event of this size, or whole answers in an object like this.
_EVENT_BYTES = 256
_ENVELOPE_BYTES = 512
_BYTES_PER_TOKEN = 4


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """One request, as a line of a trace."""

    at_s: float
    """Unix time of its arrival."""
    model: str
    prompt_tokens: int
    output_tokens: int
    """Estimated from the size of the answer: gateways do not read it."""
    block_size: int
    num_blocks: int
    """Full blocks of the prompt; 0 where they are not known."""
    stride: int
    """Of which every `stride`-th has a hash here."""
    hashes: str
    """Base64 of these hashes, 8 bytes each. They are chained: one stands for all of the prompt before it."""
    worker: str | None
    matched_tokens: int
    predicted_ttft_ms: float | None
    ttft_ms: float | None


def recorded(receipt: Receipt) -> Recorded | None:
    """Return the request of a receipt; None if its prompt was not read."""
    if receipt.model is None or not receipt.prompt_tokens:
        return None
    chain: Chain | None = max(receipt.chains, key=lambda chain: chain.num_blocks, default=None)
    served = receipt.served
    return Recorded(
        at_s=receipt.at,
        model=receipt.model,
        prompt_tokens=receipt.prompt_tokens,
        output_tokens=_output_tokens(receipt),
        block_size=chain.pool.block_size if chain else 0,
        num_blocks=chain.num_blocks if chain else 0,
        stride=chain.stride if chain else 1,
        hashes=base64.b64encode(chain.hashes).decode() if chain else "",
        worker=receipt.chosen,
        matched_tokens=receipt.matched_tokens,
        predicted_ttft_ms=receipt.predicted_ttft_ms,
        ttft_ms=served.ttft_ms if served else None,
    )


def _output_tokens(receipt: Receipt) -> int:
    """Return how long the answer was, as far as its size tells; at least 1."""
    most = receipt.max_output_tokens
    if receipt.served is None:
        return most or 1
    num_bytes = receipt.served.response_bytes
    if receipt.streamed:
        num_tokens = num_bytes // _EVENT_BYTES
    else:
        num_tokens = (num_bytes - _ENVELOPE_BYTES) // _BYTES_PER_TOKEN
    return max(1, num_tokens if most is None else min(num_tokens, most))
