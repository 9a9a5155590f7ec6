"""Counters of a connector in vLLM's log line and at its `/metrics`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "loads_done": "Loads of which every block arrived and matched its digest.",
    "loads_failed": "Loads with blocks that did not arrive or did not match.",
    "loads_expired": "Loads that reached their deadline or were aborted.",
    "saves_done": "Saves that ended well.",
    "saves_failed": "Saves that failed.",
    "saves_expired": "Saves that reached their deadline.",
    "loaded_blocks": "Blocks received and written to the KV cache.",
    "loaded_bytes": "Bytes received and written to the KV cache.",
    "load_seconds": "Seconds from a load's start in a worker to its end.",
    "sent_bytes": "Bytes sent to consumers.",
    "corrupt_blocks": "Blocks received whose digest did not match.",
}
"""Every counter, with its meaning. Workers of one server add up."""


@dataclass
class KVSDKStats(KVConnectorStats):
    """Counts since the last report; `data` maps a name of `COUNTERS` to a number."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(value, 4) for name, value in self.data.items()}

    def is_empty(self) -> bool:
        return not any(self.data.values())


class KVSDKPromMetrics(KVConnectorPromMetrics):
    """`kvsdk_<name>_total` for each of `COUNTERS`, labelled as vLLM's own metrics are."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = _counters(self._counter_cls, tuple(labelnames))

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            if name in self._counters and value > 0:
                self._counters[name].labels(*self.per_engine_labelvalues[engine_idx]).inc(value)


@functools.cache
def _counters(kind: type[Any], labelnames: tuple[str, ...]) -> dict[str, Any]:
    """One set for the process: Prometheus takes each name once, and vLLM's MultiConnector may hold several connectors
    of this package."""
    return {
        name: kind(name=f"kvsdk_{name}", documentation=text, labelnames=list(labelnames))
        for name, text in COUNTERS.items()
    }


__all__ = ["COUNTERS", "KVSDKPromMetrics", "KVSDKStats"]
