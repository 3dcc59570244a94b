"""Asks a gateway's admin API, and reads prompts and block hashes for it."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from kvindex.blocks import BlockHash, unpack_hashes
from kvindex.commands.inspect.tables import HOW_TO_JOIN
from kvindex.config import admin_access
from kvindex.errors import AdminUnavailable, ConfigError

TIMEOUT_S = 30.0
"""A long prompt is tokenised on the way."""


class Chain(msgspec.Struct, frozen=True):
    """A prompt's block hashes as a gateway keeps them: those that end every `stride`-th block."""

    pool_id: str
    num_blocks: int
    stride: int
    hashes: tuple[BlockHash, ...]

    def by_depth(self) -> Iterator[tuple[int, BlockHash]]:
        """Yield the hashes with the number of blocks of the prefix that they end."""
        return ((self.stride * (index + 1), block) for index, block in enumerate(self.hashes))


def ask(admin: str, method: str, path: str, body: object = None) -> Any:  # noqa: ANN401 (JSON)
    """Return the admin API's answer.

    Raises:
        AdminUnavailable: nobody answers there, or with a refusal, which the message repeats.
        ConfigError: a certificate of ours cannot be used.
    """
    url = admin.rstrip("/") + path
    try:
        with _reaching(admin):
            options = admin_access().http_options()
            answer = httpx.request(method, url, json=body, timeout=TIMEOUT_S, **options)
        content = answer.json()
    except ValueError as error:
        raise AdminUnavailable(f"{admin} is not the admin API of a gateway: no JSON at {path}") from error
    if not isinstance(content, dict | list):
        raise AdminUnavailable(f"{admin} is not the admin API of a gateway: no object at {path}")
    if answer.is_error:
        fields = content if isinstance(content, dict) else {}
        detail = fields.get("detail") or fields.get("error", {}).get("message")
        raise AdminUnavailable(f"{admin}{path} answers {answer.status_code}: {detail or answer.text}")
    return content


@contextmanager
def _reaching(admin: str) -> Iterator[None]:
    """Say in one line that nobody answers there."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        hint = "give a gateway's admin address with --admin"
        raise AdminUnavailable(f"no gateway answers at {admin} ({error}): {hint}") from error


def download(admin: str, path: str, file: Path) -> int:
    """Write what the admin API answers to `file`; return the number of lines.

    Raises:
        AdminUnavailable: nobody answers there, or with a refusal.
        ConfigError: the file cannot be written, or a certificate of ours cannot be used.
    """
    num_lines = 0
    url = admin.rstrip("/") + path
    try:
        with (
            _reaching(admin),
            httpx.stream("GET", url, timeout=TIMEOUT_S, **admin_access().http_options()) as answer,
        ):
            if answer.is_error:
                raise AdminUnavailable(f"{admin}{path} answers {answer.status_code}")
            with file.open("wb") as written:
                for part in answer.iter_bytes():
                    written.write(part)
                    num_lines += part.count(b"\n")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    return num_lines


def ask_about_prompt(
    admin: str, text: str, model: str | None, *, tenant: str | None = None
) -> dict[str, Any]:
    """Return what the gateway knows of a prompt, given as TEXT-or-@FILE; with `tenant`, of that tenant's.

    Raises:
        AdminUnavailable: see `ask`.
        ConfigError: the file cannot be read, or the model must be named.
    """
    body = _prompt(text)
    if model is not None or "model" not in body:
        body["model"] = model or _only_model(admin)
    if tenant is not None:
        body["tenant"] = tenant
    found: dict[str, Any] = ask(admin, "POST", "/prefix", body)
    return found


def read_chains(view: Mapping[str, Any]) -> list[Chain]:
    """Return the chains of a prompt that the admin API described."""
    return [
        Chain(
            each["pool_id"],
            each["num_blocks"],
            each["stride"],
            tuple(unpack_hashes(base64.b64decode(each["hashes"]))),
        )
        for each in view["chains"]
    ]


def _prompt(text: str) -> dict[str, Any]:
    if not text.startswith("@"):
        return {"text": text}
    try:
        content = Path(text[1:]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text}: {error}") from error
    try:
        body = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return {"text": content}
    return body if isinstance(body, dict) and "messages" in body else {"text": content}


def _only_model(admin: str) -> str:
    models: list[str] = sorted({each["worker"]["model"] for each in ask(admin, "GET", "/fleet")["workers"]})
    if not models:
        raise ConfigError(f"the gateway at {admin} knows no live worker. {HOW_TO_JOIN}")
    if len(models) > 1:
        raise ConfigError(f"the fleet serves {', '.join(models)}: name one with --model")
    return models[0]
