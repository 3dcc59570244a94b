"""Settings of moving KV: between engines, and to and from tiers."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from kvindex.tls import PeerTls

DEFAULT_CHUNK_BYTES = {"cuda": 64 << 20}
"""By type of device; on a GPU a chunk costs its launches and waits, whatever its size."""

DEFAULT_STAGING_CHUNKS = {"cuda": 4}


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
    transfer_tls: PeerTls | None = Field(
        None,
        description="cert, key and ca (PEM files): the side channel speaks TLS, among engines of this CA.",
    )
    transport: str = Field(
        "auto", description="ucx, nixl-ucx, nixl-libfabric, several separated by commas, or auto."
    )
    chunk_bytes: int | None = Field(
        None,
        ge=4096,
        multiple_of=4096,
        description="Size of a staging buffer, and of a message to a peer whose buffers are not smaller. "
        "Default: 4 MiB on a CPU, 64 MiB on a GPU.",
    )
    staging_chunks: int | None = Field(
        None,
        ge=2,
        description="Staging buffers for sending, and as many for receiving. "
        "Default: 8 on a CPU, 4 on a GPU.",
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

    def buffer_bytes(self, device_type: str) -> int:
        """Return the size of a staging buffer on a type of device."""
        return self.chunk_bytes or DEFAULT_CHUNK_BYTES.get(device_type, 4 << 20)

    def num_buffers(self, device_type: str) -> int:
        """Return how many staging buffers there are for each direction on a type of device."""
        return self.staging_chunks or DEFAULT_STAGING_CHUNKS.get(device_type, 8)


class TierConfig(BaseSettings):
    """Keys of `kv_connector_extra_config` arrive here as `kvlane.<name>`; `KVLANE_<NAME>` overrides."""

    model_config = SettingsConfigDict(env_prefix="KVLANE_", frozen=True, extra="forbid")

    tiers: str = Field(
        "",
        pattern=r"^$|^([^\s:/]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}$",
        description="host:port of the LMCache server that keeps CPU, disk and S3; empty: no tiers.",
    )
    tier_stores: tuple[str, ...] = Field(
        (), description="Names in the index of what that server holds, one per tier."
    )
    tier_server: str = Field("", description="Name in the index of that server.")
