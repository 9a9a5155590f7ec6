"""What `kvsdk.layout.layout_of` and `kvsdk.kernels.BlockStore` promise, checked element by element.

Bytes are read and written here by indexing the tensors that vLLM would register, never by the code under test.

B blocks, H heads, N tokens of a block, C content of a head and token (K and V together), L layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvsdk.errors import ConfigError, MismatchError
from kvsdk.kernels import BlockStore
from kvsdk.layout import CacheLayout, check_same, layout_of
from kvsdk.testing.contracts.promise import Contract, Promise, check_promises, demand, raises

LAYOUT_PROMISES = Contract()
"""In the order in which `check_layout` checks them."""

_promise = LAYOUT_PROMISES.promise


@dataclass
class Caches:
    """KV caches of one worker, as vLLM would register them.

    Attributes:
        tensors: by layer name; dim 0 counts blocks, or kernel blocks.
        num_blocks: blocks in the pool, at least 6.
        block_size: tokens of a block.
    """

    tensors: dict[str, torch.Tensor]
    num_blocks: int
    block_size: int

    def places(self, name: str) -> np.ndarray:
        """int64 array (B, bytes of a block): where each byte of each block lies in the layer's storage, in memory
        order.
        """
        tensor = self.tensors[name]
        index = np.full(1, tensor.storage_offset(), np.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            index = (index[:, None] + stride * np.arange(size)[None, :]).ravel()
        item = tensor.element_size()
        places = (index[:, None] * item + np.arange(item)[None, :]).reshape(self.num_blocks, -1)
        return np.sort(places, axis=1)

    def storage(self, name: str) -> torch.Tensor:
        """The layer's whole storage, as bytes; writing to it writes the cache."""
        tensor = self.tensors[name]
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())

    def peek(self, name: str) -> np.ndarray:
        """uint8 array (B, bytes of a block): a copy of every block."""
        return self.storage(name).cpu().numpy()[self.places(name)]

    def fill(self, seed: int) -> None:
        """Random bytes everywhere, also where no block is."""
        chance = torch.Generator().manual_seed(seed)
        for name in self.tensors:
            storage = self.storage(name)
            storage.copy_(torch.randint(0, 256, storage.shape, dtype=torch.uint8, generator=chance))


