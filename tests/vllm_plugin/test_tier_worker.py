"""A store whose server does not answer in time ends nothing. Real servers: `test_tiers`."""

import pytest
from lmcache.v1.mp_observability.errors import LMCacheTimeoutError

from vllm_plugin.tier_worker import _given_up_when_late


def test_a_late_store_is_given_up_and_the_next_is_made():
    made: list[str] = []

    def store(request_id: str, op: object, *, cache_salt: str) -> None:
        if request_id == "late":
            raise LMCacheTimeoutError("PREPARE_STORE timed out")
        made.append(request_id + cache_salt)

    submit = _given_up_when_late(store)
    submit("late", None, cache_salt="s")
    submit("next", None, cache_salt="s")
    assert made == ["nexts"]


def test_other_errors_are_not_hidden():
    def store(request_id: str) -> None:
        raise RuntimeError(request_id)

    with pytest.raises(RuntimeError, match="r"):
        _given_up_when_late(store)("r")
