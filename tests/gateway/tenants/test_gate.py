import asyncio
import json

import pytest

from gateway.decision import End, HttpRequest
from gateway.errors import RequestError
from gateway.tenants.gate import TenantGate
from gateway.tenants.keys import hash_key, new_key
from gateway.tenants.limits import Limiter
from gateway.tenants.roster import Key, Roster, Tenant
from gateway.tenants.salts import cache_salt
from tests.support.envoy import ScriptedRouter

SECRET = b"s" * 32
KEY = new_key()


class Fleet:
    """A gate in front of a scripted router; time stands still."""

    def __init__(self, *, engine_key=None, **limits):
        self.router = ScriptedRouter(("10.0.0.1:8000",))
        self.limiter = Limiter(clock=lambda: 0.0)
        keys = (Key(sha256=hash_key(KEY)),)
        roster = Roster([Tenant(name="acme", keys=keys, **limits)])
        self.gate = TenantGate(
            self.router, lambda: roster, self.limiter, secret=SECRET, engine_key=engine_key
        )

    async def ask(self, body=b'{"prompt": "x"}', *, path="/v1/completions", method="POST", **headers):
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if not {"authorization", "x-api-key"} & given.keys():
            given["authorization"] = f"Bearer {KEY}"
        self.gate.admit(HttpRequest(method, path, given, b""))
        return await self.gate.decide(HttpRequest(method, path, given, body))


async def refusal(asking):
    with pytest.raises(RequestError) as caught:
        await asking
    return caught.value


async def test_the_engine_gets_the_salt_and_not_the_key():
    fleet = Fleet()
    decision = await fleet.ask(x_vllm_priority="-5")
    assert json.loads(decision.body) == {"prompt": "x", "cache_salt": cache_salt(SECRET, "acme", None)}
    assert set(decision.removed_headers) >= {"authorization", "x-api-key", "x-vllm-priority"}
    # The router decides about what the engine will see.
    (request,) = fleet.router.requests
    assert request.body == decision.body
    assert request.caller.tenant == "acme"


async def test_the_engines_own_key_takes_the_clients_place():
    decision = await Fleet(engine_key="engine").ask()
    assert decision.request_headers["authorization"] == "Bearer engine"
    assert "authorization" not in decision.removed_headers
    assert KEY not in str(decision)


@pytest.mark.parametrize("headers", [{"authorization": KEY}, {"x_api_key": KEY}])
async def test_a_key_may_come_in_other_ways(headers):
    assert (await Fleet().ask(**headers)).body


@pytest.mark.parametrize(
    "key", ["", "Bearer", "Bearer ", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer " + "x" * 9]
)
async def test_without_a_known_key_nothing_is_read(key):
    fleet = Fleet()
    error = await refusal(fleet.ask(authorization=key))
    assert (error.status, error.kind) == (401, "AuthenticationError")
    assert "Authorization: Bearer" in error.message
    assert KEY not in error.message
    await refusal(fleet.gate.decide(HttpRequest("POST", "/v1/completions", {"authorization": key}, b"{}")))
    assert fleet.router.requests == []


async def test_a_path_without_salt_passes_as_it_is():
    decision = await Fleet().ask(b"", path="/v1/models", method="GET")
    assert decision.body is None
    assert "authorization" in decision.removed_headers


@pytest.mark.parametrize("path", ["/v1/responses", "/reset_prefix_cache"])
async def test_other_paths_are_refused_before_their_body(path):
    head = HttpRequest("POST", path, {"authorization": f"Bearer {KEY}"}, b"")
    with pytest.raises(RequestError) as caught:
        Fleet().gate.admit(head)
    assert caught.value.status == 403


async def test_the_rate_of_requests_is_kept():
    fleet = Fleet(requests_per_s=2)
    await fleet.ask()
    await fleet.ask()
    error = await refusal(fleet.ask())
    assert (error.status, error.kind, error.retry_after_s) == (429, "RateLimitError", 1)
    assert "2 requests/s" in error.message


async def test_the_rate_of_tokens_is_kept_by_what_was_counted():
    fleet = Fleet(prompt_tokens_per_s=100)
    fleet.router.num_prompt_tokens = 350
    await fleet.ask()
    error = await refusal(fleet.ask())
    assert error.status == 429
    assert error.retry_after_s == 3
    # What costs no prompt needs none.
    await fleet.ask(b"", path="/v1/models", method="GET")


async def test_requests_at_a_time_are_limited_until_one_ends():
    fleet = Fleet(max_concurrent=1)
    decision = await fleet.ask()
    assert (await refusal(fleet.ask())).status == 429
    await fleet.gate.finish(decision.decision_id, End.ABORTED)
    await fleet.gate.finish(decision.decision_id, End.ABORTED)
    assert fleet.limiter.running["acme"] == 0
    await fleet.ask()
    assert fleet.router.finished == [(decision.decision_id, End.ABORTED)] * 2


async def refuse(_):
    raise RequestError(503, "No worker.")


async def defect(_):
    raise KeyError("the prompt")


async def hang(_):
    await asyncio.sleep(3600)


@pytest.mark.parametrize(("script", "status"), [(refuse, 503), (defect, 500)])
async def test_a_request_that_cannot_be_routed_is_refused_and_leaves_nothing(script, status):
    fleet = Fleet(max_concurrent=1, prompt_tokens_per_s=10)
    fleet.router.script = script
    error = await refusal(fleet.ask())
    assert error.status == status
    assert "the prompt" not in error.message
    assert fleet.limiter.running["acme"] == 0
    fleet.router.script = None
    await fleet.ask()


async def test_a_client_that_leaves_during_the_decision_frees_its_place():
    fleet = Fleet(max_concurrent=1)
    fleet.router.script = hang
    asking = asyncio.create_task(fleet.ask())
    while not fleet.router.requests:
        await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert fleet.limiter.running["acme"] == 0
