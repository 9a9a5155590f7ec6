"""PyNcclConnectors for tests in real servers, loaded by path: `"kv_connector": "under_test:FlippingConnector"`.

They put faults where a test wants them, or write down what a test compares, without a line for it in the package.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch

from kvsdk.connectors.pynccl import PyNcclConnector, PyNcclWorker
from kvsdk.kernels import torch_blocks


class _FlippingPipe:
    """Flips bits of one byte in every message received."""

    def __init__(self, pipe):
        self._pipe = pipe

    def recv_row(self, sizes, drain, deadline):
        def flip(i, part):
            # The high byte of a float, sign excepted: of about 1 it makes about 100, which no attention overlooks.
            part[part.numel() // 3 | 3] ^= 0x7E
            return drain(i, part)

        self._pipe.recv_row(sizes, flip, deadline)

    def __getattr__(self, name):
        return getattr(self._pipe, name)


class FlippingWorker(PyNcclWorker):
    def register(self, kv_caches, layout):
        read = torch_blocks.read_process

        def read_process(pid, places, nbytes, into):
            read(pid, places, nbytes, into)
            into[into.numel() // 3 | 3] ^= 0x7E

        torch_blocks.read_process = read_process
        super().register(kv_caches, layout)

    def join(self, invite, bind_ip, deadline, wanted):
        return _FlippingPipe(super().join(invite, bind_ip, deadline, wanted))

    def load(self, task):
        done = task.done

        def flip_and_end():
            # A kernel reads the producer's memory in place and writes what it has read.
            for block_id in task.blocks[0]:
                staging = self._store.staging(1)
                self._store.gather(np.array([block_id], np.int32), staging)
                staging[staging.numel() // 3 | 3] ^= 0x7E
                self._store.scatter(np.array([block_id], np.int32), staging)
            torch.cuda.current_stream().synchronize()
            done()

        if "peer" in self._kinds and self._device.type == "cuda":
            task.done = flip_and_end
        super().load(task)


class FlippingConnector(PyNcclConnector):
    """Every message that arrives has one byte changed, in one block of one layer, and so has every piece of a CPU's
    memory that is read in place; on a GPU every block."""

    worker_half = FlippingWorker


class RecordingWorker(PyNcclWorker):
    """Writes a line `side transfer_id first_block sha256 ...` for the blocks kept, and for those loaded, read back from
    the cache.
    """

    def _record(self, side, transfer_id, first, block_ids):
        staging = self._store.staging(len(block_ids))
        self._store.gather(np.asarray(block_ids), staging)
        sizes = [len(block_ids) * layer.block_bytes for layer in self._layout.layers]
        per_layer = [part.view(len(block_ids), -1).cpu().numpy() for part in staging.split(sizes)]
        hashes = [
            hashlib.sha256(b"".join(part[i].tobytes() for part in per_layer)).hexdigest() for i in range(len(block_ids))
        ]
        with open(os.environ["KVSDK_TEST_RECORD"], "a", encoding="ascii") as file:
            file.write(" ".join([side, transfer_id, str(first), *hashes]) + "\n")

    def kept(self, hold_id, blocks):
        self._record("kept", hold_id, 0, blocks[0])
        super().kept(hold_id, blocks)

    def load(self, task):
        done = task.done

        def record_and_end():
            self._record("loaded", task.source.transfer_id, task.first_block, task.blocks[0])
            done()

        task.done = record_and_end
        super().load(task)


class RecordingConnector(PyNcclConnector):
    """Writes down the bytes of every block handed over, as each side's KV cache holds them."""

    worker_half = RecordingWorker
