import importlib.util

import pytest

from gateway.bench import radix_tree
from gateway.bench.index import run
from gateway.bench.index_fleet import conversation

TARGETS = {
    "index.bytes_per_block_1m": "<= 20",
    "index.bytes_per_block_10m": "<= 20",
    "index.match_p50_ms_6250x8": "<= 0.2",
    "index.match_p50_ms_6250x64": "<= 0.2",
    "index.match_reserve_per_core": ">= 10000",
    "index.store_blocks_per_s": ">= 50000",
    "index.select_p99_ms_under_write": "<= 3",
    "index.resync_1m_s": "<= 15",
    "index.select_p99_ms_under_resync": "<= 5",
    "index.publisher_cpu_pct": "<= 2",
}


def test_a_short_run_measures_every_figure():
    figures = {figure.name: figure for figure in run(scale=0.005)}
    assert {name: figure.target for name, figure in figures.items() if figure.target} == TARGETS
    assert all(figure.value > 0 for figure in figures.values())
    memory = figures["index.bytes_per_block_1m"]
    assert memory.value < memory.reference_value / 4


def test_the_peer_answers_or_is_named_as_absent():
    named, value = radix_tree.reference("", radix_tree.match_p50_ms, conversation, 8, 10)
    if importlib.util.find_spec("dynamo") is None:
        assert named.startswith("absent")
        assert value is None
    else:
        assert value > 0


def test_an_absent_peer_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    named, value = radix_tree.reference("", radix_tree.stores_per_s, 10)
    assert "absent" in named
    assert "pip install" in named
    assert value is None
