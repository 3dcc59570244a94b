"""Settings of an engine's connector, built once per process."""

from __future__ import annotations

from connectors.config import TransferConfig
from kvindex.config import PublisherConfig


class WorkerConfig(PublisherConfig, TransferConfig):
    """What `kv_connector_extra_config` may hold as `kvlane.<name>`."""
