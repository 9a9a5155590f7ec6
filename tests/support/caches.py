"""Random KV caches in vLLM's layouts, and ways to read them that share nothing with the code under test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvsdk.kernels import BlockStore
from kvsdk.layout import CacheLayout, layout_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8]
KINDS = ["NHD", "HND", "one buffer", "MLA 3-D", "MLA 4-D", "BLHNC", "BHLNC", "kernel blocks", "kernel blocks NHD"]


@dataclass
class Cache:
    """Layers in one of vLLM's layouts.

    Attributes:
        kind: one of `KINDS`.
        storage: the memory of all layers, 1-D uint8; one for each layer unless they share it.
        views: for each layer its storage and its tensor's dtype, shape, strides and offset, in elements.
        num_blocks: blocks in the pool.
        ratio: kernel blocks to a block.
        block_size: tokens of a block.
    """

    kind: str
    storages: list[torch.Tensor]
    views: list[tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...], int]]
    num_blocks: int
    ratio: int
    block_size: int

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"layers.{i}": self.storages[at].view(dtype).as_strided(shape, strides, offset)
            for i, (at, dtype, shape, strides, offset) in enumerate(self.views)
        }

    def layout(self) -> CacheLayout:
        return layout_of(self.tensors, num_blocks=self.num_blocks, block_size=self.block_size)

    def store(self) -> BlockStore:
        return BlockStore(self.tensors, self.layout())

    def to(self, device: torch.device | str) -> Cache:
        """A copy on a device."""
        storages = [storage.to(device, copy=True) for storage in self.storages]
        return Cache(self.kind, storages, self.views, self.num_blocks, self.ratio, self.block_size)

    def clone(self) -> Cache:
        return self.to(self.storages[0].device)

    def same_bytes(self, other: Cache) -> bool:
        """Whether all memory is equal, gaps between blocks included."""
        return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(self.storages, other.storages, strict=True))

    def blocks(self, layer: int) -> np.ndarray:
        """`(num_blocks, bytes)` copied by indexing the logical tensor, a block in its own memory order."""
        t = self.tensors[f"layers.{layer}"].cpu()
        t = t.view(torch.uint8) if t.element_size() == 1 else t
        order = sorted(range(1, t.dim()), key=lambda d: (t.shape[d] == 1, -t.stride(d), d))
        rows = [block.permute([d - 1 for d in order]).clone(memory_format=torch.contiguous_format) for block in t]
        return torch.stack(rows).view(torch.uint8).reshape(self.num_blocks, -1).numpy().copy()

    def content(self, layer: int) -> np.ndarray:
        """`(num_blocks, heads, tokens, bytes)`: the same for all layouts that hold the same."""
        t = self.tensors[f"layers.{layer}"].cpu().clone(memory_format=torch.contiguous_format).view(torch.uint8)
        t = t.unsqueeze(1) if t.dim() == 3 else t
        _, heads, tokens, size = t.shape
        t = t.view(self.num_blocks, self.ratio, heads, tokens, size).transpose(1, 2)
        return t.reshape(self.num_blocks, heads, self.ratio * tokens, size).numpy().copy()

    def naive_gather(self, ids: np.ndarray) -> np.ndarray:
        return np.concatenate([self.blocks(i)[ids].ravel() for i in range(len(self.views))])


def make_cache(
    kind: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    blocks: int = 6,
    layers: int = 3,
    heads: int = 2,
    tokens: int = 4,
    content: int = 8,
    seed: int = 0,
    ratio: int | None = None,
    sizes: tuple[int, ...] = (1,),
) -> Cache:
    """A cache of random bytes.

    Args:
        kind: one of `KINDS`.
        dtype: of all layers.
        blocks: in the pool.
        layers: how many.
        heads: of a layer; 1 for MLA.
        tokens: of a kernel block.
        content: of a head and token.
        seed: of the bytes.
        ratio: kernel blocks to a block; 2 for `kernel blocks`, else 1, if None.
        sizes: what `content` is multiplied by, layer after layer, for pages of several sizes; not where layers share
            a buffer.
    """
    if ratio is None:
        ratio = 2 if "kernel" in kind else 1
    b, h, n, c = blocks * ratio, heads, tokens, content
    c_of = [c * sizes[i % len(sizes)] for i in range(layers)]
    storages, views = [], []

    def storage(elements: int) -> int:
        g = torch.Generator().manual_seed(seed * 1000 + len(storages))
        storages.append(torch.randint(0, 256, (elements * dtype.itemsize,), dtype=torch.uint8, generator=g))
        return len(storages) - 1

    def view(at: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> None:
        views.append((at, dtype, shape, strides, offset))

    if kind in ("NHD", "kernel blocks NHD"):
        for c in c_of:
            view(storage(b * n * h * c), (b, h, n, c), (n * h * c, c, h * c, 1))
    elif kind in ("HND", "kernel blocks"):
        for c in c_of:
            view(storage(b * n * h * c), (b, h, n, c), (n * h * c, n * c, c, 1))
    elif kind == "MLA 3-D":
        for c in c_of:
            view(storage(b * n * c), (b, n, c), (n * c, c, 1))
    elif kind == "MLA 4-D":
        for c in c_of:
            view(storage(b * n * c), (b, 1, n, c), (n * c, n * c, c, 1))
    else:
        assert sizes == (1,), "layers of one buffer are of one size"
        page = h * n * c
        at = storage(layers * b * page)
        for i in range(layers):
            if kind == "one buffer":
                view(at, (b, h, n, c), (page, n * c, c, 1), i * b * page)
            elif kind == "BLHNC":
                view(at, (b, h, n, c), (layers * page, n * c, c, 1), i * page)
            elif kind == "BHLNC":
                view(at, (b, h, n, c), (layers * page, layers * n * c, c, 1), i * n * c)
            else:
                raise ValueError(kind)
    return Cache(kind, storages, views, blocks, ratio, ratio * tokens)
