"""A server that does not answer in time ends no engine. Real servers: `test_tiers`."""

import threading
from types import SimpleNamespace

import pytest
from lmcache.v1.mp_observability.errors import LMCacheTimeoutError

from vllm_plugin.tier_worker import _patient


class Adapter(SimpleNamespace):
    """Does with a request as LMCache's adapter does."""

    def __init__(self) -> None:
        super().__init__(_health_event=threading.Event(), made=[], dropped=[])
        self._health_event.set()

    def submit(self, request_id: str, *, cache_salt: str) -> None:
        if not self._health_event.is_set():
            self.dropped.append(request_id + cache_salt)
        elif request_id == "late":
            raise LMCacheTimeoutError("PREPARE_STORE timed out")
        else:
            self.made.append(request_id + cache_salt)


def test_a_silent_server_is_one_that_is_gone_until_the_heartbeat_finds_it():
    adapter = Adapter()
    submit = _patient(adapter, adapter.submit)
    for request_id in ("first", "late", "next"):
        submit(request_id, cache_salt="-s")
    assert (adapter.made, adapter.dropped) == (["first-s"], ["late-s", "next-s"])
    adapter._health_event.set()
    submit("last", cache_salt="-s")
    assert adapter.made == ["first-s", "last-s"]


def test_other_errors_are_not_hidden():
    def submit(request_id: str) -> None:
        raise RuntimeError(request_id)

    with pytest.raises(RuntimeError, match="r"):
        _patient(Adapter(), submit)("r")
