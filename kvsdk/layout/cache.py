"""Where the bytes of each block lie in a worker's KV cache: pure data, read off the tensors that vLLM registers.

vLLM hands over one tensor a layer, and the same bytes come in many shapes: `(B, H, N, C)` with strides that put tokens
before heads (NHD), the same contiguous (HND), MLA as `(B, N, C)` or `(B, 1, N, C)`, one buffer for all layers, several
kernel blocks to a block. Two servers may exchange blocks when a block's bytes mean the same on both, whatever the
shapes; `CacheLayout.fingerprint` holds exactly that and `check_same` names what differs.

B blocks, H heads, N tokens of a block, C content of a head and token (K and V together), R kernel blocks to a block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from kvsdk.errors import ConfigError, MismatchError

_DIM_NAMES = {1: "C", 2: "NC", 3: "HNC"}


@dataclass(frozen=True)
class LayerLayout:
    """One layer's part of a block.

    Attributes:
        name: the layer's name in the model.
        dtype: such as `bfloat16`.
        block_bytes: payload of one block of this layer, in bytes.
        block_stride: bytes from one block's first byte to the next one's; larger than `block_bytes` where the blocks
            of all layers share a page.
        segments: `(offset, nbytes)` runs within a block's stride that hold the payload, in memory order, all of one
            size and evenly spaced; one for a dense block.
        order: the dims after the block in memory order, outermost first: `HNC`, `NHC`, `NC`. Dims of size 1 are left
            out but for `C`, since they move no byte. `R` appears where kernel blocks cut the tokens apart, such as
            `RHNC`; where the tokens of kernel blocks follow each other, `RN` is the same bytes as `N` and is called so.
        dims: sizes of the dims in `order`.
        shape: sizes of the dims after the block, in the tensor's order.
        storage_offset: bytes from the start of the tensor's storage to block 0.
    """

    name: str
    dtype: str
    block_bytes: int
    block_stride: int
    segments: tuple[tuple[int, int], ...]
    order: str
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    storage_offset: int


@dataclass(frozen=True)
class CacheLayout:
    """The layers of one worker's KV cache, in the model's order.

    Attributes:
        layers: one `LayerLayout` a layer.
        num_blocks: blocks in vLLM's pool; block ids run from 0 to `num_blocks - 1`.
        block_size: tokens of a block.
        backend: name of the attention backend, which decides what the bytes within a block mean; empty if unknown.
    """

    layers: tuple[LayerLayout, ...]
    num_blocks: int
    block_size: int
    backend: str = ""

    @property
    def block_bytes(self) -> int:
        """Payload bytes of one block over all layers."""
        return sum(layer.block_bytes for layer in self.layers)

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal on two servers for a block's bytes to mean the same on both.

        Left out on purpose: the number of blocks, tensor shapes (MLA's 3-D and 4-D tensors hold the same bytes),
        strides between blocks (a block travels packed) and layer names (releases of vLLM differ in prefixes).
        """
        return {
            "block_size": self.block_size,
            "num_layers": len(self.layers),
            "backend": self.backend,
            "dtype": [layer.dtype for layer in self.layers],
            "order": [layer.order for layer in self.layers],
            "dims": [list(layer.dims) for layer in self.layers],
            "block_bytes": [layer.block_bytes for layer in self.layers],
        }


def layout_of(
    kv_caches: dict[str, torch.Tensor], *, num_blocks: int, block_size: int, backend: str = ""
) -> CacheLayout:
    """Reads the layout off the tensors that vLLM registers.

    Args:
        kv_caches: layer name to tensor; dim 0 counts blocks, or kernel blocks (a multiple of `num_blocks`).
        num_blocks: blocks in vLLM's pool.
        block_size: tokens of a block.
        backend: name of the attention backend.

    Raises:
        ConfigError: a layer is no attention cache (state-space models register lists of tensors), its tensor does not
            divide into `num_blocks` blocks, or its elements overlap.
    """
    if not kv_caches:
        raise ConfigError("no KV caches were registered: this model has no attention layers that a connector can move")
    names = sorted(kv_caches, key=_natural_key)
    layers = tuple(_layer_of(name, kv_caches[name], num_blocks, block_size) for name in names)
    return CacheLayout(layers, num_blocks, block_size, backend)


