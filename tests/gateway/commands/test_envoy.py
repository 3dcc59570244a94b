import contextlib
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.cli import KVLANE, kvlane
from tests.support.ports import free_ports


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
