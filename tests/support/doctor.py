"""`kvlane doctor` in the test's own process, where the tokenizer library is imported once."""

from __future__ import annotations

import json
from typing import Any

from click.testing import Result
from structlog.testing import capture_logs
from typer.testing import CliRunner

from gateway.commands.doctor import app


def doctor(*arguments: str) -> Result:
    """Run it; its log lines are not in the output."""
    with capture_logs():
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})


def report(*arguments: str) -> dict[str, Any]:
    """Return what it found; the exit code agrees."""
    shown = doctor(*arguments, "--json")
    found: dict[str, Any] = json.loads(shown.stdout)
    assert shown.exit_code == int(found["num_problems"] > 0)
    return found
