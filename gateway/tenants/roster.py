"""The tenants, their keys, limits and service levels, as one file tells them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from gateway.decision import Caller
from gateway.labels import ANY_LABELS, Selector, parse_selector
from gateway.tenants.keys import KEY_PREFIX, hash_key, is_key_hash
from kvindex.config import describe
from kvindex.errors import ConfigError

_INT64 = 1 << 63


def _hash_of_key(text: str) -> str:
    if text.startswith(KEY_PREFIX):
        raise ValueError("this is a key: write its hash, as `kvlane tenant hash` prints it")
    if not is_key_hash(text):
        raise ValueError("expected 64 hex digits, as `kvlane tenant key` prints them")
    return text


def _selecting(text: str) -> str:
    parse_selector(text)
    return text


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Level(_Entry):
    """What a request is promised; a key's own values stand before its tenant's."""

    ttft_target_ms: float | None = Field(None, gt=0)
    """Time to first token to aim for."""
    priority: int | None = Field(None, ge=-_INT64, lt=_INT64)
    """vLLM's `priority`, lower is sooner; requests may ask for later, never for sooner."""
    labels: Annotated[str, AfterValidator(_selecting)] | None = None
    """Selector of workers, for requests that bring none: `gpu=h200,zone!=a`."""

    @property
    def selector(self) -> Selector | None:
        """What `labels` mean; None where there are none."""
        return None if self.labels is None else parse_selector(self.labels)


class Key(Level):
    """One API key of a tenant."""

    sha256: Annotated[str, AfterValidator(_hash_of_key)]
    note: str = ""
    """Whose it is, for people."""


class Tenant(Level):
    """Who shares a cache, limits and a weight. Limits are those of all gateways together; None: no limit."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    keys: tuple[Key, ...] = Field(min_length=1)
    requests_per_s: float | None = Field(None, gt=0)
    prompt_tokens_per_s: float | None = Field(None, gt=0)
    max_concurrent: int | None = Field(None, gt=0)
    weight: float = Field(1.0, gt=0)
    """Share of the fleet under load, against the other tenants' weights."""


class _File(_Entry):
    tenants: tuple[Tenant, ...]

    @model_validator(mode="after")
    def _are_distinct(self) -> _File:
        for what, values in (
            ("name", [tenant.name for tenant in self.tenants]),
            ("key", [key.sha256 for tenant in self.tenants for key in tenant.keys]),
        ):
            if repeated := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"the same {what} twice: {', '.join(repeated)}")
        return self


class Roster:
    """Every tenant by name, and every caller by key. Immutable."""

    def __init__(self, tenants: Iterable[Tenant] = ()) -> None:
        self.tenants = {tenant.name: tenant for tenant in tenants}
        self._callers = {
            key.sha256: Caller(
                tenant=tenant.name,
                weight=tenant.weight,
                priority=_first(key.priority, tenant.priority) or 0,
                ttft_target_ms=_first(key.ttft_target_ms, tenant.ttft_target_ms),
                labels=_first(key.selector, tenant.selector) or ANY_LABELS,
            )
            for tenant in self.tenants.values()
            for key in tenant.keys
        }

    def caller(self, key: str) -> Caller | None:
        """Return whose key this is, None if nobody's."""
        return self._callers.get(hash_key(key))


def load_roster(file: Path) -> Roster:
    """Read the tenants' file.

    Raises:
        ConfigError: it cannot be read, a key is unknown or a value is wrong; no value is repeated.
    """
    try:
        content = yaml.safe_load(file.read_text())
        return Roster(_File.model_validate(content).tenants)
    except OSError as error:
        raise ConfigError(f"tenants {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"tenants {file}: not YAML") from error
    except ValidationError as error:
        raise ConfigError(f"tenants {file}: {describe(error)}") from error


def _first(*values: Any) -> Any:  # noqa: ANN401 (of whatever type they are)
    return next((value for value in values if value is not None), None)
