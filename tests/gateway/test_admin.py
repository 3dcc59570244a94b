from __future__ import annotations

import base64

import httpx
import msgspec
import pytest

from gateway.admin.app import create_app
from gateway.config import GatewayConfig
from gateway.decide import KvRouter
from gateway.decision import End, HttpRequest, Served
from gateway.errors import RequestError, TokenizerError
from gateway.fleet import Fleet
from gateway.parity import Parity, Reason, State, degraded
from gateway.probe import worker_client
from gateway.profile import Profile
from gateway.rates import Rates
from gateway.readiness import Readiness
from gateway.receipts import Receipts
from gateway.recording import Recorded
from gateway.tokens.request import Api, Prompt, ReadRequest
from kvindex.blocks import hash_blocks, pack_hashes, root_hash, unpack_hashes
from kvindex.errors import IndexUnavailable
from kvindex.memory_index import MemoryIndex, MemoryIndexReader, MemoryIndexWriter
from kvindex.worker import Batch, StepCosts
from tests.support.workers import make_worker

PROMPT = tuple(range(100))


class Outage(MemoryIndexReader):
    """A reader that cannot be reached while `down`."""

    down = False

    async def pools(self):
        if self.down:
            raise IndexUnavailable("redis://nowhere: refused")
        return await super().pools()

    async def match(self, pool, hashes):
        if self.down:
            raise IndexUnavailable("redis://nowhere: refused")
        return await super().match(pool, hashes)

    async def events(self, pool, **options):
        if self.down:
            raise IndexUnavailable("redis://nowhere: refused")
        return await super().events(pool, **options)


class RecordingReader:
    """Understands everything as `PROMPT` and keeps what it was given."""

    def __init__(self) -> None:
        self.given = []
        self.failure = None

    async def read(self, path, body):
        self.given.append((path, body))
        if self.failure:
            raise self.failure
        return ReadRequest(Api.COMPLETION, "tiny", (Prompt(PROMPT, len(PROMPT)),), stream=True)


class Gateway:
    """All that the admin app shows, on a memory index with one worker that holds two blocks."""

    def __init__(self, client) -> None:
        memory = MemoryIndex()
        self.index = Outage(memory)
        self.reader = RecordingReader()
        self.fleet = Fleet(GatewayConfig(), self.index, client)
        self.receipts = Receipts(10)
        self.readiness = Readiness()
        rates = Rates(Profile(prefill_tokens_per_s=1000))
        self.router = KvRouter(
            GatewayConfig(index_deadline_ms=2_000),
            self.index,
            self.fleet,
            self.reader,
            rates=rates,
            receipts=self.receipts,
            client=client,
        )
        self.app = create_app(
            self.router, self.fleet, self.index, rates=rates, receipts=self.receipts, readiness=self.readiness
        )
        worker = make_worker("a:1")
        self.writer = writer = MemoryIndexWriter(memory)
        slot = writer.open_slot(worker, lease_ms=60_000)
        blocks = hash_blocks(root_hash("tiny"), PROMPT, 16)
        writer.apply(worker.pool, slot, worker.incarnation, Batch(sequence=1, stored=tuple(blocks[:2])))


@pytest.fixture
async def gateway():
    async with worker_client(GatewayConfig()) as client:
        yield Gateway(client)


@pytest.fixture
async def admin(gateway):
    transport = httpx.ASGITransport(gateway.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
        yield client


async def decide(gateway, **headers):
    request = HttpRequest("POST", "/v1/completions", headers, b"{}")
    return await gateway.router.decide(request)


async def test_health_needs_nothing(admin):
    answer = await admin.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "alive"})


async def test_readiness_waits_for_the_index_and_then_only_degrades(admin, gateway):
    answer = await admin.get("/ready")
    assert answer.status_code == 503
    assert "not been read" in answer.json()["reason"]
    await gateway.fleet.poll()
    assert (await admin.get("/ready")).json() == {"status": "unready", "reason": "the gateway is starting"}
    await gateway.readiness.open()
    assert (await admin.get("/ready")).json() == {"status": "ready"}
    gateway.index.down = True
    with pytest.raises(IndexUnavailable):
        await gateway.fleet.poll()
    answer = await admin.get("/ready")
    assert answer.status_code == 200
    assert answer.json() == {"status": "degraded", "reason": "redis://nowhere: refused"}
    await gateway.readiness.close()
    assert (await admin.get("/ready")).status_code == 503


async def test_metrics_count_decisions(admin, gateway):
    await gateway.fleet.poll()
    await decide(gateway)
    text = (await admin.get("/metrics")).text
    assert 'kvlane_gateway_decisions_total{fallback="",mode="overlap"}' in text
    assert 'kvlane_gateway_step_seconds_count{step="match"}' in text


