import contextlib
import signal
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
import yaml

from connectors.bench.ports import free_ports
from tests.support.cli import KVLANE, kvlane


def test_bootstrap_is_printed_with_the_options_in_it():
    printed = kvlane("envoy", "--print-bootstrap", "--gateway", "a:1", "--gateway", "b:2", "--fail-closed")
    config = yaml.safe_load(printed.stdout)
    gateway = next(
        each for each in config["static_resources"]["clusters"] if each["name"] == "kvlane_gateway"
    )
    (locality,) = gateway["load_assignment"]["endpoints"]
    addresses = [each["endpoint"]["address"]["socket_address"] for each in locality["lb_endpoints"]]
    assert addresses == [{"address": "a", "port_value": 1}, {"address": "b", "port_value": 2}]
    assert "failure_mode_allow: false" in printed.stdout


@pytest.mark.envoy
@pytest.mark.parametrize("option", ["--listen", "--admin"])
def test_port_in_use_is_one_line(option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        other = "--admin" if option == "--listen" else "--listen"
        failed = kvlane("envoy", option, address, other, f"127.0.0.1:{free_ports(1)[0]}")
    assert failed.returncode == 2
    assert (
        failed.stderr.strip()
        == f"cannot listen on {address}, taken or not this machine's: choose another {option}"
    )


def test_wrong_address_is_one_line():
    failed = kvlane("envoy", "--listen", "nowhere")
    assert (failed.returncode, failed.stderr.strip()) == (2, "expected host:port, got 'nowhere'")


@pytest.mark.envoy
def test_envoy_runs_in_the_commands_place():
    listen, admin, gateway = (f"127.0.0.1:{port}" for port in free_ports(3))
    command = [
        KVLANE,
        "envoy",
        "--listen",
        listen,
        "--admin",
        admin,
        "--gateway",
        gateway,
        "--",
        "-l",
        "error",
    ]
    with subprocess.Popen(command) as process:
        try:
            deadline_s = time.monotonic() + 30
            status = 0
            while status != 503:
                assert time.monotonic() < deadline_s
                with contextlib.suppress(httpx.TransportError):
                    status = httpx.get(f"http://{listen}/v1/models").status_code
                time.sleep(0.1)
            assert Path(f"/proc/{process.pid}/exe").resolve().name == "envoy"
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


class Unclosing(BaseHTTPRequestHandler):
    """Answers each request, and keeps the connection for as long as the client does."""

    protocol_version = "HTTP/1.1"
    answered_at_s = 0.0
    unused_s: ClassVar[list[float]] = []

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
        type(self).answered_at_s = time.monotonic()

    def finish(self):
        self.unused_s.append(time.monotonic() - self.answered_at_s)
        super().finish()

    def log_message(self, *_):
        """Say nothing."""


@pytest.mark.envoy
def test_a_connection_to_a_worker_is_closed_before_the_worker_would():
    """Or a request may be sent just as the worker closes it, and is lost."""
    listen, admin = (f"127.0.0.1:{port}" for port in free_ports(2))
    with ThreadingHTTPServer(("127.0.0.1", 0), Unclosing) as worker:
        threading.Thread(target=worker.serve_forever, daemon=True).start()
        fixed = ("--no-ext-proc", "--worker", f"127.0.0.1:{worker.server_port}")
        with subprocess.Popen([KVLANE, "envoy", "--listen", listen, "--admin", admin, *fixed]) as process:
            try:
                deadline_s = time.monotonic() + 60
                while not Unclosing.answered_at_s:
                    assert time.monotonic() < deadline_s
                    with contextlib.suppress(httpx.TransportError):
                        httpx.get(f"http://{listen}/health")
                while not Unclosing.unused_s:
                    assert time.monotonic() < deadline_s
                    time.sleep(0.1)
            finally:
                process.send_signal(signal.SIGINT)
        worker.shutdown()
    assert 3 < Unclosing.unused_s[0] < 5
