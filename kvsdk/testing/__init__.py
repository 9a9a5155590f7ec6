"""The conformance kit: prove a KV connector, whoever wrote it.

`kvsdk.testing.suite` is what an author's test file imports. Beneath it lie parts that can be used alone: contracts as
functions, engines around a connector (`World`), the state machine, faults, and connectors that live in one process.
Only `suite` and `machine` need pytest or Hypothesis, and nothing needs vLLM before an engine is made.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "BrokenPromise": "contracts",
    "check_layout": "contracts",
    "check_lookup_buffer": "contracts",
    "check_pipe": "contracts",
    "FaultPlan": "faults",
    "FaultyBuffer": "faults",
    "FaultyClient": "faults",
    "FaultyPipe": "faults",
    "with_faults": "faults",
    "Capabilities": "capabilities",
    "capabilities_table": "capabilities",
    "Network": "in_process",
    "HandOverConnector": "in_process",
    "StoreConnector": "in_process",
    "Clock": "world",
    "NeverEnds": "world",
    "Place": "world",
    "Prompt": "world",
    "Subject": "world",
    "World": "world",
    "WrongAnswer": "world",
    "replay": "world",
    "check_histories": "machine",
    "machine_of": "machine",
}
"""Public name to the module that holds it; imported when it is first asked for."""

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_WHERE]
