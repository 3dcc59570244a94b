"""How long an engine's steps take, as a linear function of what is in them. Pure.

An engine computes in steps: one token for each decoding request, and up to a budget of prompt tokens. A
step reads the weights once (the fixed part), multiplies every prompt token with them, compares it with
every token before it (the quadratic part: a pair is one token looking at one earlier token), and reads the
KV cache of every decoding request.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Self

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Profile:
    """Costs of an engine's steps. A cost of 0 is one that is not known."""

    prefill_tokens_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Of prompts so short that attention costs nothing."""
    attention_ns_per_pair: Cost = 0.0
    """Added for each pair of a prompt token and one before it."""
    step_ms: Cost = 0.0
    """Of a step, whatever is in it."""
    decode_us_per_request: Cost = 0.0
    """Added to a step for each decoding request."""
    decode_ns_per_token: Cost = 0.0
    """Added to a step for each token of the decoding requests' context."""

    def prefill_ms(self, num_tokens: float, num_pairs: float = 0.0) -> float:
        """Return the compute time of prompt tokens, without the fixed parts of their steps."""
        return num_tokens / self.prefill_tokens_per_s * 1e3 + num_pairs * self.attention_ns_per_pair / 1e6

    def shared_step_ms(self, num_requests: int, num_context_tokens: int) -> float:
        """Return what a step costs beside the prompt tokens in it: the fixed part, and decoding."""
        decode_us = num_requests * self.decode_us_per_request
        return self.step_ms + decode_us / 1e3 + num_context_tokens * self.decode_ns_per_token / 1e6

    def faster(self, factor: float) -> Self:
        """Return the profile of an engine that does everything in 1 / `factor` of the time."""
        return replace(
            self,
            prefill_tokens_per_s=self.prefill_tokens_per_s * factor,
            attention_ns_per_pair=self.attention_ns_per_pair / factor,
            step_ms=self.step_ms / factor,
            decode_us_per_request=self.decode_us_per_request / factor,
            decode_ns_per_token=self.decode_ns_per_token / factor,
        )


def num_pairs(num_tokens: int, num_before: int) -> float:
    """Return the pairs of `num_tokens` prompt tokens that follow `num_before` others."""
    return num_tokens * (num_before + num_tokens / 2)
