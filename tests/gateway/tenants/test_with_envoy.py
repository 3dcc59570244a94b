"""The gate behind a real Envoy: what the engine sees of a tenant's request, in both body modes."""

import json

import httpx
import pytest
from starlette.responses import JSONResponse

from gateway.tenants.gate import TenantGate
from gateway.tenants.keys import hash_key, new_key
from gateway.tenants.limits import Limiter
from gateway.tenants.roster import Key, Roster, Tenant
from gateway.tenants.salts import cache_salt
from tests.gateway.extproc.test_with_envoy import full_duplex
from tests.support.envoy import KnownEndpoints, ScriptedRouter, Stack, serve
from tests.support.waiting import eventually

pytestmark = pytest.mark.envoy

SECRET = b"s" * 32
KEY = new_key()
BODIES = {
    "small": {"prompt": "é\u2028", "stream": True, "unknown": [1.5, None, {"x": ""}]},
    "large": {
        "messages": [{"role": "user", "content": 'Say "hello" and ☃.\n' * 20_000}],
        "cache_salt": "mine",
    },
}


async def chunks(content):
    for start in range(0, len(content), 10_000):
        yield content[start : start + 10_000]


@pytest.mark.parametrize("mode", ["buffered", "full_duplex"])
async def test_the_engine_sees_the_salt_whatever_the_size_and_form_of_the_body(tmp_path, mode):
    seen = []

    async def engine(request):
        seen.append((dict(request.headers), await request.body()))
        return JSONResponse({})

    async with serve(engine) as worker:
        inner = ScriptedRouter((worker,))
        roster = Roster([Tenant(name="acme", keys=(Key(sha256=hash_key(KEY)),), max_concurrent=1)])
        gate = TenantGate(inner, lambda: roster, Limiter(), secret=SECRET, engine_key="engine")
        stack = Stack(tmp_path, gate, KnownEndpoints(worker))
        headers = {"authorization": f"Bearer {KEY}", "x-vllm-priority": "-9", "x-mine": "kept"}
        change = full_duplex if mode == "full_duplex" else lambda _: None
        async with stack.run(change, fail_open=False), httpx.AsyncClient(timeout=30) as client:
            for name, body in BODIES.items():
                content = json.dumps(body).encode()
                for sent in (content, chunks(content)):
                    url = f"{stack.url}/v1/chat/completions"
                    response = await client.post(url, content=sent, headers=headers)
                    assert response.status_code == 200, response.text
                    got, received = seen.pop()
                    salt = cache_salt(SECRET, "acme", body.get("cache_salt"))
                    assert json.loads(received) == {**body, "cache_salt": salt}, name
                    assert got["authorization"] == "Bearer engine"
                    assert got["x-mine"] == "kept"
                    assert "x-vllm-priority" not in got
                    assert got.get("content-length", str(len(received))) == str(len(received))
                    # One at a time: the last one's end must have been heard of.
                    await eventually(lambda: len(inner.finished) == len(inner.requests))
            refused = await client.post(url, content=b"{}", headers={"authorization": "Bearer nobody"})
            assert refused.status_code == 401
            # Without a gateway nothing passes: it would be without key and salt.
            await stack.stop_gateway()
            alone = await client.post(url, content=b"{}", headers=headers)
            assert alone.status_code >= 500
            assert seen == []
