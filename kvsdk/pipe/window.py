"""Windows: a worker's KV cache, laid open for another worker to read in place.

A GPU's memory is opened by CUDA IPC: the consumer maps the producer's allocations once for a pair, whether it sees that
GPU by itself or not. Not every allocation can be laid open: CUDA IPC needs memory of `cudaMalloc`, which PyTorch's
expandable segments and vLLM's sleep mode do not use.

A CPU's memory is read out of the other process (`kvsdk.kernels.process_memory`), which the system has to allow. Where
the cache lies there is read from that process, too, and not from a message: whoever can send one does not choose what
the consumer reads. What is found also shows that it is the right process.

Both need both processes on one host.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvsdk.errors import KVError, ProtocolError, WindowUnavailable
from kvsdk.kernels import bindings
from kvsdk.kernels.process_memory import read_process
from kvsdk.layout import CacheLayout, LayerLayout

WINDOW_VERSION = 2
_IPC, _PROCESS_MEMORY = "cuda-ipc", "process-memory"
_HANDLE_BYTES = 64
_TABLE_HEAD = b"kvsdk window 2\0\0"
_NONCE_BYTES = 16
_PROCESS = uuid.uuid4().hex
"""Of this process, and of none that was forked off it later: nothing here forks after CUDA has started."""


def lay_open(layout: CacheLayout, addresses: np.ndarray, device: torch.device) -> dict[str, Any]:
    """What another worker needs to read this one's KV cache in place: plain values for msgpack.

    Args:
        layout: of the cache.
        addresses: uint64 `(layers,)`: where block 0 of each layer lies.
        device: where the cache is.

    Raises:
        WindowUnavailable: this memory cannot be laid open; the message says why.
    """
    window: dict[str, Any] = {
        "version": WINDOW_VERSION,
        "host": this_host(),
        "num_blocks": layout.num_blocks,
        "strides": [[layer.block_stride, len(layer.segments), *_first_and_step(layer)] for layer in layout.layers],
    }
    if device.type != "cuda":
        table = _table_of(_geometry_of(window) + addresses.tobytes())
        nonce = table[len(_TABLE_HEAD) : len(_TABLE_HEAD) + _NONCE_BYTES].tobytes()
        return window | {"kind": _PROCESS_MEMORY, "process": os.getpid(), "table": table.ctypes.data, "nonce": nonce}
    handles: dict[int, bytes] = {}
    layers = []
    try:
        driver = bindings.load("driver")
        capable = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes the device's context this thread's
            for address in map(int, addresses):
                if not int(bindings.call(driver.cuPointerGetAttribute, capable, address)[1]):
                    raise WindowUnavailable(
                        "its KV cache is not memory of cudaMalloc: no CUDA IPC with expandable_segments or sleep mode"
                    )
                base = int(bindings.call(driver.cuMemGetAddressRange, address)[1])
                if base not in handles:
                    handles[base] = bytes(bindings.call(driver.cuIpcGetMemHandle, base)[1].reserved)
                layers.append([list(handles).index(base), address - base])
    except WindowUnavailable:
        raise
    except KVError as error:
        raise WindowUnavailable(f"CUDA IPC is not possible here: {error}") from error
    return window | {"kind": _IPC, "process": _PROCESS, "handles": list(handles.values()), "layers": layers}


@dataclass(frozen=True, eq=False)
class OpenWindow:
    """Another worker's KV cache, open until `close`.

    Attributes:
        layout: of the cache.
        addresses: uint64 `(layers,)`: where block 0 of each layer lies: of a GPU's cache in this process, into which it
            is mapped.
        pid: of a CPU's cache: the process that has it.
    """

    layout: CacheLayout
    addresses: np.ndarray
    pid: int | None
    _close: Callable[[], None]

    def close(self) -> None:
        """Nothing may read it any more; a GPU's is unmapped. Twice is fine."""
        self._close()


def open_window(window: Any, ours: CacheLayout, device: torch.device) -> OpenWindow:
    """Opens what another worker laid open.

    Args:
        window: from `lay_open`, over the network: anything may be in it.
        ours: this worker's layout; the contents are the same, as the handshake has found.
        device: this worker's.

    Raises:
        ProtocolError: the message is malformed, or names memory outside a GPU's mapping.
        WindowUnavailable: the memory cannot be read here, or is described in another version; the message says why.
    """
    layout = _layout_of(window, ours)
    places = window.get("layers")
    wanted = _IPC if device.type == "cuda" else _PROCESS_MEMORY
    if window.get("kind") != wanted:
        raise WindowUnavailable(f"it lays its memory open by {window.get('kind')!r}, and this worker takes {wanted!r}")
    if window.get("host") != this_host():
        raise WindowUnavailable("it is on another host")
    if wanted == _PROCESS_MEMORY:
        return _open_process(window, layout)
    _check(isinstance(places, list) and len(places) == len(ours.layers), "layers")
    for place in places:
        _check(isinstance(place, list) and len(place) == 2 and all(type(x) is int and x >= 0 for x in place), "layers")
    if window.get("process") == _PROCESS:
        raise WindowUnavailable("CUDA IPC does not open memory in the process that it belongs to")
    handles = window.get("handles")
    _check(
        isinstance(handles, list) and all(isinstance(one, bytes) and len(one) == _HANDLE_BYTES for one in handles),
        "handles",
    )
    _check(all(index < len(handles) for index, _ in places), "layers")
    mapped: list[_Mapping] = []

    def close() -> None:
        while mapped:
            mapped.pop().release()

    try:
        for handle in handles:
            mapped.append(_map(handle, device))
        for (index, offset), layer in zip(places, layout.layers, strict=True):
            end = offset + _extent(layer, layout.num_blocks)
            _check(end <= mapped[index].size, f"layers: {layer.name} ends at {end} of {mapped[index].size} bytes")
        addresses = np.array([mapped[index].address + offset for index, offset in places], dtype=np.uint64)
    except BaseException:
        close()
        raise
    return OpenWindow(layout, addresses, None, close)


