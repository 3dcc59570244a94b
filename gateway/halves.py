"""Bodies of requests that tell an engine more: the two of a request that is prefilled on one worker and
decoded on another, and that of one which is to load less than tiers hold. Pure.

Only top-level values are taken apart; each is put back as its own bytes.

Source: vLLM 0.24 and 0.32 `vllm/entrypoints/openai` (protocol.py of completions and chat); the parameters are
those of `connectors/params.py`.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

from kvindex.stores import LOAD_KEY

PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
"""Whose requests can be split."""

TRANSFER_FIELD = "kv_transfer_params"
_MAY_NAME_IT = re.compile(rb"kv_transfer_params|\\u00[5-7]")
"""The name itself, or an escape of one of its letters, which no encoder writes."""

_OF_THE_ANSWER = ("stream_options", "min_tokens", "max_completion_tokens", "logprobs", "top_logprobs")
"""What asks for an answer that the prefill worker does not give."""

Fields = dict[str, msgspec.Raw]


class Halves(NamedTuple):
    """What the two workers get."""

    prefill: bytes
    decode: bytes


def without_transfer_params(body: bytes) -> bytes | None:
    """Return the body without a client's own transfer parameters; None if it has none.

    They name other requests' blocks, so they come from a gateway or from nobody.
    """
    if not _MAY_NAME_IT.search(body) or (fields := _fields(body)) is None or TRANSFER_FIELD not in fields:
        return None
    del fields[TRANSFER_FIELD]
    return _ENCODER.encode(fields)


def divisible(body: bytes) -> Fields | None:
    """Return the parts of a request that may be split; None for one that must stay whole.

    What needs every prompt token computed where the answer is made, or is several requests in the
    engine, which cannot share a transfer, stays whole.
    """
    fields = _fields(body)
    return fields if fields is not None and _may_split(fields) else None


def load_params(limit_tokens: int | None) -> dict[str, int]:
    """Return what an engine is told of tiers.

    Args:
        limit_tokens: see `Choice.load_limit_tokens`.
    """
    return {} if limit_tokens is None else {LOAD_KEY: limit_tokens}


def make_halves(
    fields: Fields,
    *,
    transfer_id: str,
    peer: str,
    peer_tp_size: int,
    load_limits: tuple[int | None, int | None],
) -> Halves:
    """Return the bodies for both workers.

    Args:
        fields: of a `divisible` request.
        transfer_id: what ties the halves together, and entitles to the blocks.
        peer: `host:port` of the prefill worker's first rank.
        peer_tp_size: its tensor-parallel ranks.
        load_limits: how far each may read tiers, the decode worker where no transfer comes; see
            `load_params`.
    """
    mine = {"transfer_id": transfer_id, "role": "send"}
    theirs = {"transfer_id": transfer_id, "role": "receive", "peer": peer, "peer_tp_size": peer_tp_size}
    prefill, decode = map(load_params, load_limits)
    first = {name: value for name, value in fields.items() if name not in _OF_THE_ANSWER}
    first |= {"max_tokens": _raw(1), "stream": _raw(value=False)}
    first[TRANSFER_FIELD] = _raw({"kvlane": mine, **prefill})
    second = fields | {TRANSFER_FIELD: _raw({"kvlane": theirs, **decode})}
    return Halves(_ENCODER.encode(first), _ENCODER.encode(second))


def with_load_limit(body: bytes, limit_tokens: int) -> bytes | None:
    """Return the body of a request that reads tiers for so many of its leading tokens; None if it is none."""
    if (fields := _fields(body)) is None:
        return None
    return _ENCODER.encode(fields | {TRANSFER_FIELD: _raw(load_params(limit_tokens))})


def _may_split(fields: Fields) -> bool:
    asked = {
        name: _value(fields.get(name))
        for name in ("n", "best_of", "use_beam_search", "echo", "prompt_logprobs")
    }
    is_one = asked["n"] in (None, 1) and asked["best_of"] in (None, 1) and not asked["use_beam_search"]
    return is_one and not asked["echo"] and asked["prompt_logprobs"] is None


def _fields(body: bytes) -> Fields | None:
    try:
        return _FIELDS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _value(raw: msgspec.Raw | None) -> Any:  # noqa: ANN401 (any JSON)
    return None if raw is None else msgspec.json.decode(raw)


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(_ENCODER.encode(value))


_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(Fields)
