import socket
import ssl

import httpx
import pytest
from prometheus_client import REGISTRY

from connectors.bench.ports import free_ports
from kvindex import metrics
from kvindex.config import admin_access, publisher_config
from kvindex.errors import ConfigError
from kvindex.tls import ClientTls, ServerTls
from tests.support.certificates import Authority


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def server_tls(authority, name="server", *, mutual=False):
    own = authority.issue(name)
    return ServerTls(cert=own.certfile, key=own.keyfile, client_ca=authority.cafile if mutual else None)


def client_tls(authority, name=None):
    own = authority.issue(name) if name else None
    return ClientTls(ca=authority.cafile, cert=own and own.certfile, key=own and own.keyfile)


def test_what_is_wrong_with_files_is_one_line_that_names_them(authority, tmp_path):
    good, other = authority.issue("good"), authority.issue("other")
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    for tls, finding in [
        (ServerTls(cert=tmp_path / "none.pem", key=good.keyfile), "No such file"),
        (ServerTls(cert=text, key=good.keyfile), "no certificate and its key"),
        (ServerTls(cert=good.certfile, key=other.keyfile), "no certificate and its key"),
        (ServerTls(cert=good.certfile, key=good.keyfile, client_ca=text), "is no CA certificate"),
        (ClientTls(ca=tmp_path / "none.pem"), "No such file"),
    ]:
        with pytest.raises(ConfigError, match=finding) as caught:
            tls.context()
        assert "\n" not in str(caught.value)


def test_a_key_belongs_to_a_certificate(authority):
    with pytest.raises(ValueError, match="come together"):
        ClientTls(ca=authority.cafile, key=authority.issue("a").keyfile)


def test_old_versions_of_tls_are_not_spoken(authority):
    assert server_tls(authority).context().minimum_version >= ssl.TLSVersion.TLSv1_2
    assert client_tls(authority).context().minimum_version >= ssl.TLSVersion.TLSv1_2
    assert client_tls(authority).context().verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize("mutual", [False, True])
def test_a_publishers_metrics_are_shown_over_tls_and_on_loopback_alone(authority, mutual):
    (port,) = free_ports(1)
    settings = publisher_config({"kvlane.metrics_port": port})
    metrics.serve(settings.metrics_host, port, server_tls(authority, mutual=mutual))
    url = f"https://127.0.0.1:{port}/metrics"
    known = client_tls(authority, "scraper").context()
    assert "kvlane_publisher" in httpx.get(url, verify=known).text
    with pytest.raises(httpx.HTTPError):
        httpx.get(url.replace("https", "http"))
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)  # of no CA that the system knows
    if mutual:
        with pytest.raises(httpx.HTTPError):
            httpx.get(url, verify=client_tls(authority).context())
    # Every other address of this machine is free: nobody listens on all of them.
    with socket.socket() as other:
        other.bind(("127.0.0.2", port))
    assert REGISTRY


def test_how_an_admin_api_is_asked_comes_from_the_environment(authority, monkeypatch):
    assert admin_access().http_options() == {"headers": {}, "verify": True}
    monkeypatch.setenv("KVLANE_ADMIN_TOKEN", "sesame")
    monkeypatch.setenv("KVLANE_ADMIN_CLIENT_TLS", client_tls(authority).model_dump_json())
    options = admin_access().http_options()
    assert options["headers"] == {"authorization": "Bearer sesame"}
    assert isinstance(options["verify"], ssl.SSLContext)
    assert "sesame" not in repr(admin_access())
    for wrong in ("{", '{"cafile": "x"}'):
        monkeypatch.setenv("KVLANE_ADMIN_CLIENT_TLS", wrong)
        with pytest.raises(ConfigError):
            admin_access()
