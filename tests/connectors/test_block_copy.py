"""On a machine without a GPU Triton interprets the kernel, which is the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from triton.runtime.interpreter import InterpretedFunction

from connectors import block_copy
from connectors.block_copy import WORD_BYTES, WORDS, BlockCopy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_BLOCKS = 6


@pytest.fixture(autouse=True, scope="module")
def kernel() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(block_copy, "_move", InterpretedFunction(block_copy._move.fn))
        yield


def some_planes(num_planes: int, block_bytes: int, gap_bytes: int = 0) -> list[torch.Tensor]:
    """Planes of random numbers, with a gap behind each block."""
    row = block_bytes + gap_bytes
    memory = torch.randint(0, 255, (num_planes, NUM_BLOCKS, row), dtype=torch.uint8, device=DEVICE)
    return [plane[:, :block_bytes] for plane in memory]


@given(
    num_planes=st.integers(1, 4),
    num_words=st.one_of(st.integers(1, 40), st.integers(WORDS - 1, WORDS + 1)),
    gap_words=st.integers(0, 2),
    ids=st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, unique=True),
    data=st.data(),
)
def test_blocks_go_out_in_order_and_back_to_where_they_were(
    num_planes: int, num_words: int, gap_words: int, ids: list[int], data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, num_planes - 1))
    count = data.draw(st.integers(1, num_planes - first))
    block_bytes = num_words * WORD_BYTES
    planes = some_planes(num_planes, block_bytes, gap_words * WORD_BYTES)
    before = [plane.clone() for plane in planes]
    copy = BlockCopy(planes)
    index = torch.tensor(ids, device=DEVICE)
    buffer = torch.zeros(count * len(ids) * block_bytes, dtype=torch.uint8, device=DEVICE)

    copy.gather(first, count, index, buffer)
    expected = torch.stack([plane[index] for plane in planes[first : first + count]])
    assert torch.equal(buffer.view_as(expected), expected)
    assert all(map(torch.equal, planes, before))

    buffer.bitwise_not_()
    copy.scatter(first, count, index, buffer)
    for plane in before[first : first + count]:
        plane[index] = ~plane[index]
    assert all(map(torch.equal, planes, before))


@pytest.mark.parametrize(
    "planes",
    [
        pytest.param(some_planes(2, WORD_BYTES + 1), id="not whole words"),
        pytest.param([*some_planes(1, 64), *some_planes(1, 64, 8)], id="at different distances"),
        pytest.param([torch.zeros(4, 8, 16).transpose(1, 2)], id="blocks in another order"),
    ],
)
def test_planes_that_are_not_alike_are_told_apart(planes: list[torch.Tensor]) -> None:
    assert not BlockCopy.is_possible(planes)
    assert BlockCopy.is_possible(some_planes(2, 64, 8))


def test_one_that_copies_rightly_is_taken_and_nothing_else_is_touched() -> None:
    planes = some_planes(3, 9 * WORD_BYTES, WORD_BYTES)
    before = [plane.clone() for plane in planes]
    state = torch.get_rng_state()
    assert BlockCopy.tried(planes) is not None
    assert all(map(torch.equal, planes, before))
    assert torch.equal(torch.get_rng_state(), state)


class Broken:
    """A kernel that does a part of its work; None: that raises."""

    def __init__(self, done: tuple[bool, ...] | None) -> None:
        self._done = done
        self._kernel = block_copy._move

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, is_gather: bool, words: int) -> None:
            if self._done is None:
                raise RuntimeError("Failed to find C compiler")
            if is_gather in self._done:
                self._kernel[grid](*args, is_gather=is_gather, words=words)

        return launch


@pytest.mark.parametrize(
    ("done", "reason"),
    [
        pytest.param((), "it copies wrongly", id="nothing"),
        pytest.param((True,), "it copies wrongly", id="gathers only"),
        pytest.param((False,), "it copies wrongly", id="scatters only"),
        pytest.param(None, "RuntimeError: Failed to find C compiler", id="raises"),
    ],
)
def test_where_the_kernel_does_not_work_it_is_not_used_and_the_log_says_why(
    done: tuple[bool, ...] | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_copy, "_move", Broken(done))
    with capture_logs() as logs:
        assert BlockCopy.tried(some_planes(2, 64)) is None
    assert [(log["event"], log["reason"]) for log in logs] == [("block_copy_off", reason)]
