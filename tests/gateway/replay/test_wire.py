from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.replay.wire import Transfer, Wires, WireSpec, read_roles, read_wire
from kvindex.errors import ConfigError
from kvindex.worker import Role

SPEC = WireSpec(gb_per_s=1.0, latency_ms=2.0)
MB = 10**6


def wires(spec: WireSpec = SPEC, num_workers: int = 3) -> Wires:
    """A token is 1 MB, so it takes 1 ms."""
    return Wires(spec, num_workers, bytes_per_token=MB, block_size=16)


def test_the_wire_and_roles_are_read_from_the_command_line():
    assert read_wire("50") == WireSpec(50.0)
    assert read_wire("12.5@2") == WireSpec(12.5, 2.0)
    assert read_roles("prefill=1,decode=2", 4) == (Role.PREFILL, Role.DECODE, Role.DECODE, Role.BOTH)


@pytest.mark.parametrize("text", ["", "0", "fast", "1@", "1.1.1", "-1", "1@2@3"])
def test_any_other_wire_is_refused(text):
    with pytest.raises(ConfigError, match="write GB_PER_S"):
        read_wire(text)


@pytest.mark.parametrize(
    ("text", "says"), [("", "write prefill="), ("both=1", "write prefill="), ("prefill=5", "4 workers")]
)
def test_other_roles_are_refused(text, says):
    with pytest.raises(ConfigError, match=says):
        read_roles(text, 4)


def test_chunks_leave_while_the_next_are_computed():
    wire, transfer = wires(), Transfer(0, 1, 100)
    assert wire.asked(transfer, 0, 0.0) is None
    assert wire.computed(transfer, 40, 50.0) is None  # two blocks: until 82, there at 84
    assert wire.computed(transfer, 100, 200.0) == pytest.approx(200 + 68 + 2)
    assert transfer.num_bytes == 100 * MB
    assert transfer.wire_ms == pytest.approx(34 + 70)
    assert transfer.waited_ms == pytest.approx(70)


def test_what_was_computed_before_it_is_asked_for_leaves_then_and_what_is_held_never():
    wire, transfer = wires(), Transfer(0, 1, 100)
    assert wire.computed(transfer, 48, 0.0) is None
    assert wire.computed(transfer, 100, 10.0) is None
    assert wire.asked(transfer, 64, 300.0) == pytest.approx(300 + 36 + 2)
    assert transfer.num_bytes == 36 * MB
    assert transfer.waited_ms == pytest.approx(38)


def test_a_worker_sends_and_receives_one_chunk_at_a_time():
    wire = wires()
    first, sibling, other = Transfer(0, 1, 50), Transfer(0, 2, 50), Transfer(1, 0, 50)
    for transfer in (first, sibling, other):
        wire.asked(transfer, 0, 0.0)
    assert wire.computed(first, 50, 0.0) == pytest.approx(52)
    assert wire.computed(sibling, 50, 0.0) == pytest.approx(102)  # of the same sender
    assert wire.computed(other, 50, 0.0) == pytest.approx(52)  # the other way of the same link


def test_receivers_measure_the_wire():
    wire = wires(num_workers=2)
    for number, num_tokens in enumerate((32, 64, 480)):
        transfer = Transfer(0, 1, num_tokens)
        wire.asked(transfer, 0, 10_000.0 * number)
        wire.computed(transfer, num_tokens, 10_000.0 * number)
        wire.arrived(transfer)
    assert wire.paces[1].line().gb_per_s == pytest.approx(1.0)
    assert wire.paces[1].line().latency_ms == pytest.approx(2.0)
    assert wire.paces[0].line().gb_per_s == 0


@given(
    first_token=st.integers(0, 99),
    asked_ms=st.floats(0, 500),
    steps=st.lists(st.tuples(st.integers(1, 100), st.floats(0, 100)), min_size=1, max_size=6),
)
def test_all_that_is_missing_is_sent_once_whoever_comes_first(first_token, asked_ms, steps):
    wire, transfer = wires(), Transfer(0, 1, 100)
    events: list[tuple[float, int]] = [(asked_ms, 0)]
    now_ms = 0.0
    ends = sorted({end for end, _ in steps} | {100})
    for end, gap_ms in zip(ends, [gap for _, gap in steps] + [1.0], strict=False):
        now_ms += gap_ms
        events.append((now_ms, end))
    if events[-1][1] != 100:
        events.append((now_ms + 1, 100))
    arrivals = []
    for at_ms, end in sorted(events):
        arrived = wire.computed(transfer, end, at_ms) if end else wire.asked(transfer, first_token, at_ms)
        arrivals += [arrived] if arrived is not None else []
    assert len(arrivals) == 1
    assert transfer.num_bytes == (100 - first_token) * MB
    assert not math.isnan(transfer.waited_ms)
    assert arrivals[0] >= max(asked_ms, events[-1][0]) + 2
