import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from gateway.admin.guard import TokenGuard


@pytest.fixture
async def client():
    async def answer(_):
        return PlainTextResponse("inside")

    app = TokenGuard(Starlette(routes=[Route("/{path:path}", answer)]), "sesame")
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
        yield client


async def test_who_knows_the_token_is_let_in(client):
    answer = await client.get("/metrics", headers={"authorization": "Bearer sesame"})
    assert answer.text == "inside"


@pytest.mark.parametrize(
    "given", [None, "", "sesame", "Bearer", "Bearer sesam", "Bearer sesame ", "Basic sesame"]
)
@pytest.mark.parametrize("path", ["/metrics", "/decisions", "/health/", "//health", "/nowhere"])
async def test_everybody_else_is_told_what_to_give(client, given, path):
    answer = await client.get(path, headers={} if given is None else {"authorization": given})
    assert answer.status_code == 401
    assert "KVLANE_ADMIN_TOKEN" in answer.json()["detail"]
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_probes_need_none(client, path):
    assert (await client.get(path)).text == "inside"
