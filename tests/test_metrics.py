"""Every metric by Prometheus' conventions, in the document, and known to the dashboard that asks for it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from tests.support.metrics_reference import PAGE, ROOT, document, metrics

DASHBOARD = ROOT / "deploy" / "grafana" / "kvlane.json"

LABELS = {
    "block_size",  # of the pools of the fleet
    "direction",
    "fallback",
    "mode",
    "model",  # base models of the fleet, not what a client asks for
    "outcome",
    "part",  # of a step
    "peer",  # engines that sent blocks: the gateway names them
    "reason",
    "role",  # send, receive
    "server",  # LMCache servers of the node
    "source",
    "state",
    "status",
    "step",
    "store",  # their tiers
    "tenant",  # from the operator's file
    "tier",
    "type",  # store, access, delete, config
    "verdict",
    "worker",  # in a publisher's process there is one
}
"""Labels whose values a client cannot make up."""

OTHER_UNITS = ("ms", "milliseconds", "us", "minutes", "kb", "mb", "gb", "percent", "pct")
HISTOGRAM_UNITS = ("seconds", "bytes", "tokens", "blocks")


def test_names_follow_the_conventions():
    for each in metrics():
        assert re.fullmatch(r"kvlane_(gateway|publisher|store|transfer)_[a-z][a-z0-9_]*", each.name), each
        words = each.name.removesuffix("_total").split("_")
        assert not set(words) & set(OTHER_UNITS), f"{each.name}: base units only"
        assert (each.kind == "counter") == each.name.endswith("_total"), each
        if each.kind == "histogram":
            assert words[-1] in HISTOGRAM_UNITS, f"{each.name}: a histogram ends with its unit"
        for unit in ("seconds", "bytes", "tokens"):
            assert unit not in words[:-1], f"{each.name}: the unit comes last"
        assert each.help.endswith("."), f"{each.name}: say what it counts, in a sentence"


def test_labels_have_few_values():
    assert {label for each in metrics() for label in each.labels} <= LABELS
    # A histogram has a series for each bucket: labels multiply them.
    assert all(len(each.labels) <= 1 for each in metrics() if each.kind == "histogram")
    assert all(len(each.labels) <= 2 for each in metrics())


def test_nothing_of_ours_has_another_prefix():
    # In a process of its own: other tests import libraries that have metrics, too.
    program = (
        "from prometheus_client import REGISTRY; from tests.support.metrics_reference import metrics\n"
        "metrics(); print(*(family.name for family in REGISTRY.collect()))"
    )
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)
    names = {each.name for each in metrics()}
    for family in printed.stdout.decode().split():
        assert family.startswith(("python_", "process_", "kvlane_")), family
        if family.startswith("kvlane_"):
            assert {family, f"{family}_total"} & names


def test_the_document_is_of_this_registry():
    assert PAGE.read_text() == document(), "run: python -m tests.support.metrics_reference"


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_every_metric_of_the_dashboard_exists():
    suffixes = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    series = {each.name + suffix for each in metrics() for suffix in suffixes[each.kind]}
    labels = {each.name: set(each.labels) for each in metrics()}
    asked = [(query, name) for query in queries() for name in re.findall(r"kvlane_\w+", query)]
    assert len(asked) > 25
    for query, name in asked:
        assert name in series, query
    for query in queries():
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}")
        grouped = {each.strip() for by in re.findall(r"by \(([^)]*)\)", query) for each in by.split(",")}
        (*known,) = (labels[name] for name in re.findall(r"kvlane_\w+", query) if name in labels)
        histogram = {"step", "direction"} if "_bucket" in query else set()
        assert grouped <= set().union(*known, histogram, {"le", "instance"}), query


def test_every_counter_is_asked_for_by_its_rate():
    for query in queries():
        for counter in re.findall(r"kvlane_\w+_total", query):
            assert re.search(rf"(rate|increase)\({counter}\b", query), query


def test_the_dashboard_is_one_that_grafana_takes():
    board = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in board["panels"]]
    assert len(places) == len(set(places))
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "job"}
    assert {panel["datasource"]["uid"] for panel in board["panels"] if "targets" in panel} == {
        "${datasource}"
    }
