"""Reading another process's memory: Linux's `process_vm_readv`, one copy and no part of it by the other process.

The kernel lets a process read another one of its user that has no privileges which it lacks itself (`man 2 ptrace`,
PTRACE_MODE_ATTACH_REALCREDS). Yama's `kernel.yama.ptrace_scope`, 1 on Ubuntu, takes that from all but parents and
holders of CAP_SYS_PTRACE; a container's processes do not even see another container's.
"""

from __future__ import annotations

import ctypes
import errno
import os

import numpy as np
import torch

from kvsdk.errors import KVError, PeerGone

_MAX_PLACES = 1024
"""Places that one call takes: UIO_MAXIOV."""

try:
    _readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
    _readv.restype = ctypes.c_ssize_t
    _readv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
except AttributeError:
    _readv = None


def read_process(pid: int, places: np.ndarray, nbytes: int, into: torch.Tensor) -> None:
    """Copies pieces of another process's memory, one behind the other. It does not hold Python's lock meanwhile.

    Args:
        pid: of the process; this one's own is fine.
        places: uint64 `(n,)`: where the pieces begin, in the other process.
        nbytes: of each piece.
        into: uint8, contiguous, of at least `n * nbytes` bytes.

    Raises:
        PeerGone: there is no such process any more.
        KVError: the process may not be read by this one, or has no memory there; or this system cannot do it.
    """
    if _readv is None:
        raise KVError("this system has no process_vm_readv")
    remote = np.empty((len(places), 2), np.uint64)
    remote[:, 0], remote[:, 1] = places, nbytes
    start = into.data_ptr()
    for i in range(0, len(places), _MAX_PLACES):
        count = min(_MAX_PLACES, len(places) - i)
        wanted = count * nbytes
        local = np.array([start + i * nbytes, wanted], np.uint64)
        got = _readv(pid, local.ctypes.data, 1, remote[i:].ctypes.data, count, 0)
        if got == wanted:
            continue
        error = ctypes.get_errno()
        if got < 0 and error == errno.ESRCH:
            raise PeerGone(f"process {pid} is gone")
        if got < 0 and error != errno.EFAULT:
            raise KVError(f"process {pid} cannot be read: {os.strerror(error)}")
        raise KVError(f"process {pid} has no memory there any more")
