"""Settings of an engine's connector, built once per process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from connectors.config import TierConfig, TransferConfig
from kvindex.config import PublisherConfig, connector_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class WorkerConfig(PublisherConfig, TransferConfig, TierConfig):
    """What `kv_connector_extra_config` may hold as `kvlane.<name>`."""


def worker_config(vllm_config: VllmConfig) -> WorkerConfig:
    """Return the settings of an engine's connector.

    Raises:
        ConfigError: an unknown key or a wrong value.
    """
    return connector_config(WorkerConfig, vllm_config.kv_transfer_config.kv_connector_extra_config)
