"""Settings of a gateway process: built once, frozen, unknown keys refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from gateway.profile import Profile
from gateway.service import Admission
from gateway.tiers import TierSpeed
from kvindex.config import IndexConfig, describe
from kvindex.errors import ConfigError
from kvindex.tls import ClientTls, ServerTls
from kvindex.worker import Tier


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[ipv6]:port`.

    Raises:
        ValueError: no host or no port in it.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"expected host:port, got {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _checked(address: str) -> str:
    split_address(address)
    return address


Address = Annotated[str, AfterValidator(_checked)]
"""`host:port`; port 0 picks a free one."""


MIN_SECRET_LENGTH = 32
"""Of the salts' secret: a tenant that guessed it could compute every other tenant's salt."""


class GatewayConfig(IndexConfig):
    """Everything a gateway may be told; overridden by `KVLANE_LISTEN` and so on."""

    listen: Address = Field("127.0.0.1:9002", description="host:port of ext_proc, EDS and access log.")
    admin_listen: Address = Field(
        "127.0.0.1:9003", description="host:port of health, metrics, fleet and receipts."
    )
    tls: ServerTls | None = Field(
        None, description="cert, key and client_ca (PEM files) of the port for Envoy; with client_ca, mTLS."
    )
    admin_tls: ServerTls | None = Field(None, description="The same of the admin port.")
    admin_token: SecretStr | None = Field(
        None, description="Bearer token for the admin port; without it, whoever reaches the port may ask."
    )
    worker_tls: ClientTls | None = Field(
        None, description="ca, cert and key (PEM files) for workers, which are then asked by https."
    )
    max_body_bytes: int = Field(16 << 20, gt=0, description="Largest request body that is read.")
    stop_grace_s: float = Field(5.0, ge=0, description="Time that open streams get when the gateway stops.")

    poll_interval_ms: int = Field(250, gt=0, description="How often the list of workers is read.")
    recovery_grace_s: float = Field(
        5.0,
        ge=0,
        description="After Redis was away, workers that it does not know yet stay for this long, since "
        "their leases ran out meanwhile. Longer than a lease.",
    )
    probe_interval_s: float = Field(2.0, gt=0, description="How often workers are asked for their models.")
    probe_timeout_s: float = Field(2.0, gt=0, description="Longest wait for a worker's models.")
    worker_api_key: SecretStr | None = Field(
        None, description="Bearer token for the workers, where they want one."
    )

    parity_probe: bool = Field(
        True, description="Compare tokens and block hashes with each worker that joins, by a probe request."
    )
    parity_timeout_s: float = Field(
        10.0, gt=0, description="Longest wait for a probe's answer, and then for its blocks in the index."
    )
    parity_tries: int = Field(2, ge=1, description="Probes before a worker is given its verdict.")
    parity_again_s: float = Field(
        60.0, gt=0, description="How soon a worker whose check failed or came to no end is checked again."
    )
    silent_after_s: float = Field(
        30.0,
        gt=0,
        description="A worker that has requests and has ended none for this long is checked; if it does not "
        "answer that, others are preferred.",
    )
    parity_concurrency: int = Field(8, ge=1, description="Workers that are checked at the same time.")

    tenants: Path | None = Field(
        None, description="YAML file of tenants with their keys and limits; with it, requests need a key."
    )
    cache_salt_secret: SecretStr | None = Field(
        None, description="What tenants' cache salts are made from: 32 characters or more, in every gateway."
    )

    tokenizers: dict[str, str] = Field(
        default_factory=dict, description="Tokenizer directory by model, where the engines' path is not ours."
    )
    chat_templates: dict[str, Path] = Field(
        default_factory=dict, description="Jinja file by model, where engines run with --chat-template."
    )
    trust_request_chat_template: bool = Field(
        False, description="Engines run with the flag of this name; requests' templates then run here too."
    )
    tokenizer_threads: int = Field(2, ge=1, description="Threads that tokenise long prompts.")
    tokenize_inline_bytes: int = Field(
        2_048, ge=0, description="Up to this much new text is tokenised on the event loop, which is faster."
    )
    token_cache_bytes: int = Field(
        256 << 20, ge=0, description="Memory for tokens of texts and hashes of prompts seen before."
    )
    tokenize_deadline_ms: int = Field(100, gt=0, description="Longest wait for a prompt's tokens.")
    tokenize_deadline_ms_per_mb: int = Field(1_500, ge=0, description="Added to it for each MB of body.")
    index_deadline_ms: int = Field(50, gt=0, description="Longest wait for each answer of the index.")
    reserve_tries: int = Field(5, ge=1, description="Plans made before a worker is charged in any case.")
    reservation_ttl_ms: int = Field(
        30_000, ge=1_000, description="A reservation that nobody settles counts for this long."
    )
    fallbacks: int = Field(3, ge=0, description="Workers named beside the best, for connection failures.")
    prefill_tokens_per_s: float = Field(
        10_000, gt=0, description="Prefill speed of a model without a profile, before any was measured."
    )
    transfer_gb_per_s: float | None = Field(
        None, gt=0, description="How fast KV moves between workers. Default: as they measure it."
    )
    transfer_latency_ms: float | None = Field(
        None, ge=0, description="What a transfer takes whatever its size. Default: as workers measure it."
    )
    tier_speeds: dict[Tier, TierSpeed] = Field(
        default_factory=dict,
        description="gb_per_s and latency_ms of loading KV by tier (cpu, disk, object); then measured.",
    )
    profiles: dict[str, Profile] = Field(
        default_factory=dict, description="What an engine's steps cost, by model; measured from there on."
    )
    admission: Admission = Field(
        Admission.OFF,
        description="Whether requests that no worker can begin in time, or that are over their tenant's "
        "share, are refused (enforce), counted (shadow) or not looked for (off).",
    )
    fair_share_queue_ms: float = Field(
        1_000, gt=0, description="Queue at every worker from which tenants are held to their shares."
    )
    retry_after_s: int = Field(
        1, ge=1, description="Retry-After of a 503, and of a 429 where nothing longer is known."
    )
    tracing: bool = Field(
        False,
        description="Send OpenTelemetry traces; OTEL_EXPORTER_OTLP_ENDPOINT and its like say where.",
    )
    receipts: int = Field(2_000, ge=1, description="Decisions that can be looked up afterwards.")
    receipt_bytes: int = Field(
        128 << 20, ge=0, description="Memory that they may take, about; the oldest go first."
    )
    receipt_sample: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of decisions that stay after they were measured: less reaches further back. "
        "Those that load decided stay in any case.",
    )
    receipt_hashes: int = Field(
        512, ge=1, description="Most block hashes that a receipt keeps; longer prompts keep them at a stride."
    )

    @property
    def salt_secret(self) -> bytes | None:
        """What cache salts are made from; None where tenants are not told apart."""
        if self.tenants is None or self.cache_salt_secret is None:
            return None
        return self.cache_salt_secret.get_secret_value().encode()

    @model_validator(mode="after")
    def _can_salt(self) -> GatewayConfig:
        if self.tenants is not None:
            secret = self.cache_salt_secret.get_secret_value() if self.cache_salt_secret else ""
            if len(secret) < MIN_SECRET_LENGTH:
                raise ValueError(
                    f"tenants need a cache_salt_secret of {MIN_SECRET_LENGTH} random characters or more, "
                    "such as `openssl rand -base64 32` prints, in KVLANE_CACHE_SALT_SECRET of every gateway"
                )
        return self

    @property
    def default_profile(self) -> Profile:
        """Return the profile of models that have none of their own."""
        return Profile(prefill_tokens_per_s=self.prefill_tokens_per_s)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: command line, environment, file."""
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)


def load_config(file: Path | None = None, **options: object) -> GatewayConfig:
    """Build the settings from command-line options, environment and a YAML file, strongest first.

    An option that is None was not given.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or a value is wrong.
    """

    class FileConfig(GatewayConfig):
        model_config = SettingsConfigDict(yaml_file=file)

    if file is not None and not file.is_file():
        raise ConfigError(f"--config {file}: no such file")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    try:
        return FileConfig(**given)
    except ValidationError as error:
        raise ConfigError(describe(error)) from error
    except SettingsError as error:
        raise ConfigError(str(error)) from error
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"--config {file}: not a YAML mapping of settings") from error
