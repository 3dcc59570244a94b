"""Receipts as a trace, and that trace read again."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.chains import make_chain
from gateway.decision import Served
from gateway.errors import TraceError
from gateway.receipts import Receipt
from gateway.recording import Recorded, recorded
from gateway.replay.readers import read_trace
from kvindex.blocks import BlockHash, hash_blocks, root_hash
from tests.support.workers import make_worker

POOL = make_worker().pool
SIZE = POOL.block_size


def hashes_of(tokens: list[int]) -> tuple[BlockHash, ...]:
    return tuple(hash_blocks(root_hash("tiny"), tokens, SIZE))


def made(tokens: list[int], at_s: float = 1_000.0, max_hashes: int = 10_000, **fields: object) -> Receipt:
    hashes = hashes_of(tokens)
    chain = make_chain(POOL, hashes, hashes, "salt", max_hashes=max_hashes, overlap_stride=1)
    known = {"decision_id": "d", "request_id": "client", "path": "/v1/completions", "model": "tiny"}
    return Receipt(**(known | {"at": at_s, "prompt_tokens": len(tokens), "chains": (chain,)} | fields))


def write(file: Path, *receipts: Receipt) -> Path:
    file.write_bytes(b"".join(msgspec.json.encode(recorded(each)) + b"\n" for each in receipts))
    return file


def prompt(start: int, num_blocks: int, extra: int = 3) -> list[int]:
    return list(range(start, start + num_blocks * SIZE + extra))


def num_shared(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    pairs = zip(left, right, strict=False)
    return next((depth for depth, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def test_what_was_recorded_is_read_again(tmp_path: Path):
    first, second = prompt(0, 5), [*prompt(0, 5, 0), *prompt(900, 2)]
    file = write(tmp_path / "trace.jsonl", made(second, 1_002.5), made(first, 1_001.0))
    trace = read_trace(file)
    assert (trace.name, trace.block_size) == ("trace", SIZE)
    assert [each.at_ms for each in trace.requests] == [0, 1_500]
    assert [each.num_tokens for each in trace.requests] == [len(first), len(second)]
    blocks = [each.blocks for each in trace.requests]
    assert [len(each) for each in blocks] == [5, 7]
    assert blocks[1][:5] == blocks[0]


pieces = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), min_size=1, max_size=4)


@given(st.lists(st.tuples(pieces, st.integers(1, 8)), min_size=2, max_size=6))
def test_prompts_share_as_many_blocks_as_they_did_within_their_stride(tmp_path_factory, wanted):
    """Each prompt is pieces of some contents, and keeps few hashes or many."""
    prompts = [
        [*(token for start, size in each for token in prompt(10_000 * start, size, 0)), 7]
        for each, _ in wanted
    ]
    receipts = [
        made(tokens, number, most)
        for number, (tokens, (_, most)) in enumerate(zip(prompts, wanted, strict=True))
    ]
    trace = read_trace(write(tmp_path_factory.mktemp("t") / "trace", *receipts))
    strides = [each.chains[0].stride for each in receipts]
    for i, left in enumerate(trace.requests):
        for j, right in enumerate(trace.requests[:i]):
            exact = num_shared(hashes_of(prompts[i]), hashes_of(prompts[j]))
            found = num_shared(left.blocks, right.blocks)
            assert exact - max(strides[i], strides[j]) < found <= exact


def test_a_long_prompt_has_what_a_short_one_tells_of_it(tmp_path: Path):
    short, long = prompt(0, 4), prompt(0, 64)
    file = write(tmp_path / "trace", made(long, 1.0, max_hashes=16), made(short, 2.0))
    first, second = read_trace(file).requests
    assert first.blocks[:4] == second.blocks
    assert len(set(first.blocks)) == 64


@pytest.mark.parametrize(
    ("num_bytes", "fields", "num_tokens"),
    [
        (None, {"max_output_tokens": 40}, 40),
        (None, {}, 1),
        (256 * 30 + 100, {"streamed": True}, 30),
        (256 * 30, {"streamed": True, "max_output_tokens": 20}, 20),
        (512 + 4 * 30, {}, 30),
        (10, {}, 1),
    ],
)
def test_an_answers_length_is_told_by_its_size(num_bytes, fields, num_tokens):
    served = None if num_bytes is None else Served("d", 200, "a:1", 1.0, 2.0, 1, num_bytes)
    found = recorded(made(prompt(0, 1), served=served, **fields))
    assert found is not None
    assert found.output_tokens == num_tokens


def test_requests_whose_prompts_were_not_read_are_left_out():
    assert recorded(made([], prompt_tokens=0)) is None
    assert recorded(made(prompt(0, 1), model=None)) is None
    by_load = recorded(made([], prompt_tokens=70, chains=()))
    assert by_load is not None
    assert (by_load.prompt_tokens, by_load.num_blocks) == (70, 0)


def test_nothing_that_tells_of_content_or_client_is_in_it():
    line = msgspec.json.decode(msgspec.json.encode(recorded(made(prompt(0, 2)))))
    assert set(line) == set(Recorded.__struct_fields__)
    assert not {"client", "d", "salt"} & {each for each in line.values() if isinstance(each, str)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hashes": "@"}, "base64|padding|Non"),
        ({"num_blocks": 7}, "not the hashes of 7 blocks"),
        ({"stride": 0}, "not the hashes"),
        ({"prompt_tokens": "many"}, "prompt_tokens"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, change, says):
    good = msgspec.to_builtins(recorded(made(prompt(0, 2))))
    file = tmp_path / "trace"
    file.write_bytes(b"\n".join(msgspec.json.encode(each) for each in (good, good | change)))
    with pytest.raises(TraceError, match=says) as caught:
        read_trace(file)
    assert f"{file}:2: " in str(caught.value)


def test_blocks_of_several_sizes_are_refused(tmp_path: Path):
    good = msgspec.to_builtins(recorded(made(prompt(0, 2))))
    file = tmp_path / "trace"
    file.write_bytes(b"\n".join(msgspec.json.encode(each) for each in (good, good | {"block_size": 32})))
    with pytest.raises(TraceError, match="blocks of 16, 32 tokens"):
        read_trace(file)
