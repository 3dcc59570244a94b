"""What holds for every subcommand: JSON, and one clear line when Redis or the gateway is away."""

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from connectors.bench.ports import free_ports
from kvindex import cli
from kvindex.commands.inspect import app

ARGUMENTS = {
    "top": ["--once"],
    "workers": [],
    "pools": [],
    "stores": [],
    "block": ["beef"],
    "rates": [],
    "prefix": ["Once", "--model", "tiny"],
    "receipts": [],
    "decision": ["x"],
    "why": ["x"],
    "heatmap": [],
    "diff": ["a", "b"],
    "drift": [],
    "memory": [],
    "events": [],
}
ASK_THE_GATEWAY = ("rates", "receipts", "prefix", "decision", "why", "heatmap")


def test_every_command_is_tried_and_has_json():
    commands = get_command(app).commands
    assert commands.keys() == ARGUMENTS.keys()
    for command in commands.values():
        assert any("--json" in param.opts for param in command.params)


@pytest.mark.parametrize("command", ARGUMENTS)
def test_who_is_away_is_said_in_one_line(command, monkeypatch):
    """With nobody at either address, through `kvlane` as an operator calls it."""
    # It would bind this process's log to the output of one call.
    monkeypatch.setattr(cli, "configure_logging", lambda level: None)
    where = f"127.0.0.1:{free_ports(1)[0]}"
    options = {
        option: value
        for option, value in (("--redis-url", f"redis://{where}/0"), ("--admin", f"http://{where}"))
        if any(option in param.opts for param in get_command(app).commands[command].params)
    }
    given = [*ARGUMENTS[command], *(each for pair in options.items() for each in pair)]
    ran = CliRunner().invoke(cli.root(), ["inspect", command, *given])
    assert ran.exit_code == 1
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    said = f"no gateway answers at http://{where}" if command in ASK_THE_GATEWAY else f"Redis at {where}: "
    assert ran.stderr.startswith(said)
