"""A throwaway certificate authority."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Certificate:
    """Where a certificate and its key lie, as PEM."""

    certfile: Path
    keyfile: Path


class Authority:
    """Signs certificates for 127.0.0.1 and keeps them in a folder.

    By its name a client finds it among those that it knows.
    """

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        built = _builder(self._name, self._name, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.cafile = self._write("ca", built.sign(self._key, hashes.SHA256()), self._key).certfile

    def issue(self, name: str) -> Certificate:
        """Return a new certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        built = _builder(_name(name), self._name, key).add_extension(
            x509.SubjectAlternativeName([address]), critical=False
        )
        return self._write(name, built.sign(self._key, hashes.SHA256()), key)

    def server_context(self, *, wants_client_certificate: bool = False) -> ssl.SSLContext:
        """Return what a server needs; if asked for, it only takes clients that this authority knows."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.cafile)
        own = self.issue("server")
        context.load_cert_chain(own.certfile, own.keyfile)
        if wants_client_certificate:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _write(
        self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> Certificate:
        certfile, keyfile = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        certfile.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        keyfile.write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
        return Certificate(certfile, keyfile)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )
