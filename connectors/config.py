"""Settings of the transfer of KV between engines."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class TransferConfig(BaseSettings):
    """Keys of `kv_connector_extra_config` arrive here as `kvlane.<name>`; `KVLANE_<NAME>` overrides."""

    model_config = SettingsConfigDict(env_prefix="KVLANE_", frozen=True, extra="forbid")

    transfer_port: int = Field(
        0,
        ge=0,
        lt=65536,
        description="Port of the first rank's side channel, the next ranks' follow; 0: no transfer.",
    )
    transfer_host: str = Field(
        "0.0.0.0", description="Address that the side channel listens on; peers reach it at the endpoint's."
    )
    transport: str = Field(
        "auto", description="ucx, nixl-ucx, nixl-libfabric, several separated by commas, or auto."
    )
    chunk_bytes: int = Field(4 << 20, ge=4096, description="Size of a staging buffer, and so of a message.")
    staging_chunks: int = Field(
        8,
        ge=2,
        description="Staging buffers for sending, and as many for receiving.",
    )
    staging_poison: bool = Field(False, description="Check that no staging buffer is used after its end.")
    transfer_metrics_port: int = Field(
        0,
        ge=0,
        lt=65536,
        description="Port of the first rank's Prometheus metrics, the next ranks' follow; 0: none.",
    )
    lease_s: float = Field(
        10.0,
        gt=0,
        description="How long blocks wait for their receiver, and a receiver for its sender's request.",
    )
    peer_timeout_s: float = Field(
        10.0, gt=0, description="A peer with a transfer under way that is silent for this long is lost."
    )
    chunk_timeout_s: float = Field(
        30.0, gt=0, description="Longest wait for a chunk: to be computed, for a buffer, or on the wire."
    )
