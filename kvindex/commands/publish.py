"""`kvlane publish`: publish a vLLM that runs without the connector, from beside it."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Annotated

import structlog
import typer

from kvindex import metrics
from kvindex.config import PublisherConfig, labels_of, publisher_config
from kvindex.contents import EngineContents
from kvindex.engine_api import EngineApi
from kvindex.errors import EngineUnavailable
from kvindex.event_source import EventSource, ZmqEventSource
from kvindex.publisher import LoadReport, Publisher
from kvindex.redis_index import RedisIndexWriter

_RETRY_S = 1.0

_log = structlog.get_logger(__name__)

app = typer.Typer(add_completion=False)


@app.command()
def publish(
    *,
    endpoint: Annotated[str, typer.Option(help="ip:port of vLLM's OpenAI server, as Envoy reaches it.")],
    events: Annotated[str, typer.Option(help="Where its KV events are published: tcp://host:port.")],
    replay: Annotated[
        str | None, typer.Option(help="Its replay endpoint: fills gaps, and what came before us.")
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(envvar="KVLANE_REDIS_URL", help="The Redis that holds the index.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="What requests may select it by, once for each label."),
    ] = None,
    dp_rank: Annotated[int, typer.Option(min=0, help="The data-parallel rank behind these events.")] = 0,
    dp_size: Annotated[int, typer.Option(min=1, help="Data-parallel ranks behind the endpoint.")] = 1,
) -> None:
    """Publish a vLLM that runs without the connector.

    Its cache is known from its KV events, its load from its metrics, where token counts are estimates.
    Model, context length and cache size are learned from it. The worker leaves the index when the engine
    stops answering, and joins anew when it is back.
    """
    given = {"kvlane.endpoint": endpoint} | ({"kvlane.redis_url": redis_url} if redis_url else {})
    labels = {"kvlane.labels": labels_of(label)} if label else {}
    config = publisher_config(given | labels)
    metrics.serve(config.metrics_host, config.metrics_port, config.metrics_tls)
    stopping = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        stopping.set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    with EngineApi(endpoint, dp_rank=dp_rank, dp_size=dp_size) as api:
        while not stopping.is_set():
            try:
                follow(api, config, ZmqEventSource(events, replay), stopping)
            except EngineUnavailable as error:
                _log.info("waiting for the engine", reason=str(error))
                stopping.wait(_RETRY_S)


def follow(api: EngineApi, config: PublisherConfig, source: EventSource, stopping: threading.Event) -> None:
    """Publish one run of the engine until `stopping` is set.

    Raises:
        EngineUnavailable: the engine is not there, or has not answered for as long as a lease.
    """
    worker = api.read_worker(config.labels)
    latest = LoadReport(api.read_load(worker))
    publisher = Publisher(
        worker,
        config,
        RedisIndexWriter(config),
        EngineContents(worker, source),
        lambda: latest,
        # By then a request has been in one reading of the metrics, however the two clocks fall.
        settle_older_than_ms=2 * config.heartbeat_ms,
    )
    publisher.start()
    answered_s = time.monotonic()
    try:
        while not stopping.wait(config.heartbeat_ms / 1000):
            try:
                latest = LoadReport(api.read_load(worker))
                answered_s = time.monotonic()
            except EngineUnavailable:
                if time.monotonic() - answered_s > config.lease_ms / 1000:
                    raise
    finally:
        publisher.stop()
