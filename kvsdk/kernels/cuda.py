"""Blocks of a KV cache on a GPU, moved and digested by the kernels of `csrc/blocks.cu`."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import NamedTuple, Protocol

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


LISTED_IDS = 2048
"""Ids that a launch takes along: 30,000 tokens in blocks of 16, in 8 KiB of arguments, of which CUDA takes 32,764 bytes
since release 12.1."""


class _Listed(ctypes.Structure):
    _fields_ = [("copy", _Copy), ("dst_ids", ctypes.c_int32 * LISTED_IDS)]


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
    f"-DLISTED_IDS={LISTED_IDS}",
)
"""What the source is compiled with, but for the kind of GPU."""


class Launcher(Protocol):
    """What `CudaBlocks` launches kernels through: `kvsdk.kernels.nvrtc.Module`."""

    def launch(self, name: str, grid: int, threads: int, args: ctypes.Structure, stream: int) -> None: ...

    def upload(self, device_address: int, host_address: int, nbytes: int, stream: int) -> None: ...


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
        self._sums = self._empty(0).zero_()
        self._flags = self._empty(0)
        self._pinned: collections.deque[tuple[torch.Tensor, torch.cuda.Event]] = collections.deque()

    def upload(self, arrays: list[np.ndarray | None]) -> list[int]:
        """Copies arrays to the device in one go, on the current stream; returns their addresses, 0 for None."""
        _, total = _starts(arrays)
        if self._arguments.numel() < total:
            self._arguments = self._empty(total)
        self.fill(self._arguments, arrays)
        return _addresses(self._arguments, arrays)

    def fill(self, memory: torch.Tensor, arrays: list[np.ndarray | None]) -> None:
        """Copies arrays to the places in `memory`, on the device, that `_starts` gives them, on the current stream."""
        starts, total = _starts(arrays)
        pinned, event = self._take_pinned(total)
        host = pinned.numpy()
        for array, start in zip(arrays, starts, strict=True):
            if array is not None:
                host[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8)
        memory[:total].copy_(pinned[:total], non_blocking=True)
        event.record()
        self._pinned.append((pinned, event))

    def new_memory(self, arrays: list[np.ndarray | None]) -> torch.Tensor:
        """Memory on the device of its own that holds arrays, as `fill` puts them there."""
        with torch.inference_mode(False):
            memory = torch.empty(max(16, _starts(arrays)[1]), dtype=torch.uint8, device=self._device)
        self.fill(memory, arrays)
        return memory

    def zeroed_sums(self, count: int) -> int:
        """The address of `count` sums of 0, which `finish_digests` leaves at 0."""
        if self._sums.numel() < 8 * count:
            self._sums = self._empty(8 * count).zero_()
        return self._sums.data_ptr()

    def forget_sums(self) -> None:
        """What was added to them may not have been taken out: take others."""
        self._sums = self._empty(0).zero_()

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


def _starts(arrays: list[np.ndarray | None]) -> tuple[list[int], int]:
    """Where each of several arrays begins in memory for all of them, and how much that is."""
    starts, total = [], 0
    for array in arrays:
        starts.append(total)
        total += -(-array.nbytes // 16) * 16 if array is not None else 0
    return starts, total


def _addresses(memory: torch.Tensor, arrays: list[np.ndarray | None]) -> list[int]:
    """Where each of them begins there; 0 for None."""
    base = memory.data_ptr()
    return [base + start if array is not None else 0 for array, start in zip(arrays, _starts(arrays)[0], strict=True)]


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

    def puller(self, plan: Plan, addresses: np.ndarray) -> Puller:
        """For reading a peer's cache, on the current stream."""
        with self._on_stream() as (scratch, stream):
            return Puller(
                Route(plan, self._device),
                addresses,
                self._addresses,
                self._max_sms,
                self._launcher,
                type(scratch)(self._device),
                stream,
            )

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
            grid = _grid(copy, self._max_sms)
            src_bits = route.src_bits | int(np.bitwise_or.reduce(src_bases))
            both_bits = src_bits | route.dst_bits
            if dst_bases is not None:
                both_bits |= int(np.bitwise_or.reduce(dst_bases))
            if check is None:
                self._launcher.launch(f"copy_blocks_{_grain(both_bits)}", grid, THREADS, copy, stream)
                return
            copy.sums = scratch.zeroed_sums(len(src_bases) * num_blocks)
            finish = _Finish(
                sums=copy.sums, positions=checked[0], expected=checked[1],
                digests=0 if check.digests is None else check.digests.data_ptr(),
                wrong=0 if check.wrong is None else check.wrong.data_ptr(),
                wrong_too=scratch.flags(num_blocks) if check_first else 0,
                num_layers=len(src_bases), num_blocks=num_blocks,
            )  # fmt: skip
            only_digest = dst_bases is None or check_first
            kernel = f"digest_blocks_{_grain(src_bits)}" if only_digest else f"copy_digest_blocks_{_grain(both_bits)}"
            try:
                self._launcher.launch(kernel, grid, THREADS, copy, stream)
                grid_of_finish = min(self._max_sms, -(-num_blocks // _WARPS))
                self._launcher.launch("finish_digests", grid_of_finish, THREADS, finish, stream)
            except BaseException:
                scratch.forget_sums()
                raise
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


class Puller:
    """Reads blocks of a peer's cache, on one stream, for one thread at a time.

    Small loads take as long as the host takes to launch them, so all that can be is prepared: the tables lie on the
    device, `choose` puts there which blocks may be read and what they should be, and a pull adds their destinations.
    """

    def __init__(
        self,
        route: Route,
        src_bases: np.ndarray,
        dst_bases: np.ndarray,
        max_sms: int,
        launcher: Launcher,
        scratch: Scratch,
        stream: int,
    ):
        self._route, self._max_sms, self._launcher = route, max_sms, launcher
        self._scratch, self._stream = scratch, stream
        self._bases = scratch.new_memory([src_bases, dst_bases])
        src, dst = _addresses(self._bases, [src_bases, dst_bases])
        copy = _Copy(
            layers=route.layers.data_ptr(), runs=route.runs.data_ptr(), chunks=route.chunks.data_ptr(),
            src_bases=src, dst_bases=dst,
            num_chunks=route.num_chunks,
        )  # fmt: skip
        self._listed = _Listed(copy)
        self._copy = self._listed.copy
        self._listed_ids = np.frombuffer(self._listed, np.int32)[ctypes.sizeof(_Copy) // 4 :]
        self._finish = _Finish(num_layers=len(src_bases))
        grain = _grain(
            route.src_bits | route.dst_bits | int(np.bitwise_or.reduce(np.concatenate([src_bases, dst_bases])))
        )
        self._names = f"copy_blocks_{grain}", f"copy_digest_blocks_{grain}"
        self._can_list = grain == 16
        self._grow(LISTED_IDS)

    def _grow(self, count: int) -> None:
        """Memory for the ids of destinations."""
        pinned, _ = self._scratch.new_pinned(_round_up(4 * count))
        self._ids, self._host = self._scratch.new_memory([pinned.numpy()]), pinned
        self._host_ids = pinned.numpy().view(np.int32)

    def choose(self, ids: np.ndarray, positions: np.ndarray | None, expected: np.ndarray | None) -> Chosen:
        """Puts blocks' ids, positions and digests on the device."""
        arrays = [ids, positions, expected]
        memory = self._scratch.new_memory(arrays)
        return Chosen(memory, *_addresses(memory, arrays))

    def pull(
        self, chosen: Chosen, first: int, dst_ids: np.ndarray, wrong: torch.Tensor | None, digests: torch.Tensor | None
    ) -> None:
        """Enqueues reading as many of the chosen blocks, from `first` on, as there are `dst_ids`. The stream must have
        carried out the pull before."""
        n, copy, finish = len(dst_ids), self._copy, self._finish
        copy.src_ids, copy.num_blocks = chosen.ids + 4 * first, n
        grid = _grid(copy, self._max_sms)
        listed = self._can_list and chosen.positions and n <= LISTED_IDS
        if listed:
            self._listed_ids[:n] = dst_ids
        else:
            if n > len(self._host_ids):
                self._grow(n)
            self._host_ids[:n] = dst_ids
            copy.dst_ids = self._ids.data_ptr()
            self._launcher.upload(copy.dst_ids, self._host.data_ptr(), 4 * n, self._stream)
        if not chosen.positions:
            self._launcher.launch(self._names[0], grid, THREADS, copy, self._stream)
            return
        copy.sums = finish.sums = self._scratch.zeroed_sums(finish.num_layers * n)
        try:
            if listed:
                self._launcher.launch("copy_digest_listed", grid, THREADS, self._listed, self._stream)
            else:
                self._launcher.launch(self._names[1], grid, THREADS, copy, self._stream)
            finish.positions, finish.num_blocks = chosen.positions + 8 * first, n
            finish.expected = chosen.expected + 8 * first if chosen.expected else 0
            finish.wrong = 0 if wrong is None else wrong.data_ptr()
            finish.digests = 0 if digests is None else digests.data_ptr()
            self._launcher.launch("finish_digests", min(self._max_sms, -(-n // _WARPS)), THREADS, finish, self._stream)
        except BaseException:
            self._scratch.forget_sums()
            raise


class Chosen(NamedTuple):
    """Blocks of a peer, on the device: the memory, and the addresses of what is in it; 0 for what is not."""

    memory: torch.Tensor
    ids: int
    positions: int
    expected: int


def _grid(copy: _Copy, max_sms: int) -> int:
    """Thread blocks for a copy; cuts its units where there are few."""
    units = copy.num_blocks * copy.num_chunks
    copy.split = 0
    while copy.split < 2 and units << copy.split < 4 * _WARPS * max_sms:
        copy.split += 1
    units <<= copy.split
    if units >= 1 << 31:
        raise ValueError(f"{copy.num_blocks} blocks are too many for one operation")
    return min(max_sms, -(-units // _WARPS))


def _grain(bits: int) -> int:
    """The largest of the kernels' grains that divides all numbers whose OR is `bits`."""
    return next(grain for grain in (16, 8, 4, 1) if bits % grain == 0)


def _round_up(size: int) -> int:
    """The next power of two, so that memory grows a few times and no more."""
    return max(4096, 1 << (size - 1).bit_length())
