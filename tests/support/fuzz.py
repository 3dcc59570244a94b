"""Request bodies that no client should send: real ones, damaged in every way that comes to mind."""

from __future__ import annotations

import json
import random
from typing import Any

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/tokenize",
    "/inference/v1/generate",
    "/x",
)

BODIES: tuple[dict[str, Any], ...] = (
    {"model": "tiny", "prompt": "hello there", "max_tokens": 4, "stream": True, "cache_salt": "s"},
    {"model": "tiny", "prompt": [1, 2, 3, 4]},
    {"model": "tiny", "prompt": [[1, 2], [3]], "n": 2},
    {"model": "tiny", "input": ["a", "b"], "truncate_prompt_tokens": 3},
    {"model": "tiny", "token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 1}},
    {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "You are."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "x"}}],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {}}],
            },
            {"role": "tool", "content": "4", "tool_call_id": "1"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "add_generation_prompt": True,
    },
)
ODD = (
    None,
    True,
    False,
    0,
    -1,
    1e308,
    10**30,
    "",
    "\ud800",
    "\x00",
    "<s>" * 50,
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    [1.5],
)
BYTES = (b"\xff", b"\x00", b'"', b"{", b"}", b"[", b"]", b",", b"\\u", b"\\", b"NaN", b"1e999", b"/*")


def body(draw: random.Random) -> tuple[str, bytes]:
    """Return a path and a body."""
    value: Any = json.loads(json.dumps(draw.choice(BODIES)))
    for _ in range(draw.randrange(3)):
        _change(value, draw)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.9).encode("utf-8", "surrogatepass")
    damage = draw.random()
    if damage < 0.15:
        text = text[: draw.randrange(len(text) + 1)]
    elif damage < 0.35:
        at = draw.randrange(len(text) + 1)
        text = text[:at] + draw.choice(BYTES) + text[at + draw.randrange(4) :]
    elif damage < 0.38:
        depth = draw.choice((50, 2_000, 100_000))
        text = b'{"model":"tiny","prompt":' + b"[" * depth + b"]" * depth + b"}"
    elif damage < 0.4:
        text = draw.randbytes(draw.randrange(300))
    return draw.choice(PATHS), text


def _change(value: Any, draw: random.Random) -> None:
    """Replace, remove or repeat something somewhere inside."""
    while isinstance(value, dict | list) and value:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = draw.choice(keys)
        inside = value[key]
        if not isinstance(inside, dict | list) or not inside or draw.random() < 0.4:
            kind = draw.random()
            if kind < 0.6:
                value[key] = draw.choice(ODD)
            elif kind < 0.8:
                del value[key]
            elif isinstance(value, list):
                value.extend([inside] * 20)
            return
        value = inside
