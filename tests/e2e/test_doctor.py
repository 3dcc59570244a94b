"""`kvlane doctor` as an operator runs it."""

from __future__ import annotations

import json
import subprocess

import pytest

from gateway.local_fleet import free_address
from tests.support.cli import KVLANE, kvlane
from tests.support.doctor import doctor, report
from tests.support.fleet import parities

pytestmark = pytest.mark.envoy

PATIENCE_S = 300
"""The import of a tokenizer library alone takes many seconds on a busy machine."""


def test_a_fleet_that_is_well_has_no_finding_but_that(fleet):
    before = parities(fleet)
    command = [KVLANE, "doctor", "--redis-url", fleet.redis_url, "--admin", fleet.admin_url, "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert {each["level"] for each in found["findings"]} == {"ok"}, found
    assert (found["num_problems"], found["num_warnings"]) == (0, 0)
    subjects = {each["subject"].split()[0] for each in found["findings"]}
    assert subjects == {"Redis", "gateway", "worker"}
    assert sum("`poetry`" in each["what"] for each in found["findings"]) == len(fleet.engines)
    # It looks, and changes no verdict.
    assert parities(fleet) == before


def test_the_table_says_what_it_costs_and_what_cures_it(fleet):
    shown = doctor("--redis-url", fleet.redis_url, "--admin", f"http://{free_address()}")
    assert shown.exit_code == 0
    assert "cure: Give its address" in shown.stdout
    assert "0 problems, 1 warnings" in shown.stdout


def test_no_worker_and_no_redis_are_problems(redis_url):
    nowhere = free_address()
    found = report("--redis-url", redis_url, "--admin", f"http://{nowhere}")
    whats = [each["what"] for each in found["findings"] if each["level"] == "problem"]
    assert whats == ["no worker is live: none holds a valid lease"]
    (finding,) = report("--redis-url", f"redis://{nowhere}", "--admin", f"http://{nowhere}")["findings"]
    assert (finding["level"], finding["subject"]) == ("problem", "Redis")


def test_a_wrong_option_is_one_line():
    run = kvlane("doctor", "--replay", "10.0.0.1:8000")
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith("--replay 10.0.0.1:8000: give WORKER=URL")
