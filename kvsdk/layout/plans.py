"""Plans: which bytes of which layer and block go where, between two layouts that hold the same content.

A plan knows no tensors and no block ids. `kvsdk.kernels` carries it out; `byte_runs` turns it, with block ids, into
plain byte ranges for whatever else moves bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvsdk.layout.cache import CacheLayout, LayerLayout, check_same


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """Where the bytes of one layer's part of a block go.

    The payload is cut into runs of one size that are contiguous on both sides; where both sides are dense and in one
    order, a run is the whole page.

    Attributes:
        nbytes: bytes of a run.
        src_offsets: int64, ascending: where each run begins, from the source block's first byte. In this order the
            runs are the source's payload in its own memory order.
        dst_offsets: int64: where the same run goes, from the destination block's first byte.
        loops: the same offsets as nested, evenly spaced counts, `(count, src_step, dst_step)` in bytes, outermost
            first; empty for one run, None where the runs are not spaced like that.
        src_stride: bytes from one block to the next at the source.
        dst_stride: the same at the destination.
    """

    nbytes: int
    src_offsets: np.ndarray
    dst_offsets: np.ndarray
    loops: tuple[tuple[int, int, int], ...] | None
    src_stride: int
    dst_stride: int

    @property
    def block_bytes(self) -> int:
        """Payload bytes of a block."""
        return self.nbytes * len(self.src_offsets)


@dataclass(frozen=True, eq=False)
class Plan:
    """How blocks get from `src` to `dst`.

    Attributes:
        src: the layout that blocks come from.
        dst: the layout that they go to.
        layers: one `LayerPlan` a layer; equal layers share one object.
    """

    src: CacheLayout
    dst: CacheLayout
    layers: tuple[LayerPlan, ...]


def plan_copy(src: CacheLayout, dst: CacheLayout) -> Plan:
    """Finds where each byte of a block goes, for layouts of the same content in whatever order and spacing.

    Heads and tokens may lie in another order, and kernel blocks may cut the tokens in another way; the plan's runs are
    then what stays together on both sides. Attention backends are not compared: whether their bytes mean the same is
    for the handshake to say (`CacheLayout.fingerprint`).

    Raises:
        MismatchError: the content differs: number of layers, block size, dtype, or sizes of heads (H), tokens (N) and
            content (C); `ours` is the destination's value, `theirs` the source's.
    """
    check_same(_content(dst), _content(src))
    known: dict[Any, LayerPlan] = {}
    layers = []
    for a, b in zip(src.layers, dst.layers, strict=True):
        key = (_bytes_of(a), _bytes_of(b))
        if key not in known:
            known[key] = _plan_layer(a, b)
        layers.append(known[key])
    return Plan(src, dst, tuple(layers))


def staging_layout(layout: CacheLayout, num_blocks: int) -> CacheLayout:
    """The layout of a staging buffer: packed, layer-major; for each layer the blocks' payloads one after the other.

    A layer's `storage_offset` is where it begins in the buffer. Payloads keep the memory order that they have in
    `layout`, so plans to and from it have the runs of `layout`'s segments.
    """
    layers, start = [], 0
    for layer in layout.layers:
        size = layer.block_bytes
        layers.append(replace(layer, block_stride=size, segments=((0, size),), storage_offset=start))
        start += num_blocks * size
    return replace(layout, layers=tuple(layers), num_blocks=num_blocks)


def byte_runs(plan: Plan, src_ids: np.ndarray, dst_ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The fewest contiguous runs of bytes that copy block `src_ids[i]` to `dst_ids[i]`, for each layer.

    Runs of blocks that are neighbours on both sides become one, where their pages are dense.

    Args:
        plan: from `plan_copy`.
        src_ids: 1-D integers, repeats allowed.
        dst_ids: as many, no id twice.

    Returns:
        A layer's `(src_offset, dst_offset, nbytes)`, int64 arrays of one length, ascending by `dst_offset`; offsets
        count from the first byte of block 0 of the layer.

    Raises:
        ValueError: the ids are not as many, or a destination comes twice.
    """
    src_ids, dst_ids = np.asarray(src_ids).astype(np.int64), np.asarray(dst_ids).astype(np.int64)
    if src_ids.ndim != 1 or src_ids.shape != dst_ids.shape or len(np.unique(dst_ids)) != len(dst_ids):
        raise ValueError("src_ids and dst_ids must be 1-D, as many, and dst_ids all different")
    known: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for layer in plan.layers:
        if id(layer) not in known:
            src = (src_ids[:, None] * layer.src_stride + layer.src_offsets).ravel()
            dst = (dst_ids[:, None] * layer.dst_stride + layer.dst_offsets).ravel()
            known[id(layer)] = _merge(src, dst, layer.nbytes)
    return [known[id(layer)] for layer in plan.layers]


