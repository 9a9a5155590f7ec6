"""`PyNcclConnector` whose hooks are timed, for `kv_connector_module_path`; see `benchmarks.hooks`.

{"kv_connector": "TimedPyNcclConnector", "kv_connector_module_path": "benchmarks.timed_connector", ...}
"""

from __future__ import annotations

from typing import Any

from benchmarks.hooks import RECORDER, timed
from kvsdk.connectors.pynccl import PyNcclConnector
from kvsdk.vllm.binding import bind

_Bound = bind(PyNcclConnector)


class _Marked(_Bound):  # type: ignore[misc,valid-type]
    """Tells the recorder that its process holds a worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        if self._worker is not None:
            RECORDER.first_hook = "bind_connector_metadata"


TimedPyNcclConnector = type("TimedPyNcclConnector", (_Marked,), {**timed(_Marked), "__module__": __name__})
