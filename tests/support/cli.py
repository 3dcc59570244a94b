"""The installed `kvlane` command."""

import os
import subprocess
import sys
from pathlib import Path

KVLANE = Path(sys.executable).with_name("kvlane")


def kvlane(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end, with these variables beside our own."""
    command = [KVLANE, *arguments]
    return subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=60, check=False
    )
