"""Connector classes that no module has under their own name, such as those made in a test, by names that vLLM can load.

They are known in this process only.
"""

from __future__ import annotations

import sys

_classes: dict[str, type] = {}


def importable(kind: type) -> bool:
    """Whether another process finds this class by its module and name."""
    module = sys.modules.get(kind.__module__)
    return kind.__module__ != "__main__" and getattr(module, kind.__qualname__, None) is kind


def where(kind: type) -> tuple[str, str]:
    """The module and the name by which this class can be loaded here."""
    if importable(kind):
        return kind.__module__, kind.__qualname__
    name = f"{kind.__name__}_{id(kind):x}"
    _classes[name] = kind
    return __name__, name


def __getattr__(name: str) -> type:
    if name not in _classes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _classes[name]
