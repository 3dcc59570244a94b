"""Entry point of `vllm.general_plugins`: vLLM calls it in every one of its processes, often twice."""

from __future__ import annotations

CONNECTOR_NAME = "KvlaneConnector"
CONNECTOR_MODULE = "vllm_plugin.connector"


def register() -> None:
    """Make `KvlaneConnector` known to vLLM; calling it again changes nothing."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR_NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR_NAME, CONNECTOR_MODULE, CONNECTOR_NAME)
