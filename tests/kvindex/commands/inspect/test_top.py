"""`kvlane inspect top` over a real Redis, with and without a gateway."""

import json
import os
import pty
import signal
import subprocess

import pytest

from connectors.bench.ports import free_ports
from kvindex.commands.inspect.top import _view, read_frame
from kvindex.config import IndexConfig
from kvindex.errors import IndexUnavailable
from kvindex.redis_index import RedisIndexReader
from kvindex.worker import Load
from tests.kvindex.commands.inspect.views import view_of_prompt
from tests.support.cli import INTERRUPTIBLE

TRAFFIC = {
    "covered_s": 42.0,
    "total": {"requests": 4, "prompt_tokens": 1000, "matched_tokens": 640},
    "workers": {"10.0.0.1:8000": {"requests": 3, "prompt_tokens": 800, "matched_tokens": 600}},
}


@pytest.fixture
def gateway(admin, worker):
    url, answers, _ = admin
    answers["GET", "/traffic?seconds=60"] = (200, TRAFFIC)
    chains = [(0xBEEF, 0xCAFE, 7), (0xBEEF, 0xCAFE, 8), (0xBEEF, 9, 10)]
    answers["GET", "/prompts?limit=200"] = (200, [view_of_prompt(worker, hashes) for hashes in chains])
    return url


def test_a_frame(inspect, redis_url, publisher, worker, gateway):
    other = publisher.open(2)
    publisher.beat(other, Load(waiting_prefill_tokens=900, waiting_requests=2, kv_usage=0.5))
    shown = inspect("top", "--once", "--redis-url", redis_url, "--admin", gateway).stdout
    assert "2 workers, 5 running, 2 waiting, 2 blocks, 4 requests in 42 s, hit rate 64%" in shown
    assert shown.index("10.0.0.2:8000") < shown.index("10.0.0.1:8000")  # the busiest first
    for word in ("2 of 4,000", "75%", "device", "both", "000000000000cafe"):
        assert word in shown
    only = inspect("top", "--once", "--rows", "1", "--redis-url", redis_url, "--admin", gateway).stdout
    assert "and 1 workers more" in only


def test_a_frame_as_json(inspect, redis_url, publisher, worker, gateway):
    publisher.open(2)
    frame = json.loads(inspect("top", "--json", "--redis-url", redis_url, "--admin", gateway).stdout)
    first, second = frame["workers"]
    assert first["worker"] == worker.worker_id
    assert first["traffic"] == {"requests": 3, "prompt_tokens": 800, "matched_tokens": 600}
    assert second["traffic"] == {"requests": 0, "prompt_tokens": 0, "matched_tokens": 0}
    hot = [(each["block"][-4:], each["depth_blocks"], each["num_prompts"]) for each in frame["prefixes"]]
    assert hot == [("beef", 1, 3), ("cafe", 2, 2)]
    assert [each["num_holders"] for each in frame["prefixes"]] == [1, 1]
    assert (frame["traffic_s"], frame["missing"]) == (42.0, None)


def test_without_a_gateway_the_rest_is_shown_and_what_is_missing_said(inspect, redis_url, worker):
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    shown = inspect("top", "--once", "--redis-url", redis_url, "--admin", nobody).stdout
    assert "10.0.0.1:8000" in shown
    assert "no hit rates and no prefixes: no gateway answers at" in " ".join(shown.split())
    frame = json.loads(inspect("top", "--json", "--redis-url", redis_url, "--admin", nobody).stdout)
    assert frame["workers"][0]["traffic"] is None


def test_without_redis_there_is_one_line(inspect):
    url = f"redis://127.0.0.1:{free_ports(1)[0]}/0"
    assert isinstance(inspect("top", "--once", "--redis-url", url).exception, IndexUnavailable)


def test_it_watches_until_it_is_interrupted(redis_url, worker, gateway):
    command = [*INTERRUPTIBLE, "inspect", "top", "--interval", "0.2"]
    command += ["--redis-url", redis_url, "--admin", gateway]
    terminal, inside = pty.openpty()
    with subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside) as process:
        try:
            shown = b""
            while shown.count(b"1 workers, 5 running") < 2:
                shown += os.read(terminal, 65_536)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) in (0, 130)
        finally:
            process.kill()
    os.close(terminal)
    os.close(inside)


async def test_a_thousand_workers(redis_url, publisher):
    for number in range(1, 1001):
        publisher.open(number)
    reader = RedisIndexReader(IndexConfig(redis_url=redis_url, redis_timeout_s=10))
    frame = await read_frame(reader, f"http://127.0.0.1:{free_ports(1)[0]}")
    await reader.close()
    assert len(frame.workers) == 1000
    assert len(list(_view(frame, 20))) == 4
