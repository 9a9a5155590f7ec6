"""Fixtures for the tests that boot vLLM servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fleet import Fleet


@pytest.fixture(scope="module")
def new_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Fleet]]:
    """Makes a `Fleet` of a model whose logs are in a folder of its own."""
    return lambda model: Fleet(model, tmp_path_factory.mktemp("servers"))
