"""`kvlane inspect prefix`, `decision` and `why` over an admin API that answers as told."""

import json

import msgspec

from connectors.bench.ports import free_ports
from gateway.plan import Candidate, Choice, Demand, weigh
from gateway.profile import Profile
from gateway.receipts import Receipt
from gateway.tiers import SPEEDS, TierPart, TierSpeed
from kvindex.errors import AdminUnavailable, ConfigError
from kvindex.worker import Load, Tier, WorkerState
from tests.support.workers import make_worker

WORKER = make_worker("10.0.0.1:8000")


def receipt(*choices: Choice) -> dict[str, object]:
    """Return what the admin API says of a decision between `choices`."""
    steps_ms = {"read": 0.5, "match": 0.25}
    made = Receipt(decision_id="00000000000000aa", request_id="client-7", path="/v1/completions", at=1.5)
    made.prompt_tokens, made.choices, made.steps_ms, made.chosen = 1200, choices, steps_ms, WORKER.worker_id
    return json.loads(msgspec.json.encode(made.view()))


def weighed(**fields: object) -> Choice:
    """Return a candidate that holds 64 of 75 blocks and is weighed for 1,200 tokens."""
    state = WorkerState(slot=0, load=Load(running_requests=3), charged_tokens=12, charged_requests=1)
    candidate = Candidate(
        worker=WORKER, state=state, overlap_blocks=64, profile=Profile(prefill_tokens_per_s=8_000)
    )
    candidate = msgspec.structs.replace(candidate, **fields)
    return weigh(Demand(num_tokens=1200, num_lookup_tokens=1200, model="tiny"), candidate)


def test_decision(inspect, admin):
    url, answers, _ = admin
    answers["GET", "/decisions/client-7"] = (200, receipt(weighed()))
    shown = inspect("decision", "client-7", "--admin", url).stdout
    for word in ("1,024", "23.50", "prefill ms", "match 0.25", "chosen"):
        assert word in shown
    found = inspect("decision", "client-7", "--json", KVLANE_ADMIN_URL=url).stdout
    assert json.loads(found) == receipt(weighed())


def test_a_decision_says_what_tiers_had_and_what_was_made_of_it(inspect, admin):
    url, answers, _ = admin
    slow = TierSpeed(gb_per_s=0.001, latency_ms=500)
    for speed, said in ((SPEEDS[Tier.OBJECT], "loaded"), (slow, "computed: that is faster")):
        part = TierPart(
            store="s3://kv", tier=Tier.OBJECT, first_token=0, end_token=1024, speed=speed, known=speed
        )
        answers["GET", "/decisions/x"] = (200, receipt(weighed(tiers=(part,), overlap_blocks=0)))
        shown = inspect("decision", "x", "--admin", url, COLUMNS="250").stdout
        for word in ("s3://kv", "object", said, "1,024", "loaded tokens", "load ms"):
            assert word in shown


def test_receipts_are_listed(inspect, admin):
    url, answers, _ = admin
    known = [receipt(weighed()), receipt()]
    answers["GET", "/decisions?limit=2"] = (200, known)
    shown = inspect("receipts", "-n", "2", "--admin", url).stdout
    for word in ("00000000000000aa", "10.0.0.1:8000", "1,200", "85%"):
        assert word in shown
    assert json.loads(inspect("receipts", "-n", "2", "--json", KVLANE_ADMIN_URL=url).stdout) == known
    answers["GET", "/decisions?limit=20"] = (200, [])
    assert "remembers no decision" in inspect("receipts", "--admin", url).stdout


def test_receipts_are_written_as_a_trace(inspect, admin, tmp_path):
    url, answers, _ = admin
    answers["GET", "/recording"] = (200, b'{"a": 1}\n{"a": 2}\n')
    file = tmp_path / "trace.jsonl"
    assert inspect("receipts", "--jsonl", str(file), "--admin", url).stdout == f"{file}: 2 requests\n"
    assert file.read_bytes() == b'{"a": 1}\n{"a": 2}\n'
    error = inspect("receipts", "--jsonl", str(tmp_path), "--admin", url).exception
    assert isinstance(error, ConfigError)
    answers["GET", "/recording"] = (401, b"no")
    error = inspect("receipts", "--jsonl", str(file), "--admin", url).exception
    assert isinstance(error, AdminUnavailable)
    assert "answers 401" in str(error)


def test_a_decision_without_candidates(inspect, admin):
    url, answers, _ = admin
    answers["GET", "/decisions/a%2Fb"] = (200, receipt())
    assert "load alone decided" in inspect("decision", "a/b", "--admin", url).stdout


PREFIX = {
    "model": "tiny",
    "prompt_tokens": 2048,
    "inexact": None,
    "workers": [
        {
            "worker": "10.0.0.1:8000",
            "matched_blocks": 64,
            "matched_tokens": 1024,
            "tier_tokens": {"device": 1024, "object": 1536},
        }
    ],
    "chains": [],
}


