"""Lets only those who know the token ask the admin API."""

from __future__ import annotations

import hmac

from fastapi import Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = frozenset({"/health", "/ready"})
"""What probes ask, which carry no token, and which says nothing of anybody."""


class TokenGuard:
    """Answers 401 in front of `app` to requests without `Authorization: Bearer TOKEN`."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        app = self._app
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = Headers(scope=scope).get("authorization", "").encode()
            if not hmac.compare_digest(given, self._expected):
                detail = '{"detail": "give the admin token: KVLANE_ADMIN_TOKEN, or Authorization: Bearer"}'
                headers = {"www-authenticate": "Bearer"}
                app = Response(detail, 401, headers, media_type="application/json")
        await app(scope, receive, send)
