"""Asks a worker over HTTP which models it serves; the answer is also its sign of life."""

from __future__ import annotations

import httpx
import msgspec
import structlog

from gateway.config import GatewayConfig
from gateway.errors import GatewayError

log = structlog.get_logger(__name__)


class Unreachable(GatewayError):
    """The worker refuses connections."""


class ModelCard(msgspec.Struct, frozen=True):
    """One entry of `/v1/models`.

    Source: vLLM 0.32 `vllm/entrypoints/serve/engine/protocol.py`, ModelCard.
    """

    id: str
    root: str | None = None
    """Where the engine loaded the model from; for an adapter, the adapter's own path."""
    parent: str | None = None
    """Name of the base model; None unless this is a LoRA adapter."""
    max_model_len: int | None = None


class _ModelList(msgspec.Struct, frozen=True):
    data: tuple[ModelCard, ...] = ()


def worker_client(config: GatewayConfig) -> httpx.AsyncClient:
    """Return the client for probes: never through a proxy, and each probe connects anew."""
    key = config.worker_api_key
    return httpx.AsyncClient(
        headers={"authorization": f"Bearer {key.get_secret_value()}"} if key else None,
        timeout=config.probe_timeout_s,
        limits=httpx.Limits(max_keepalive_connections=0),
        trust_env=False,
    )


async def served_models(client: httpx.AsyncClient, endpoint: str) -> tuple[ModelCard, ...] | None:
    """Return the models that `endpoint` (`ip:port`) serves, or None if it answers but does not say.

    Raises:
        Unreachable: nothing accepts connections there.
    """
    try:
        answer = await client.get(f"http://{endpoint}/v1/models")
        answer.raise_for_status()
        return msgspec.json.decode(answer.content, type=_ModelList).data
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Unreachable(f"{endpoint}: {error}") from error
    except (httpx.HTTPError, msgspec.DecodeError) as error:
        # A busy engine answers late and one with an API key refuses; neither is down.
        log.warning("worker does not tell its models", endpoint=endpoint, reason=repr(error))
        return None
