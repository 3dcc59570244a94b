"""Certificates of a running gateway: new files are taken up without a restart, bad ones are not."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

import grpc
import structlog

from gateway import metrics
from kvindex.errors import ConfigError
from kvindex.tls import ClientTls, ServerTls, load

log = structlog.get_logger(__name__)

INTERVAL_S = 10.0


class _Watched:
    """Files that are looked at now and then; a change that cannot be used is refused once.

    Args:
        tls: the files.
        where: what they are for, in log lines.

    Raises:
        ConfigError: they cannot be used at the start.
    """

    def __init__(self, tls: ServerTls | ClientTls, where: str) -> None:
        self._tls = tls
        self._where = where
        tls.context()
        self._seen = self._read()

    def changed(self) -> bool:
        """Say whether there are new files, and they are good."""
        content = self._read()
        if content == self._seen:
            return False
        self._seen = content
        try:
            self._tls.context()
        except ConfigError as error:
            log.error("new certificate refused, the old one stays", of=self._where, reason=str(error))
            metrics.CERTIFICATE_LOADS.labels("refused").inc()
            return False
        log.info("new certificate", of=self._where)
        metrics.CERTIFICATE_LOADS.labels("taken").inc()
        return True

    def _read(self) -> dict[str, bytes]:
        try:
            return self._tls.contents()
        except ConfigError:
            return {}


def grpc_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Return a gRPC server's credentials, which follow the files at each handshake, the CA too.

    Raises:
        ConfigError: the files cannot be used.
    """
    watched = _Watched(tls, "the port for Envoy")

    def current() -> grpc.ServerCertificateConfiguration:
        files = tls.contents()
        return grpc.ssl_server_certificate_configuration(
            [(files["key"], files["cert"])], files.get("client_ca")
        )

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        return current() if watched.changed() else None

    return grpc.dynamic_ssl_server_credentials(
        current(), fetch, require_client_authentication=tls.client_ca is not None
    )


@contextlib.asynccontextmanager
async def kept_current(
    context: ssl.SSLContext, tls: ServerTls | ClientTls, where: str, *, interval_s: float = INTERVAL_S
) -> AsyncIterator[None]:
    """Load new certificates into `context` while the block runs.

    Its CA stays as it was at the start: Python's ssl can add one and not take one away.
    """
    watching = asyncio.create_task(_keep_current(context, tls, where, interval_s))
    try:
        yield
    finally:
        watching.cancel()


async def _keep_current(
    context: ssl.SSLContext, tls: ServerTls | ClientTls, where: str, interval_s: float
) -> None:
    watched = _Watched(tls, where)
    while True:
        await asyncio.sleep(interval_s)
        if tls.cert is not None and tls.key is not None and watched.changed():
            load(context, tls.cert, tls.key)
