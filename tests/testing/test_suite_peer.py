"""PyNcclConnector passes the suite where it reads the producer's memory in place; both engines are in one process."""

from test_suite_pynccl import capabilities, ready
from test_suite_pynccl import options as _options

from kvsdk.testing.suite import *  # noqa: F403

connector = "PyNcclConnector"


def options(place):
    return {name: value for name, value in _options(place).items() if name != "folder"} | {"pipe": "peer"}


__all__ = ["capabilities", "connector", "options", "ready"]
