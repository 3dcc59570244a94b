"""Two real engines with vLLM's NixlConnector, as the bench asks them."""

import os
import threading
from pathlib import Path

import pytest

from connectors.bench.nixl_pair import nixl_pair
from connectors.bench.serving import ONE_CORE_EACH, ONE_PROCESS
from tests.support.vllm_engine import tiny_model
from tests.support.waiting import eventually

pytestmark = pytest.mark.vllm

# As on a host that has no more of a model than its config.json.
ARGUMENTS = (
    *ONE_PROCESS,
    *("--load-format", "dummy", "--skip-tokenizer-init", "--enforce-eager", "--block-size", "32"),
)


def children() -> set[str]:
    """Return the processes that this thread has started."""
    return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())


def state(process: str) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


async def test_each_prompts_kv_comes_and_between_answers_they_are_stopped(tmp_path: Path):
    others = children()
    environment = {**os.environ, **ONE_CORE_EACH, "UCX_TLS": "tcp,self"}
    with nixl_pair(tiny_model(), "cpu", ARGUMENTS, environment, tmp_path) as pair:
        for number in (1, 2):
            await eventually(lambda: {state(each) for each in children() - others} == {"T"})
            moments = [moment async for moment in pair.ask([100 + number] * 320, 2)]
            assert moments == sorted(moments)
            assert len(moments) > 0
            assert pair.num_loaded_tokens() == number * 320
