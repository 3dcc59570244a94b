"""Cache salts: what makes equal prompts of two tenants different blocks. Pure."""

from __future__ import annotations

import base64
import hashlib
import hmac

import msgspec


def cache_salt(secret: bytes, tenant: str, client_salt: str | None) -> str:
    """Return the salt for a tenant's request: 43 characters of base64url.

    HMAC-SHA256 under the gateways' secret, so that no tenant can compute the salt of another. A salt that
    the client sent only divides the tenant's own cache: what is authenticated is the pair, in an encoding
    in which no two pairs are alike.

    Args:
        secret: the same in every gateway; another one makes every cache cold.
        client_salt: the request's own `cache_salt`, None without one.
    """
    pair = msgspec.msgpack.encode(("kvlane cache salt 1", tenant, client_salt))
    digest = hmac.digest(secret, pair, hashlib.sha256)
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