@functools.cache
def _table_of(places: bytes) -> np.ndarray:
    """Where a cache of this process lies, for whoever reads its memory; stays where it is."""
    return np.frombuffer(bytearray(_TABLE_HEAD + os.urandom(_NONCE_BYTES) + places), np.uint8)


def _geometry_of(window: dict[str, Any]) -> bytes:
    """How far its blocks reach from where they begin."""
    return np.array([window["num_blocks"], *itertools.chain(*window["strides"])], np.int64).tobytes()


def _open_process(window: dict[str, Any], layout: CacheLayout) -> OpenWindow:
    """The window of a CPU, if this process may read the one that it is of."""
    pid, table, nonce = (window.get(name) for name in ("process", "table", "nonce"))
    _check(type(pid) is int and 0 < pid < 1 << 31, "process")
    _check(type(table) is int and 0 <= table < 1 << 64, "table")
    _check(isinstance(nonce, bytes) and len(nonce) == _NONCE_BYTES, "nonce")
    head = _TABLE_HEAD + nonce + _geometry_of(window)
    read = torch.zeros(len(head) + 8 * len(layout.layers), dtype=torch.uint8)
    ends = [_extent(layer, layout.num_blocks) - 1 for layer in layout.layers]
    try:
        read_process(pid, np.array([table], np.uint64), len(read), read)
        found = read.numpy()
        addresses = found[len(head) :].view(np.uint64).copy()
        same = found[: len(head)].tobytes() == head
        if same:
            # Else no load would succeed, and no other kind would be tried.
            places = np.concatenate([addresses, addresses + np.array(ends, np.uint64)])
            read_process(pid, places, 1, torch.empty(len(places), dtype=torch.uint8))
    except KVError as error:
        raise WindowUnavailable(f"its memory cannot be read: {error}") from error
    if not same:
        raise WindowUnavailable(f"process {pid} has something else there: it runs in another PID namespace")
    return OpenWindow(layout, addresses, pid, lambda: None)


class _Mapping:
    """One allocation of another process. CUDA maps it once a process, however many pairs read it."""

    def __init__(self, handle: bytes, device: torch.device):
        driver = bindings.load("driver")
        self.handle, self.device, self.users = handle, device, 0
        ipc = driver.CUipcMemHandle()
        ipc.reserved = handle
        flags = int(driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        try:
            with torch.cuda.device(device):
                torch.cuda.current_stream().synchronize()
                self.address = int(bindings.call(driver.cuIpcOpenMemHandle, ipc, flags)[1])
                self.size = int(bindings.call(driver.cuMemGetAddressRange, self.address)[2])
        except KVError as error:
            raise WindowUnavailable(f"its memory cannot be opened: {error}") from error

    def release(self) -> None:
        with _mappings_lock:
            self.users -= 1
            if self.users:
                return
            del _mappings[self.handle]
            with torch.cuda.device(self.device):
                torch.cuda.current_stream().synchronize()
                bindings.call(bindings.load("driver").cuIpcCloseMemHandle, self.address)


_mappings: dict[bytes, _Mapping] = {}
_mappings_lock = threading.Lock()


def _map(handle: bytes, device: torch.device) -> _Mapping:
    with _mappings_lock:
        if handle not in _mappings:
            _mappings[handle] = _Mapping(handle, device)
        _mappings[handle].users += 1
        return _mappings[handle]


def _first_and_step(layer: LayerLayout) -> tuple[int, int]:
    first = layer.segments[0][0]
    return first, layer.segments[1][0] - first if len(layer.segments) > 1 else 0


def _extent(layer: LayerLayout, num_blocks: int) -> int:
    """Bytes from block 0's address to the end of the last block's payload."""
    return (num_blocks - 1) * layer.block_stride + sum(layer.segments[-1])


def _layout_of(window: Any, ours: CacheLayout) -> CacheLayout:
    """The other worker's layout: the same content as ours, in places of its own."""
    _check(isinstance(window, dict), "the window")
    if window.get("version") != WINDOW_VERSION:
        raise WindowUnavailable(f"its window is of version {window.get('version')!r}, not {WINDOW_VERSION}")
    num_blocks, strides = window.get("num_blocks"), window.get("strides")
    _check(type(num_blocks) is int and 0 < num_blocks < 1 << 31, "num_blocks")
    _check(isinstance(strides, list) and len(strides) == len(ours.layers), "strides")
    layers = []
    for layer, stride in zip(ours.layers, strides, strict=True):
        _check(
            isinstance(stride, list) and len(stride) == 4 and all(type(x) is int and 0 <= x < 1 << 48 for x in stride),
            "strides",
        )
        block_stride, count, first, step = stride
        run, rest = divmod(layer.block_bytes, count) if 0 < count <= layer.block_bytes else (0, 1)
        _check(rest == 0 and (count == 1 or step >= run), "strides")
        segments = tuple((first + i * step, run) for i in range(count))
        _check(num_blocks == 1 or block_stride >= sum(segments[-1]) - first, "strides")
        layers.append(
            LayerLayout(
                layer.name,
                layer.dtype,
                layer.block_bytes,
                block_stride,
                segments,
                layer.order,
                layer.dims,
                layer.shape,
                0,
            )
        )
    return CacheLayout(tuple(layers), num_blocks, ours.block_size, ours.backend)


def _check(good: bool, what: str) -> None:
    if not good:
        raise ProtocolError(f"a window's {what} cannot be")


@functools.cache
def this_host() -> str:
    """Names this boot of this host; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
