"""What clients get wrong ends in an OpenAI error with the right status, and charges nobody."""

import json
import socket

import httpx
import pytest

from tests.support.fleet import charges, eventually, seen_by

pytestmark = pytest.mark.envoy

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
TOO_LONG = "word " * 6_000
MB = 1 << 20

CASES = {
    "no JSON": (TEXT, b"{", 400),
    "JSON of another type": (TEXT, b"[1, 2]", 400),
    "no body": (TEXT, b"", 400),
    "invalid UTF-8": (TEXT, b'{"model": "tiny", "prompt": "\xff"}', 400),
    "no model": (TEXT, {"prompt": "hello"}, 400),
    "model of a wrong type": (TEXT, {"model": 7, "prompt": "hello"}, 400),
    "unknown model": (TEXT, {"model": "gpt-9", "prompt": "hello"}, 404),
    "unknown model in chat": (CHAT, {"model": "gpt-9", "messages": HELLO}, 404),
    "no prompt": (TEXT, {"model": "tiny"}, 400),
    "prompt of a wrong type": (TEXT, {"model": "tiny", "prompt": {"a": 1}}, 400),
    "empty list of prompts": (TEXT, {"model": "tiny", "prompt": []}, 400),
    "token ids of a wrong type": (TEXT, {"model": "tiny", "prompt": [1, "two"]}, 400),
    "negative token ids": (TEXT, {"model": "tiny", "prompt": [-1, 5]}, 400),
    "no messages": (CHAT, {"model": "tiny"}, 400),
    "empty messages": (CHAT, {"model": "tiny", "messages": []}, 400),
    "messages of a wrong type": (CHAT, {"model": "tiny", "messages": "hello"}, 400),
    "message without a role": (CHAT, {"model": "tiny", "messages": [{"content": "hello"}]}, 400),
    "prompt over the context": (TEXT, {"model": "tiny", "prompt": TOO_LONG}, 400),
    "chat over the context": (
        CHAT,
        {"model": "tiny", "messages": [{"role": "user", "content": TOO_LONG}]},
        400,
    ),
    "tokens over the context": (TEXT, {"model": "tiny", "prompt": [5] * 5_000}, 400),
    "no input": ("/v1/embeddings", {"model": "tiny"}, 400),
    "15 MB of prompt": (TEXT, {"model": "tiny", "prompt": "a" * (15 * MB)}, 400),
    "a body over 16 MB": (TEXT, {"model": "tiny", "prompt": "a" * (17 * MB)}, 413),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_requests_are_refused_clearly(fleet, client, name):
    path, body, status = CASES[name]
    before = [len(seen_by(fleet, engine)) for engine in fleet.engines]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status
    assert error["type"] == ("NotFoundError" if status == 404 else "BadRequestError")
    assert error["message"]
    assert charges(fleet) == 0
    assert [len(seen_by(fleet, engine)) for engine in fleet.engines] == before


def test_the_largest_body_passes_whole(client):
    # 15 MB beside a prompt that is short enough.
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 1, "user": "u" * (15 * MB)}
    response = client.post(TEXT, json=body)
    assert response.status_code == 200, response.text


# Envoy speaks HTTP/2 without negotiation; curl and gRPC clients use it so.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


def address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


def test_http2_is_spoken(fleet):
    with socket.create_connection(address(fleet.url)) as connection:
        connection.settimeout(10)
        connection.sendall(PREFACE)
        header = connection.recv(9)
    settings_frame = 4
    assert header[3] == settings_frame


def request_bytes(**body: object) -> tuple[bytes, bytes]:
    content = json.dumps({"model": "tiny", **body}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nhost: kvlane\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode(), content


@pytest.mark.parametrize("stage", ["headers", "body", "sent", "streaming"])
def test_a_client_that_goes_away_leaves_nothing_charged(fleet, stage):
    head, content = request_bytes(prompt="word " * 2_000, stream=True, max_tokens=2_000)
    with socket.create_connection(address(fleet.url)) as connection:
        connection.settimeout(10)
        connection.sendall(head)
        if stage != "headers":
            connection.sendall(content[: len(content) // 2])
        if stage in {"sent", "streaming"}:
            connection.sendall(content[len(content) // 2 :])
        if stage == "streaming":
            received = b""
            while b"data: " not in received:
                received += connection.recv(4096)
            assert received.startswith(b"HTTP/1.1 200")

    def in_flight() -> int:
        workers = httpx.get(f"{fleet.admin_url}/fleet").json()["workers"]
        return sum(
            each["requests_from_here"] + each["load"]["running_requests"] + each["load"]["waiting_requests"]
            for each in workers
        )

    eventually(lambda: in_flight() == 0)
    eventually(lambda: charges(fleet) == 0)
    if stage == "streaming":
        assert any(seen_by(fleet, engine)[-1:] for engine in fleet.engines)
        ends = {each["end"] for engine in fleet.engines for each in seen_by(fleet, engine)[-1:]}
        assert "aborted" in ends
