"""PyNcclConnector passes the suite where it reads the producer's memory in place, each engine a process of its own."""

import pathlib

import pytest
from support.processes import MAY_NOT_READ
from test_suite_pynccl import capabilities, damage, processes, ready
from test_suite_pynccl import options as _options

from kvsdk.connectors.pynccl import PyNcclConnector
from kvsdk.connectors.pynccl.worker import PyNcclWorker
from kvsdk.kernels import torch_blocks
from kvsdk.testing.suite import *  # noqa: F403


class Worker(PyNcclWorker):
    """Damages the last block that it reads, once for each time that a test asks for it."""

    def __init__(self, context):
        super().__init__(context)
        asked, read = pathlib.Path(context.options.extra["folder"], "damage"), torch_blocks.read_process
        last = {}

        def read_process(pid, places, nbytes, into):
            read(pid, places, nbytes, into)
            # A difference has the producer asked and the blocks read again: these are damaged, too.
            if asked.exists():
                asked.unlink()
                last["is"] = places[-1]
            elif last.pop("is", None) != places[-1]:
                return
            into[-1] ^= 1

        torch_blocks.read_process = read_process


class connector(PyNcclConnector):
    worker_half = Worker
    option_names = frozenset({"folder"})


def options(place):
    return _options(place) | {"pipe": "peer"}


pytestmark = pytest.mark.skipif(bool(MAY_NOT_READ), reason=MAY_NOT_READ)

__all__ = ["capabilities", "connector", "damage", "options", "processes", "ready"]
