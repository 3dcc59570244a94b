"""The installed `kvlane` command."""

import os
import subprocess
import sys
from pathlib import Path

KVLANE = Path(sys.executable).with_name("kvlane")
INTERRUPTIBLE = ("env", "--default-signal=INT", str(KVLANE))
"""The command where it is to be sent SIGINT, which tests in the background of a shell ignore."""


def kvlane(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end, with these variables beside our own, and say `stdin` to it."""
    return subprocess.run(
        [KVLANE, *arguments],
        env=os.environ | env,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
