"""Fixtures for the tests that boot vLLM servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fleet import Fleet, said

_fleets: list[Fleet] = []


@pytest.fixture(scope="module")
def new_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Fleet]]:
    """Makes a `Fleet` of a model whose logs are in a folder of its own."""

    def make(model: Path) -> Fleet:
        _fleets[:] = [Fleet(model, tmp_path_factory.mktemp("servers"))]
        return _fleets[0]

    return make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """With a failure comes what the servers' logs say of it."""
    report = yield
    if report.failed:
        for server in [server for fleet in _fleets for server in fleet.servers]:
            report.sections.append((f"log of {server.name}", said(server)))
    return report
