"""Which transport is used, and what is said when it cannot be."""

import pytest

from connectors.transports import TransportChoice, best_common, names
from kvindex.errors import ConfigError


def test_a_transport_that_does_not_exist_or_work_is_refused_at_the_start():
    with pytest.raises(ConfigError, match=r"no transport 'ib': choose among ucx, .*auto"):
        TransportChoice("ib")


def test_auto_is_what_is_installed():
    assert names("auto") == ["ucx", "nixl-ucx"]
    assert names("memory,ucx") == ["ucx", "memory"]


def test_two_workers_use_the_best_that_both_have():
    assert best_common(["nixl-ucx", "ucx"], ["ucx", "nixl-ucx", "nixl-libfabric"]) == "ucx"
    assert best_common(["nixl-libfabric", "nixl-ucx"], ["nixl-ucx", "nixl-libfabric"]) == "nixl-libfabric"
    assert best_common(["ucx"], ["nixl-ucx"]) is None


async def test_a_process_has_one_transport():
    choice = TransportChoice("memory,ucx")
    assert choice.transport is None
    opened = choice.open("memory")
    assert choice.names == ["memory"]
    assert choice.open("memory") is opened
    choice.close()
