"""A real S3 that answers late is known to be slow, and to be fast again, and holds no lookup up."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.connectors.tiers.test_stores import SIZE, Memory, S3Store, content, find, get, key, put
from tests.support.relay import Relay, relay
from tests.support.tiers import S3Server, s3_server, wait_until

LATE_S = 0.4


class SlowS3(NamedTuple):
    """A tier, and what is between it and its server."""

    tier: Any
    relay: Relay
    store: S3Store
    behind: S3Store

    def predicted_ms(self, num_bytes: float) -> float:
        """Return what plans are told of a load."""
        load = self.tier.report_status()["load"]
        return load["latency_ms"] + num_bytes / load["gb_per_s"] / 1e6 if load["num_loads"] else 0.0


@pytest.fixture
def slow(tmp_path: Any) -> Iterator[SlowS3]:
    with s3_server() as server, relay(server.port) as between:
        store = S3Store(S3Server(between.port, server.process), "slow")
        tier = store.open(probe_interval_s=0.05, lookup_s=LATE_S)
        yield SlowS3(tier, between, store, S3Store(server, "slow"))
        between.delay_s = 0.0
        tier.close()


class Silent:
    """A listener that nobody listens to."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def test_it_is_known_to_be_slow_and_to_be_fast_again_though_nobody_loads(slow: SlowS3):
    assert put(slow.tier, 1, 2, 3)
    slow.tier.register_listener(Silent())
    num_bytes = 40_000
    wait_until(lambda: 0 < slow.predicted_ms(num_bytes) < 1000 * LATE_S)
    slow.relay.delay_s = 2 * LATE_S
    wait_until(lambda: slow.predicted_ms(num_bytes) > 1000 * LATE_S)
    slow.relay.delay_s = 0.0
    wait_until(lambda: slow.predicted_ms(num_bytes) < 1000 * LATE_S)
    assert get(slow.tier, 1, 2) == [content(1), content(2)]


def test_a_lookup_does_not_wait_for_what_s3_has_not_said_in_time(slow: SlowS3):
    assert put(slow.tier, 1)
    other = slow.behind.open()
    assert put(other, 2)
    other.close()
    slow.relay.delay_s = 5.0
    # What this server has stored itself is known.
    assert find(slow.tier, 1, 2) == [True, False]
    slow.relay.delay_s = 0.0
    wait_until(lambda: find(slow.tier, 1, 2) == [True, True])


def test_an_answer_that_comes_late_is_remembered_and_locks_nothing(slow: SlowS3):
    other = slow.behind.open()
    assert put(other, 1)
    other.close()
    slow.relay.delay_s = 3 * LATE_S
    assert find(slow.tier, 1) == [False]
    wait_until(lambda: find(slow.tier, 1) == [True])
    wait_until(lambda: sum(slow.tier._locked_keys.values()) == 1)


def num_client_threads() -> int:
    return sum(each.read_text().startswith("Aws") for each in Path("/proc/self/task").glob("*/comm"))


def test_a_load_that_is_under_way_when_the_tier_closes_writes_nothing_later(slow: SlowS3):
    others = num_client_threads()
    tier = slow.store.open()
    assert put(tier, 1)
    # What was not found keeps nothing of the client alive.
    assert find(tier, 1, 9) == [True, False]
    slow.relay.delay_s = 2 * LATE_S
    memory = Memory()
    tier.submit_load_task([key(1)], [memory])
    time.sleep(LATE_S)
    tier.close()
    wait_until(lambda: num_client_threads() == others)
    time.sleep(2 * LATE_S)
    assert memory.content() == bytes(SIZE)
