"""What every subcommand is tried on: a real Redis, and an admin API that answers as told."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import msgspec
import pytest
from typer.testing import CliRunner

from kvindex.commands.inspect import app
from kvindex.config import IndexConfig
from kvindex.redis_index import RedisIndexWriter
from kvindex.worker import Batch, Load, Worker, new_incarnation

WORKER = Worker(
    endpoint="10.0.0.1:8000",
    model="tiny",
    block_size=16,
    num_blocks=4000,
    bytes_per_token=64,
    max_model_len=4096,
    incarnation="1",
)


@pytest.fixture
def inspect():
    """Run `kvlane inspect` with these arguments."""

    def run(*arguments: str, **env: str):
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "160", **env})

    return run


class Publisher:
    """Writes for workers of the pool `tiny`, by number."""

    def __init__(self, redis_url: str) -> None:
        self._writer = RedisIndexWriter(IndexConfig(redis_url=redis_url, redis_timeout_s=10))
        self._slots: dict[str, tuple[Worker, int, int]] = {}

    def open(self, number: int = 1, **fields: object) -> Worker:
        worker = msgspec.structs.replace(
            WORKER, endpoint=f"10.0.0.{number}:8000", incarnation=new_incarnation(), **fields
        )
        slot = self._writer.open_slot(worker, lease_ms=60_000, takeover=True)
        self._slots[worker.worker_id] = (worker, slot, 0)
        return worker

    def change(self, worker: Worker, *, stored=(), removed=()) -> None:
        worker, slot, sequence = self._slots[worker.worker_id]
        changes = [(block, True) for block in stored] + [(block, False) for block in removed]
        for at in range(0, len(changes), 128):
            sequence += 1
            part = changes[at : at + 128]
            batch = Batch(
                sequence=sequence,
                stored=tuple(block for block, present in part if present),
                removed=tuple(block for block, present in part if not present),
            )
            self._writer.apply(worker.pool, slot, worker.incarnation, batch)
        self._slots[worker.worker_id] = (worker, slot, sequence)

    def beat(self, worker: Worker, load: Load) -> None:
        worker, slot, _ = self._slots[worker.worker_id]
        self._writer.heartbeat(worker.pool, slot, worker.incarnation, load, lease_ms=60_000)

    def close_slot(self, worker: Worker) -> None:
        worker, slot, _ = self._slots[worker.worker_id]
        self._writer.close_slot(worker.pool, slot, worker.incarnation)

    def close(self) -> None:
        self._writer.close()


@pytest.fixture
def publisher(redis_url):
    made = Publisher(redis_url)
    yield made
    made.close()


@pytest.fixture
def worker(publisher):
    """A busy worker that holds two blocks."""
    worker = publisher.open()
    publisher.change(worker, stored=(0xBEEF, 0xCAFE))
    publisher.beat(worker, Load(running_requests=5))
    return worker


@pytest.fixture
def admin():
    """Yield (URL, answers by (method, path), bodies received)."""
    answers: dict[tuple[str, str], tuple[int, object]] = {}
    received: list[object] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            received.append(json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "null"))
            status, content = answers[self.command, self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def do_POST(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answers, received
    server.shutdown()
    thread.join()
    server.server_close()
