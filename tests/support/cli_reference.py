"""`docs/cli.md` as the installed commands describe themselves.

`python -m tests.support.cli_reference` writes it.
"""

import enum
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from kvindex import cli

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"

HEAD = """\
# Command line

Every command runs with its own part of the installation and says what is missing. Options of `kvlane` itself
stand before the command: `kvlane --log-level debug gateway`.

Exit codes: 0 success, 1 an error (one line on stderr), 2 a wrong option or setting or a missing part of the
installation, 130 after Ctrl-C. Logs go to stderr, as JSON unless it is a terminal.

This page is made from the commands themselves by `python -m tests.support.cli_reference`.
"""


def reference() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *(_section(path, command) for path, command in commands())])


def commands() -> Iterator[tuple[str, Any]]:
    """Yield every command line without its arguments, with the command behind it."""
    yield "kvlane", get_command(cli.root())
    for entry in cli.commands():
        yield from _walk(f"kvlane {entry.name}", get_command(entry.load()))


def _walk(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from _walk(f"{path} {name}", child)


def _section(path: str, command: Any) -> str:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option"]
    follows = ["COMMAND"] if hasattr(command, "commands") else [_metavar(each) for each in arguments]
    usage = [path, *(["[OPTIONS]"] if options else []), *follows]
    lines = [f"## `{path}`", "", " ".join((command.help or "").split()), "", f"    {' '.join(usage)}", ""]
    if rows := [f"| {_names(each)} | {_help(each)} | {_default(each)} |" for each in [*arguments, *options]]:
        lines += ["| option | what | default |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _metavar(param: Any) -> str:
    return param.metavar or param.name.upper()


def _names(param: Any) -> str:
    if param.param_type_name == "argument":
        return f"`{_metavar(param)}`"
    return ", ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])


def _help(param: Any) -> str:
    text = " ".join((param.help or "").split())
    return f"{text} Environment: `{param.envvar}`." if param.envvar else text


def _default(param: Any) -> str:
    if param.default is True:
        return f"`{param.opts[0]}`"
    default = param.default.value if isinstance(param.default, enum.Enum) else param.default
    return "" if callable(default) or default in (None, False, "", (), []) else f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(reference())
