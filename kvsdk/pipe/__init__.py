"""Pipes: ordered streams of tensors between two workers; and windows into a worker's memory.

`in_process_pair` and `lockstep_pair` connect two threads, for tests. `PipeHost` and `join` connect two processes by
`torch.distributed`, over gloo or NCCL; a worker on CUDA calls `prepare_process` first.
"""

from kvsdk.pipe.base import Pipe
from kvsdk.pipe.in_process import in_process_pair, lockstep_pair
from kvsdk.pipe.torch_pipe import PipeHost, PipeInvite, choose, join, prepare_process
from kvsdk.pipe.window import OpenWindow, lay_open, open_window

__all__ = [
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
