"""NVIDIA's `cuda.bindings`, which CUDA builds of PyTorch bring: imported when they are first needed."""

from __future__ import annotations

from typing import Any

from kvsdk.errors import ConfigError, KVError


def load(name: str) -> Any:
    """`cuda.bindings.driver` or `cuda.bindings.nvrtc`.

    Raises:
        ConfigError: they are not installed.
    """
    try:
        if name == "nvrtc":
            from cuda.bindings import nvrtc as module
        else:
            from cuda.bindings import driver as module
    except ImportError as error:
        raise ConfigError(f"cuda.bindings is not installed ({error}); pip install cuda-bindings") from error
    return module


def call(function: Any, *args: Any) -> tuple[Any, ...]:
    """Call a function of the bindings; returns its status and results.

    Raises:
        KVError: it failed, or the library behind it cannot be loaded.
    """
    try:
        result = function(*args)
    except RuntimeError as error:
        raise KVError(f"{function.__name__}: {error}") from error
    if int(result[0]) != 0:
        raise KVError(f"{function.__name__} failed: {result[0].name}")
    return result
