"""Fixtures that the whole suite shares."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama in float32, whose answers depend on all of the prompt."""
    from kvsdk.demo.models import make_tiny_llama

    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_deepseek_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny DeepSeek-V2 (multi-head latent attention) in float32."""
    from kvsdk.demo.models import make_tiny_deepseek_v2

    return make_tiny_deepseek_v2(tmp_path_factory.mktemp("tiny-deepseek-v2"))


@pytest.fixture(scope="session", autouse=True)
def pytorch_has_connected() -> Iterator[None]:
    """Waits for PyTorch's calls that a pipe gave up on: in C++, they abort an interpreter that ends meanwhile."""
    yield
    until = time.monotonic() + 30.0
    for thread in threading.enumerate():
        if thread.name == "kvsdk-pipe-connect":
            thread.join(max(0.0, until - time.monotonic()))


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """Fails the test when a thread that it started is still alive two seconds after it ended."""
    from kvsdk.testing.engine_process import threads_left

    before = set(threading.enumerate())
    yield
    left = threads_left(before, 2.0)
    assert not left, f"threads left behind: {left}"
