"""Simulated engines on the test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from connectors.bench.ports import free_ports
from tests.support import engine_sim
from tests.support.vllm_engine import tiny_model
from tests.support.waiting import eventually


@contextlib.asynccontextmanager
async def simulated(redis_url: str, *flags: str) -> AsyncIterator[str]:
    """Run an engine that publishes itself; yields its endpoint."""
    (port,) = free_ports(1)
    where = ["--port", str(port), "--redis-url", redis_url, "--events", f"inproc://kv-{port}"]
    server = engine_sim.server(engine_sim.parse([*where, "--tokenizer", str(tiny_model()), *flags]))
    task = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task