async def test_fleet_shows_workers_with_load_rates_and_blocks(admin, gateway):
    empty = {"parity_probe": True, "pools": [], "workers": []}
    assert (await admin.get("/fleet")).json() == {"failure": "the index has not been read yet", **empty}
    await gateway.fleet.poll()
    decision = await decide(gateway)
    await gateway.fleet.poll()
    (worker,) = (await admin.get("/fleet")).json()["workers"]
    assert worker["worker_id"] == "a:1"
    assert worker["worker"]["model"] == "tiny"
    assert worker["num_indexed_blocks"] == 2
    assert worker["prefill_tokens_per_s"] == 1000
    assert worker["models"] == ["tiny"]
    assert worker["reachable"] is True
    assert (worker["requests_from_here"], worker["charged_requests"]) == (1, 1)
    await gateway.router.finish(decision.decision_id, End.COMPLETE)


async def test_fleet_and_metrics_show_what_is_known_of_workers_and_pools(admin, gateway):
    await gateway.fleet.poll()
    fleet = (await admin.get("/fleet")).json()
    assert fleet["workers"][0]["parity"]["state"] == fleet["pools"][0]["parity"] == "checking"
    (registered,) = gateway.fleet.snapshot.workers()
    verdict = degraded(registered.worker, Reason.TOKENS, "they differ")
    gateway.fleet.note_parity(registered.worker, verdict)
    fleet = (await admin.get("/fleet")).json()
    parity = fleet["workers"][0]["parity"]
    assert (parity["state"], parity["reason"], parity["detail"]) == ("degraded", "tokens", "they differ")
    assert parity["cure"] == verdict.cure
    assert fleet["pools"][0]["parity"] == "degraded"
    text = (await admin.get("/metrics")).text
    assert 'kvlane_gateway_workers{state="degraded"} 1.0' in text
    assert 'kvlane_gateway_workers{state="exact"} 0.0' in text
    assert 'kvlane_gateway_pool_exact{block_size="16",model="tiny"} 0.0' in text
    gateway.fleet.note_parity(registered.worker, Parity(state=State.EXACT))
    assert 'kvlane_gateway_pool_exact{block_size="16",model="tiny"} 1.0' in (await admin.get("/metrics")).text


async def test_rates_show_whence_they_are_and_how_far_predictions_were_off(admin, gateway):
    await gateway.fleet.poll()
    found = (await admin.get("/rates")).json()
    assert found["errors"] == {"num_measured": 0, "median_ms": None, "p90_distance_ms": None}
    assert (found["workers"][0]["source"], found["workers"][0]["num_steps"]) == ("profile", 0)
    (registered,) = gateway.fleet.snapshot.workers()
    costs = StepCosts(num_steps=50, prefill_tokens_per_s=2_000.0, step_ms=3.0)
    gateway.writer.report_costs(registered.worker.pool, registered.slot, registered.worker.incarnation, costs)
    await gateway.fleet.poll()
    for ttft_ms in (1.0, 10.0, 1_000.0):
        decision = await decide(gateway)
        receipt = gateway.receipts.get(decision.decision_id)
        gateway.router.record(Served(decision.decision_id, 200, "a:1", ttft_ms, ttft_ms, 1, 1))
        assert receipt.ttft_error_ms == pytest.approx(
            ttft_ms - sum(receipt.steps_ms.values()) - receipt.predicted_ttft_ms
        )
    found = (await admin.get("/rates")).json()
    (worker,) = found["workers"]
    assert (worker["worker"], worker["source"], worker["num_steps"]) == ("a:1", "worker", 50)
    assert worker["profile"]["prefill_tokens_per_s"] == pytest.approx(2_000 * worker["speed"])
    assert worker["profile"]["step_ms"] == pytest.approx(3 / worker["speed"])
    assert worker["errors"] == found["errors"]
    assert worker["errors"]["num_measured"] == 3
    assert worker["errors"]["p90_distance_ms"] > 500
    text = (await admin.get("/metrics")).text
    assert 'kvlane_gateway_worker_rates{source="worker"} 1.0' in text
    assert 'kvlane_gateway_worker_rates{source="profile"} 0.0' in text


async def test_decisions_are_found_by_both_ids(admin, gateway):
    await gateway.fleet.poll()
    decision = await decide(gateway, **{"x-request-id": "client/7"})
    by_decision = (await admin.get(f"/decisions/{decision.decision_id}")).json()
    assert by_decision["chosen"] == "a:1"
    assert by_decision["matched_tokens"] == 32
    assert [each["worker"] for each in by_decision["candidates"]] == ["a:1"]
    assert (await admin.get("/decisions/client%2F7")).json() == by_decision
    latest = await decide(gateway)
    listed = (await admin.get("/decisions", params={"limit": 1})).json()
    assert [each["decision_id"] for each in listed] == [latest.decision_id]


