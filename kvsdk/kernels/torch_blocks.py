"""Blocks of a KV cache in CPU memory, or on a GPU without the kernels: moved by PyTorch, digested by NumPy or PyTorch.

On a GPU, what digests waits for the current stream here.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvsdk.kernels.digest import WordMixer
from kvsdk.kernels.process_memory import read_process
from kvsdk.kernels.results import Check
from kvsdk.layout import CacheLayout, LayerLayout, LayerPlan, Plan, plan_copy, staging_layout

PIECE_BYTES = 16 << 20
"""That a thread reads of a peer's memory before it digests and writes them: 256 rows of 64 KiB. Loads of 1 GiB ran at
0.53 of memcpy with 2 MiB, 0.61 with 4, 0.68 with 8, 0.71 with 16 and 0.58 with 32
(benchmarks/results/2026-11-22-cpu.md)."""


class TorchBlocks:
    """The blocks of one worker's KV cache.

    Args:
        kv_caches: the tensors from which `layout` was read, by layer name.
        layout: of the cache.
    """

    def __init__(self, kv_caches: dict[str, torch.Tensor], layout: CacheLayout):
        self._layout = layout
        tensors = [kv_caches[layer.name] for layer in layout.layers]
        self._device = tensors[0].device
        # A view that is made in inference mode could not be written outside it, and the reverse is fine.
        with torch.inference_mode(False):
            self._flat = [
                torch.empty(0, dtype=torch.uint8, device=self._device).set_(
                    tensor.untyped_storage(), layer.storage_offset, (_extent(layer, layout.num_blocks),), (1,)
                )
                for tensor, layer in zip(tensors, layout.layers, strict=True)
            ]
            # What a staging buffer is packed from; there a layer begins after those before it. The buffer's words are
            # of one kind for all layers, since a layer's place in it depends on their sizes.
            plan = plan_copy(layout, staging_layout(layout, 1))
            self._starts = [layer.storage_offset for layer in plan.dst.layers]
            self._word = _word(plan, self._flat)
            self._views = [
                _view(
                    flat,
                    self._word,
                    int(layer.src_offsets[0]),
                    [layout.num_blocks, *(count for count, _, _ in layer.loops or ()), layer.nbytes],
                    [layer.src_stride, *(step for _, step, _ in layer.loops or ())],
                )
                for flat, layer in zip(self._flat, plan.layers, strict=True)
            ]
            # Layers of one shape are digested together.
            self._even = len({view.shape[1:] for view in self._views}) == 1
            # NumPy copies a block's run as one piece, half as fast again as PyTorch's `index_copy_`, and asks for less
            # before it begins. Its `take` would copy all blocks first where they do not lie one behind the other.
            self._arrays = [view.numpy() for view in self._views] if self._device.type == "cpu" else []
            self._take = bool(self._arrays) and all(array.flags.c_contiguous for array in self._arrays)
            self.mixer = WordMixer(max(layer.block_bytes for layer in layout.layers), self._device)

    def puller(self, plan: Plan, addresses: np.ndarray, pid: int | None) -> Puller:
        """For reading a peer's memory: another process's, or this one's."""
        with torch.inference_mode(False):
            return Puller(self, plan, addresses, os.getpid() if pid is None else pid)

    def targets(self, plan: Plan) -> list[list[np.ndarray]]:
        """Views of this cache for what comes in another layout's order: for each layer `(blocks, counts…, words)`, one
        for each run where the runs are not evenly spaced."""
        word = _word(plan, self._flat)
        return [
            [
                _view(
                    flat, word, int(offset), [plan.dst.num_blocks, *counts, layer.nbytes], [layer.dst_stride, *steps]
                ).numpy()
                for offset, counts, steps in _nests(layer)
            ]
            for flat, layer in zip(self._flat, plan.layers, strict=True)
        ]

    def gather(self, ids: np.ndarray, staging: torch.Tensor, check: Check | None = None) -> None:
        if self._take:
            index = ids.astype(np.intp)
            for array, part in zip(self._arrays, self._array_parts(staging, len(ids)), strict=True):
                array.take(index, 0, part, "clip")  # other modes go through a buffer
        else:
            index = self._index(ids)
            for view, part in zip(self._views, self._parts(staging, len(ids)), strict=True):
                torch.index_select(view, 0, index, out=part)
        if check is not None:
            self.digest_staging(staging, len(ids), check)

    def scatter(self, ids: np.ndarray, staging: torch.Tensor, select: np.ndarray | None = None) -> None:
        if self._arrays:
            index = ids.astype(np.intp)
            for array, part in zip(self._arrays, self._array_parts(staging, len(ids)), strict=True):
                if select is None:
                    array[index] = part
                else:
                    array[index[select]] = part[select]
            return
        parts = self._parts(staging, len(ids))
        if select is None:
            index = self._index(ids)
            for view, part in zip(self._views, parts, strict=True):
                view.index_copy_(0, index, part)
            return
        chosen, index = self._index(select), self._index(ids[select])
        for view, part in zip(self._views, parts, strict=True):
            view.index_copy_(0, index, part.index_select(0, chosen))

    def scatter_right(self, ids: np.ndarray, staging: torch.Tensor, check: Check) -> None:
        right = np.flatnonzero(self.digest_staging(staging, len(ids), check) == check.expected)
        self.scatter(ids, staging, None if len(right) == len(ids) else right)

    def digest_staging(self, staging: torch.Tensor, num_blocks: int, check: Check) -> np.ndarray:
        if self._even:
            rows = staging[: num_blocks * self._layout.block_bytes].view(num_blocks * len(self._views), -1)
            return self.finish(list(self.mixer.row_sums(rows).reshape(-1, num_blocks)), check)
        parts = self._parts(staging, num_blocks)
        return self.finish([self.mixer.row_sums(_rows(part)) for part in parts], check)

    def digest(self, ids: np.ndarray, check: Check) -> None:
        index = self._index(ids)
        self.finish([self.mixer.row_sums(_rows(view.index_select(0, index))) for view in self._views], check)

    def finish(self, sums: list[Any], check: Check) -> np.ndarray:
        """Digests from the sums of rows, one a layer; tells what `check` asks for."""
        digests = self.mixer.digests(sums, check.positions)
        if check.digests is not None:
            check.digests.copy_(torch.from_numpy(digests.view(np.int64)))
        if check.wrong is not None:
            check.wrong.copy_(torch.from_numpy((digests != check.expected).view(np.uint8)))
        return digests

    def _parts(self, staging: torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
        """Views of the staged blocks, one a layer, of the shapes of `_views`."""
        parts = []
        for layer, start, view in zip(self._layout.layers, self._starts, self._views, strict=True):
            part = staging[num_blocks * start : num_blocks * (start + layer.block_bytes)]
            parts.append(part.view(self._word).view(num_blocks, *view.shape[1:]))
        return parts

    def _array_parts(self, staging: torch.Tensor, num_blocks: int) -> Iterable[np.ndarray]:
        """`_parts` for NumPy; one view of all layers where they have one shape, which takes a tenth of the time."""
        if not self._even:
            return [part.numpy() for part in self._parts(staging, num_blocks)]
        array = self._arrays[0]
        staged = staging.numpy()[: num_blocks * self._layout.block_bytes].view(array.dtype)
        return staged.reshape(len(self._arrays), num_blocks, *array.shape[1:])

    def _index(self, ids: np.ndarray) -> torch.Tensor:
        index = torch.from_numpy(ids.astype(np.int64))
        if self._device.type == "cuda":
            # From pinned memory the copy does not wait for the stream.
            return index.pin_memory().to(self._device, non_blocking=True)
        return index


@dataclass(frozen=True, eq=False)
class _Alike:
    """Layers of a peer's cache that follow one another and are of one shape, and where their blocks go here.

    Attributes:
        starts: uint64 `(layers,)`: where block 0 of each lies.
        segments: uint64 `(segments,)`: where a block's pieces begin, from its first byte.
        segment_bytes: of each piece.
        targets: for each layer, see `TorchBlocks.targets`.
    """

    plan: LayerPlan
    starts: np.ndarray
    segments: np.ndarray
    segment_bytes: int
    targets: list[list[np.ndarray]]


class Puller:
    """Reads blocks of a peer's cache: a piece of some MiB from the other process at a time, which is digested and then
    written while a core's caches have it. Safe to use from several threads, for different blocks of this cache."""

    def __init__(self, blocks: TorchBlocks, plan: Plan, addresses: np.ndarray, pid: int):
        self._blocks, self._pid = blocks, pid
        self._idle: collections.deque[torch.Tensor] = collections.deque()  # memory for pieces that nobody uses now
        targets, self._alike = blocks.targets(plan), list[_Alike]()
        for layer, group in itertools.groupby(range(len(plan.layers)), key=lambda i: plan.layers[i]):
            indices = list(group)
            segments = plan.src.layers[indices[0]].segments
            offsets = np.array([offset for offset, _ in segments], np.uint64)
            views = [targets[i] for i in indices]
            self._alike.append(_Alike(layer, addresses[indices], offsets, segments[0][1], views))
        self._piece = max(PIECE_BYTES, max(layer.block_bytes for layer in plan.layers))

    def choose(self, ids: np.ndarray, positions: np.ndarray | None, expected: np.ndarray | None) -> tuple[Any, ...]:
        """Notes blocks' ids, positions and digests."""
        return ids, positions, expected

    def pull(
        self,
        chosen: tuple[Any, ...],
        first: int,
        dst_ids: np.ndarray,
        wrong: torch.Tensor | None,
        digests: torch.Tensor | None,
    ) -> None:
        """Reads as many of the chosen blocks, from `first` on, as there are `dst_ids`."""
        n = len(dst_ids)
        ids, positions, expected = (array[first : first + n] if array is not None else None for array in chosen)
        sums: list[np.ndarray] = []
        which = ids.astype(np.uint64), dst_ids.astype(np.intp)
        with self._staging() as staging:
            for alike in self._alike:
                told = self._pull(staging, alike, *which, digested=positions is not None)
                sums += list(told.reshape(-1, n))
        if positions is not None:
            results = (tensor[:n] if tensor is not None else None for tensor in (digests, wrong))
            self._blocks.finish(sums, Check(positions, expected, *results))

    def _pull(
        self, staging: torch.Tensor, alike: _Alike, ids: np.ndarray, dst_ids: np.ndarray, *, digested: bool
    ) -> np.ndarray:
        """Returns the sum of each row, layer by layer, if they are digested."""
        n, layer = len(ids), alike.plan
        total, size = n * len(alike.starts), layer.block_bytes
        sums = np.zeros(total if digested else 0, np.uint64)
        at_once = self._piece // size
        for a in range(0, total, at_once):
            b = min(a + at_once, total)
            which, block = np.divmod(np.arange(a, b), n)
            begins = alike.starts[which] + ids[block] * np.uint64(layer.src_stride)
            piece = staging[: (b - a) * size]
            places = (begins[:, None] + alike.segments).reshape(-1)
            read_process(self._pid, places, alike.segment_bytes, piece)
            # The same bytes are digested and written: the peer may change its own at any time.
            if digested:
                sums[a:b] = self._blocks.mixer.row_sums(piece.view(b - a, size))
            rows = piece.numpy().reshape(b - a, size)
            for i in range(a // n, -(-b // n)):
                low, high = max(a, i * n), min(b, (i + 1) * n)
                _write(alike.targets[i], dst_ids[low - i * n : high - i * n], rows[low - a : high - a])
        return sums

    @contextlib.contextmanager
    def _staging(self) -> Iterator[torch.Tensor]:
        """Memory for a piece."""
        try:
            staging = self._idle.pop()
        except IndexError:
            with torch.inference_mode(False):
                staging = torch.empty(self._piece, dtype=torch.uint8)
        try:
            yield staging
        finally:
            self._idle.append(staging)


def _write(targets: list[np.ndarray], dst_ids: np.ndarray, rows: np.ndarray) -> None:
    """Write a layer's blocks, `(blocks, bytes)`, where they go."""
    words = rows.view(targets[0].dtype)
    each = words.shape[1] // len(targets)
    for i, target in enumerate(targets):
        target[dst_ids] = words[:, i * each : (i + 1) * each].reshape(-1, *target.shape[1:])


def _nests(layer: LayerPlan) -> list[tuple[int, list[int], list[int]]]:
    """A layer's runs at the destination: `(offset, counts, steps)`. Those that are not evenly spaced one by one."""
    if layer.loops is None:
        return [(int(offset), [], []) for offset in layer.dst_offsets]
    counts, steps = [count for count, _, _ in layer.loops], [step for _, _, step in layer.loops]
    return [(int(layer.dst_offsets[0]), counts, steps)]


def _extent(layer: LayerLayout, num_blocks: int) -> int:
    """Bytes from block 0's first byte to the last block's last."""
    offset, nbytes = layer.segments[-1]
    return (num_blocks - 1) * layer.block_stride + offset + nbytes


def _word(plan: Plan, flat: list[torch.Tensor]) -> torch.dtype:
    """Words of 8 bytes, which move faster, where everything is a multiple of them; else bytes."""
    places = [tensor.data_ptr() | tensor.storage_offset() for tensor in flat]
    for layer in {id(layer): layer for layer in plan.layers}.values():
        places += [layer.nbytes, layer.src_stride, layer.dst_stride]
        places += np.concatenate([layer.src_offsets, layer.dst_offsets]).tolist()
    return torch.uint8 if any(place % 8 for place in places) else torch.int64


def _view(flat: torch.Tensor, word: torch.dtype, offset: int, shape: list[int], steps: list[int]) -> torch.Tensor:
    """`(blocks, counts…, words)` of `flat`, from `offset` on; `shape` and `steps` in bytes, the last step left out."""
    size = word.itemsize
    return torch.empty(0, dtype=word, device=flat.device).set_(
        flat.untyped_storage(),
        (flat.storage_offset() + offset) // size,
        (*shape[:-1], shape[-1] // size),
        (*(step // size for step in steps), 1),
    )


def _rows(part: torch.Tensor) -> torch.Tensor:
    """`(blocks, bytes)`, uint8, of contiguous `(blocks, …)`."""
    return part.reshape(len(part), -1).view(torch.uint8)
