import contextlib
import os
import signal
import socket
import ssl
import subprocess

import httpx
import pytest

from connectors.bench.ports import free_ports
from kvindex.embedded import embedded_redis
from kvindex.tls import ClientTls, ServerTls
from tests.support.certificates import Authority
from tests.support.cli import KVLANE, kvlane
from tests.support.fleet import eventually


@pytest.fixture
def addresses():
    return [f"127.0.0.1:{port}" for port in free_ports(2)]


@contextlib.contextmanager
def gateway(addresses, redis_url, **env):
    """Run a gateway; afterwards it must end by itself and without a traceback."""
    listen, admin = addresses
    command = [KVLANE, "gateway", "--listen", listen, "--admin-listen", admin, "--redis-url", redis_url]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | env) as process:
        try:
            yield f"http://{admin}"
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "gateway stops" in log
    assert "Traceback" not in log


def status(url, **options):
    with contextlib.suppress(httpx.TransportError, ssl.SSLError):
        return httpx.get(url, **options).status_code
    return 0


def test_gateway_serves_until_it_is_told_to_stop(redis_url, addresses):
    with gateway(addresses, redis_url) as admin:
        eventually(lambda: status(f"{admin}/ready") == 200, timeout_s=60)
        assert "kvlane_gateway_extproc_streams_open" in httpx.get(f"{admin}/metrics").text
        socket.create_connection(addresses[0].split(":")).close()


def test_its_ports_speak_tls_to_who_is_known_and_the_admin_port_wants_its_token(
    redis_url, addresses, tmp_path
):
    authority = Authority(tmp_path)
    own, mine = authority.issue("gateway"), authority.issue("operator")
    server = ServerTls(cert=own.certfile, key=own.keyfile, client_ca=authority.cafile).model_dump_json()
    client = ClientTls(ca=authority.cafile, cert=mine.certfile, key=mine.keyfile)
    env = {"KVLANE_TLS": server, "KVLANE_ADMIN_TLS": server, "KVLANE_ADMIN_TOKEN": "sesame"}
    with gateway(addresses, redis_url, **env) as plain_url:
        url, known = plain_url.replace("http:", "https:"), client.context()
        eventually(lambda: status(f"{url}/ready", verify=known) == 200, timeout_s=60)
        assert status(f"{plain_url}/ready") == 0
        assert status(f"{url}/ready") == 0
        assert status(f"{url}/metrics", verify=known) == 401
        asking = ("inspect", "decision", "none", "--admin", url)
        access = {"KVLANE_ADMIN_CLIENT_TLS": client.model_dump_json()}
        assert "KVLANE_ADMIN_TOKEN" in kvlane(*asking, **access).stderr
        assert "no decision none here" in kvlane(*asking, **access, KVLANE_ADMIN_TOKEN="sesame").stderr
        with (
            socket.create_connection(addresses[0].split(":")) as raw,
            known.wrap_socket(raw, server_hostname="127.0.0.1") as secure,
        ):
            assert dict(pair for pairs in secure.getpeercert()["subject"] for pair in pairs)


def test_without_redis_it_is_alive_and_not_ready_until_redis_is_there(addresses):
    (port,) = free_ports(1)
    with gateway(addresses, f"redis://127.0.0.1:{port}") as admin:
        eventually(lambda: status(f"{admin}/health") == 200, timeout_s=60)

        def says_why() -> bool:
            unready = httpx.get(f"{admin}/ready")
            assert unready.status_code == 503
            return f"127.0.0.1:{port}" in unready.json()["reason"]

        eventually(says_why)
        with embedded_redis(port):
            eventually(lambda: status(f"{admin}/ready") == 200, timeout_s=60)


@pytest.mark.parametrize("option", ["--listen", "--admin-listen"])
def test_port_in_use_is_one_line(redis_url, addresses, option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        options = dict(zip(("--listen", "--admin-listen"), addresses, strict=True)) | {option: address}
        given = [argument for pair in options.items() for argument in pair]
        failed = kvlane("gateway", *given, "--redis-url", redis_url)
    assert failed.returncode == 2
    expected = f"cannot listen on {address}, taken or not this machine's: choose another {option}"
    assert failed.stderr.strip().splitlines()[-1] == expected


def test_unknown_key_is_one_line(tmp_path):
    file = tmp_path / "kvlane.yaml"
    file.write_text("lisen: 127.0.0.1:1\n")
    failed = kvlane("gateway", "--config", str(file))
    (line,) = failed.stderr.strip().splitlines()
    assert failed.returncode == 2
    assert "lisen" in line