def _merge(src: np.ndarray, dst: np.ndarray, nbytes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Destinations are all different, so in their order a run's successor on both sides stands right behind it.
    order = np.argsort(dst)
    src, dst = src[order], dst[order]
    begins = np.ones(len(src), dtype=bool)
    begins[1:] = (np.diff(src) != nbytes) | (np.diff(dst) != nbytes)
    first = np.flatnonzero(begins)
    return src[first], dst[first], np.diff(first, append=len(src)) * nbytes


def _content(layout: CacheLayout) -> dict[str, Any]:
    return {
        "num_layers": len(layout.layers),
        "block_size": layout.block_size,
        "dtype": [layer.dtype for layer in layout.layers],
        "dims": [_sizes(layer) for layer in layout.layers],
    }


def _sizes(layer: LayerLayout) -> dict[str, int]:
    sizes = dict(zip(layer.order, layer.dims, strict=True))
    return {"H": sizes.get("H", 1), "N": sizes.get("R", 1) * sizes.get("N", 1), "C": sizes["C"]}


def _bytes_of(layer: LayerLayout) -> tuple[Any, ...]:
    return (layer.block_bytes, layer.block_stride, layer.segments, layer.order, layer.dims)


def _plan_layer(src: LayerLayout, dst: LayerLayout) -> LayerPlan:
    ours, theirs = list(zip(dst.order, dst.dims, strict=True)), list(zip(src.order, src.dims, strict=True))
    inner = src.block_bytes // math.prod(src.dims)
    while ours and theirs and ours[-1] == theirs[-1]:
        inner *= ours.pop()[1]
        theirs.pop()
    # No segment's end may lie within a grain.
    grain = math.gcd(inner, src.segments[0][1], dst.segments[0][1])
    within = np.arange(0, inner, grain)
    packed = np.arange(0, src.block_bytes, grain, dtype=np.int64)
    src_offsets = _spread(src, packed)
    dst_offsets = _spread(dst, (_places(theirs, ours)[:, None] * inner + within).ravel())
    ends = np.flatnonzero((np.diff(src_offsets) != grain) | (np.diff(dst_offsets) != grain)) + 1
    together = math.gcd(len(packed), *ends.tolist())
    src_offsets, dst_offsets = src_offsets[::together].copy(), dst_offsets[::together].copy()
    for offsets in (src_offsets, dst_offsets):
        offsets.flags.writeable = False
    return LayerPlan(
        nbytes=grain * together,
        src_offsets=src_offsets,
        dst_offsets=dst_offsets,
        loops=_loops(src_offsets, dst_offsets),
        src_stride=src.block_stride,
        dst_stride=dst.block_stride,
    )


def _spread(layer: LayerLayout, packed: np.ndarray) -> np.ndarray:
    """Offsets within the block of bytes whose offsets within the packed payload are given."""
    offset, run = layer.segments[0]
    step = layer.segments[1][0] - offset if len(layer.segments) > 1 else run
    return offset + packed // run * step + packed % run


def _places(theirs: list[tuple[str, int]], ours: list[tuple[str, int]]) -> np.ndarray:
    """For each index into dims `theirs`, in memory order, the index of the same element in dims `ours`."""
    sizes = [size for _, size in theirs]
    indices = np.indices(sizes, dtype=np.int64).reshape(len(sizes), math.prod(sizes))
    theirs_at = dict(zip([name for name, _ in theirs], indices, strict=True))
    zero = np.zeros(indices.shape[1], dtype=np.int64)
    tokens = theirs_at.get("R", zero) * dict(theirs).get("N", 1) + theirs_at.get("N", zero)
    kernel_block = dict(ours).get("N", 1)
    at = {
        "H": theirs_at.get("H", zero),
        "C": theirs_at.get("C", zero),
        "R": tokens // kernel_block,
        "N": tokens % kernel_block,
    }
    places = zero
    for name, size in ours:
        places = places * size + at[name]
    return places


def _loops(src: np.ndarray, dst: np.ndarray) -> tuple[tuple[int, int, int], ...] | None:
    loops: list[tuple[int, int, int]] = []
    while len(src) > 1:
        src_step, dst_step = int(src[1] - src[0]), int(dst[1] - dst[0])
        uneven = np.flatnonzero((np.diff(src) != src_step) | (np.diff(dst) != dst_step))
        count = int(uneven[0]) + 1 if len(uneven) else len(src)
        if len(src) % count:
            return None
        src, dst = src.reshape(-1, count), dst.reshape(-1, count)
        if (np.diff(src, axis=1) != src_step).any() or (np.diff(dst, axis=1) != dst_step).any():
            return None
        loops.insert(0, (count, src_step, dst_step))
        src, dst = src[:, 0], dst[:, 0]
    return tuple(loops)
