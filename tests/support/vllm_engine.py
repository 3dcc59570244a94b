"""Real vLLM engines (CPU build, tiny random model) for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from connectors.bench.serving import ONE_PROCESS
from deploy.demo.model import ENGINE_ENV, make_model
from deploy.demo.model import NAME as MODEL_NAME

ROOT = Path(__file__).parents[2]
BLOCK_SIZE = 32
MAX_MODEL_LEN_TOKENS = 4096
START_TIMEOUT_S = 240.0
END_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Engine:
    """A running `vllm serve`; `process` leads the process group of everything it started."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.endpoint}"

    def kill(self) -> None:
        """Kill every process of the engine at once, as a crash of its machine would."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """Have the engine end, so that its shared memory goes with it, and kill what is left."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_TIMEOUT_S)
        self.kill()


def tiny_model() -> Path:
    """Return the tiny model's directory, made on first use."""
    directory = ROOT / ".kvlane" / "tinymodel"
    if not (directory / "model.safetensors").exists():
        directory.mkdir(parents=True, exist_ok=True)
        make_model(directory)
    return directory


@contextmanager
def start_engine(
    port: int,
    *extra_args: str,
    env: Mapping[str, str] | None = None,
    command: tuple[str, ...] = ("vllm", "serve"),
    log: Path | None = None,
) -> Iterator[Engine]:
    """Serve the tiny model on 127.0.0.1:`port` until the block ends; ready when entered.

    Args:
        port: a free port.
        extra_args: more arguments of `vllm serve`, after the usual ones.
        env: environment on top of what a CPU engine needs.
        command: what stands before the model; `("kvlane", "serve")` tests our own wrapper.
        log: where the output goes; kept, and quoted when the start fails.

    Raises:
        RuntimeError: the engine ended or was not healthy in time.
    """
    log = log or ROOT / ".kvlane" / "logs" / f"engine-{port}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    program = Path(sys.executable).parent / command[0]
    in_one_process = () if "--tensor-parallel-size" in extra_args else ONE_PROCESS
    arguments = [
        *(str(program), *command[1:], str(tiny_model())),
        *in_one_process,
        *("--served-model-name", MODEL_NAME, "--enforce-eager"),
        *("--max-model-len", str(MAX_MODEL_LEN_TOKENS), "--block-size", str(BLOCK_SIZE)),
        *("--host", "127.0.0.1", "--port", str(port), *extra_args),
    ]
    # vLLM leaves its sockets behind, however it ends.
    with tempfile.TemporaryDirectory(prefix="vllm-") as sockets:
        with log.open("wb") as output:
            process = subprocess.Popen(
                arguments,
                env={**os.environ, **ENGINE_ENV, "VLLM_RPC_BASE_PATH": sockets, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        engine = Engine(port, process, log)
        try:
            _wait_until_healthy(engine)
            yield engine
        finally:
            engine.end()


def _wait_until_healthy(engine: Engine) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if engine.process.poll() is not None:
            raise RuntimeError(f"the engine ended at its start:\n{_tail(engine.log)}")
        try:
            if httpx.get(f"{engine.url}/health", timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the engine was not healthy after {START_TIMEOUT_S:.0f} s:\n{_tail(engine.log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])
