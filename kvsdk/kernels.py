"""Gather, scatter and digest of blocks, by PyTorch and NumPy, on CPU or CUDA tensors.

A chunk of n blocks travels as one contiguous uint8 tensor, the staging buffer, layer-major: for each layer in the
layout's order, the n blocks' payloads one after the other. So a message is one tensor, however many layers and blocks
it holds.
"""

from __future__ import annotations

import numpy as np
import torch

from kvsdk.layout import CacheLayout, LayerLayout

DIGEST_ALGORITHM = "mix64-v1"
"""Named in handshakes: two servers compare digests only if they compute the same ones."""

_C1 = 0xBF58476D1CE4E5B9
_C2 = 0x94D049BB133111EB
_GOLDEN = 0x9E3779B97F4A7C15
_LAYER_SEED = 0xD6E8FEB86659FD93
_SHIFT = 32
_CPU_PIECE = 32768  # words; with two temporaries 512 KiB, which stays in a core's second-level cache
_CUDA_PIECE = 1 << 21  # words; with two temporaries 32 MiB, which stays in the second-level cache of data-centre GPUs


class BlockStore:
    """Reads and writes whole blocks of one worker's KV cache.

    The tensors are vLLM's: the store keeps references to their storage and never allocates or frees blocks. On CUDA
    everything runs on the current stream; `gather` and `scatter` do not wait for it, `digest` does. Safe to use from
    several threads as long as they use different staging buffers and, for `scatter`, different blocks.
    """

    def __init__(self, kv_caches: dict[str, torch.Tensor], layout: CacheLayout):
        """Makes one view of each layer by block.

        Args:
            kv_caches: the tensors from which `layout` was read, by layer name.
            layout: what `layout_of` made of them.

        Raises:
            ValueError: the layers lie on different devices.
        """
        devices = {kv_caches[layer.name].device for layer in layout.layers}
        if len(devices) != 1:
            raise ValueError(f"the layers of one worker must be on one device, not on {sorted(map(str, devices))}")
        self.layout = layout
        self.device = devices.pop()
        # Words of 8 bytes move faster than bytes; one kind for all layers, since a layer's place in a staging buffer
        # depends on the sizes of those before it.
        aligned = all(_word_aligned(kv_caches[layer.name], layer) for layer in layout.layers)
        self._word = torch.int64 if aligned else torch.uint8
        # A view that is made in inference mode could not be written outside it, and the reverse is fine.
        with torch.inference_mode(False):
            self._views = [self._view(kv_caches[layer.name], layer) for layer in layout.layers]
            longest = max(-(-layer.block_bytes // 8) for layer in layout.layers)
            self._keys = splitmix64(np.arange(longest, dtype=np.uint64))
            self._multipliers = splitmix64(self._keys) | np.uint64(1)
            self._device_keys = torch.from_numpy(self._keys.view(np.int64)).to(self.device)
            self._device_multipliers = torch.from_numpy(self._multipliers.view(np.int64)).to(self.device)

    def staging_bytes(self, num_blocks: int) -> int:
        """Bytes that `num_blocks` blocks take in a staging buffer."""
        return num_blocks * self.layout.block_bytes

    def staging(self, num_blocks: int) -> torch.Tensor:
        """A new staging buffer for up to `num_blocks` blocks: 1-D, uint8, on the store's device, not initialised."""
        with torch.inference_mode(False):
            return torch.empty(self.staging_bytes(num_blocks), dtype=torch.uint8, device=self.device)

    def gather(self, block_ids: np.ndarray, staging: torch.Tensor) -> None:
        """Copies blocks from the cache into the front of a staging buffer, in the order of `block_ids`.

        Args:
            block_ids: 1-D int32, repeats allowed.
            staging: from `staging`, for at least as many blocks.

        Raises:
            ValueError: an id is out of range, or the staging buffer does not fit.
        """
        self._check_ids(block_ids)
        index = self._index(block_ids)
        for view, part in zip(self._views, self._parts(staging, len(block_ids)), strict=True):
            torch.index_select(view, 0, index, out=part)

    def scatter(self, block_ids: np.ndarray, staging: torch.Tensor, select: np.ndarray | None = None) -> None:
        """Copies blocks from the front of a staging buffer into the cache.

        Args:
            block_ids: 1-D int32: where each staged block belongs; no id twice, since either write might last.
            staging: holds `len(block_ids)` blocks.
            select: which of the staged blocks to write, by index into `block_ids`; all of them if None.

        Raises:
            ValueError: an id or an index is out of range or comes twice, or the staging buffer does not fit.
        """
        self._check_ids(block_ids)
        if len(np.unique(block_ids)) != len(block_ids):
            raise ValueError("a block id comes twice: each block can be written once")
        parts = self._parts(staging, len(block_ids))
        if select is None:
            index = self._index(block_ids)
            for view, part in zip(self._views, parts, strict=True):
                view.index_copy_(0, index, part)
            return
        select = np.asarray(select)
        if select.ndim != 1 or (select.size and select.dtype.kind not in "iu"):
            raise ValueError(f"select must be a 1-D array of integers, not {select.dtype} of shape {select.shape}")
        if select.size == 0:
            return
        if select.min() < 0 or select.max() >= len(block_ids) or len(np.unique(select)) != len(select):
            raise ValueError(f"select must hold different indices from 0 to {len(block_ids) - 1}")
        target, source = self._index(np.asarray(block_ids)[select]), self._index(select)
        for view, part in zip(self._views, parts, strict=True):
            view.index_copy_(0, target, part.index_select(0, source))

    def digest(self, staging: torch.Tensor, num_blocks: int, positions: np.ndarray) -> np.ndarray:
        """One 64-bit digest for each staged block, over all layers (`mix64-v1`).

        The words x_i of a layer's block, 8 bytes each, the last one padded with zeros, are mixed one by one and added:
        y = (x_i ^ key_i) * C1; y ^= y >>> 32; y *= m_i, with key_i = splitmix64(i) and m_i = splitmix64(key_i) | 1, so
        that a word counts where it stands. Each step is a bijection of the word, so a change within one word always
        shows. Not linear, and a multiplier for each place, on purpose: in a sum of odd multiples of the words the top
        bits of two words (signs, in a cache of 16-bit floats) cancel when both flip, and with one multiplier for all
        places behind the shift they still cancel half the time. A layer's sum is then mixed with the layer's index
        and the block's position and the results are added, so that swapped or shifted blocks and exchanged layers show.

        It finds faults, not forgeries.

        Args:
            staging: holds `num_blocks` blocks.
            num_blocks: how many to digest.
            positions: 1-D int64: each block's position in its prompt, in blocks.

        Returns:
            1-D uint64 on the host. On CUDA this waits for the current stream, and for nothing else.

        Raises:
            ValueError: the staging buffer or `positions` does not fit.
        """
        positions = np.asarray(positions)
        if positions.shape != (num_blocks,) or positions.dtype != np.int64:
            raise ValueError(f"positions must be int64 of shape ({num_blocks},): {positions.dtype}, {positions.shape}")
        parts = self._parts(staging, num_blocks, torch.uint8)
        if num_blocks == 0:
            return np.zeros(0, dtype=np.uint64)
        sums_LB = self._sums_by_torch(parts) if self.device.type == "cuda" else self._sums_by_numpy(parts)
        layers = np.arange(len(parts), dtype=np.uint64)[:, None]
        place = splitmix64(positions.view(np.uint64))[None, :]
        seeds = splitmix64(layers * np.uint64(_GOLDEN) + np.uint64(_LAYER_SEED) + place)
        return splitmix64(sums_LB ^ seeds).sum(axis=0, dtype=np.uint64)

    def _view(self, tensor: torch.Tensor, layer: LayerLayout) -> torch.Tensor:
        size = self._word.itemsize
        count, (offset, run) = len(layer.segments), layer.segments[0]
        step = layer.segments[1][0] if count > 1 else run
        return torch.empty(0, dtype=self._word, device=tensor.device).set_(
            tensor.untyped_storage(),
            (layer.storage_offset + offset) // size,
            (self.layout.num_blocks, count, run // size),
            (layer.block_stride // size, step // size, 1),
        )

    def _parts(self, staging: torch.Tensor, num_blocks: int, word: torch.dtype | None = None) -> list[torch.Tensor]:
        """Views of the staged blocks, one a layer: `(blocks, segments, words)`, or `(blocks, bytes)` as uint8."""
        needed = self.staging_bytes(num_blocks)
        if (
            staging.dtype != torch.uint8
            or staging.dim() != 1
            or not staging.is_contiguous()
            or staging.numel() < needed
            or staging.device != self.device
        ):
            raise ValueError(
                f"staging must be a contiguous 1-D uint8 tensor on {self.device} of at least {needed} bytes, "
                f"not {staging.dtype} of shape {tuple(staging.shape)} on {staging.device}"
            )
        if staging.data_ptr() % 8:
            raise ValueError("staging must start at a multiple of 8 bytes")
        parts, start = [], 0
        for layer, view in zip(self.layout.layers, self._views, strict=True):
            end = start + num_blocks * layer.block_bytes
            part = staging[start:end]
            if word is None:
                part = part.view(self._word).view(num_blocks, *view.shape[1:])
            else:
                part = part.view(num_blocks, layer.block_bytes)
            parts.append(part)
            start = end
        return parts

    def _check_ids(self, block_ids: np.ndarray) -> None:
        if not isinstance(block_ids, np.ndarray) or block_ids.ndim != 1 or block_ids.dtype != np.int32:
            raise ValueError("block ids must be a 1-D int32 array")
        if block_ids.size and (block_ids.min() < 0 or block_ids.max() >= self.layout.num_blocks):
            raise ValueError(
                f"block ids must be from 0 to {self.layout.num_blocks - 1}, not {block_ids.min()} to {block_ids.max()}"
            )

    def _index(self, ids: np.ndarray) -> torch.Tensor:
        index = torch.from_numpy(ids.astype(np.int64))
        if self.device.type == "cuda":
            # From pinned memory the copy does not wait for the stream.
            return index.pin_memory().to(self.device, non_blocking=True)
        return index

    def _sums_by_numpy(self, parts: list[torch.Tensor]) -> np.ndarray:
        """Sums of the mixed words, `(layers, blocks)`, for CPUs: NumPy shifts unsigned and is twice as fast there."""
        sums_LB = np.zeros((len(parts), parts[0].shape[0]), dtype=np.uint64)
        temporary = np.empty((2, _CPU_PIECE), dtype=np.uint64)
        for sums_B, part in zip(sums_LB, parts, strict=True):
            words_BW = _pad_to_words(part).numpy().view(np.uint64)
            for rows, columns in _pieces(words_BW.shape, _CPU_PIECE):
                x = words_BW[rows, columns]
                y, shifted = temporary[:, : x.size].reshape(2, *x.shape)
                np.bitwise_xor(x, self._keys[columns], out=y)
                np.multiply(y, np.uint64(_C1), out=y)
                np.right_shift(y, np.uint64(_SHIFT), out=shifted)
                np.bitwise_xor(y, shifted, out=y)
                np.multiply(y, self._multipliers[columns], out=y)
                sums_B[rows] += y.sum(axis=1, dtype=np.uint64)
        return sums_LB

    def _sums_by_torch(self, parts: list[torch.Tensor]) -> np.ndarray:
        """The same sums for GPUs. PyTorch's int64 wraps like uint64 but shifts in the sign, which a mask undoes."""
        with torch.inference_mode(False):
            sums_LB = torch.zeros((len(parts), parts[0].shape[0]), dtype=torch.int64, device=self.device)
            temporary = torch.empty((2, _CUDA_PIECE), dtype=torch.int64, device=self.device)
        for sums_B, part in zip(sums_LB, parts, strict=True):
            words_BW = _pad_to_words(part).view(torch.int64)
            for rows, columns in _pieces(words_BW.shape, _CUDA_PIECE):
                x = words_BW[rows, columns]
                y, shifted = temporary[:, : x.numel()].view(2, *x.shape)
                torch.bitwise_xor(x, self._device_keys[columns], out=y)
                y.mul_(_signed(_C1))
                torch.bitwise_right_shift(y, _SHIFT, out=shifted)
                shifted.bitwise_and_((1 << (64 - _SHIFT)) - 1)
                y.bitwise_xor_(shifted).mul_(self._device_multipliers[columns])
                sums_B[rows] += y.sum(dim=1)
        return sums_LB.cpu().numpy().view(np.uint64)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The splitmix64 generator's output for state `x`, element by element: a bijection of 64-bit words."""
    z = x + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_C1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_C2)
    return z ^ (z >> np.uint64(31))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _word_aligned(tensor: torch.Tensor, layer: LayerLayout) -> bool:
    places = [layer.storage_offset, layer.block_stride, layer.segments[0][1], layer.segments[-1][0], layer.block_bytes]
    if len(layer.segments) > 1:
        places.append(layer.segments[1][0])
    return all(place % 8 == 0 for place in places) and tensor.untyped_storage().data_ptr() % 8 == 0


def _pad_to_words(part: torch.Tensor) -> torch.Tensor:
    """`(blocks, bytes)` with rows of whole 8-byte words, each starting at one; a copy only where it is needed."""
    rest = -part.shape[1] % 8
    if rest == 0 and part.data_ptr() % 8 == 0:
        return part
    padded = part.new_zeros((part.shape[0], part.shape[1] + rest))
    padded[:, : part.shape[1]] = part
    return padded


def _pieces(shape: tuple[int, ...], limit: int) -> list[tuple[slice, slice]]:
    """Cuts a `(rows, columns)` array into pieces of at most `limit` elements: whole rows where they fit."""
    rows, columns = shape
    width = min(columns, limit)
    height = max(1, limit // width)
    return [
        (slice(r, min(r + height, rows)), slice(c, min(c + width, columns)))
        for r in range(0, rows, height)
        for c in range(0, columns, width)
    ]