def test_prefix_of_a_text(inspect, admin):
    url, answers, received = admin
    answers["POST", "/prefix"] = (200, PREFIX)
    shown = inspect("prefix", "Once upon", "--model", "tiny", "--admin", url).stdout
    assert received == [{"text": "Once upon", "model": "tiny"}]
    for word in (
        "10.0.0.1:8000",
        "1,024",
        "50%",
        "tokens on device",
        "tokens on object",
        "1,536",
        "2,048 prompt tokens of tiny",
    ):
        assert word in shown
    assert "may differ" not in shown
    answers["POST", "/prefix"] = (200, PREFIX | {"inexact": "a template unknown here"})
    shown = inspect("prefix", "Once upon", "--model", "tiny", "--admin", url).stdout
    assert "a template unknown here" in shown
    answers["POST", "/prefix"] = (200, PREFIX)
    found = inspect("prefix", "Once upon", "--model", "tiny", "--json", "--admin", url).stdout
    assert json.loads(found) == PREFIX


def test_prefix_of_a_file(inspect, admin, tmp_path):
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


def test_prefix_takes_the_only_model(inspect, admin):
    url, answers, received = admin
    answers["POST", "/prefix"] = (200, PREFIX)
    for models, refusal in (["tiny", "tiny"], None), (["a", "b"], "a, b"), ([], "no live worker"):
        answers["GET", "/fleet"] = (200, {"workers": [{"worker": {"model": model}} for model in models]})
        error = inspect("prefix", "Once", "--admin", url).exception
        assert error is None if refusal is None else isinstance(error, ConfigError) and refusal in str(error)
    assert {"text": "Once", "model": "tiny"} in received


def test_an_unknown_decision_repeats_the_reason(inspect, admin):
    url, answers, _ = admin
    answers["GET", "/decisions/x"] = (404, {"detail": "no such decision here"})
    error = inspect("decision", "x", "--admin", url).exception
    assert isinstance(error, AdminUnavailable)
    assert "404" in str(error)
    assert "no such decision here" in str(error)


def test_no_gateway_at_the_admin_address(inspect, admin):
    (port,) = free_ports(1)
    error = inspect("decision", "x", "--admin", f"http://127.0.0.1:{port}").exception
    assert isinstance(error, AdminUnavailable)
    assert "--admin" in str(error)
    url, answers, _ = admin
    answers["GET", "/decisions/x"] = (200, b"<html>")
    assert "not the admin API" in str(inspect("decision", "x", "--admin", url).exception)


def finding(**fields: object) -> dict[str, object]:
    """Return what the admin API says of a worker that held 64 blocks and evicted the next."""
    return {
        "worker": "10.0.0.1:8000",
        "overlap_blocks": 64,
        "num_blocks": 75,
        "reason": "evicted",
        "detail": "10.0.0.1:8000 evicted it at 12:00:00.000Z",
        "missed_tokens": [1024, 1040],
        "block": "000000000000beef",
        "at_ms": 1,
        "earlier": None,
        "holders_now": [],
        "tiers": [],
        **fields,
    }


WHY = {
    "decision_id": "00000000000000aa",
    "request_id": "client-7",
    "at": 1.5,
    "model": "tiny",
    "mode": "overlap",
    "fallback": None,
    "prompt_tokens": 1200,
    "matched_tokens": 1024,
    "receipts_since": 1.0,
    "findings": {"chosen": finding()},
}


def test_why(inspect, admin):
    url, answers, _ = admin
    answers["GET", "/why/client-7"] = (200, WHY)
    shown = inspect("why", "client-7", "--admin", url).stdout
    for word in (
        "held 64 of its 75 full blocks",
        "evicted: 10.0.0.1:8000",
        "1,024 to 1,039",
        "beef",
        "nobody",
    ):
        assert word in shown
    assert "best holder" not in shown
    assert "tiers had" not in shown
    had = finding(tiers=["512 tokens in s3://kv (object), 90 ms to load: loaded"])
    answers["GET", "/why/client-7"] = (200, WHY | {"findings": {"chosen": had}})
    shown = inspect("why", "client-7", "--admin", url).stdout
    assert "tiers had" in shown
    assert "512 tokens in s3://kv" in shown
    other = finding(worker="10.0.0.2:8000", reason="never_stored", holders_now=["10.0.0.3:8000"])
    answers["GET", "/why/client-7"] = (200, WHY | {"findings": {"chosen": finding(), "best_holder": other}})
    shown = inspect("why", "client-7", "--admin", url).stdout
    for word in ("The best holder, 10.0.0.2:8000", "never stored", "10.0.0.3:8000"):
        assert word in shown
    found = inspect("why", "client-7", "--json", "--admin", url).stdout
    assert json.loads(found)["findings"]["best_holder"] == other
    answers["GET", "/why/client-7?worker=a%3A1"] = (200, WHY | {"findings": {"asked_for": other}})
    assert "asked for" in inspect("why", "client-7", "--worker", "a:1", "--admin", url).stdout


def test_why_without_a_lookup_says_so(inspect, admin):
    url, answers, _ = admin
    answers["GET", "/why/x"] = (200, WHY | {"findings": {}, "fallback": "index_deadline"})
    assert "was not asked (index_deadline)" in inspect("why", "x", "--admin", url).stdout
