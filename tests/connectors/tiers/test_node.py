"""A node's tiers are kept by one process, with a real LMCache server."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from connectors.bench.ports import adjacent_ports
from connectors.errors import TiersUnavailable
from connectors.tiers.node import NodeFiles, TierKeeper, is_locked, join_or_start, server_command
from connectors.tiers.spec import Disk, Tiers, parse_tiers
from kvindex.errors import ConfigError
from tests.support.tiers import BIN, PATIENCE_S, TierNode, tier_node
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TierNode, Path]]:
    path = tmp_path_factory.mktemp("disk")
    port = adjacent_ports(2)
    with tier_node(f"cpu=16MiB,disk={path}:100MB", port, "--eviction-policy", "ARC") as node:
        yield node, path


def test_the_server_is_what_was_asked_for(kept: tuple[TierNode, Path]):
    node, path = kept
    config = httpx.get(f"{node.api}/config").json()
    manager = config["storage_manager"]
    assert config["mp"]["chunk_size"] == 256
    assert manager["l1_manager_config"]["memory_config"]["size_in_bytes"] == 16 << 20
    assert manager["eviction_config"]["eviction_policy"] == "ARC"
    (disk,) = manager["l2_adapter_config"]["adapters"]
    assert (disk["base_path"], disk["max_bytes"]) == (str(path), 100_000_000)


def test_who_says_the_same_joins_and_who_says_else_is_refused(kept: tuple[TierNode, Path]):
    node, path = kept
    spec = f"cpu=16MiB,disk={path}:100MB,port={node.port}"
    tiers, more = parse_tiers(spec), ["--eviction-policy", "ARC"]
    assert isinstance(tiers, Tiers)
    join_or_start(tiers, spec, more)
    assert is_locked(NodeFiles(node.port).users)
    with pytest.raises(ConfigError, match="keeps other tiers at port"):
        join_or_start(tiers, spec, [])
    with pytest.raises(ConfigError, match="keeps other tiers at port"):
        join_or_start(Tiers(1 << 20, port=node.port), spec, more)


def test_one_server_per_port_and_per_path(kept: tuple[TierNode, Path]):
    node, path = kept
    with pytest.raises(ConfigError, match="another process keeps tiers at port"):
        TierKeeper(Tiers(1 << 20, port=node.port), (), None, None)
    with pytest.raises(ConfigError, match="another server keeps its chunks in"):
        TierKeeper(Tiers(1 << 20, Disk(path, 0), port=adjacent_ports(2)), (), None, None)


async def test_a_server_that_dies_is_started_again(kept: tuple[TierNode, Path]):
    node, _ = kept
    died = node.server_pid()
    os.kill(died, signal.SIGKILL)
    await eventually(lambda: not node.is_up(), PATIENCE_S)
    await eventually(lambda: node.is_up() and node.server_pid() != died, PATIENCE_S)


def test_a_server_that_cannot_start_is_said_with_its_last_words():
    tiers = Tiers(1 << 20, port=adjacent_ports(2))
    with pytest.raises(TiersUnavailable, match="unrecognized arguments: --no-such-thing"):
        TierKeeper(tiers, ["--no-such-thing"], None, None).run(threading.Event())
    files = NodeFiles(tiers.port)
    assert not is_locked(files.lock)
    assert files.read_state() is None


def test_it_ends_when_nobody_uses_it_any_more():
    port = adjacent_ports(2)
    command = [str(BIN / "kvlane"), "tier", "serve", f"cpu=1MiB,port={port}", "--linger", "0.5"]
    with subprocess.Popen(command) as keeper:
        assert keeper.wait(PATIENCE_S) == 0
    assert not TierNode(port).is_up()


def test_what_is_in_arguments_wins():
    command = server_command(Tiers(1 << 30), "http://127.0.0.1:9300", ["--chunk-size", "512"])
    assert command[-2:] == ["--chunk-size", "512"]
    assert command[command.index("--coordinator-url") + 1] == "http://127.0.0.1:9300"
