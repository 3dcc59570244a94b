"""The root command: discovery, laziness, and errors as one line with an exit code."""

import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from kvindex import cli
from tests.support.cli_reference import PAGE, commands, reference

HELPER = '''"""`kvlane helper`: help out."""
import os, signal, sys, typer
import structlog
from kvindex.errors import ConfigError, IndexUnavailable
app = typer.Typer(add_completion=False)

@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def helper(context: typer.Context, how: str) -> None:
    match how:
        case "config": raise ConfigError("port: 1 is in use")
        case "redis": raise IndexUnavailable("Redis at nowhere: gone")
        case "extra": import a_module_that_nobody_has
        case "broken": import kvindex.a_module_that_nobody_has
        case "interrupt": os.kill(os.getpid(), signal.SIGINT)
        case "log":
            structlog.get_logger().info("quiet")
            structlog.get_logger().warning("loud", port=1)
        case _: typer.echo(repr(context.args))
'''


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return the command line with one more subcommand, `helper`, of a package with an extra."""
    (tmp_path / "helper_command.py").write_text(HELPER)
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("helper", "helper_command:app", cli.GROUP)
    monkeypatch.setattr(cli, "commands", lambda: iter([entry]))
    monkeypatch.setitem(cli.INSTALL, "helper_command", "pip install 'kvlane[helper]'")
    yield lambda *arguments: CliRunner().invoke(cli.root(), arguments)
    sys.modules.pop("helper_command", None)
    structlog.reset_defaults()


def kvlane(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvindex.cli", *arguments]
    return subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_names_every_command_with_a_line():
    shown = kvlane("--help", COLUMNS="200").stdout
    for entry in cli.commands():
        assert re.search(rf"{entry.name}\s+{re.escape(cli.summary(entry))}", shown)
        assert len(cli.summary(entry)) > 10


def test_help_imports_no_command():
    loaded = "[name for name in sys.modules if '.commands.' in name]"
    code = f"import sys; from kvindex import cli; cli.root(); print({loaded})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_called_command_alone_is_imported(helper):
    assert "helper_command" not in sys.modules
    assert "Help out" in helper("--help").stdout
    assert "helper_command" not in sys.modules
    helper("helper", "now")
    assert "helper_command" in sys.modules


def test_version():
    run = kvlane("--version")
    assert re.fullmatch(r"kvlane \d+\.\d+\.\d+\n", run.stdout)


def test_everything_behind_the_name_reaches_the_command(helper):
    assert helper("helper", "echo", "-x", "--", "--y=2").stdout.strip() == "['-x', '--y=2']"
    assert helper("helper", "--", "--echo", "--y=2").stdout.strip() == "['--y=2']"
    assert "kvlane helper" in helper("helper", "--help").stdout


@pytest.mark.parametrize(
    ("how", "code", "line"),
    [
        ("config", 2, "port: 1 is in use"),
        ("redis", 1, "Redis at nowhere: gone"),
        (
            "extra",
            2,
            "kvlane helper needs: pip install 'kvlane[helper]' (no module named a_module_that_nobody_has)",
        ),
    ],
)
def test_an_error_is_one_line(helper, how, code, line):
    result = helper("helper", how)
    assert result.exit_code == code
    assert result.stderr == line + "\n"
    assert result.stdout == ""


def test_a_hole_in_our_own_package_is_not_blamed_on_an_extra(helper):
    assert isinstance(helper("helper", "broken").exception, ModuleNotFoundError)


def test_interrupt(helper):
    # A background job of a shell inherits an ignored SIGINT.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert helper("helper", "interrupt").exit_code == 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, former)


def test_unknown_command_and_option():
    assert kvlane("nonsense").returncode == 2
    run = kvlane("inspect", "workers", "--nonsense")
    assert run.returncode == 2
    assert "--nonsense" in run.stderr


def test_logs_are_json_off_a_terminal_and_obey_the_level(helper):
    result = helper("--log-level", "warning", "helper", "log")
    (line,) = result.stderr.splitlines()
    assert json.loads(line).items() >= {"event": "loud", "level": "warning", "port": 1}.items()


def test_the_reference_in_the_docs_is_up_to_date():
    assert PAGE.read_text() == reference(), "run: python -m tests.support.cli_reference"


def test_every_command_and_option_says_what_it_does():
    silent = [path for path, command in commands() if not command.help]
    silent += [
        f"{path} {param.name}" for path, command in commands() for param in command.params if not param.help
    ]
    assert silent == []
