"""PyNcclConnector over shared memory passes the suite, each engine in a process of its own."""

import pathlib

import pytest

from kvsdk.connectors.pynccl import PyNcclConnector
from kvsdk.connectors.pynccl.worker import PyNcclWorker
from kvsdk.testing.capabilities import PYNCCL as capabilities
from kvsdk.testing.suite import *  # noqa: F403


class Worker(PyNcclWorker):
    """Damages the last block that it receives, once for each time that a test asks for it."""

    def join(self, invite, bind_ip, deadline, wanted):
        pipe = super().join(invite, bind_ip, deadline, wanted)
        asked = pathlib.Path(self.context.options.extra["folder"], "damage")
        receive = pipe.recv_row

        def recv_row(sizes, drain, deadline):
            def damage(i, part):
                if asked.exists():
                    asked.unlink()
                    part[-1] ^= 1
                return drain(i, part)

            receive(sizes, damage, deadline)

        pipe.recv_row = recv_row
        return pipe


class connector(PyNcclConnector):
    worker_half = Worker
    option_names = frozenset({"folder"})


processes = True


def options(place):
    common = {"folder": place.folder, "lookup_timeout": 5.0, "pipe": "shm"}
    if place.role == "kv_producer":
        return {"kv_port": place.ports[place.index], **common}
    return {"producers": [f"127.0.0.1:{port}" for port in place.producer_ports], **common}


def damage(place):
    pathlib.Path(place.folder, "damage").touch()


def ready(engines):
    for engine in engines:
        client = engine.connector._scheduler._half._client
        assert client is None or client.wait_ready(10.0), client.peers()


pytestmark = pytest.mark.compat

__all__ = ["capabilities", "connector", "damage", "options", "processes", "ready"]
