"""Two tenants before one fleet: what each is given, what they share (nothing), and what is kept of them."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis

from gateway.local_fleet import LocalFleet
from gateway.tenants.keys import hash_key, new_key
from tests.support.engine_sim import Prompts
from tests.support.fleet import charges, eventually, settled, simulated_fleet
from tests.support.vllm_engine import tiny_model

pytestmark = pytest.mark.envoy

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
LONG = "Which of these books tells of the sea? " * 60
SECRET_TEXT = "The combination of the safe is open sesame forty two thieves. "


@dataclass(frozen=True)
class Tenants:
    fleet: LocalFleet
    file: Path
    acme: str
    beta: str
    salt_secret: str
    engine_key: str


def roster(*tenants: tuple[str, str, str]) -> str:
    lines = [f"- {{name: {name}, keys: [{{sha256: {hash_key(key)}}}]{more}}}" for name, key, more in tenants]
    return "\n".join(["tenants:", *lines])


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    file = tmp_path_factory.mktemp("tenants") / "tenants.yaml"
    acme, beta, salt_secret, engine_key = new_key(), new_key(), secrets.token_urlsafe(32), "key-of-the-engine"
    file.write_text(roster(("acme", acme, ""), ("beta", beta, "")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVLANE_TENANTS", str(file))
        patch.setenv("KVLANE_CACHE_SALT_SECRET", salt_secret)
        patch.setenv("KVLANE_WORKER_API_KEY", engine_key)
        patch.setenv("KVLANE_ADMISSION", "enforce")
        with simulated_fleet(
            tmp_path_factory.mktemp("logs"), "--lora", "sql", "--api-key", engine_key, num_workers=2
        ) as fleet:
            yield Tenants(fleet, file, acme, beta, salt_secret, engine_key)


def ask(tenants: Tenants, key: str | None, body: object, path: str = CHAT, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers |= {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    return httpx.post(f"{tenants.fleet.url}{path}", content=content, headers=headers, timeout=30)


def chat(text: str, **fields: object) -> dict[str, object]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 2, **fields}


def cached(response: httpx.Response) -> tuple[int, int]:
    """Return what the gateway expected to be cached, and what the engine found."""
    assert response.status_code == 200, response.text
    found = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return int(response.headers["x-kvlane-matched-tokens"]), found


@pytest.mark.parametrize("model", ["tiny", "sql"])
def test_tenants_share_nothing_and_each_has_its_own(tenants, model):
    body = chat(f"{model} {LONG}", model=model)
    assert cached(ask(tenants, tenants.acme, body)) == (0, 0)
    settled(tenants.fleet)
    for mine in ({}, {"cache_salt": "acme"}, {"cache_salt": None}):
        if mine != {"cache_salt": None}:
            assert cached(ask(tenants, tenants.beta, body | mine)) == (0, 0)
            settled(tenants.fleet)
    for key in (tenants.acme, tenants.beta):
        expected, found = cached(ask(tenants, key, body))
        assert expected == found > 0
        settled(tenants.fleet)
    admin = f"{tenants.fleet.admin_url}/prefix"
    for tenant, holds in (("acme", True), ("beta", True), ("gamma", False), (None, False)):
        found = httpx.post(admin, json=body | ({"tenant": tenant} if tenant else {})).json()["workers"]
        assert any(each["matched_blocks"] for each in found) == holds


def test_a_clients_salt_divides_its_tenants_cache(tenants):
    body = chat("divided " + LONG)
    cached(ask(tenants, tenants.acme, body | {"cache_salt": "mine"}))
    settled(tenants.fleet)
    assert cached(ask(tenants, tenants.acme, body | {"cache_salt": "yours"})) == (0, 0)
    assert cached(ask(tenants, tenants.acme, body)) == (0, 0)
    settled(tenants.fleet)
    expected, found = cached(ask(tenants, tenants.acme, body | {"cache_salt": "mine"}))
    assert expected == found > 0


@pytest.mark.parametrize("key", [None, "kvl_wrong"])
def test_without_a_key_the_answer_is_401_and_says_what_to_do(tenants, key):
    for path in (CHAT, "/v1/models", "/nowhere"):
        response = ask(tenants, key, chat("hello"), path)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["type"] == "AuthenticationError"
        assert "Authorization: Bearer" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/reset_prefix_cache", "/sim/requests"])
def test_what_would_pass_unsalted_is_403(tenants, path):
    response = ask(tenants, tenants.acme, chat("hello"), path)
    assert response.status_code == 403
    assert response.json()["error"]["type"] == "PermissionDeniedError"


def test_the_models_are_shown_to_tenants(tenants):
    bearer = {"authorization": f"Bearer {tenants.acme}"}
    assert httpx.get(f"{tenants.fleet.url}/v1/models", headers=bearer).json()["data"][0]["id"] == "tiny"


def test_limits_and_keys_follow_the_file_while_it_runs(tenants):
    old = tenants.file.read_text()
    gamma = new_key()
    assert ask(tenants, gamma, chat("hello")).status_code == 401
    try:
        tenants.file.write_text(
            old + "\n" + roster(("gamma", gamma, ", requests_per_s: 0.01")).split("\n")[1]
        )
        eventually(lambda: ask(tenants, gamma, chat("hello")).status_code == 200)
        limited = ask(tenants, gamma, chat("hello"))
        assert limited.status_code == 429
        assert 1 <= int(limited.headers["retry-after"]) <= 100
        assert limited.json()["error"]["type"] == "RateLimitError"
        assert ask(tenants, tenants.acme, chat("hello")).status_code == 200
        tenants.file.write_text("tenants: [")
        metrics = f"{tenants.fleet.admin_url}/metrics"
        refused = 'kvlane_gateway_tenants_file_loads_total{outcome="refused"}'
        eventually(lambda: refused in httpx.get(metrics).text)
        assert ask(tenants, tenants.acme, chat("hello")).status_code == 200
    finally:
        tenants.file.write_text(old)
    eventually(lambda: ask(tenants, gamma, chat("hello")).status_code == 401)


def foreseen(tenants, body, **headers) -> httpx.Response:
    """Ask until the answer was planned: where index or tokenizer are late, nothing is foreseen."""
    answers: list[httpx.Response] = []

    def ask_again() -> bool:
        answers.append(ask(tenants, tenants.acme, body, **headers))
        return "x-kvlane-fallback" not in answers[-1].headers

    eventually(ask_again, timeout_s=60)
    return answers[-1]


def test_what_cannot_begin_in_time_is_429_and_what_can_is_in_its_receipt(tenants):
    body = chat("in time " + LONG)
    late = foreseen(tenants, body, **{"x-kvlane-ttft-target-ms": "0.001"})
    assert late.status_code == 429
    assert int(late.headers["retry-after"]) >= 1
    assert "predicted time to first token" in late.json()["error"]["message"]
    sent = foreseen(tenants, body, **{"x-kvlane-ttft-target-ms": "60000"})
    assert sent.status_code == 200
    decision = sent.headers["x-kvlane-decision"]
    receipt = httpx.get(f"{tenants.fleet.admin_url}/decisions/{decision}").json()
    assert (receipt["tenant"], receipt["ttft_target_ms"], receipt["verdict"]) == ("acme", 60_000, "in_time")


def test_an_engine_that_wants_a_key_answers_nobody_who_passes_by_the_gateway(tenants):
    engine = tenants.fleet.engines[0]
    answer = httpx.post(f"http://{engine}{CHAT}", json=chat("hello"), headers={"authorization": tenants.acme})
    assert answer.status_code == 401


def everything_in_redis(url: str) -> Iterator[bytes]:
    """Yield every key with all that it holds."""
    with redis.Redis.from_url(url) as client:
        for key in client.scan_iter():
            yield key
            match client.type(key):
                case b"hash":
                    yield from (part for pair in client.hgetall(key).items() for part in pair)
                case b"zset":
                    yield from client.zrange(key, 0, -1)
                case b"stream":
                    yield from (
                        part for _, pair in client.xrange(key) for each in pair.items() for part in each
                    )
                case b"string":
                    yield client.get(key)
                case other:
                    raise AssertionError(f"{key!r} is a {other!r}")


def test_nothing_of_prompts_keys_and_secrets_is_kept_or_logged(tenants):
    fleet, text = tenants.fleet, SECRET_TEXT * 8
    tools = [{"type": "function", "function": {"name": "f", "description": text}}]
    tokens = Prompts(tiny_model()).encode(text)
    told: list[httpx.Response] = [
        ask(tenants, tenants.acme, chat(text)),
        ask(tenants, tenants.beta, chat("hello", tools=tools, cache_salt=text[:40])),
        ask(tenants, tenants.acme, {"model": "tiny", "prompt": text, "max_tokens": 1}, TEXT),
        ask(tenants, tenants.acme, {"model": "tiny", "prompt": tokens, "max_tokens": 1}, TEXT),
        ask(tenants, tenants.acme, {"model": "tiny", "prompt": text}, TEXT + f"?user={SECRET_TEXT}"),
    ]
    assert [each.status_code for each in told] == [200] * 5
    refused = [
        ask(tenants, tenants.acme, chat(text)["messages"]),
        ask(tenants, tenants.acme, b'{"model": "tiny", "prompt": "' + text.encode(), TEXT),
        ask(tenants, tenants.acme, {"model": "tiny", "prompt": {text: text}}, TEXT),
        ask(tenants, tenants.acme, chat(text, chat_template="{{ 1 / 0 }}" + text)),
        ask(tenants, tenants.acme, chat(text, model=text)),
        ask(tenants, tenants.acme, chat(text, kv_transfer_params={text: text})),
        ask(tenants, "kvl_" + SECRET_TEXT.strip(), chat(text)),
    ]
    assert {200} & {each.status_code for each in refused if each is not refused[3]} == set()
    settled(fleet)
    decision = told[0].headers["x-kvlane-decision"]
    admin = [f"/why/{decision}", "/decisions", "/prompts", "/traffic", "/fleet", "/metrics"]
    kept = [httpx.get(f"{fleet.admin_url}{path}") for path in admin]
    assert all(each.status_code == 200 for each in kept)
    assert '"tenant":"acme"' in kept[1].text
    logs = [path.read_bytes() for path in Path(fleet.processes.log("gateway")).parent.iterdir()]
    heap = b"\n".join([*(each.content for each in kept), *logs, *everything_in_redis(fleet.redis_url)])
    assert decision.encode() in heap
    # Tokens as JSON, as Python and as the index packs numbers.
    run = tokens[4:12]
    packed = [b"".join(token.to_bytes(width, "little") for token in run) for width in (2, 4, 8)]
    listed = [separator.join(map(str, run)).encode() for separator in (", ", ",")]
    secret = [tenants.acme, tenants.beta, tenants.salt_secret, tenants.engine_key, "sesame", "thieves"]
    for needle in [*packed, *listed, *(each.encode() for each in secret)]:
        assert needle not in heap, re.search(b".{200}" + re.escape(needle) + b".{50}", heap, re.DOTALL)


def test_nothing_stays_charged(tenants):
    eventually(lambda: charges(tenants.fleet) == 0)
