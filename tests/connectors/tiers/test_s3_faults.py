"""The S3 tier before a server that fails: nothing wrong is loaded, what is gone is forgotten."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from tests.connectors.tiers.test_stores import Listener, S3Store, content, find, get, key, put
from tests.support import s3_faults
from tests.support.s3_faults import Fault, FaultyS3, faulty_s3_server
from tests.support.tiers import wait_until

DEADLINE_S = 2.0
FAILURES = {
    "403": s3_faults.FORBIDDEN,
    "expired": s3_faults.EXPIRED,
    "500": s3_faults.FAILING,
    "503": s3_faults.SLOW_DOWN,
    "hung up": s3_faults.HUNG_UP,
    "silent": s3_faults.SILENT,
}
OF_BODIES = {"reset": s3_faults.RESET, "cut": s3_faults.CUT, "stalled": s3_faults.STALLED}
failures = pytest.mark.parametrize("fault", FAILURES.values(), ids=FAILURES)
failures_of_loads = pytest.mark.parametrize(
    "fault", [*FAILURES.values(), *OF_BODIES.values()], ids=[*FAILURES, *OF_BODIES]
)


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyS3]:
    with faulty_s3_server() as running:
        yield running


@pytest.fixture
def store(server: FaultyS3, tmp_path: Path) -> S3Store:
    return S3Store(server, f"faults/{tmp_path.name}")


@pytest.fixture
def tier(store: S3Store) -> Iterator[Any]:
    """A server that has stored nothing itself: what it finds it has to ask for."""
    first = store.open()
    assert put(first, 1, 2)
    first.close()
    opened = store.open(deadline_s=DEADLINE_S, lookup_s=60)
    opened.listener = Listener()
    opened.register_listener(opened.listener)
    wait_until(lambda: len(opened.listener.stored) == 2)
    # It is probed at once, and then not for a while.
    wait_until(lambda: opened.report_status()["load"]["num_loads"])
    yield opened
    opened.close()


def counted(what: str) -> float:
    return REGISTRY.get_sample_value(f"kvlane_store_{what}_total", {"tier": "s3"}) or 0.0


def is_off() -> float | None:
    return REGISTRY.get_sample_value("kvlane_store_off", {"tier": "s3"})


def comes_back(tier: Any) -> None:
    """Wait for the pause to end; the next that is tried decides anew."""
    assert is_off() == 1
    # On a busy machine one answer may come after the deadline.
    wait_until(lambda: find(tier, 1, 2) == [True, True])
    wait_until(lambda: get(tier, 1, 2) == [content(1), content(2)])
    assert is_off() == 0


@failures_of_loads
def test_a_load_that_fails_loads_nothing_and_switches_the_tier_off(
    server: FaultyS3, tier: Any, store: S3Store, fault: Fault
):
    before = counted("failures")
    with server.failing(fault.of("GET")):
        assert get(tier, 1) == [None]
    assert counted("failures") == before + 1
    # It is there still.
    assert len(store.names()) == len(tier.listener.stored) == 2
    comes_back(tier)


@failures
def test_a_lookup_that_fails_finds_nothing_in_time(server: FaultyS3, tier: Any, fault: Fault):
    before = counted("failures")
    with server.failing(fault.of("HEAD")):
        assert find(tier, 1) == [False]
    assert counted("failures") == before + 1
    assert len(tier.listener.stored) == 2
    comes_back(tier)


@failures
def test_a_store_that_fails_is_told_to_nobody(server: FaultyS3, tier: Any, store: S3Store, fault: Fault):
    before = counted("failures")
    with server.failing(fault.of("PUT")):
        assert not put(tier, 3)
    assert counted("failures") == before + 1
    assert key(3) not in tier.listener.stored
    comes_back(tier)
    wait_until(lambda: put(tier, 3))
    wait_until(lambda: get(tier, 3) == [content(3)])


def test_what_is_gone_is_forgotten_when_it_is_loaded(server: FaultyS3, tier: Any):
    before = counted("missing_objects")
    wait_until(lambda: find(tier, 1, 2) == [True, True])
    with server.failing(s3_faults.GONE.of("GET")):
        assert get(tier, 1, 2) == [None, None]
    assert (counted("missing_objects"), tier.listener.stored) == (before + 2, {})
    assert is_off() == 0


def test_what_is_gone_is_forgotten_when_it_is_looked_up(tier: Any, store: S3Store):
    before = counted("missing_objects")
    for name in store.names():
        store.remove(name)
    assert find(tier, 1, 2, 3) == [False, False, False]
    wait_until(lambda: not tier.listener.stored)
    assert counted("missing_objects") == before + 2
    assert is_off() == 0


def test_what_comes_truncated_is_removed(server: FaultyS3, tier: Any, store: S3Store):
    before = counted("damaged_objects")
    with server.failing(s3_faults.TRUNCATED.of("GET")):
        assert get(tier, 1) == [None]
    assert counted("damaged_objects") == before + 1
    assert len(store.names()) == 1
    assert list(tier.listener.stored) == [key(2)]
    assert is_off() == 0
