"""KV connectors for vLLM: a prompt's KV cache goes from the server that computed it to the one that decodes from it.

vLLM imports this package in every process that it starts, so importing it loads nothing but itself; the names below are
fetched when they are first asked for.
"""

from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "kv_transfer_config"]


def __getattr__(name: str) -> Any:
    if name == "kv_transfer_config":
        from kvsdk.config import kv_transfer_config

        return kv_transfer_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
