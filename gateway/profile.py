"""How long an engine's steps take, as a linear function of what is in them. Pure.

An engine computes in steps: one token for each decoding request, and up to a budget of prompt tokens. A
step reads the weights once (the fixed part), multiplies every prompt token with them, compares it with
every token before it (the quadratic part: a pair is one token looking at one earlier token), and reads the
KV cache of every decoding request.
"""

from __future__ import annotations

import msgspec


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Costs of an engine's steps."""

    prefill_tokens_per_s: float = 10_000.0
    """Of prompts so short that attention costs nothing."""
    attention_ns_per_pair: float = 0.0
    """Added for each pair of a prompt token and one before it."""
    step_ms: float = 0.0
    """Of a step, whatever is in it."""
    decode_us_per_request: float = 0.0
    """Added to a step for each decoding request."""
    decode_ns_per_token: float = 0.0
    """Added to a step for each token of the decoding requests' context."""

    def prefill_ms(self, num_tokens: float, num_pairs: float = 0.0) -> float:
        """Return the compute time of prompt tokens without the fixed parts of their steps."""
        return num_tokens / self.prefill_tokens_per_s * 1e3 + num_pairs * self.attention_ns_per_pair / 1e6

    def decode_ms(self, num_requests: int, num_context_tokens: int) -> float:
        """Return what decoding requests add to a step."""
        return (
            num_requests * self.decode_us_per_request / 1e3
            + num_context_tokens * self.decode_ns_per_token / 1e6
        )


def num_pairs(num_tokens: int, num_before: int) -> float:
    """Return the pairs of `num_tokens` prompt tokens that follow `num_before` others."""
    return num_tokens * (num_before + num_tokens / 2)
