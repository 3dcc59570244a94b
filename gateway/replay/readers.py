"""Trace files: Mooncake's JSON lines, Azure's CSV, our own receipts."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

import msgspec

from gateway.errors import TraceError
from gateway.replay.recordings import read_recordings
from gateway.replay.trace import Trace, TraceRequest, make_trace

MOONCAKE_BLOCK_TOKENS = 512

AZURE_BLOCK_TOKENS = 16
"""Azure's trace has no content; this is no more than how its simulated caches are divided."""

AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(file: Path) -> Trace:
    """Return the trace in `file`, whichever of the formats it has.

    Raises:
        TraceError: it cannot be read, or is in none of them.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{file} cannot be read: {error}") from error
    if not lines:
        raise TraceError(f"{file} is empty")
    if lines[0].startswith("{") and '"hashes"' in lines[0]:
        trace = make_trace(file.stem, *read_recordings(file, lines))
    elif lines[0].startswith("{"):
        trace = make_trace(file.stem, MOONCAKE_BLOCK_TOKENS, _mooncake(file, lines))
    elif next(csv.reader(lines)) == AZURE_HEADER:
        trace = make_trace(file.stem, AZURE_BLOCK_TOKENS, _azure(file, lines))
    else:
        raise TraceError(
            f"{file} is neither Mooncake's JSON lines (timestamp, input_length, output_length, hash_ids) "
            f"nor Azure's CSV ({','.join(AZURE_HEADER)}) nor what `kvlane inspect receipts --jsonl` writes"
        )
    return trace


def _mooncake(file: Path, lines: Iterable[str]) -> Iterator[tuple[float, TraceRequest]]:
    """Source: github.com/kvcache-ai/Mooncake, FAST25-release: milliseconds, an id for 512 tokens and all
    before them; the last id may stand for fewer.
    """
    for number, line in enumerate(lines, 1):
        try:
            each = msgspec.json.decode(line, type=_MooncakeLine)
        except msgspec.DecodeError as error:
            raise TraceError(f"{file}:{number}: {error}") from error
        full = each.hash_ids[: each.input_length // MOONCAKE_BLOCK_TOKENS]
        yield each.timestamp, _request(each.input_length, each.output_length, tuple(full))


def _azure(file: Path, lines: Iterable[str]) -> Iterator[tuple[float, TraceRequest]]:
    """Source: github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace 2023."""
    for number, row in enumerate(csv.DictReader(lines), 2):
        try:
            at_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            request = _request(int(row["ContextTokens"]), int(row["GeneratedTokens"]), ())
        except (TypeError, ValueError) as error:
            raise TraceError(f"{file}:{number}: {error}") from error
        yield at_s * 1000, request


def _request(num_tokens: int, num_output_tokens: int, blocks: tuple[int, ...]) -> TraceRequest:
    return TraceRequest(0.0, max(1, num_tokens), max(1, num_output_tokens), blocks)
