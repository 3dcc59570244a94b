"""Two engines of vLLM with its own NixlConnector, asked as its proxy asks them.

Source: vLLM 0.24 and 0.32 `tests/v1/kv_connector/nixl_integration/toy_proxy_server.py`.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from connectors.bench.ports import free_ports
from connectors.bench.serving import VLLM, Engine, serving, together
from connectors.bench.transport import gpu_of

_LOADED = re.compile(r"^vllm:external_prefix_cache_hits_total{.*} ([-+.e\d]+)$", re.MULTILINE)

_ASKED = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What the prefill engine is told."""


class NixlPair:
    """One that prefills and one that decodes. Between answers both are stopped: idle ones spin."""

    def __init__(self, prefill: Engine, decode: Engine, groups: Sequence[int]) -> None:
        self._prefill = prefill
        self._decode = decode
        self._groups = groups
        """Their process groups."""
        self._signal(signal.SIGSTOP)

    async def ask(self, tokens: list[int], max_tokens: int) -> AsyncIterator[float]:
        """Yield the moment of every piece of an answer.

        Raises:
            BenchFailed: the KV did not come.
        """
        with self._running():
            transfer = await self._prefill.prefill(tokens, _ASKED)
            async for moment in self._decode.ask(tokens, max_tokens, transfer):
                yield moment

    def num_loaded_tokens(self) -> int:
        """Return for how many tokens KV came to the one that decodes."""
        with self._running():
            text = httpx.get(f"http://127.0.0.1:{self._decode.port}/metrics").text
        found = _LOADED.search(text)
        return int(float(found[1])) if found else 0

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, what: signal.Signals) -> None:
        for group in self._groups:
            os.killpg(group, what)


@contextmanager
def nixl_pair(
    model: Path, device: str, arguments: Sequence[str], environment: Mapping[str, str], logs: Path
) -> Iterator[NixlPair]:
    """Run a pair until the block ends.

    Args:
        model: its directory.
        device: `cpu` or `cuda`.
        arguments: of `vllm serve`, beside the connector's.
        environment: all of it, but the side channel's and which GPU.
        logs: a directory for output.

    Raises:
        BenchFailed: an engine does not start.
    """
    # A failed load fails the request: nothing is computed twice in silence.
    transfer = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        "kv_buffer_device": device,
        "kv_load_failure_policy": "fail",
    }
    given = [*arguments, "--kv-transfer-config", json.dumps(transfer)]
    with ExitStack() as stack:
        engines, starting = [], []
        for index, name in enumerate(("nixl_prefill", "nixl_decode")):
            port, side_channel = free_ports(2)
            told = {
                **environment,
                **gpu_of(device, index),
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel),
            }
            starting.append(serving(VLLM, model, port, given, environment=told, log=logs / name))
            engines.append(Engine(port))
        prefill, decode = engines
        yield NixlPair(prefill, decode, together(stack, starting))
