"""The installed `kvlane` command."""

import subprocess
import sys
from pathlib import Path

KVLANE = Path(sys.executable).with_name("kvlane")


def kvlane(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run([KVLANE, *arguments], capture_output=True, text=True, timeout=60, check=False)
