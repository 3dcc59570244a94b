"""Which transport is used, and what is said when it cannot be."""

import pytest

from connectors.transports import Wire, best_common, names
from kvindex.errors import ConfigError


def test_a_transport_that_does_not_exist_or_work_is_refused_at_the_start():
    with pytest.raises(ConfigError, match=r"no transport 'ib': choose among ucx, .*auto"):
        Wire("ib")


def test_auto_is_what_is_installed():
    assert names("auto") == ["ucx", "nixl-ucx"]
    assert names("memory,ucx") == ["ucx", "memory"]


def test_two_workers_use_the_best_that_both_have():
    assert best_common(["nixl-ucx", "ucx"], ["ucx", "nixl-ucx", "nixl-libfabric"]) == "ucx"
    assert best_common(["nixl-libfabric", "nixl-ucx"], ["nixl-ucx", "nixl-libfabric"]) == "nixl-libfabric"
    assert best_common(["ucx"], ["nixl-ucx"]) is None


async def test_a_process_has_one_transport():
    wire = Wire("memory,ucx")
    assert wire.transport is None
    opened = wire.open("memory")
    assert wire.names == ["memory"]
    assert wire.open("memory") is opened
    wire.close()
