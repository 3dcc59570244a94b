"""Child processes that end with this one: each in a process group of its own, with a log file."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gateway.errors import ProcessEnded

_GRACE_S = 10.0
_TAIL_LINES = 12
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # here, since a forked child must not load libraries


@contextmanager
def child_processes(logs: Path) -> Iterator[Processes]:
    """Yield a place to start children in, and end them and all that they started with the block.

    To be used from the main thread: children also end when the thread that started them does.

    Args:
        logs: directory of the log files, made if missing.
    """
    logs.mkdir(parents=True, exist_ok=True)
    processes = Processes(logs)
    try:
        yield processes
    finally:
        processes.stop()


class Processes:
    """The children of one `child_processes` block, by name."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> int:
        """Start a child whose output goes to `NAME.log`; return its process id.

        Args:
            name: unique among the children.
            env: variables on top of this process's own.
        """
        with self.log(name).open("wb") as log:
            self._children[name] = subprocess.Popen(  # noqa: S603 - our own commands
                command,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - the main thread starts children
            )
        return self._children[name].pid

    def log(self, name: str) -> Path:
        """Return where the child's output is."""
        return self._logs / f"{name}.log"

    def check(self) -> None:
        """Do nothing while every child runs.

        Raises:
            ProcessEnded: one has ended; the message carries the end of its log.
        """
        for name, child in self._children.items():
            if (code := child.poll()) is not None:
                lines = self.log(name).read_text(errors="replace").splitlines()[-_TAIL_LINES:]
                how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
                end = "".join(f"\n  {line}" for line in lines)
                raise ProcessEnded(f"{name} ended {how}; {self.log(name)} ends with:{end}")

    def stop(self, *names: str) -> None:
        """Ask these children (none named: all) to end, and kill what is left of them a while later."""
        ending = [self._children.pop(name) for name in names or tuple(self._children)]
        for child in ending:
            child.terminate()
        deadline = time.monotonic() + _GRACE_S
        for child in ending:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
            # What a child started stays in its group, also when the child itself is gone.
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def kill(self, name: str) -> None:
        """End a child and all that it started at once, as a crash would."""
        child = self._children.pop(name)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
