"""Pipes: ordered streams of tensors between two workers; and windows into a worker's memory.

`in_process_pair` and `lockstep_pair` connect two threads, for tests. `PipeHost` and `join` connect two processes: by
memory that both map, on CPUs of one host, or by `torch.distributed`, over gloo or NCCL. A worker on CUDA calls
`prepare_process` first.
"""

from kvsdk.pipe.base import SLOT_BYTES, SLOTS, Pipe
from kvsdk.pipe.in_process import in_process_pair, lockstep_pair
from kvsdk.pipe.pairing import PipeHost, PipeInvite, choose, join
from kvsdk.pipe.torch_pipe import prepare_process
from kvsdk.pipe.window import OpenWindow, lay_open, open_window

__all__ = [
    "SLOTS",
    "SLOT_BYTES",
    "OpenWindow",
    "Pipe",
    "PipeHost",
    "PipeInvite",
    "choose",
    "in_process_pair",
    "join",
    "lay_open",
    "lockstep_pair",
    "open_window",
    "prepare_process",
]
