"""`PyNcclConnector`: KV blocks over torch.distributed send/recv (NCCL on GPUs, gloo on CPUs) or, on one host, read in
place or, between CPUs, through shared memory; found through a lookup buffer.

The prefill server keeps a finished prompt's blocks; the decode server claims them by prompt prefix or by
`kv_transfer_params`, and loads whole blocks and the partial tail in the background. Every block is checked against a
digest on arrival.
"""

from kvsdk.connector.interface import Connector
from kvsdk.connectors.pynccl.scheduler import PyNcclScheduler
from kvsdk.connectors.pynccl.worker import PyNcclWorker


class PyNcclConnector(Connector):
    """See the module; options are in `docs/operators.md`."""

    scheduler_half = PyNcclScheduler
    worker_half = PyNcclWorker


__all__ = ["PyNcclConnector", "PyNcclScheduler", "PyNcclWorker"]
