"""The classes that vLLM loads, by name, made when they are asked for.

`getattr(kvsdk.vllm.connectors, "PyNcclConnector")` is the vLLM class of the connector which that name has in the
entry-point group `kvsdk.connectors`. A name of the form `module:Class` needs no entry point, so that a connector can be
loaded by path:

    {"kv_connector": "my_package.my_module:MyConnector", "kv_connector_module_path": "kvsdk.vllm.connectors", ...}
"""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import entry_points

GROUP = "kvsdk.connectors"

SHIPPED = {
    "LMCacheConnector": "kvsdk.connectors.lmcache:LMCacheConnector",
    "PyNcclConnector": "kvsdk.connectors.pynccl:PyNcclConnector",
}
"""kvsdk's own, found even where kvsdk is on the path without being installed."""


@functools.cache
def targets() -> dict[str, str]:
    """Connector name to `module:Class`. kvsdk's own names cannot be taken by another package."""
    return {point.name: point.value for point in entry_points(group=GROUP)} | SHIPPED


def __getattr__(name: str) -> type:
    target = name if ":" in name else targets().get(name)
    if target is None:
        raise AttributeError(
            f"no connector {name!r}; known are {', '.join(sorted(targets()))}, or name one as module:Class"
        )
    module, _, attribute = target.partition(":")
    from kvsdk.vllm.binding import bind

    return bind(getattr(importlib.import_module(module), attribute))
