from __future__ import annotations

from pathlib import Path

import pytest

from gateway.errors import TraceError
from gateway.replay.readers import read_trace

MOONCAKE = Path(__file__).parents[2] / "data" / "mooncake_conversation_head.jsonl"


def test_mooncake_lines_keep_the_ids_of_full_blocks():
    trace = read_trace(MOONCAKE)
    assert (len(trace.requests), trace.block_size) == (60, 512)
    first = trace.requests[0]
    assert (first.num_tokens, first.num_output_tokens) == (6758, 500)
    assert first.blocks == tuple(range(13))


def test_azure_rows_share_nothing(tmp_path):
    file = tmp_path / "azure.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    trace = read_trace(file)
    assert [each.num_tokens for each in trace.requests] == [374, 396]
    assert trace.requests[1].at_ms == pytest.approx(4314.58, abs=0.1)
    assert not trace.requests[0].blocks


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "empty"),
        ("a,b\n1,2\n", "neither"),
        ('{"timestamp": 1}\n', ":1: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", ":2: "),
    ],
)
def test_what_is_no_trace_is_refused_with_the_place(tmp_path, content, says):
    file = tmp_path / "file"
    file.write_text(content)
    with pytest.raises(TraceError, match=says):
        read_trace(file)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TraceError, match="nowhere"):
        read_trace(tmp_path / "nowhere")
