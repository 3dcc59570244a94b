"""The recorded KV event streams in tests/data, and what the engine that sent them must hold."""

import base64
import functools
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
VERSIONS = ("0.24.0", "0.32.0")
HYBRID = "0.32.0_hybrid"
MODEL = "tiny"
BLOCK_SIZE = 32
NUM_BLOCKS = 24


@functools.cache
def recorded_payloads(version: str) -> tuple[bytes, ...]:
    lines = (DATA / f"kv_events_vllm_{version}.jsonl").read_text().splitlines()
    return tuple(base64.b64decode(json.loads(line)["payload_b64"]) for line in lines)


def recorded_steps(version: str) -> list[dict[str, Any]]:
    return json.loads((DATA / f"kv_events_vllm_{version}.steps.json").read_text())


def cached_tokens_of(step: dict[str, Any]) -> list[int]:
    """Return prompt and output without the last token, whose KV is never computed."""
    return (step["prompt_token_ids"] + step["output_token_ids"])[:-1]
