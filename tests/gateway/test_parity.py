"""The verdict on a worker, from what a check has seen."""

import pytest

from gateway.parity import (
    CURES,
    Evidence,
    Parity,
    Reason,
    State,
    Trial,
    cure,
    degraded,
    difference,
    judge,
    pool_state,
    unverified,
)
from tests.support.workers import make_worker

WORKER = make_worker()
TOKENS = tuple(range(40))
EXACT = Parity(state=State.EXACT)
CHECKING = Parity()


def trial(**fields):
    known = {"model": "tiny", "num_blocks": 2, "num_held_blocks": 2, "num_other_blocks": 0, "waited_s": 0.25}
    return Trial(**(known | fields))


def seen(*trials, **fields):
    return Evidence(trials=trials, **({"tokens_here": TOKENS, "tokens_there": TOKENS} | fields))


def test_blocks_where_they_should_be_are_exact_and_tell_the_lag():
    verdict = judge(WORKER, seen(trial(), trial(model="sql", waited_s=0.5)))
    assert (verdict.state, verdict.reason, verdict.lag_ms) == (State.EXACT, None, 500.0)
    assert not verdict.ignores_overlap


def test_an_engine_without_tokenize_is_exact_by_its_blocks():
    assert judge(WORKER, seen(trial(), tokens_there=None)).state is State.EXACT


NOTHING = {"num_held_blocks": 0}


@pytest.mark.parametrize(
    ("evidence", "reason", "said"),
    [
        (seen(missing_model="tiny"), Reason.MODEL, "registered as `tiny`"),
        (seen(tokens_there=(0, 1, 9)), Reason.TOKENS, "from token 2 on"),
        (seen(trial(**NOTHING)), Reason.NO_BLOCKS, "0 of its 2 blocks; no other"),
        (seen(trial(num_held_blocks=0, num_other_blocks=7)), Reason.HASHES, "7 others"),
        (seen(trial(num_held_blocks=1)), Reason.HASHES, "1 of its 2 blocks"),
        (seen(trial(**NOTHING), prefix_caching=False), Reason.PREFIX_CACHING, "without prefix caching"),
        (seen(trial(**NOTHING), engine_block_size=32), Reason.BLOCK_SIZE, "hold 32 tokens"),
        (seen(trial(**NOTHING), engine_block_size=16), Reason.NO_BLOCKS, "no other"),
        (seen(trial(num_held_blocks=0, found_without={Reason.SALT})), Reason.SALT, "cache_salt"),
        # Found under the right hash as well as under that without the salt: still shared with strangers.
        (seen(trial(found_without={Reason.SALT})), Reason.SALT, "cache_salt"),
        (seen(trial(), trial(model="sql", found_without={Reason.LORA}, **NOTHING)), Reason.LORA, "`sql`"),
        (seen(trial(), tokenizer_failure="no such directory"), Reason.TOKENIZER, "no such directory"),
    ],
)
def test_what_differs_is_named_with_its_cure(evidence, reason, said):
    verdict = judge(WORKER, evidence)
    assert (verdict.state, verdict.reason) == (State.DEGRADED, reason)
    assert said in verdict.detail
    assert verdict.cure == cure(WORKER, reason)


def test_different_tokens_are_named_before_the_blocks_that_they_spoil():
    assert judge(WORKER, seen(trial(**NOTHING), tokens_there=TOKENS[1:])).reason is Reason.TOKENS


def test_without_a_tokenizer_here_token_ids_still_match():
    assert not degraded(WORKER, Reason.TOKENIZER, "").ignores_overlap
    assert degraded(WORKER, Reason.HASHES, "").ignores_overlap
    assert not unverified(WORKER, Reason.NO_ANSWER, "").ignores_overlap


@pytest.mark.parametrize("publisher", ["connector", "external"])
def test_every_reason_has_a_cure_for_every_worker(publisher):
    worker = make_worker(publisher=publisher)
    assert all(cure(worker, reason) for reason in Reason)
    assert {*CURES, Reason.NO_BLOCKS} == set(Reason)


def test_tokens_part_where_one_list_ends():
    assert "5 tokens of the probe, kvlane 3" in difference((1, 2, 3), (1, 2, 3, 4, 5))
    assert "from token 3 on" in difference((1, 2, 3), (1, 2, 3, 4, 5))


@pytest.mark.parametrize(
    ("parities", "state"),
    [
        ([], State.CHECKING),
        ([EXACT, EXACT], State.EXACT),
        ([EXACT, CHECKING], State.CHECKING),
        ([EXACT, CHECKING, degraded(WORKER, Reason.HASHES, "")], State.DEGRADED),
    ],
)
def test_a_pool_is_as_its_worst_worker(parities, state):
    assert pool_state(parities) is state
