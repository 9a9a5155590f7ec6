"""Blocks of a KV cache in CPU memory, or on a GPU without the kernels: moved by PyTorch, digested by NumPy or PyTorch.

On a GPU, what digests waits for the current stream here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from kvsdk.kernels.digest import WordMixer
from kvsdk.kernels.results import Check
from kvsdk.layout import CacheLayout, LayerLayout, Plan, plan_copy, staging_layout


class Route:
    """A plan as PyTorch carries it out: for each layer, pairs of views of the same runs, a dim 0 a block."""

    def __init__(self, plan: Plan, src: list[torch.Tensor], dst: list[torch.Tensor]):
        word = _word(plan, [*src, *dst])
        self.layers: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        for layer, a, b in zip(plan.layers, src, dst, strict=True):
            # Runs that are not evenly spaced are copied one by one.
            nests = (
                [(int(layer.src_offsets[0]), int(layer.dst_offsets[0]), layer.loops)]
                if layer.loops is not None
                else [(int(s), int(d), ()) for s, d in zip(layer.src_offsets, layer.dst_offsets, strict=True)]
            )
            pairs = []
            for src_offset, dst_offset, loops in nests:
                shape = [count for count, _, _ in loops] + [layer.nbytes]
                src_steps = [layer.src_stride, *(step for _, step, _ in loops)]
                dst_steps = [layer.dst_stride, *(step for _, _, step in loops)]
                pairs.append(
                    (
                        _view(a, word, src_offset, [plan.src.num_blocks, *shape], src_steps),
                        _view(b, word, dst_offset, [plan.dst.num_blocks, *shape], dst_steps),
                    )
                )
            self.layers.append(pairs)


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

    def puller(self, plan: Plan, addresses: np.ndarray) -> Puller:
        """For reading a peer's memory that is mapped into this process."""
        src = [
            torch.frombuffer(
                (ctypes.c_uint8 * _extent(layer, plan.src.num_blocks)).from_address(int(address)), dtype=torch.uint8
            )
            for layer, address in zip(plan.src.layers, addresses, strict=True)
        ]
        with torch.inference_mode(False):
            return Puller(self, Route(plan, src, self._flat))

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
            return self._finish(list(self.mixer.row_sums(rows).reshape(-1, num_blocks)), check)
        parts = self._parts(staging, num_blocks)
        return self._finish([self.mixer.row_sums(_rows(part)) for part in parts], check)

    def digest(self, ids: np.ndarray, check: Check) -> None:
        index = self._index(ids)
        self._finish([self.mixer.row_sums(_rows(view.index_select(0, index))) for view in self._views], check)

    def pull(self, route: Route, src_ids: np.ndarray, dst_ids: np.ndarray, check: Check | None) -> None:
        src_index, dst_index = self._index(src_ids), self._index(dst_ids)
        sums = []
        for pairs in route.layers:
            # The same bytes are digested and written: the peer may change its own at any time.
            read = [src.index_select(0, src_index) for src, _ in pairs]
            if check is not None:
                sums.append(self.mixer.row_sums(torch.cat([_rows(part) for part in read], dim=1)))
            for (_, dst), part in zip(pairs, read, strict=True):
                dst.index_copy_(0, dst_index, part)
        if check is not None:
            self._finish(sums, check)

    def _finish(self, sums: list[Any], check: Check) -> np.ndarray:
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


class Puller:
    """Reads blocks of a peer's cache."""

    def __init__(self, blocks: TorchBlocks, route: Route):
        self._blocks, self._route = blocks, route

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
        part = slice(first, first + len(dst_ids))
        ids, positions, expected = (array[part] if array is not None else None for array in chosen)
        check = None
        if positions is not None:
            n = len(dst_ids)
            told = (tensor[:n] if tensor is not None else None for tensor in (digests, wrong))
            check = Check(positions, expected, *told)
        self._blocks.pull(self._route, ids, dst_ids, check)


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
