"""What TLS needs to know: where certificates lie, on either side of a connection."""

from __future__ import annotations

import ssl
from pathlib import Path

from pydantic import BaseModel, ConfigDict, model_validator

from kvindex.errors import ConfigError


class _Files(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def contents(self) -> dict[str, bytes]:
        """Return the bytes of every file.

        Raises:
            ConfigError: one cannot be read.
        """
        try:
            named = {name: path for name, path in self if path is not None}
            return {name: path.read_bytes() for name, path in named.items()}
        except OSError as error:
            raise ConfigError(f"TLS: {error.filename}: {error.strerror}") from error


class ServerTls(_Files):
    """A port that speaks TLS. Files are PEM; a certificate is followed by those between it and its CA."""

    cert: Path
    key: Path
    client_ca: Path | None = None
    """Clients must show a certificate of this CA; None: any client may connect."""

    def context(self) -> ssl.SSLContext:
        """Return what a server of Python's ssl needs.

        Raises:
            ConfigError: a file cannot be read, or is not what it should be.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        load(context, self.cert, self.key)
        if self.client_ca is not None:
            _trust(context, self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


class ClientTls(_Files):
    """A connection that we open with TLS."""

    ca: Path | None = None
    """CA of the server's certificate; None: the system's."""
    cert: Path | None = None
    key: Path | None = None
    """Our own certificate and its key, where the server asks for one."""

    @model_validator(mode="after")
    def _are_a_pair(self) -> ClientTls:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key come together")
        return self

    def context(self) -> ssl.SSLContext:
        """Return what a client of Python's ssl needs.

        Raises:
            ConfigError: a file cannot be read, or is not what it should be.
        """
        context = ssl.create_default_context()
        if self.ca is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            _trust(context, self.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.cert is not None and self.key is not None:
            load(context, self.cert, self.key)
        return context


class PeerTls(_Files):
    """Connections among equals, each of whom shows the others a certificate of the same CA."""

    cert: Path
    key: Path
    ca: Path

    def server_context(self) -> ssl.SSLContext:
        """Return what who is connected to needs; raises what `ServerTls.context` does."""
        return ServerTls(cert=self.cert, key=self.key, client_ca=self.ca).context()

    def client_context(self) -> ssl.SSLContext:
        """Return what who connects needs; raises what `ClientTls.context` does."""
        return ClientTls(ca=self.ca, cert=self.cert, key=self.key).context()


def load(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Let `context` show this certificate from the next handshake on.

    Raises:
        ConfigError: a file cannot be read, or the two are no pair.
    """
    try:
        context.load_cert_chain(cert, key)
    except ssl.SSLError as error:
        raise ConfigError(f"TLS: {cert} and {key} are no certificate and its key: {error.reason}") from error
    except OSError as error:
        raise ConfigError(f"TLS: {cert}, {key}: {error.strerror}") from error


def _trust(context: ssl.SSLContext, ca: Path) -> None:
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise ConfigError(f"TLS: {ca} is no CA certificate: {error.reason}") from error
    except OSError as error:
        raise ConfigError(f"TLS: {ca}: {error.strerror}") from error
