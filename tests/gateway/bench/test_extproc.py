"""`kvlane bench extproc` end to end with a handful of requests: real Envoy, Redis, gateway, tokenizer."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from gateway.bench.extproc import CASES, run
from gateway.errors import BenchFailed
from tests.support.vllm_engine import tiny_model


@pytest.mark.envoy
def test_every_figure_is_measured():
    figures = {each.name: each for each in run(tiny_model(), scale=0.01, console=Console(file=io.StringIO()))}
    latencies = [f"extproc.added_{what}_ms_{case.name}" for case in CASES for what in ("p50", "p99")]
    rates = ["extproc.rps_per_core_2kb", "extproc.scaling_2", "extproc.rps_per_core_400kb_warm"]
    streams = ["extproc.errors_2000_streams", "extproc.kb_per_open_request"]
    assert sorted(figures) == sorted([*latencies, *rates, *streams, "extproc.fallbacks"])
    assert figures["extproc.errors_2000_streams"].value == 0
    assert figures["extproc.scaling_2"].value > 0
    # 200 times the text takes longer to tokenise, however noisy the machine.
    assert figures["extproc.added_p50_ms_400kb_cold"].value > figures["extproc.added_p50_ms_2kb"].value
    assert figures["extproc.rps_per_core_2kb"].value > 0
    assert figures["extproc.rps_per_core_2kb"].reference_value > 0


def test_a_missing_tokenizer_is_one_line(tmp_path: Path):
    with pytest.raises(BenchFailed, match=r"--tokenizer"):
        run(tmp_path, scale=1, console=Console(file=io.StringIO()))
