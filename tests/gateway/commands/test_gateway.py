import contextlib
import signal
import socket
import subprocess
import time

import httpx
import pytest

from tests.support.cli import KVLANE, kvlane
from tests.support.ports import free_ports


@pytest.fixture
def addresses():
    return [f"127.0.0.1:{port}" for port in free_ports(2)]


def test_gateway_serves_until_it_is_told_to_stop(redis_url, addresses):
    listen, admin = addresses
    command = [KVLANE, "gateway", "--listen", listen, "--admin-listen", admin, "--redis-url", redis_url]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline_s = time.monotonic() + 30
            status = 0
            while status != 200:
                assert process.poll() is None
                assert time.monotonic() < deadline_s
                with contextlib.suppress(httpx.TransportError):
                    status = httpx.get(f"http://{admin}/ready").status_code
                time.sleep(0.05)
            assert "kvlane_gateway_extproc_streams_open" in httpx.get(f"http://{admin}/metrics").text
            socket.create_connection(listen.split(":")).close()
        finally:
            process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "gateway serves" in log
    assert "Traceback" not in log


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


def test_redis_that_cannot_be_reached_is_one_line(addresses):
    url = f"redis://127.0.0.1:{free_ports(1)[0]}"
    failed = kvlane("gateway", "--listen", addresses[0], "--admin-listen", addresses[1], "--redis-url", url)
    (line,) = failed.stderr.strip().splitlines()
    assert failed.returncode == 1
    assert line.startswith(f"Redis at {url.removeprefix('redis://')}")


def test_unknown_key_is_one_line(tmp_path):
    file = tmp_path / "kvlane.yaml"
    file.write_text("lisen: 127.0.0.1:1\n")
    failed = kvlane("gateway", "--config", str(file))
    (line,) = failed.stderr.strip().splitlines()
    assert failed.returncode == 2
    assert "lisen" in line