def usual_caches(device: torch.device | str = "cpu") -> dict[str, Callable[[], Caches]]:
    """Small caches in every layout that vLLM's attention backends register, by name."""
    num_layers, blocks, heads, tokens, content = 3, 6, 2, 4, 8

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def caches(make: Callable[[], Iterable[torch.Tensor]], block_size: int = tokens) -> Callable[[], Caches]:
        return lambda: Caches({f"model.layers.{i}.attn": t for i, t in enumerate(make())}, blocks, block_size)

    def each(make: Callable[[], torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        return lambda: [make() for _ in range(num_layers)]

    return {
        "NHD": caches(each(lambda: zeros(blocks, tokens, heads, content).transpose(1, 2))),
        "HND": caches(each(lambda: zeros(blocks, heads, tokens, content))),
        "HND, float8": caches(each(lambda: zeros(blocks, heads, tokens, content, dtype=torch.float8_e4m3fn))),
        "HND, an odd number of bytes": caches(each(lambda: zeros(blocks, heads, tokens, 9, dtype=torch.uint8))),
        "MLA": caches(each(lambda: zeros(blocks, tokens, content))),
        "MLA, 4-D": caches(each(lambda: zeros(blocks, tokens, content).unsqueeze(1))),
        "one buffer, layers outside": caches(lambda: zeros(num_layers, blocks, heads, tokens, content).unbind(0)),
        "one buffer, layers in a block": caches(lambda: zeros(blocks, num_layers, heads, tokens, content).unbind(1)),
        "one buffer, layers in a head": caches(lambda: zeros(blocks, heads, num_layers, tokens, content).unbind(2)),
        "kernel blocks": caches(each(lambda: zeros(2 * blocks, heads, tokens, content)), 2 * tokens),
        "kernel blocks, NHD": caches(
            each(lambda: zeros(2 * blocks, tokens, heads, content).transpose(1, 2)), 2 * tokens
        ),
    }


def check_layout(
    read: Callable[..., CacheLayout] = layout_of,
    store: Callable[[dict[str, torch.Tensor], CacheLayout], BlockStore] = BlockStore,
    *,
    caches: Mapping[str, Callable[[], Caches]] | None = None,
    device: torch.device | str = "cpu",
    promises: Iterable[Promise] = LAYOUT_PROMISES,
) -> None:
    """Checks that layouts say where the bytes lie, and that a store moves exactly those.

    Args:
        read: like `kvsdk.layout.layout_of`: called with the tensors by name, `num_blocks` and `block_size`.
        store: like `kvsdk.kernels.BlockStore`: called with the tensors and their layout.
        caches: makers of the caches to check on, by name; `usual_caches()` if None. Give your own to check that the
            tensors of an attention backend of yours can be moved.
        device: where the tensors of `usual_caches` are.
        promises: those to check; for example one in each test.

    Raises:
        BrokenPromise: an AssertionError that names the first broken promise, the cache and what happened.
    """
    check_promises(promises, _Layouts(read, store, usual_caches(device) if caches is None else caches))


class _Layouts:
    def __init__(
        self,
        read: Callable[..., CacheLayout],
        store: Callable[[dict[str, torch.Tensor], CacheLayout], BlockStore],
        caches: Mapping[str, Callable[[], Caches]],
    ):
        self._read, self._store, self._caches = read, store, caches

    def layout(self, caches: Caches) -> CacheLayout:
        return self._read(caches.tensors, num_blocks=caches.num_blocks, block_size=caches.block_size)

    def read(self, tensor: torch.Tensor, num_blocks: int = 6, block_size: int = 4) -> CacheLayout:
        return self._read({"model.layers.0.attn": tensor}, num_blocks=num_blocks, block_size=block_size)

    def store(self, caches: Caches) -> BlockStore:
        return self._store(caches.tensors, self.layout(caches))

    def each(self, check: Callable[[Caches], None]) -> None:
        for name, make in self._caches.items():
            caches = make()
            caches.fill(1)
            try:
                check(caches)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error

    def each_twice(self, check: Callable[[Caches, Caches], None]) -> None:
        for name, make in self._caches.items():
            caches, others = make(), make()
            caches.fill(1)
            others.fill(2)
            try:
                check(caches, others)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


def _ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def _packed(caches: Caches, layout: CacheLayout, ids: np.ndarray) -> np.ndarray:
    """Blocks as they lie in a staging buffer: layer by layer, block after block."""
    return np.concatenate([caches.peek(layer.name)[ids].ravel() for layer in layout.layers])


def _bytes(staging: torch.Tensor) -> np.ndarray:
    return staging.cpu().numpy().copy()


def _snapshot(caches: Caches) -> dict[str, np.ndarray]:
    return {name: caches.storage(name).cpu().numpy().copy() for name in caches.tensors}


@_promise("a layout has every layer once, in the model's order, and the sizes of its blocks")
def _(layouts: _Layouts) -> None:
    def check(caches: Caches) -> None:
        layout = layouts.layout(caches)
        names = [layer.name for layer in layout.layers]
        demand(sorted(names) == sorted(caches.tensors), f"layers are {names}")
        demand((layout.num_blocks, layout.block_size) == (caches.num_blocks, caches.block_size), "sizes are others")
        for layer in layout.layers:
            tensor = caches.tensors[layer.name]
            expected = tensor.numel() * tensor.element_size() // caches.num_blocks
            demand(layer.block_bytes == expected, f"{layer.name} has {layer.block_bytes} bytes a block, not {expected}")
            demand(layer.dtype == str(tensor.dtype).removeprefix("torch."), f"{layer.name} is {layer.dtype}")
        demand(layout.block_bytes == sum(layer.block_bytes for layer in layout.layers), "block_bytes is no sum")

    layouts.each(check)
    numbered = {f"model.layers.{i}.attn": torch.zeros(6, 4, 8) for i in (10, 9, 1, 0)}
    order = [layer.name.split(".")[2] for layer in layouts.layout(Caches(numbered, 6, 4)).layers]
    demand(order == ["0", "1", "9", "10"], f"the order of layers is {order}")


@_promise("segments are where each block's bytes lie, all of them and no others")
def _(layouts: _Layouts) -> None:
    def check(caches: Caches) -> None:
        for layer in layouts.layout(caches).layers:
            runs = [np.arange(offset, offset + nbytes) for offset, nbytes in layer.segments]
            starts = layer.storage_offset + layer.block_stride * np.arange(caches.num_blocks)
            said = starts[:, None] + np.concatenate(runs)[None, :]
            true = caches.places(layer.name)
            demand(said.shape == true.shape, f"{layer.name}: segments hold {said.shape[1]} bytes of {true.shape[1]}")
            demand(bool((said == true).all()), f"{layer.name}: segments say other bytes than the tensor's")

    layouts.each(check)


@_promise("gather copies the blocks' bytes, in the order asked for")
def _(layouts: _Layouts) -> None:
    def check(caches: Caches) -> None:
        store, ids = layouts.store(caches), _ids(5, 0, 2, 0)
        before = _snapshot(caches)
        staging = store.staging(len(ids) + 1)
        staging.fill_(7)
        store.gather(ids, staging)
        got, size = _bytes(staging), store.staging_bytes(len(ids))
        demand(size == len(ids) * store.layout.block_bytes, f"staging_bytes({len(ids)}) is {size}")
        demand(np.array_equal(got[:size], _packed(caches, store.layout, ids)), "the bytes are others")
        demand(bool((got[size:] == 7).all()), "more was written than was asked for")
        after = _snapshot(caches)
        demand(all(np.array_equal(before[name], after[name]) for name in before), "gather wrote to the cache")
        store.gather(_ids(), store.staging(0))

    layouts.each(check)


@_promise("scatter writes the blocks asked for, and nothing else")
def _(layouts: _Layouts) -> None:
    def check(caches: Caches) -> None:
        store, ids = layouts.store(caches), _ids(4, 1, 3)
        for select in (None, np.array([2, 0]), np.array([], np.int64)):
            caches.fill(1)
            expected = _snapshot(caches)
            staging = store.staging(len(ids))
            staging.copy_(torch.randint(0, 256, staging.shape, dtype=torch.uint8))
            staged, start = _bytes(staging), 0
            chosen = np.arange(len(ids)) if select is None else select
            for layer in store.layout.layers:
                end = start + len(ids) * layer.block_bytes
                rows = staged[start:end].reshape(len(ids), layer.block_bytes)
                whole = expected[layer.name]
                whole[caches.places(layer.name)[ids[chosen]]] = rows[chosen]
                for other in caches.tensors:  # layers that share their storage
                    if caches.tensors[other].untyped_storage().data_ptr() == _pointer(caches, layer.name):
                        expected[other] = whole
                start = end
            store.scatter(ids, staging, select)
            after = _snapshot(caches)
            wrong = [name for name in after if not np.array_equal(after[name], expected[name])]
            demand(not wrong, f"select={select}: other bytes than those of the blocks changed in {wrong}")

    layouts.each(check)


def _pointer(caches: Caches, name: str) -> int:
    return caches.tensors[name].untyped_storage().data_ptr()


@_promise("blocks travel from one cache to another of the same layout")
def _(layouts: _Layouts) -> None:
    def check(ours: Caches, theirs: Caches) -> None:
        a, b = layouts.store(ours), layouts.store(theirs)
        check_same(a.layout.fingerprint(), b.layout.fingerprint())
        source, target = _ids(5, 0, 2), _ids(1, 3, 4)
        staging = a.staging(3)
        a.gather(source, staging)
        positions = np.array([3, 4, 5])
        digests = a.digest(staging, 3, positions)
        demand(bool((b.digest(staging, 3, positions) == digests).all()), "the two sides' digests differ")
        b.scatter(target, staging)
        for layer in a.layout.layers:
            same = np.array_equal(ours.peek(layer.name)[source], theirs.peek(layer.name)[target])
            demand(same, f"{layer.name} arrived changed")

    layouts.each_twice(check)


@_promise("a digest finds a changed byte, a swapped block, a shifted position, and exchanged layers")
def _(layouts: _Layouts) -> None:
    def check(caches: Caches) -> None:
        store, positions = layouts.store(caches), np.array([7, 8, 9])
        staging = store.staging(3)
        store.gather(_ids(1, 2, 3), staging)
        clean = store.digest(staging, 3, positions)
        demand(clean.dtype == np.uint64 and clean.shape == (3,), f"digests are {clean.dtype} of {clean.shape}")
        start = 0
        for layer in store.layout.layers:
            for block in range(3):
                for byte in (0, layer.block_bytes // 2, layer.block_bytes - 1):
                    changed = staging.clone()
                    changed[start + block * layer.block_bytes + byte] ^= 1
                    found = np.flatnonzero(store.digest(changed, 3, positions) != clean).tolist()
                    demand(found == [block], f"byte {byte} of block {block} of {layer.name}: found in {found}")
            start += 3 * layer.block_bytes
        swapped = store.staging(3)
        store.gather(_ids(2, 1, 3), swapped)
        demand(not set(store.digest(swapped, 3, positions)[:2]) & set(clean[:2]), "swapped blocks are not found")
        demand(bool((store.digest(staging, 3, positions + 1) != clean).all()), "a shifted position is not found")
        sizes = {layer.block_bytes for layer in store.layout.layers}
        if len(store.layout.layers) > 1 and len(sizes) == 1:
            size = 3 * sizes.pop()
            exchanged = torch.cat([staging[size : 2 * size], staging[:size], staging[2 * size :]])
            demand(bool((store.digest(exchanged, 3, positions) != clean).all()), "exchanged layers are not found")

    layouts.each(check)


@_promise("ids, selections and staging buffers that do not fit are a ValueError, and nothing is written")
def _(layouts: _Layouts) -> None:
    def check(caches: Caches) -> None:
        store = layouts.store(caches)
        before, two = _snapshot(caches), store.staging(2)
        for ids in (
            _ids(-1),
            _ids(caches.num_blocks),
            _ids(0, caches.num_blocks),
            np.array([0]),
            _ids(0).reshape(1, 1),
        ):
            raises(ValueError, store.gather, ids, two)
            raises(ValueError, store.scatter, ids, two)
        raises(ValueError, store.scatter, _ids(1, 1), two)
        for select in ([2], [-1], [0, 0], [0.5]):
            raises(ValueError, store.scatter, _ids(1, 2), two, np.array(select))
        wide = torch.zeros(2 * store.staging_bytes(2), dtype=torch.uint8, device=store.device)
        for staging in (store.staging(1), wide[::2], wide.view(2, -1)):
            raises(ValueError, store.gather, _ids(0, 1), staging)
            raises(ValueError, store.scatter, _ids(0, 1), staging)
        for positions in (np.arange(3), np.arange(2, dtype=np.int32)):
            raises(ValueError, store.digest, two, 2, positions)
        after = _snapshot(caches)
        demand(all(np.array_equal(before[name], after[name]) for name in before), "something was written")

    layouts.each(check)


@_promise("a fingerprint is plain values, and says nothing of pool size, layer names or strides between blocks")
def _(layouts: _Layouts) -> None:
    def check(caches: Caches) -> None:
        ours = layouts.layout(caches).fingerprint()
        demand(json.loads(json.dumps(ours)) == ours, "it does not survive a message")
        # The same blocks packed into tensors of their own, twice as many of them, under other names.
        copies = {f"other.{name}": _repacked(tensor, 2) for name, tensor in caches.tensors.items()}
        copy = layouts.layout(Caches(copies, 2 * caches.num_blocks, caches.block_size)).fingerprint()
        demand(copy == ours, f"{copy} is not {ours}")

    layouts.each(check)


def _repacked(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """Zeros of `times` as many blocks, with the dims of a block in the same order of memory and no gaps."""
    order = sorted(range(1, tensor.dim()), key=lambda dim: -tensor.stride(dim))
    packed = torch.zeros(
        times * tensor.shape[0], *(tensor.shape[dim] for dim in order), dtype=tensor.dtype, device=tensor.device
    )
    return packed.permute(0, *(1 + order.index(dim) for dim in range(1, tensor.dim())))


@_promise("fingerprints differ where a block's bytes mean something else, and the field is named")
def _(layouts: _Layouts) -> None:
    heads, tokens, content = 2, 4, 8
    ours = layouts.read(torch.zeros(6, heads, tokens, content)).fingerprint()
    for field, tensor, block_size in (
        ("block_size", torch.zeros(6, heads, tokens, content), 8),
        ("dtype.0", torch.zeros(6, heads, tokens, content, dtype=torch.int32), tokens),
        ("order.0", torch.zeros(6, tokens, heads, content).transpose(1, 2), tokens),
        ("dims.0.0", torch.zeros(6, 2 * heads, tokens, content // 2), tokens),
        ("dims.0.2", torch.zeros(6, heads, tokens, 2 * content), tokens),
    ):
        theirs = layouts.read(tensor, block_size=block_size).fingerprint()
        error: Any = raises(MismatchError, check_same, ours, theirs)
        demand(error.field == field, f"{error.field} is named, not {field}")


@_promise("tensors that are no attention cache, overlap, or do not divide into blocks are a ConfigError")
def _(layouts: _Layouts) -> None:
    shape, size = (6, 2, 4, 8), 2 * 4 * 8
    flat = torch.zeros(6 * size)
    refused: list[Any] = [
        [torch.zeros(6, 4), torch.zeros(6, 2)],
        torch.zeros(1, 2, 4, 8).expand(shape),
        torch.zeros(6, 1, 4, 8).expand(shape),
        flat.as_strided(shape, (size // 2, 32, 8, 1)),
        flat.as_strided(shape, (size, 16, 8, 1)),
        torch.zeros(0, 2, 4, 8),
        torch.zeros(5, 2, 4, 8),
        torch.zeros(9, 2, 4, 8),
    ]
    for tensor in refused:
        error = raises(ConfigError, layouts.read, tensor)
        demand("model.layers.0.attn" in str(error), f"the layer is not named: {error}")
