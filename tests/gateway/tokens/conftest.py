"""One real engine for the parity tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest

from connectors.bench.ports import free_ports
from tests.support.vllm_engine import Engine, start_engine


@dataclass(frozen=True, slots=True)
class PublishingEngine:
    """An engine and where its KV events, present and past, are to be had."""

    engine: Engine
    events: str
    replay: str


@pytest.fixture(scope="session")
def publishing_engine() -> Iterator[PublishingEngine]:
    port, events_port, replay_port = free_ports(3)
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{events_port}",
        "replay_endpoint": f"tcp://*:{replay_port}",
    }
    with start_engine(
        port,
        *("--kv-events-config", msgspec.json.encode(events).decode()),
        *("--trust-request-chat-template", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ) as engine:
        yield PublishingEngine(engine, f"tcp://127.0.0.1:{events_port}", f"tcp://127.0.0.1:{replay_port}")
