"""What `kvlane bench extproc` measures on: four Envoys, kvlane, Redis, and engines that answer at once."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.bench.conversations import Message
from gateway.bench.peers import peer, serve_engines, serve_trivial_ext_proc
from gateway.errors import ProcessEnded
from gateway.local_fleet import answers, free_address, free_ports, kvlane
from gateway.processes import Processes, child_processes
from kvindex.blocks import hash_blocks, root_hash
from kvindex.config import IndexConfig, index_config
from kvindex.embedded import embedded_redis
from kvindex.index import MAX_BATCH
from kvindex.redis_index import RedisIndexWriter
from kvindex.worker import Batch, Worker, new_incarnation

MODEL = "bench"
BLOCK_SIZE = 16
MAX_MODEL_LEN = 1 << 18
NUM_WORKERS = 8
LEASE_MS = 3_600_000
START_TIMEOUT_S = 60.0

PLAIN, TRIVIAL, KVLANE, TWO = "plain", "trivial", "kvlane", "two gateways"


@dataclass(frozen=True, slots=True)
class Stack:
    """Everything runs. `addresses` are the Envoys' and `pids` the ext_proc servers', by setup."""

    addresses: Mapping[str, str]
    pids: Mapping[str, Sequence[int]]
    engines: tuple[str, ...]
    cache: SimulatedCache


class SimulatedCache:
    """Makes the first worker the holder of conversations, as an engine that has served them would."""

    def __init__(self, writer: RedisIndexWriter, worker: Worker, slot: int, tokenizer: Path) -> None:
        from transformers import AutoTokenizer

        self._writer = writer
        self._worker = worker
        self._slot = slot
        self._sequence = 0
        self._stored: set[int] = set()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer)

    def hold(self, messages: list[Message]) -> None:
        """Store the blocks of a conversation's prompt."""
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # Not verbose: it need not know that this is longer than its own model's context.
        tokens = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        hashes = hash_blocks(root_hash(MODEL), tokens, BLOCK_SIZE)
        fresh = [block for block in dict.fromkeys(hashes) if block not in self._stored]
        self._stored.update(fresh)
        for at in range(0, len(fresh), MAX_BATCH):
            self._sequence += 1
            batch = Batch(sequence=self._sequence, stored=tuple(fresh[at : at + MAX_BATCH]))
            self._writer.apply(self._worker.pool, self._slot, self._worker.incarnation, batch)


@contextmanager
def run_stack(tokenizer: Path) -> Iterator[Stack]:
    """Start everything, yield once all three setups serve, leave nothing behind.

    Raises:
        ProcessEnded: a part did not start; with the end of its log.
        ConfigError: an extra is missing.
    """
    ports = free_ports(NUM_WORKERS)
    engines = tuple(f"127.0.0.1:{port}" for port in ports)
    trivial, *gateways = (free_address() for _ in range(3))
    fixed = [argument for engine in engines for argument in ("--worker", engine)]
    envoys = {
        PLAIN: ["--no-ext-proc", *fixed],
        TRIVIAL: ["--gateway", trivial, *fixed],
        KVLANE: ["--gateway", gateways[0]],
        TWO: [argument for each in gateways for argument in ("--gateway", each)],
    }
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvlane-bench-")))
        redis_url = stack.enter_context(embedded_redis())
        stack.enter_context(peer(serve_engines, ports, MODEL, str(tokenizer.resolve()), MAX_MODEL_LEN))
        pids = {TRIVIAL: [stack.enter_context(peer(serve_trivial_ext_proc, trivial))], TWO: []}
        cache = stack.enter_context(_register(index_config(redis_url), engines, tokenizer))
        processes = stack.enter_context(child_processes(logs))
        # The engines have no cache that a probe could check.
        unchecked = {"KVLANE_PARITY_PROBE": "false"}
        for number, gateway in enumerate(gateways):
            admin = free_address()
            listen = ["--listen", gateway, "--admin-listen", admin, "--redis-url", redis_url]
            pids[TWO].append(processes.start(f"gateway-{number}", kvlane("gateway", *listen), unchecked))
            _wait_until_ready(processes, admin)
        pids[KVLANE] = pids[TWO][:1]
        addresses = {name: free_address() for name in envoys}
        for name, arguments in envoys.items():
            admin = free_address()
            command = kvlane("envoy", "--listen", addresses[name], "--admin", admin, *arguments)
            # One thread: it leaves the other cores to what is measured.
            processes.start(name, [*command, "--", "--concurrency", "1", "--log-level", "error"])
            _wait_until_ready(processes, admin)
        yield Stack(addresses, pids, engines, cache)


def _wait_until_ready(processes: Processes, admin: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not answers(f"http://{admin}/ready"):
        processes.check()
        if time.monotonic() > deadline:
            raise ProcessEnded(f"nothing is ready at {admin} after {START_TIMEOUT_S:.0f} s")
        time.sleep(0.05)


@contextmanager
def _register(config: IndexConfig, engines: tuple[str, ...], tokenizer: Path) -> Iterator[SimulatedCache]:
    with closing(RedisIndexWriter(config)) as writer:
        workers = [
            Worker(
                endpoint=engine,
                model=MODEL,
                block_size=BLOCK_SIZE,
                num_blocks=1_000_000,
                bytes_per_token=1,
                max_model_len=MAX_MODEL_LEN,
                incarnation=new_incarnation(),
            )
            for engine in engines
        ]
        slots = [writer.open_slot(worker, lease_ms=LEASE_MS) for worker in workers]
        yield SimulatedCache(writer, workers[0], slots[0], tokenizer)
