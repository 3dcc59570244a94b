"""Figures: their JSON, their table, and when a target is met."""

import io
import json
import os

import pytest
from rich.console import Console

from kvindex.figures import Figure, show, write


def test_json_has_exactly_the_agreed_keys(tmp_path):
    file = tmp_path / "figures.json"
    figures = [Figure("a.p50_ms", 1.25, "ms", "<= 2", "trivial", 0.5), Figure("a.rate", 7, "1/s")]
    write(file, "kvlane bench a", figures)
    report = json.loads(file.read_text())
    assert report.keys() == {"machine", "command", "figures"}
    assert report["command"] == "kvlane bench a"
    assert report["figures"] == [
        {
            "name": "a.p50_ms",
            "value": 1.25,
            "unit": "ms",
            "target": "<= 2",
            "reference": "trivial",
            "reference_value": 0.5,
        },
        {
            "name": "a.rate",
            "value": 7,
            "unit": "1/s",
            "target": None,
            "reference": None,
            "reference_value": None,
        },
    ]
    assert report["machine"]["num_cores"] == len(os.sched_getaffinity(0))
    assert report["machine"]["memory_bytes"] > 1 << 28
    assert report["machine"]["versions"]["kvlane"]


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (None, 1, None),
        ("<= 2", 2, True),
        ("<= 2", 2.1, False),
        (">= 1000", 1000, True),
        (">= 1000", 999, False),
    ],
)
def test_met(target, value, met):
    assert Figure("a", value, "", target).met is met


def test_a_missed_target_is_red():
    shown = io.StringIO()
    console = Console(file=shown, width=120, force_terminal=True, color_system="standard")
    met = Figure("met", 1, "ms", "<= 2", "trivial", 12345.6)
    show(console, "figures", [met, Figure("missed", 3, "ms", "<= 2")])
    green, red = [line for line in shown.getvalue().splitlines() if "<= 2" in line]
    assert "\x1b[32m" in green
    assert "12,346" in green
    assert "trivial" in green
    assert "\x1b[31m" in red
