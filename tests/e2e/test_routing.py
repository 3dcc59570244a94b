"""Requests go where their blocks are: real Envoy, gateway and Redis, simulated engines."""

import itertools

import httpx
import pytest

from tests.support.fleet import eventually, registered, settled

pytestmark = pytest.mark.envoy

LONG = "The quick brown fox jumps over the lazy dog, and the dog reads a book about lists. " * 20
BLOCK = 32


def ask(client: httpx.Client, **body: object) -> httpx.Response:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    response = client.post(path, json={"model": "tiny", "max_tokens": 8, **body})
    assert response.status_code == 200, response.text
    assert "x-kvlane-fallback" not in response.headers
    # Who the gateway named is who answered.
    assert response.headers["x-kvlane-worker"] == response.json()["system_fingerprint"]
    return response


def matched_tokens(response: httpx.Response) -> int:
    return int(response.headers["x-kvlane-matched-tokens"])


def cached_tokens(response: httpx.Response) -> int:
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_each_turn_of_a_conversation_goes_to_the_worker_that_has_the_last(fleet, client):
    # Several at a time, so that load alone would not send them back.
    conversations = [
        [{"role": "system", "content": f"Assistant {number}. {LONG}"}, {"role": "user", "content": "Hello"}]
        for number in range(4)
    ]
    holders = []
    for messages in conversations:
        first = ask(client, messages=messages)
        assert matched_tokens(first) == cached_tokens(first) == 0
        holders.append(first.headers["x-kvlane-worker"])
        messages.append(first.json()["choices"][0]["message"])
        settled(fleet)
    for turn in range(3):
        for messages, holder in zip(conversations, holders, strict=True):
            messages.append({"role": "user", "content": f"And then, in turn {turn}?"})
            answer = ask(client, messages=messages)
            assert answer.headers["x-kvlane-worker"] == holder
            assert matched_tokens(answer) == cached_tokens(answer) > 300
            messages.append(answer.json()["choices"][0]["message"])
            settled(fleet)


IDENTITIES = [
    {"model": "tiny"},
    {"model": "sql"},
    {"model": "poetry"},
    {"model": "tiny", "cache_salt": "tenant-a"},
    {"model": "tiny", "cache_salt": "tenant-b"},
    {"model": "sql", "cache_salt": "tenant-a"},
]


def test_adapters_and_salts_match_nothing_but_themselves(fleet, client):
    for identity in IDENTITIES:
        first = ask(client, prompt=LONG, **identity)
        assert matched_tokens(first) == cached_tokens(first) == 0
        settled(fleet)
    for identity in IDENTITIES:
        again = ask(client, prompt=LONG, **identity)
        assert matched_tokens(again) == cached_tokens(again) > 300


@pytest.mark.parametrize(
    "prompt", [LONG, list(range(100, 400)), [LONG, "short"], [list(range(200, 500)), [1, 2, 3]]]
)
def test_every_form_of_prompt_finds_its_blocks(fleet, client, prompt):
    first = ask(client, prompt=prompt)
    settled(fleet)
    again = ask(client, prompt=prompt)
    assert again.headers["x-kvlane-worker"] == first.headers["x-kvlane-worker"]
    assert matched_tokens(again) > 200


def test_a_stream_is_routed_like_any_other_and_arrives_piece_by_piece(fleet, client):
    body = {"model": "tiny", "prompt": LONG, "stream": True, "max_tokens": 6}
    first = ask(client, prompt=LONG)
    settled(fleet)
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["x-kvlane-worker"] == first.headers["x-kvlane-worker"]
        assert matched_tokens(response) > 300
        events = [line for line in response.iter_lines() if line]
    assert len(events) == 6 + 2
    assert events[-1] == "data: [DONE]"


def test_embeddings_are_routed_and_tokens_counted(client):
    response = client.post("/v1/embeddings", json={"model": "tiny", "input": [LONG, "short"]})
    assert response.status_code == 200
    assert response.headers["x-kvlane-worker"] == response.json()["system_fingerprint"]


def test_paths_without_prompts_pass_to_a_live_worker(client):
    assert client.get("/health").status_code == 200
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["tiny", "sql", "poetry"]
    assert client.get("/no/such/path").status_code == 404
    assert client.post("/no/such/path", content=b"anything").status_code == 404


def test_a_burst_of_strangers_spreads_over_the_workers(fleet, client):
    # Idle workers are equal and drawn among: 30 draws leave one of three out once in 60,000 runs.
    workers = [ask(client, prompt=f"{number} {LONG}").headers["x-kvlane-worker"] for number in range(30)]
    counts = {worker: len(list(group)) for worker, group in itertools.groupby(sorted(workers))}
    assert set(counts) == set(fleet.engines)


def test_a_decision_can_be_looked_up_with_what_was_measured(fleet, client):
    response = ask(client, prompt=LONG)
    url = f"{fleet.admin_url}/decisions/{response.headers['x-kvlane-decision']}"
    eventually(lambda: httpx.get(url).json().get("served"))
    served = httpx.get(url).json()["served"]
    assert served["status"] == 200
    assert served["worker"] == response.headers["x-kvlane-worker"]
    assert served["ttft_ms"] > 0


def test_the_index_holds_what_the_engines_hold(fleet, client):
    response = ask(client, prompt=list(range(100, 100 + 4 * BLOCK)))
    worker = response.headers["x-kvlane-worker"]
    # 4 blocks of the prompt; 8 output tokens fill none.
    eventually(lambda: registered(fleet)[worker].num_indexed_blocks == 4)
