"""`kvlane inspect events` over a real Redis."""

import json
import signal
import subprocess

from connectors.bench.ports import free_ports
from kvindex.errors import IndexUnavailable
from tests.support.cli import INTERRUPTIBLE


def lines(output: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in output.splitlines()]


def test_events_and_evictions_by_time(inspect, redis_url, publisher, worker):
    publisher.change(worker, removed=(0xBEEF,))
    other = publisher.open(2)
    publisher.close_slot(other)
    shown = inspect("events", "--redis-url", redis_url).stdout
    for word in ("opened", "evicted", "10.0.0.1:8000 slot 0  1 blocks: 000000000000beef", "closed"):
        assert word in shown
    found = lines(inspect("events", "--json", "--redis-url", redis_url).stdout)
    assert sorted(each["kind"] for each in found) == ["closed", "evicted", "opened", "opened"]
    assert [each["at_ms"] for each in found] == sorted(each["at_ms"] for each in found)
    (evicted,) = [each for each in found if each["kind"] == "evicted"]
    assert (evicted["worker"], evicted["blocks"]) == (worker.worker_id, ["000000000000beef"])


def test_the_last_lines_with_and_without_evictions(inspect, redis_url, publisher, worker):
    for number in range(30):
        publisher.change(worker, removed=(number,))
    assert len(lines(inspect("events", "--json", "-n", "5", "--redis-url", redis_url).stdout)) == 5
    found = lines(inspect("events", "--json", "--no-evictions", "--redis-url", redis_url).stdout)
    assert [each["kind"] for each in found] == ["opened"]


def test_following(redis_url, publisher, worker):
    command = [*INTERRUPTIBLE, "inspect", "events", "--follow", "--json", "--redis-url", redis_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert json.loads(process.stdout.readline())["kind"] == "opened"
        publisher.change(worker, removed=(0xCAFE,))
        assert json.loads(process.stdout.readline())["blocks"] == ["000000000000cafe"]
        publisher.open(1)  # in its place
        assert [json.loads(process.stdout.readline())["kind"] for _ in range(2)] == ["fenced", "opened"]
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == ""
        assert process.wait(timeout=30) in (0, 130)


def test_nobody_there(inspect, redis_url):
    assert "Nothing is on record" in inspect("events", "--redis-url", redis_url).stdout
    assert inspect("events", "--json", "--redis-url", redis_url).stdout == ""
    error = inspect("events", "--redis-url", f"redis://127.0.0.1:{free_ports(1)[0]}/0").exception
    assert isinstance(error, IndexUnavailable)
