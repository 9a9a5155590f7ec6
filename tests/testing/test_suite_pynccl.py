"""PyNcclConnector over gloo passes the suite, each engine in a process of its own."""

import pytest

from kvsdk.testing.capabilities import PYNCCL as capabilities
from kvsdk.testing.suite import *  # noqa: F403

connector = "PyNcclConnector"
processes = True


def options(place):
    if place.role == "kv_producer":
        return {"kv_port": place.ports[place.index]}
    return {"producers": [f"127.0.0.1:{port}" for port in place.producer_ports]}


def ready(engines):
    for engine in engines:
        client = engine.connector._scheduler._half._client
        assert client is None or client.wait_ready(10.0), client.peers()


pytestmark = pytest.mark.compat

__all__ = ["capabilities", "connector", "options", "processes", "ready"]