def check_same(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> None:
    """Compares two fingerprints, field by field in our order.

    Args:
        ours: this side's nested dict of scalars, lists and dicts.
        theirs: the peer's, straight from a message: anything may be in it.
        prefix: put before the dotted name of a field.

    Raises:
        MismatchError: naming the first field that differs or that one side lacks (its value is then None).
    """
    missing = object()
    for key, value in ours.items():
        _check_field(f"{prefix}.{key}" if prefix else str(key), value, theirs.get(key, missing), missing)
    for key, value in theirs.items():
        if key not in ours:
            raise MismatchError(f"{prefix}.{key}" if prefix else str(key), None, value)


def _check_field(field: str, ours: Any, theirs: Any, missing: object) -> None:
    if theirs is missing:
        raise MismatchError(field, ours, None)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        check_same(ours, theirs, field)
    elif isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        if len(ours) != len(theirs):
            raise MismatchError(f"{field}.length", len(ours), len(theirs))
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            _check_field(f"{field}.{i}", a, b, missing)
    # bool is an int in Python: True must not pass for 1.
    elif type(ours) is not type(theirs) or ours != theirs:
        raise MismatchError(field, ours, theirs)


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def _layer_of(name: str, tensor: Any, num_blocks: int, block_size: int) -> LayerLayout:
    if not isinstance(tensor, torch.Tensor):
        raise ConfigError(
            f"layer {name!r} registers a {type(tensor).__name__}, not a tensor: state-space models are not supported"
        )
    ratio, rest = divmod(tensor.shape[0], num_blocks) if tensor.dim() and num_blocks > 0 else (0, 0)
    if not 2 <= tensor.dim() <= 4 or ratio == 0 or rest or tensor.numel() == 0:
        raise ConfigError(
            f"layer {name!r} has shape {tuple(tensor.shape)}: expected 2 to 4 dims, the first a multiple of "
            f"{num_blocks} blocks"
        )
    item = tensor.element_size()
    shape = tuple(tensor.shape[1:])
    if ratio == 1 and block_size > 1 and len(shape) == 3 and shape[:2] == (1, 1):
        # Releases from 0.29 on register a state as (B, 1, 1, bytes): a block without tokens.
        raise ConfigError(f"layer {name!r} holds one state a block: state-space models are not supported")
    # The kernel blocks of one block follow each other, so they are one more dim of it.
    every = [("R", ratio, tensor.stride(0)), *zip(_DIM_NAMES[len(shape)], shape, tensor.stride()[1:], strict=True)]
    # PyTorch leaves the stride of a dim of size 1 arbitrary.
    dims = sorted((dim for dim in every if dim[1] > 1), key=lambda dim: -dim[2])
    overlap = f"layer {name!r} with shape {tuple(tensor.shape)} and strides {tensor.stride()} overlaps itself"
    if any(step == 0 for _, _, step in dims):
        raise ConfigError(overlap)
    # What is left after merging neighbours: the contiguous run inside, and how often it repeats at which stride.
    run, count, stride = 1, 1, 0
    for _, size, step in reversed(dims):
        if count == 1 and step == run:
            run *= size
        elif count == 1 or step == count * stride:
            count, stride = count * size, stride if count > 1 else step
        else:
            raise ConfigError(f"layer {name!r} with strides {tensor.stride()} is unevenly spaced: not supported")
    extent = (count - 1) * stride + run
    block_stride = tensor.stride(0) * ratio if num_blocks * ratio > 1 else extent
    if (count > 1 and stride < run) or block_stride < extent:
        raise ConfigError(overlap)
    order, sizes = "".join(dim[0] for dim in dims), [dim[1] for dim in dims]
    if "RN" in order:
        at = order.index("RN")
        order, sizes[at : at + 2] = order.replace("RN", "N"), [sizes[at] * sizes[at + 1]]
    if "C" not in order:
        order, sizes = order + "C", [*sizes, 1]
    return LayerLayout(
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        block_bytes=count * run * item,
        block_stride=block_stride * item,
        segments=tuple((i * stride * item, run * item) for i in range(count)),
        order=order,
        dims=tuple(sizes),
        shape=shape,
        storage_offset=tensor.storage_offset() * item,
    )
