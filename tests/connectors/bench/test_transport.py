"""Blocks between two processes, by every way that the bench measures, and what is made of the times."""

from contextlib import closing

import pytest
from rich.console import Console

from connectors.bench.ends import StagedEnd
from connectors.bench.transport import ENDS, Pair, figures, gpu_of, run
from connectors.errors import BenchFailed
from kvindex.errors import ConfigError


class OtherBlocks(StagedEnd):
    """Moves the blocks that are asked for, in another order."""

    def fetch(self, size: int, transfer_id: str) -> None:
        super().fetch(size, transfer_id)
        blocks = self.blocks(size)
        for layer in self.layers:
            layer[blocks] = layer[blocks].flip(0)


class OtherLayers(StagedEnd):
    """Takes one layer for the other."""

    def fetch(self, size: int, transfer_id: str) -> None:
        super().fetch(size, transfer_id)
        self.layers[0].copy_(self.layers[1])


@pytest.mark.vllm
def test_every_way_moves_the_blocks_that_it_measures():
    names = {figure.name for figure in run("cpu", "tcp,self", 16, Console(quiet=True)) if figure.value > 0}
    ways = ("memcpy", "raw_ucxx", "staged", "nixl_connector")
    assert names == {f"transport.{way}_gb_s_{size}_blocks" for way in ways for size in (4, 16)}


@pytest.mark.parametrize("end", [OtherBlocks, OtherLayers])
def test_other_blocks_than_those_asked_for_are_no_measurement(end: type[StagedEnd]):
    with (
        closing(Pair(f"{__name__}:{end.__name__}", "cpu", "tcp,self", 16)) as pair,
        pytest.raises(BenchFailed, match="others were moved"),
    ):
        pair.move_s(4)


@pytest.mark.vllm
def test_a_vllm_for_another_device_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ConfigError, match="keeps its caches on cpu, not on cuda: use --device cpu"):
        Pair(ENDS["nixl_connector"], "cuda", "tcp,self", 4)


def test_figures():
    rates = {
        "memcpy": {64: 10.0, 256: 12.0},
        "raw_ucxx": {64: 2.0, 256: 3.0},
        "raw_ucxx_parts": {64: 4.0, 256: 1.0},
        "staged": {64: 1.0, 256: 2.0},
        "nixl_connector": {64: 0.5, 256: 2.5},
    }
    found = {each.name: each for each in figures(rates, ">= 0.6")}
    assert [found[f"transport.raw_ucxx_gb_s_{size}_blocks"].value for size in (64, 256)] == [4.0, 3.0]
    kept = found["transport.staged_over_raw_ucx"]
    assert (kept.value, kept.reference_value, kept.met) == (0.5, 4.0, False)
    worst = found["transport.min_over_nixl_connector"]
    assert (worst.value, worst.reference_value, worst.met) == (0.8, 2.5, False)
    connector = found["transport.nixl_connector_gb_s_64_blocks"]
    assert (connector.value, connector.reference_value) == (0.5, 1.0)


def test_two_processes_get_gpus_of_their_own_where_there_are_two(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [gpu_of("cuda", index) for index in (0, 1)] == [
        {"CUDA_VISIBLE_DEVICES": "2"},
        {"CUDA_VISIBLE_DEVICES": "5"},
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert gpu_of("cuda", 1) == {"CUDA_VISIBLE_DEVICES": "7"}
    assert gpu_of("cpu", 1) == {}
