"""Counters that several threads add to and one takes."""

from __future__ import annotations

import threading


class Counters:
    """Names to numbers. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, value: float = 1) -> None:
        self.add_all(**{name: value})

    def add_all(self, **values: float) -> None:
        with self._lock:
            for name, value in values.items():
                self._values[name] = self._values.get(name, 0) + value

    def take(self) -> dict[str, float]:
        """What was added since the last call."""
        with self._lock:
            values, self._values = self._values, {}
            return values
