"""vLLM's plugin entry point (`vllm.general_plugins`). vLLM calls `register` in every process it starts.

Nothing raises here: an exception would end `vllm serve`, and even `vllm --help`, for people who do not use kvsdk.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("kvsdk.vllm")

_registered = False


def register() -> None:
    """Register every connector name with vLLM, without importing a connector. Calling it again does nothing."""
    global _registered
    if _registered:
        return
    _registered = True
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        from kvsdk.vllm.connectors import targets

        names = sorted(targets())
    except Exception as error:  # noqa: BLE001 - whatever is wrong with this installation, vLLM must still start
        logger.warning("kvsdk's connectors are not available: %s: %s", type(error).__name__, error)
        return
    for name in names:
        try:
            KVConnectorFactory.register_connector(name, "kvsdk.vllm.connectors", name)
        except Exception as error:  # noqa: BLE001 - vLLM has a connector of this name, or changed its factory
            logger.warning(
                "%s is not registered (%s); load it with kv_connector_module_path=kvsdk.vllm.connectors", name, error
            )