async def test_receipts_are_recorded_as_a_trace_oldest_first(admin, gateway):
    await gateway.fleet.poll()
    for _ in range(3):
        await decide(gateway)
    answer = await admin.get("/recording")
    lines = [msgspec.json.decode(line, type=Recorded) for line in answer.text.splitlines()]
    assert len(lines) == 3
    assert [each.at_s for each in lines] == sorted(each.at_s for each in lines)
    known = {(each.prompt_tokens, each.num_blocks, each.worker) for each in lines}
    assert known == {(len(PROMPT), len(PROMPT) // 16, "a:1")}


async def test_an_unknown_decision_is_404(admin):
    answer = await admin.get("/decisions/nobody")
    assert answer.status_code == 404
    assert "nobody" in answer.json()["detail"]


@pytest.mark.parametrize("limit", ["0", "x", "100000"])
async def test_a_wrong_limit_is_refused(admin, limit):
    assert (await admin.get("/decisions", params={"limit": limit})).status_code == 422


async def test_traffic_is_counted_overall_and_by_worker(admin, gateway):
    nothing = {"requests": 0, "prompt_tokens": 0, "matched_tokens": 0}
    assert (await admin.get("/traffic")).json() == {"covered_s": 0.0, "total": nothing, "workers": {}}
    await gateway.fleet.poll()
    for _ in range(3):
        await decide(gateway)
    counted = {"requests": 3, "prompt_tokens": 300, "matched_tokens": 96}
    found = (await admin.get("/traffic")).json()
    assert (found["total"], found["workers"]) == (counted, {"a:1": counted})
    assert 0 <= found["covered_s"] <= 60
    oldest = list(gateway.receipts.latest())[-1]
    oldest.at -= 100
    found = (await admin.get("/traffic", params={"seconds": 60})).json()
    assert (found["total"]["requests"], found["covered_s"]) == (2, 60)
    assert (await admin.get("/traffic", params={"seconds": 0})).status_code == 422


async def test_prompts_are_told_by_hashes_alone(admin, gateway):
    await gateway.fleet.poll()
    decision = await decide(gateway)
    (told,) = (await admin.get("/prompts", params={"limit": 5})).json()
    (chain,) = told["chains"]
    assert told["decision_id"] == decision.decision_id
    assert (told["worker"], told["prompt_tokens"], told["matched_tokens"]) == ("a:1", 100, 32)
    hashes = hash_blocks(root_hash("tiny"), PROMPT, 16)
    assert unpack_hashes(base64.b64decode(chain["hashes"])) == hashes
    assert set(chain) == {"pool_id", "num_blocks", "stride", "hashes"}


async def test_why_without_the_index_is_503(admin, gateway):
    await gateway.fleet.poll()
    decision = await decide(gateway)
    gateway.index.down = True
    answer = await admin.get(f"/why/{decision.decision_id}")
    assert (answer.status_code, "refused" in answer.text) == (503, True)
    assert (await admin.get("/why/nobody")).status_code == 404


async def test_prefix_asks_as_a_completion_or_a_chat(admin, gateway):
    await gateway.fleet.poll()
    answer = await admin.post("/prefix", json={"model": "tiny", "text": "hello"})
    assert answer.json() == {
        "model": "tiny",
        "prompt_tokens": 100,
        "inexact": None,
        "workers": [
            {
                "worker": "a:1",
                "matched_blocks": 2,
                "matched_tokens": 32,
                "degraded": None,
                "tier_tokens": {"device": 32},
                "predicted_ttft_ms": pytest.approx(68),
                "cuts": [],
            },
        ],
        "chains": [
            {
                "pool_id": make_worker().pool.pool_id,
                "num_blocks": 6,
                "stride": 1,
                "hashes": base64.b64encode(pack_hashes(hash_blocks(root_hash("tiny"), PROMPT, 16))).decode(),
            }
        ],
    }
    chat = b'{"model":"tiny","messages":[],"tools":[]}'
    await admin.post("/prefix", content=chat)
    assert gateway.reader.given == [
        ("/v1/completions", b'{"model":"tiny","prompt":"hello"}'),
        ("/v1/chat/completions", chat),
    ]


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        (RequestError(404, "no such model", kind="NotFoundError"), 404, "no such model"),
        (TokenizerError("no tokenizer"), 503, "no tokenizer"),
    ],
)
async def test_prefix_repeats_why_not(admin, gateway, failure, status, said):
    await gateway.fleet.poll()
    gateway.reader.failure = failure
    answer = await admin.post("/prefix", json={"text": "hello"})
    assert (answer.status_code, said in answer.text) == (status, True)


async def test_prefix_without_the_index_is_503(admin, gateway):
    await gateway.fleet.poll()
    gateway.index.down = True
    answer = await admin.post("/prefix", json={"text": "hello"})
    assert (answer.status_code, "refused" in answer.text) == (503, True)


@pytest.mark.parametrize("body", [b"", b"[]", b"{"])
async def test_prefix_refuses_what_is_no_json_object(admin, body):
    assert (await admin.post("/prefix", content=body)).status_code == 400


async def test_a_tenants_prompt_is_unknown_to_a_gateway_that_tells_none_apart(admin, gateway):
    await gateway.fleet.poll()
    answer = await admin.post("/prefix", json={"model": "tiny", "text": "hello", "tenant": "acme"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tenant"
