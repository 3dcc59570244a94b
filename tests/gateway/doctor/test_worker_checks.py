"""What the doctor says of one worker."""

import pytest

from gateway.doctor.finding import Level
from gateway.doctor.worker_checks import parity_findings, reachability_findings, replay_findings
from gateway.parity import Parity, Reason, State, degraded, unverified
from tests.support.workers import make_worker

WORKER = make_worker("10.0.0.1:8000")
EXACT = Parity(state=State.EXACT, lag_ms=2.0)
WRONG = degraded(WORKER, Reason.HASHES, "they differ")
NO_TOKENIZER = degraded(WORKER, Reason.TOKENIZER, "no such directory")
BUSY = unverified(WORKER, Reason.NO_ANSWER, "busy")
REPLAY = "tcp://10.0.0.1:5558"


def judged(own, gateways=None, adapter=None):
    found = [*parity_findings(WORKER, own, gateways, adapter=adapter)]
    assert {each.subject for each in found} == {"worker 10.0.0.1:8000"}
    assert all(each.level is Level.OK or (each.cost and each.cure) for each in found)
    return found


@pytest.mark.parametrize(
    ("own", "gateways", "levels"),
    [
        (EXACT, None, [Level.OK]),
        (EXACT, EXACT, [Level.OK]),
        (EXACT, Parity(), [Level.OK]),
        (EXACT, WRONG, [Level.PROBLEM, Level.OK]),
        (EXACT, BUSY, [Level.WARNING, Level.OK]),
        (WRONG, EXACT, [Level.PROBLEM]),
        # Said once where both see the same.
        (WRONG, WRONG, [Level.PROBLEM]),
        (BUSY, None, [Level.WARNING]),
        (NO_TOKENIZER, None, [Level.WARNING]),
        (NO_TOKENIZER, EXACT, [Level.OK]),
        (NO_TOKENIZER, NO_TOKENIZER, [Level.PROBLEM]),
    ],
)
def test_verdicts_here_and_at_the_gateway(own, gateways, levels):
    assert [each.level for each in judged(own, gateways)] == levels


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_cost(reason):
    (finding,) = judged(degraded(WORKER, reason, "seen"))
    assert finding.what.endswith("seen")


def test_what_was_kept_apart_is_named():
    assert judged(EXACT)[0].what.endswith("salts are kept apart")
    assert judged(EXACT, adapter="sql")[0].what.endswith("salts and adapters (`sql`) are kept apart")


def test_blocks_that_come_late():
    late = Parity(state=State.EXACT, lag_ms=1_500.0)
    assert [each.level for each in judged(late)] == [Level.OK, Level.WARNING]
    assert "1.5 s" in judged(late)[1].what


def test_a_worker_that_refuses_connections():
    (finding,) = reachability_findings(WORKER)
    assert finding.level is Level.PROBLEM
    assert "10.0.0.1:8000" in finding.what


@pytest.mark.parametrize(
    ("answered", "first", "block_sizes", "level", "said"),
    [
        (True, 0, (16,), Level.OK, "all events since its start"),
        (True, 700, (16,), Level.OK, "from number 700 on"),
        (False, None, (), Level.PROBLEM, "does not answer"),
        (True, None, (), Level.WARNING, "has no event"),
        (True, 0, (16, 32), Level.PROBLEM, "blocks of 32 tokens, but it registered with 16"),
    ],
)
def test_replay(answered, first, block_sizes, level, said):
    (finding,) = replay_findings(WORKER, REPLAY, answered=answered, first=first, block_sizes=block_sizes)
    assert finding.level is level
    assert said in finding.what
    assert bool(finding.cost and finding.cure) is (level is not Level.OK)
