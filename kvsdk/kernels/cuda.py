"""Blocks of a KV cache on a GPU, moved and digested by the kernels of `csrc/blocks.cu`."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from kvsdk.kernels import nvrtc
from kvsdk.kernels.results import Check
from kvsdk.layout import CacheLayout, Plan, plan_copy, staging_layout

THREADS = 512
CHUNK_BYTES = 16384
_WARPS = THREADS // 32
_LAYER = np.dtype(
    {
        "names": ["src_stride", "dst_stride", "page_bytes", "run_bytes", "first_run", "num_runs"],
        "formats": ["<u8", "<u8", "<u4", "<u4", "<u4", "<u4"],
    }
)


class _Copy(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("layers", "runs", "chunks", "src_bases", "dst_bases")),
        *((name, ctypes.c_uint64) for name in ("src_ids", "dst_ids", "skip", "sums")),
        *((name, ctypes.c_uint32) for name in ("num_blocks", "num_chunks", "split", "unused")),
    ]


class _Finish(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("sums", "positions", "expected", "digests", "wrong", "wrong_too")),
        *((name, ctypes.c_uint32) for name in ("num_layers", "num_blocks")),
    ]


OPTIONS = (
    f"-DTHREADS={THREADS}",
    f"-DCHUNK_BYTES={CHUNK_BYTES}",
    f"-DCOPY_ARGS_BYTES={ctypes.sizeof(_Copy)}",
    f"-DFINISH_ARGS_BYTES={ctypes.sizeof(_Finish)}",
    f"-DLAYER_BYTES={_LAYER.itemsize}",
)
"""What the source is compiled with, but for the kind of GPU."""


class Launcher(Protocol):
    """What `CudaBlocks` launches kernels through: `kvsdk.kernels.nvrtc.Module`."""

    def launch(self, name: str, grid: int, threads: int, args: ctypes.Structure, stream: int) -> None: ...


class Route:
    """A plan as the kernels read it, on the device.

    Args:
        plan: what to carry out.
        device: where the tables go; waits until they are there.
    """

    def __init__(self, plan: Plan, device: torch.device):
        layers = np.zeros(len(plan.layers), dtype=_LAYER)
        first_runs: dict[int, int] = {}
        runs: list[np.ndarray] = []
        chunks = []
        for i, (row, layer) in enumerate(zip(layers, plan.layers, strict=True)):
            if id(layer) not in first_runs:
                first_runs[id(layer)] = sum(map(len, runs))
                runs.append(np.stack([layer.src_offsets, layer.dst_offsets], axis=1).astype("<u8"))
            row["src_stride"], row["dst_stride"] = layer.src_stride, layer.dst_stride
            row["page_bytes"], row["run_bytes"] = layer.block_bytes, layer.nbytes
            row["first_run"], row["num_runs"] = first_runs[id(layer)], len(layer.src_offsets)
            first_bytes = np.arange(0, layer.block_bytes, CHUNK_BYTES)
            chunks.append(np.stack([np.full_like(first_bytes, i), first_bytes], axis=1).astype("<u4"))
        self.layers, self.runs, self.chunks = (
            torch.from_numpy(np.ascontiguousarray(table).view(np.uint8).reshape(-1)).to(device)
            for table in (layers, np.concatenate(runs), np.concatenate(chunks))
        )
        self.num_chunks = sum(map(len, chunks))
        sizes = [layers["page_bytes"], layers["run_bytes"]]
        self.src_bits, self.dst_bits = (
            int(np.bitwise_or.reduce(np.concatenate([*sizes, layers[stride], *(part[:, side] for part in runs)])))
            for side, stride in enumerate(("src_stride", "dst_stride"))
        )
        """Numbers that a grain must divide on each side, put together by OR."""


class Scratch:
    """Memory for the arguments and sums of operations on one stream, reused by each after the one before it.

    Device memory is used again without waiting, because work on a stream runs in order. Pinned memory is used again
    once the copy out of it has been made; if that is still to come, the operation takes more.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.lock = threading.Lock()
        self._arguments = self._empty(0)
        self._sums = self._empty(0)
        self._flags = self._empty(0)
        self._pinned: collections.deque[tuple[torch.Tensor, torch.cuda.Event]] = collections.deque()

    def upload(self, arrays: list[np.ndarray | None]) -> list[int]:
        """Copies arrays to the device in one go, on the current stream; returns their addresses, 0 for None."""
        starts, total = [], 0
        for array in arrays:
            starts.append(total)
            total += -(-array.nbytes // 16) * 16 if array is not None else 0
        if self._arguments.numel() < total:
            self._arguments = self._empty(total)
        pinned, event = self._take_pinned(total)
        host = pinned.numpy()
        for array, start in zip(arrays, starts, strict=True):
            if array is not None:
                host[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8)
        self._arguments[:total].copy_(pinned[:total], non_blocking=True)
        event.record()
        self._pinned.append((pinned, event))
        base = self._arguments.data_ptr()
        return [base + start if array is not None else 0 for array, start in zip(arrays, starts, strict=True)]

    def zeroed_sums(self, count: int) -> int:
        """The address of `count` sums of 0."""
        if self._sums.numel() < 8 * count:
            self._sums = self._empty(8 * count)
        self._sums[: 8 * count].zero_()
        return self._sums.data_ptr()

    def flags(self, count: int) -> int:
        """The address of `count` bytes, not initialised."""
        if self._flags.numel() < count:
            self._flags = self._empty(count)
        return self._flags.data_ptr()

    def new_pinned(self, size: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Host memory, and the event that says when the device has read it."""
        with torch.inference_mode(False):
            return torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()

    def _take_pinned(self, size: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        if self._pinned and self._pinned[0][1].query():
            pinned, event = self._pinned.popleft()
            if pinned.numel() >= size:
                return pinned, event
        return self.new_pinned(_round_up(size))

    def _empty(self, size: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(_round_up(size), dtype=torch.uint8, device=self._device)


class CudaBlocks:
    """The blocks of one worker's KV cache. Everything is enqueued on the current stream; nothing waits.

    Args:
        addresses: uint64: of block 0, a layer.
        layout: of the cache.
        device: where it lies.
        max_sms: thread blocks of a launch; each takes an SM, or most of one.
        launcher: what launches kernels; the module of `csrc/blocks.cu` if None.

    Raises:
        ConfigError: the kernels cannot be compiled or loaded.
    """

    def __init__(
        self,
        addresses: np.ndarray,
        layout: CacheLayout,
        device: torch.device,
        max_sms: int,
        launcher: Launcher | None = None,
    ):
        self._addresses, self._layout, self._device, self._max_sms = addresses, layout, device, max_sms
        self._launcher = nvrtc.module_for(device, OPTIONS) if launcher is None else launcher
        staging = staging_layout(layout, 1)
        self._starts = np.array([layer.storage_offset for layer in staging.layers], dtype=np.uint64)
        self._gather, self._scatter = (
            Route(plan, device) for plan in (plan_copy(layout, staging), plan_copy(staging, layout))
        )
        self._scratches: dict[int, Scratch] = {}
        self._lock = threading.Lock()

    def route(self, plan: Plan) -> Route:
        """The tables for `pull`."""
        return Route(plan, self._device)

    def gather(self, ids: np.ndarray, staging: torch.Tensor, check: Check | None = None) -> None:
        bases = self._staging_bases(staging, len(ids))
        self._run(self._gather, self._addresses, bases, ids, None, check)

    def scatter(self, ids: np.ndarray, staging: torch.Tensor, select: np.ndarray | None = None) -> None:
        bases = self._staging_bases(staging, len(ids))
        if select is not None:
            ids, select = ids[select], select.astype(np.int32)
        self._run(self._scatter, bases, self._addresses, select, ids, None)

    def scatter_right(self, ids: np.ndarray, staging: torch.Tensor, check: Check) -> None:
        bases = self._staging_bases(staging, len(ids))
        self._run(self._scatter, bases, self._addresses, None, ids, check, check_first=True)

    def digest_staging(self, staging: torch.Tensor, num_blocks: int, check: Check) -> None:
        bases = self._staging_bases(staging, num_blocks)
        self._run(self._scatter, bases, None, None, None, check, num_blocks=num_blocks)

    def digest(self, ids: np.ndarray, check: Check) -> None:
        self._run(self._gather, self._addresses, None, ids, None, check)

    def pull(
        self, route: Route, addresses: np.ndarray, src_ids: np.ndarray, dst_ids: np.ndarray, check: Check | None
    ) -> None:
        self._run(route, addresses, self._addresses, src_ids, dst_ids, check)

    def _staging_bases(self, staging: torch.Tensor, num_blocks: int) -> np.ndarray:
        return np.uint64(staging.data_ptr()) + self._starts * np.uint64(num_blocks)

    def _run(
        self,
        route: Route,
        src_bases: np.ndarray,
        dst_bases: np.ndarray | None,
        src_ids: np.ndarray | None,
        dst_ids: np.ndarray | None,
        check: Check | None,
        *,
        num_blocks: int | None = None,
        check_first: bool = False,
    ) -> None:
        """Without `dst_bases` blocks are digested only; `check_first` copies no block whose digest is wrong."""
        if num_blocks is None:
            num_blocks = len(src_ids if src_ids is not None else dst_ids)  # type: ignore[arg-type]
        if num_blocks == 0:
            return
        with self._on_stream() as (scratch, stream):
            uploads = [src_bases, dst_bases, src_ids, dst_ids]
            if check is not None:
                uploads += [check.positions, check.expected]
            src, dst, src_at, dst_at, *checked = scratch.upload(uploads)
            copy = _Copy(
                layers=route.layers.data_ptr(), runs=route.runs.data_ptr(), chunks=route.chunks.data_ptr(),
                src_bases=src, dst_bases=dst, src_ids=src_at, dst_ids=dst_at,
                num_blocks=num_blocks, num_chunks=route.num_chunks,
            )  # fmt: skip
            units = num_blocks * route.num_chunks
            while copy.split < 2 and units << copy.split < 4 * _WARPS * self._max_sms:
                copy.split += 1
            units <<= copy.split
            if units >= 1 << 31:
                raise ValueError(f"{num_blocks} blocks are too many for one operation")
            grid = min(self._max_sms, -(-units // _WARPS))
            src_bits = route.src_bits | int(np.bitwise_or.reduce(src_bases))
            both_bits = src_bits | route.dst_bits
            if dst_bases is not None:
                both_bits |= int(np.bitwise_or.reduce(dst_bases))
            if check is None:
                self._launcher.launch(f"copy_blocks_{_grain(both_bits)}", grid, THREADS, copy, stream)
                return
            copy.sums = scratch.zeroed_sums(len(src_bases) * num_blocks)
            if dst_bases is None or check_first:
                self._launcher.launch(f"digest_blocks_{_grain(src_bits)}", grid, THREADS, copy, stream)
            else:
                self._launcher.launch(f"copy_digest_blocks_{_grain(both_bits)}", grid, THREADS, copy, stream)
            finish = _Finish(
                sums=copy.sums, positions=checked[0], expected=checked[1],
                digests=0 if check.digests is None else check.digests.data_ptr(),
                wrong=0 if check.wrong is None else check.wrong.data_ptr(),
                wrong_too=scratch.flags(num_blocks) if check_first else 0,
                num_layers=len(src_bases), num_blocks=num_blocks,
            )  # fmt: skip
            grid_of_finish = min(self._max_sms, -(-num_blocks // _WARPS))
            self._launcher.launch("finish_digests", grid_of_finish, THREADS, finish, stream)
            if check_first:
                copy.skip = finish.wrong_too
                self._launcher.launch(f"copy_blocks_{_grain(both_bits)}", grid, THREADS, copy, stream)

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[tuple[Scratch, int]]:
        """The current stream and its scratch memory, held until all is enqueued: threads may share a stream."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            with self._lock:
                if stream not in self._scratches:
                    self._scratches[stream] = Scratch(self._device)
                scratch = self._scratches[stream]
            with scratch.lock:
                yield scratch, stream


def _grain(bits: int) -> int:
    """The largest of the kernels' grains that divides all numbers whose OR is `bits`."""
    return next(grain for grain in (16, 8, 4, 1) if bits % grain == 0)


def _round_up(size: int) -> int:
    """The next power of two, so that memory grows a few times and no more."""
    return max(4096, 1 << (size - 1).bit_length())
