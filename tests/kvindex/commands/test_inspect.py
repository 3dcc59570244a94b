"""`kvlane inspect` over a real Redis and a gateway's admin API that answers as told."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import msgspec
import pytest
from typer.testing import CliRunner

from gateway.plan import Candidate, Choice, Demand, weigh
from gateway.receipts import Receipt
from kvindex.commands.inspect import app
from kvindex.config import IndexConfig
from kvindex.errors import AdminUnavailable, ConfigError, IndexUnavailable
from kvindex.redis_index import RedisIndexWriter
from kvindex.worker import Batch, Load, Worker, WorkerState, new_incarnation
from tests.support.ports import free_ports

WORKER = Worker(
    endpoint="10.0.0.1:8000",
    model="tiny",
    block_size=16,
    num_blocks=4000,
    bytes_per_token=64,
    max_model_len=4096,
    incarnation="1",
)


def receipt(*choices: Choice) -> dict[str, object]:
    """Return what the admin API says of a decision between `choices`."""
    steps_ms = {"read": 0.5, "match": 0.25}
    made = Receipt(decision_id="00000000000000aa", request_id="client-7", path="/v1/completions", at=1.5)
    made.prompt_tokens, made.choices, made.steps_ms, made.chosen = 1200, choices, steps_ms, WORKER.worker_id
    return json.loads(msgspec.json.encode(made.view()))


def weighed() -> Choice:
    """Return a candidate that holds 64 of 75 blocks and is weighed for 1,200 tokens."""
    state = WorkerState(slot=0, load=Load(running_requests=3), charged_tokens=12, charged_requests=1)
    candidate = Candidate(worker=WORKER, state=state, overlap_blocks=64, prefill_tokens_per_s=8_000)
    return weigh(Demand(num_tokens=1200, num_lookup_tokens=1200, model="tiny"), candidate)


def inspect(*arguments: str, **env: str):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "160", **env})


@pytest.fixture
def worker(redis_url):
    writer = RedisIndexWriter(IndexConfig(redis_url=redis_url))
    worker = msgspec.structs.replace(WORKER, incarnation=new_incarnation())
    slot = writer.open_slot(worker, lease_ms=60_000)
    writer.apply(worker.pool, slot, worker.incarnation, Batch(sequence=1, stored=(0xBEEF, 0xCAFE)))
    writer.heartbeat(worker.pool, slot, worker.incarnation, Load(running_requests=5), lease_ms=60_000)
    yield worker
    writer.close_slot(worker.pool, slot, worker.incarnation)
    writer.close()


@pytest.fixture
def admin():
    """Yield (URL, answers by (method, path), bodies received)."""
    answers: dict[tuple[str, str], tuple[int, object]] = {}
    received: list[object] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            received.append(json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "null"))
            status, content = answers[self.command, self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def do_POST(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answers, received
    server.shutdown()
    thread.join()
    server.server_close()


def test_workers(redis_url, worker):
    shown = inspect("workers", "--redis-url", redis_url).stdout
    assert "10.0.0.1:8000" in shown
    assert "2 of 4,000" in shown
    (found,) = json.loads(inspect("workers", "--json", KVLANE_REDIS_URL=redis_url).stdout)
    assert found["worker"]["incarnation"] == worker.incarnation
    assert found["load"]["running_requests"] == 5
    assert found["num_indexed_blocks"] == 2


def test_pools(redis_url, worker):
    assert "2 of 4,000" in inspect("pools", "--redis-url", redis_url).stdout
    (found,) = json.loads(inspect("pools", "--redis-url", redis_url, "--json").stdout)
    assert found == {
        "pool_id": worker.pool.pool_id,
        "model": "tiny",
        "block_size": 16,
        "scheme": worker.pool.scheme,
        "num_workers": 1,
        "num_blocks": 4000,
        "num_indexed_blocks": 2,
        "parity": None,
    }


@pytest.mark.parametrize(
    ("parity", "said"),
    [
        ({"state": "exact", "reason": None}, "exact"),
        ({"state": "degraded", "reason": "tokens"}, "degraded (tokens)"),
    ],
)
def test_what_a_gateway_holds_of_workers_and_pools(redis_url, worker, admin, parity, said):
    url, answers, _ = admin
    known = {"worker": {"incarnation": worker.incarnation}, "parity": parity}
    pools = [{"pool_id": worker.pool.pool_id, "parity": parity["state"]}]
    answers["GET", "/fleet"] = (200, {"workers": [known], "pools": pools})
    where = ("--redis-url", redis_url, "--admin", url)
    assert said in inspect("workers", *where, COLUMNS="250").stdout
    assert json.loads(inspect("workers", *where, "--json").stdout)[0]["parity"] == said
    assert parity["state"] in inspect("pools", *where).stdout
    assert json.loads(inspect("pools", *where, "--json").stdout)[0]["parity"] == parity["state"]


@pytest.mark.parametrize("written", ["beef", "0xBEEF", "000000000000beef"])
def test_block(redis_url, worker, written):
    assert "10.0.0.1:8000" in inspect("block", written, "--redis-url", redis_url).stdout
    (found,) = json.loads(inspect("block", written, "--redis-url", redis_url, "--json").stdout)
    assert found["pool_id"] == worker.pool.pool_id
    assert found["worker"] == worker.worker_id


def test_nothing_found_says_why_and_what_to_do(redis_url, worker):
    assert "never stored" in inspect("block", "1", "--redis-url", redis_url).stdout
    assert json.loads(inspect("block", "1", "--redis-url", redis_url, "--json").stdout) == []


def test_an_empty_index_says_where_it_looked_and_how_to_start(redis_url):
    for what in ("workers", "pools"):
        shown = inspect(what, "--redis-url", redis_url).stdout
        assert "kvlane:pools" in shown
        assert "kvlane serve MODEL" in shown
        assert inspect(what, "--redis-url", redis_url, "--json").stdout == "[]\n"


@pytest.mark.parametrize("wrong", ["", "xyz", "1" * 17, "-1"])
def test_a_wrong_hash_is_refused(wrong):
    assert isinstance(inspect("block", "--", wrong).exception, ConfigError)


def test_an_unreachable_redis_is_named():
    (port,) = free_ports(1)
    error = inspect("workers", "--redis-url", f"redis://:secret@127.0.0.1:{port}/0").exception
    assert isinstance(error, IndexUnavailable)
    assert f"127.0.0.1:{port}" in str(error)
    assert "secret" not in str(error)


def test_a_wrong_redis_url_is_a_setting():
    assert isinstance(inspect("pools", "--redis-url", "http://x").exception, ConfigError)


def test_decision(admin):
    url, answers, _ = admin
    answers["GET", "/decisions/client-7"] = (200, receipt(weighed()))
    shown = inspect("decision", "client-7", "--admin", url).stdout
    for word in ("1,024", "23.50", "prefill ms", "match 0.25", "chosen"):
        assert word in shown
    found = inspect("decision", "client-7", "--json", KVLANE_ADMIN_URL=url).stdout
    assert json.loads(found) == receipt(weighed())


def test_a_decision_without_candidates(admin):
    url, answers, _ = admin
    answers["GET", "/decisions/a%2Fb"] = (200, receipt())
    assert "load alone decided" in inspect("decision", "a/b", "--admin", url).stdout


PREFIX = {
    "model": "tiny",
    "prompt_tokens": 2048,
    "inexact": None,
    "workers": [{"worker": "10.0.0.1:8000", "matched_blocks": 64, "matched_tokens": 1024}],
}


def test_prefix_of_a_text(admin):
    url, answers, received = admin
    answers["POST", "/prefix"] = (200, PREFIX)
    shown = inspect("prefix", "Once upon", "--model", "tiny", "--admin", url).stdout
    assert received == [{"text": "Once upon", "model": "tiny"}]
    for word in ("10.0.0.1:8000", "1,024", "50%", "2,048 prompt tokens of tiny"):
        assert word in shown
    assert "may differ" not in shown
    answers["POST", "/prefix"] = (200, PREFIX | {"inexact": "a template unknown here"})
    shown = inspect("prefix", "Once upon", "--model", "tiny", "--admin", url).stdout
    assert "a template unknown here" in shown
    answers["POST", "/prefix"] = (200, PREFIX)
    found = inspect("prefix", "Once upon", "--model", "tiny", "--json", "--admin", url).stdout
    assert json.loads(found) == PREFIX


def test_prefix_of_a_file(admin, tmp_path):
    url, answers, received = admin
    answers["POST", "/prefix"] = (200, PREFIX | {"workers": []})
    text, chat = tmp_path / "text", tmp_path / "chat.json"
    text.write_text("[1, 2]")
    chat.write_text('{"model": "mine", "messages": [], "cache_salt": "s"}')
    inspect("prefix", f"@{text}", "--model", "tiny", "--admin", url)
    assert "No live worker serves tiny" in inspect("prefix", f"@{chat}", "--admin", url).stdout
    inspect("prefix", f"@{chat}", "--model", "other", "--admin", url)
    assert received == [
        {"text": "[1, 2]", "model": "tiny"},
        {"model": "mine", "messages": [], "cache_salt": "s"},
        {"model": "other", "messages": [], "cache_salt": "s"},
    ]
    assert isinstance(inspect("prefix", "@/no/such/file").exception, ConfigError)


def test_prefix_takes_the_only_model(admin):
    url, answers, received = admin
    answers["POST", "/prefix"] = (200, PREFIX)
    for models, refusal in (["tiny", "tiny"], None), (["a", "b"], "a, b"), ([], "no live worker"):
        answers["GET", "/fleet"] = (200, {"workers": [{"worker": {"model": model}} for model in models]})
        error = inspect("prefix", "Once", "--admin", url).exception
        assert error is None if refusal is None else isinstance(error, ConfigError) and refusal in str(error)
    assert {"text": "Once", "model": "tiny"} in received


def test_an_unknown_decision_repeats_the_reason(admin):
    url, answers, _ = admin
    answers["GET", "/decisions/x"] = (404, {"detail": "no such decision here"})
    error = inspect("decision", "x", "--admin", url).exception
    assert isinstance(error, AdminUnavailable)
    assert "404" in str(error)
    assert "no such decision here" in str(error)


def test_no_gateway_at_the_admin_address(admin):
    (port,) = free_ports(1)
    error = inspect("decision", "x", "--admin", f"http://127.0.0.1:{port}").exception
    assert isinstance(error, AdminUnavailable)
    assert "--admin" in str(error)
    url, answers, _ = admin
    answers["GET", "/decisions/x"] = (200, b"<html>")
    assert "not the admin API" in str(inspect("decision", "x", "--admin", url).exception)
