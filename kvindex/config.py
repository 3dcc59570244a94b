"""Settings of the index side. Built once per process, frozen, unknown keys refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from kvindex.errors import ConfigError
from kvindex.redis_url import FORMS
from kvindex.tls import ClientTls, ServerTls
from kvindex.worker import LABEL_NAME, Role

Config = TypeVar("Config", bound=BaseSettings)

LabelName = Annotated[str, Field(pattern=f"^{LABEL_NAME}$")]
LabelValue = Annotated[str, Field(pattern=f"^({LABEL_NAME})?$")]


class IndexConfig(BaseSettings):
    """How to reach Redis; overridden by `KVLANE_REDIS_URL` and so on."""

    model_config = SettingsConfigDict(env_prefix="KVLANE_", frozen=True, extra="forbid")

    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        repr=False,
        description=f"{FORMS} and who we are there; docs/operations.md has every form.",
    )
    redis_timeout_s: float = Field(1.0, gt=0, description="Longest wait for one answer of Redis.")


class LeaseConfig(IndexConfig):
    """How a publisher keeps its place in the index."""

    lease_ms: int = Field(3_000, ge=200, description="A worker that is silent for this long is not matched.")
    heartbeat_ms: int = Field(500, ge=50, description="How often lease, load and digest are refreshed.")
    flush_ms: int = Field(
        50, ge=0, description="Longest time a block waits to be written; after a pause it does not wait."
    )


class PublisherConfig(LeaseConfig):
    """What the publisher of an engine adds; keys of `kv_connector_extra_config` arrive as `kvlane.<name>`."""

    endpoint: str = Field("", description="ip:port at which Envoy reaches this engine's OpenAI server.")
    metrics_port: int = Field(
        0, ge=0, lt=65536, description="Port of the publisher's own Prometheus metrics; 0: none."
    )
    metrics_host: str = Field(
        "127.0.0.1", description="Address of that port; 0.0.0.0 shows the metrics to the network."
    )
    metrics_tls: ServerTls | None = Field(
        None, description="cert, key and client_ca (PEM files) of that port, read at the start."
    )
    labels: dict[LabelName, LabelValue] = Field(
        default_factory=dict, description="What requests may select workers by, such as {gpu: h200}."
    )
    role: Role = Field(
        Role.BOTH, description="What this worker is asked to do, until `kvlane role` says otherwise."
    )


class TierAgentConfig(LeaseConfig):
    """What the coordinator of LMCache servers adds."""

    tier_agent_host: str = Field("127.0.0.1", description="Address that it listens on for LMCache servers.")
    tier_agent_port: int = Field(0, ge=0, lt=65536, description="Port for them; 0: any that is free.")
    list_interval_s: float = Field(
        60.0, gt=0, description="How often disks and object stores are listed, to check what events told."
    )
    server_timeout_s: float = Field(
        20.0, gt=0, description="An LMCache server that is silent for this long has its stores taken out."
    )


class AdminAccess(BaseSettings):
    """How a gateway's admin API lets us in: `KVLANE_ADMIN_TOKEN` and `KVLANE_ADMIN_CLIENT_TLS`, as JSON."""

    model_config = SettingsConfigDict(env_prefix="KVLANE_ADMIN_", frozen=True, extra="forbid")

    token: SecretStr | None = Field(None, description="Bearer token, where the gateway has one.")
    client_tls: ClientTls | None = Field(None, description="ca, cert and key (PEM files) for https.")

    def http_options(self) -> dict[str, Any]:
        """Return what httpx needs to know.

        Raises:
            ConfigError: a certificate cannot be used.
        """
        token = self.token.get_secret_value() if self.token else None
        return {
            "headers": {"authorization": f"Bearer {token}"} if token else {},
            "verify": self.client_tls.context() if self.client_tls else True,
        }


def admin_access() -> AdminAccess:
    """Read the environment.

    Raises:
        ConfigError: a value is wrong.
    """
    try:
        return AdminAccess.model_validate({})
    except ValidationError as error:
        raise ConfigError(describe(error)) from error
    except SettingsError as error:
        raise ConfigError(str(error)) from error


def index_config(redis_url: str) -> IndexConfig:
    """Build the settings of a process that has no more than these.

    Raises:
        ConfigError: a value is wrong.
    """
    try:
        return IndexConfig.model_validate({"redis_url": redis_url})
    except ValidationError as error:
        raise ConfigError(describe(error)) from error


def publisher_config(extra: Mapping[str, Any]) -> PublisherConfig:
    """Build a publisher's settings; see `connector_config`."""
    return connector_config(PublisherConfig, extra)


def connector_config(kind: type[Config], extra: Mapping[str, Any]) -> Config:
    """Build settings from vLLM's `kv_connector_extra_config` and the environment.

    Keys without the prefix `kvlane.` belong to others and are left alone.

    Raises:
        ConfigError: an unknown key or a wrong value.
    """
    prefix = "kvlane."
    ours = {key.removeprefix(prefix): value for key, value in extra.items() if key.startswith(prefix)}
    try:
        return kind(**ours)
    except ValidationError as error:
        raise ConfigError(describe(error)) from error


def labels_of(given: Iterable[str]) -> dict[str, str]:
    """Return labels that were given as KEY=VALUE.

    Raises:
        ConfigError: one of them is not, or of characters that no selector can write.
    """
    labels = {}
    for each in given:
        name, separator, value = each.partition("=")
        if not separator or not re.fullmatch(LABEL_NAME, name) or not re.fullmatch(f"({LABEL_NAME})?", value):
            raise ConfigError(
                f"--label {each}: write KEY=VALUE, of letters, digits and, not at an end, `.`, `_`, `/`, `-`"
            )
        labels[name] = value
    return labels


def describe(error: ValidationError) -> str:
    """Return pydantic's findings as one line."""
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
