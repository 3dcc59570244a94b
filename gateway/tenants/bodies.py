"""What becomes of a tenant's request body: the salt goes in, what reaches past it is refused. Pure.

Only top-level values are taken apart, and each is put back as its own bytes, so that 400 KB cost a
fraction of a millisecond and whatever the engine understands beside what is named here, it still gets.

Source: vLLM 0.24 and 0.32 `vllm/entrypoints` (protocol.py of each API, `renderers/chat_utils.py`).
"""

from __future__ import annotations

import enum
import re
from typing import Any

import msgspec

from gateway.decision import Caller
from gateway.errors import RequestError
from gateway.tenants.salts import cache_salt

Fields = dict[str, msgspec.Raw]

_NAME_OF_MEDIA = b"uuid"
_ESCAPED_LETTER_OF_IT = re.compile(rb"\\u00(?:75|69|64)")
"""No encoder writes these: other prompts are not taken apart."""


class Use(enum.Enum):
    """What a path does with the engine's cache."""

    SALTED = enum.auto()
    """It computes prompts and takes `cache_salt`, in every vLLM since 0.24."""
    NONE = enum.auto()
    """It computes no prompt."""


PATHS: dict[tuple[str, str], Use] = {
    ("POST", "/v1/chat/completions"): Use.SALTED,
    ("POST", "/v1/completions"): Use.SALTED,
    ("POST", "/v1/embeddings"): Use.SALTED,
    ("POST", "/inference/v1/generate"): Use.SALTED,
    ("POST", "/tokenize"): Use.NONE,
    ("POST", "/detokenize"): Use.NONE,
    ("GET", "/v1/models"): Use.NONE,
    ("GET", "/health"): Use.NONE,
    ("GET", "/version"): Use.NONE,
}
"""All that tenants may ask for. What is not here passes unsalted in some version (`/v1/responses` after a
built-in tool, `/v1/messages`, audio), shares state by name (stored responses), or governs the engine."""

_PAST_THE_SALT = frozenset({"kv_transfer_params", "ec_transfer_params", "features", "content_parts"})
"""The first two name blocks of other engines, whoever they belong to; the others, of
`/inference/v1/generate`, media by a hash that the client chooses, found in a cache without salts."""


def use_of(method: str, path: str) -> Use:
    """Return what the request does with the cache.

    Raises:
        RequestError: 403, not for tenants.
    """
    use = PATHS.get((method, path.partition("?")[0]))
    if use is None:
        offered = ", ".join(f"{method} {path}" for method, path in PATHS)
        raise RequestError(
            403,
            "This path is not open to tenants, whose caches it would not keep apart. Open are: " + offered,
            kind="PermissionDeniedError",
        )
    return use


def salted(body: bytes, caller: Caller, secret: bytes) -> bytes:
    """Return the body with the tenant's salt and the caller's priority.

    Every key is there once, whatever the client repeated: of equals the last, which is the engine's view.

    Raises:
        RequestError: 400, no JSON object, or a field of the wrong type; 403, it reaches past the salt.
    """
    fields = _decode(_FIELDS, body, "the body")
    _refuse(fields, may_name_media=_may_name_media(body))
    own = _decode(_SALT, fields["cache_salt"], "cache_salt") if "cache_salt" in fields else None
    fields["cache_salt"] = _raw(cache_salt(secret, caller.tenant, own))
    asked = _decode(_PRIORITY, fields.pop("priority"), "priority") if "priority" in fields else None
    if priority := caller.priority if asked is None else max(caller.priority, asked):
        fields["priority"] = _raw(priority)
    return _ENCODER.encode(fields)


def _refuse(fields: Fields, *, may_name_media: bool) -> None:
    extra_args = _nested(_nested(fields, "sampling_params"), "extra_args")
    for given in (fields, _nested(fields, "vllm_xargs"), extra_args):
        for name in sorted(given.keys() & _PAST_THE_SALT):
            if bytes(given[name]) != b"null":
                raise _reaches_past(name)
    if may_name_media and any(_has_uuid(fields[name]) for name in ("messages", "input") if name in fields):
        raise _reaches_past("uuid")


def _nested(fields: Fields, name: str) -> Fields:
    """Return the object of that name, empty where there is none."""
    return (_decode(_NESTED, fields[name], name) if name in fields else None) or {}


def _may_name_media(body: bytes) -> bool:
    """Say whether the body is worth taking apart for it."""
    return _NAME_OF_MEDIA in body or _ESCAPED_LETTER_OF_IT.search(body) is not None


def _has_uuid(value: msgspec.Raw) -> bool:
    """Say whether a conversation, or one of a list of them, has a part that is found by a client's name."""
    match bytes(value)[:1]:
        case b"[":
            return any(map(_has_uuid, _decode(_ITEMS, value, "messages")))
        case b"{":
            content = _decode(_FIELDS, value, "messages").get("content", msgspec.Raw(b"null"))
            parts = _decode(_ITEMS, content, "content") if bytes(content)[:1] == b"[" else ()
            return any(map(_is_named, parts))
    return False


def _is_named(part: msgspec.Raw) -> bool:
    if bytes(part)[:1] != b"{":
        return False
    return bytes(_decode(_FIELDS, part, "content").get("uuid", b"null")) != b"null"


def _reaches_past(name: str) -> RequestError:
    return RequestError(
        403,
        f"`{name}` is not open to tenants: it names cached content without the tenant's salt. Leave it out.",
        kind="PermissionDeniedError",
        param=name,
    )


def _decode(decoder: msgspec.json.Decoder[Any], content: bytes | msgspec.Raw, name: str) -> Any:  # noqa: ANN401
    try:
        return decoder.decode(content)
    except msgspec.ValidationError as error:
        param = None if name == "the body" else name
        raise RequestError(400, f"{name}: {error}", param=param) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(400, f"The body is not valid JSON: {error}") from error


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(_ENCODER.encode(value))


_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(Fields)
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])
_NESTED = msgspec.json.Decoder(Fields | None)
_SALT = msgspec.json.Decoder(str | None)
_PRIORITY = msgspec.json.Decoder(int | None)
