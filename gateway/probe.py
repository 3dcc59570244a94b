"""Asks a worker over HTTP which models it serves; the answer is also its sign of life."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import httpx
import msgspec
import structlog

from gateway.config import GatewayConfig
from gateway.errors import GatewayError
from gateway.tls import kept_current

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


@contextlib.asynccontextmanager
async def worker_client(config: GatewayConfig) -> AsyncIterator[httpx.AsyncClient]:
    """Yield the client for probes: never through a proxy, and each probe connects anew.

    Raises:
        ConfigError: a certificate cannot be used.
    """
    key, tls = config.worker_api_key, config.worker_tls
    context = tls.context() if tls else None
    client = httpx.AsyncClient(
        headers={"authorization": f"Bearer {key.get_secret_value()}"} if key else None,
        timeout=config.probe_timeout_s,
        limits=httpx.Limits(max_keepalive_connections=0),
        trust_env=False,
        # A worker's own address comes with each request; this says how to speak to it.
        base_url="http://worker" if context is None else "https://worker",
        verify=True if context is None else context,
    )
    async with contextlib.AsyncExitStack() as exits:
        if tls and context:
            await exits.enter_async_context(kept_current(context, tls, "the connections to workers"))
        yield await exits.enter_async_context(client)


def worker_url(client: httpx.AsyncClient, endpoint: str, path: str) -> str:
    """Return where a client of `worker_client` finds `path` of the worker at `endpoint` (`ip:port`)."""
    return f"{client.base_url.scheme}://{endpoint}{path}"


async def served_models(client: httpx.AsyncClient, endpoint: str) -> tuple[ModelCard, ...] | None:
    """Return the models that `endpoint` (`ip:port`) serves, or None if it answers but does not say.

    Raises:
        Unreachable: nothing accepts connections there.
    """
    try:
        answer = await client.get(worker_url(client, endpoint, "/v1/models"))
        answer.raise_for_status()
        return msgspec.json.decode(answer.content, type=_ModelList).data
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Unreachable(f"{endpoint}: {error}") from error
    except (httpx.HTTPError, msgspec.DecodeError) as error:
        # A busy engine answers late and one with an API key refuses; neither is down.
        log.warning("worker does not tell its models", endpoint=endpoint, reason=repr(error))
        return None
