"""Children end with their parent, and so does what they started."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.errors import ProcessEnded
from gateway.processes import child_processes
from tests.support.fleet import eventually

# A child that starts a grandchild, writes its pid, and ignores the polite signal if asked to.
PARENT = """
import pathlib, signal, subprocess, sys, time
if sys.argv[2] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen(["sleep", "600"])
pathlib.Path(sys.argv[1]).write_text(str(grandchild.pid))
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("manner", ["polite", "stubborn"])
def test_what_a_child_started_ends_with_it(tmp_path, monkeypatch, manner):
    monkeypatch.setattr("gateway.processes._GRACE_S", 0.5)
    pid_file = tmp_path / "pid"
    with child_processes(tmp_path) as processes:
        child = processes.start("parent", [sys.executable, "-c", PARENT, str(pid_file), manner])
        eventually(lambda: pid_file.exists() and pid_file.read_text())
        grandchild = int(pid_file.read_text())
        assert alive(child)
        assert alive(grandchild)
    assert not alive(child)
    eventually(lambda: not alive(grandchild))


def test_a_child_that_ends_by_itself_is_named_with_its_last_words(tmp_path):
    with child_processes(tmp_path) as processes:
        processes.start("steady", ["sleep", "600"])
        processes.check()
        processes.start("engine", [sys.executable, "-c", "print('out of memory'); raise SystemExit(3)"])
        with pytest.raises(ProcessEnded, match=r"engine ended with exit code 3(.|\n)*out of memory"):
            eventually(lambda: processes.check() is not None)


def test_one_child_can_be_stopped_or_killed_alone(tmp_path):
    with child_processes(tmp_path) as processes:
        pids = {name: processes.start(name, ["sleep", "600"]) for name in ("a", "b", "c")}
        processes.stop("a")
        processes.kill("b")
        assert [alive(pid) for pid in pids.values()] == [False, False, True]
        processes.check()


def test_children_end_when_their_parent_is_killed(tmp_path):
    script = f"""
import pathlib, time
from gateway.processes import child_processes
with child_processes(pathlib.Path({str(tmp_path)!r})) as processes:
    print(processes.start("child", ["sleep", "600"]), flush=True)
    time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert alive(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    eventually(lambda: not alive(child))
