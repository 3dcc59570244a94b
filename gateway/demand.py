"""What a request asks of a worker, as its headers and its body say."""

from __future__ import annotations

import math

import msgspec

from gateway.admission import TTFT_TARGET_HEADER
from gateway.decision import HttpRequest
from gateway.errors import RequestError
from gateway.labels import ANY_LABELS, LABELS_HEADER, Selector, parse_selector
from gateway.lookup import longest_prompt
from gateway.plan import Demand
from gateway.tokens.request import ReadRequest

BYTES_PER_TOKEN = 4
"""A prompt whose tokens are not known is charged by the size of its body."""

RANK_HEADER = "x-data-parallel-rank"
"""Source: vLLM 0.32 `vllm/entrypoints/openai/engine/serving.py`, _get_data_parallel_rank."""


class _Named(msgspec.Struct):
    model: str | None = None


def named_model(body: bytes) -> str | None:
    """Return the `model` of a JSON body, without looking at anything else."""
    try:
        return msgspec.json.decode(body, type=_Named).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def demand_of(request: HttpRequest, model: str | None, read: ReadRequest | None) -> Demand:
    """Return what the request asks of a worker; without its tokens, an estimate.

    Raises:
        RequestError: 400, a header of ours cannot be read.
    """
    rank = request.headers.get(RANK_HEADER, "")
    return Demand(
        num_tokens=read.num_tokens if read else len(request.body) // BYTES_PER_TOKEN,
        num_lookup_tokens=len(longest_prompt(read).tokens) if read else 0,
        model=model,
        num_context_tokens=max(len(prompt.tokens) for prompt in read.prompts) if read else 0,
        endpoints=request.candidates,
        dp_rank=int(rank) if rank.isascii() and rank.isdecimal() else None,
        max_output_tokens=read.max_output_tokens if read else None,
        labels=_selector(request),
    )


def _selector(request: HttpRequest) -> Selector:
    if (given := request.headers.get(LABELS_HEADER)) is None:
        return request.caller.labels if request.caller else ANY_LABELS
    try:
        return parse_selector(given)
    except ValueError as error:
        raise RequestError(400, f"{LABELS_HEADER}: {error}.") from error


def ttft_target_ms(request: HttpRequest) -> float | None:
    """Return the request's own target, or its key's.

    Raises:
        RequestError: 400, the header is no time.
    """
    if (given := request.headers.get(TTFT_TARGET_HEADER)) is None:
        return request.caller.ttft_target_ms if request.caller else None
    try:
        target_ms = float(given)
    except ValueError:
        target_ms = 0.0
    if not 0 < target_ms < math.inf:
        raise RequestError(400, f"{TTFT_TARGET_HEADER} must be a time in milliseconds, such as 800.")
    return target_ms
