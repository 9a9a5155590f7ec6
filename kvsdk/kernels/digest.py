"""The digest of blocks, `mix64-v1`, by NumPy on CPUs and by PyTorch on GPUs; `csrc/blocks.cu` computes the same.

A layer's part of a block is read as little-endian 64-bit words, the last one filled up with zeros. Word i is mixed with
two keys that depend on i alone, so that exchanged words show, and the mixed words are added up, so that they may be
taken in any order. Each layer's sum is mixed with a seed of its layer and of the block's position in its prompt, so
that exchanged layers and shifted blocks show; the digest is the sum of these over the layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

DIGEST_ALGORITHM = "mix64-v1"
"""Named in handshakes: two servers compare digests only if they compute the same ones."""

_C1 = 0xBF58476D1CE4E5B9
_C2 = 0x94D049BB133111EB
_GOLDEN = 0x9E3779B97F4A7C15
_LAYER_SEED = 0xD6E8FEB86659FD93
_SHIFT = 32
_CPU_PIECE = 32768  # words; with two temporaries 512 KiB, which stays in a core's second-level cache
_CUDA_PIECE = 1 << 21  # words; with two temporaries 32 MiB, which stays in the second-level cache of data-centre GPUs


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The splitmix64 generator's output for state `x`, element by element: a bijection of 64-bit words."""
    z = x + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_C1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_C2)
    return z ^ (z >> np.uint64(31))


def finish(sums_LB: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Digests of blocks, uint64, from the sums of their mixed words, a row a layer, and their positions (int64)."""
    layers = np.arange(len(sums_LB), dtype=np.uint64)[:, None]
    place = splitmix64(positions.view(np.uint64))[None, :]
    seeds = splitmix64(layers * np.uint64(_GOLDEN) + np.uint64(_LAYER_SEED) + place)
    return splitmix64(sums_LB ^ seeds).sum(axis=0, dtype=np.uint64)


class WordMixer:
    """Mixes and adds up the words of blocks.

    Args:
        longest: bytes of the longest row that will be asked for.
        device: where the rows lie.
    """

    def __init__(self, longest: int, device: torch.device):
        self._keys = splitmix64(np.arange(-(-longest // 8), dtype=np.uint64))
        self._multipliers = splitmix64(self._keys) | np.uint64(1)
        self._device = device
        self._device_keys, self._device_multipliers = (
            torch.from_numpy(keys.view(np.int64)).to(device) for keys in (self._keys, self._multipliers)
        )

    def row_sums(self, rows: torch.Tensor) -> np.ndarray | torch.Tensor:
        """The sum of each row's mixed words; `rows` is `(blocks, bytes)`. For `digests`, which alone waits on CUDA."""
        return self.by_torch(rows) if self._device.type == "cuda" else self.by_numpy(rows)

    def digests(self, sums: list[Any], positions: np.ndarray) -> np.ndarray:
        """Digests of blocks, uint64, from one `row_sums` a layer. On CUDA this waits for the current stream."""
        if self._device.type == "cuda":
            return finish(torch.stack(sums).cpu().numpy().view(np.uint64), positions)
        return finish(np.stack(sums), positions)

    def by_numpy(self, rows: torch.Tensor) -> np.ndarray:
        """For CPUs: NumPy shifts unsigned and is twice as fast there."""
        words_BW = _pad_to_words(rows).numpy().view(np.uint64)
        sums_B = np.zeros(len(words_BW), dtype=np.uint64)
        temporary = np.empty((2, min(_CPU_PIECE, words_BW.size)), dtype=np.uint64)
        for blocks, columns in _pieces(words_BW.shape, _CPU_PIECE):
            x = words_BW[blocks, columns]
            y, shifted = temporary[:, : x.size].reshape(2, *x.shape)
            np.bitwise_xor(x, self._keys[columns], out=y)
            np.multiply(y, np.uint64(_C1), out=y)
            np.right_shift(y, np.uint64(_SHIFT), out=shifted)
            np.bitwise_xor(y, shifted, out=y)
            np.multiply(y, self._multipliers[columns], out=y)
            sums_B[blocks] += y.sum(axis=1, dtype=np.uint64)
        return sums_B

    def by_torch(self, rows: torch.Tensor) -> torch.Tensor:
        """For GPUs, int64. PyTorch's int64 wraps like uint64 but shifts in the sign, which a mask undoes."""
        words_BW = _pad_to_words(rows).view(torch.int64)
        with torch.inference_mode(False):
            sums_B = torch.zeros(len(words_BW), dtype=torch.int64, device=rows.device)
            temporary = torch.empty((2, min(_CUDA_PIECE, words_BW.numel())), dtype=torch.int64, device=rows.device)
        for blocks, columns in _pieces(tuple(words_BW.shape), _CUDA_PIECE):
            x = words_BW[blocks, columns]
            y, shifted = temporary[:, : x.numel()].view(2, *x.shape)
            torch.bitwise_xor(x, self._device_keys[columns], out=y)
            y.mul_(_C1 - (1 << 64))
            torch.bitwise_right_shift(y, _SHIFT, out=shifted)
            shifted.bitwise_and_((1 << (64 - _SHIFT)) - 1)
            y.bitwise_xor_(shifted).mul_(self._device_multipliers[columns])
            sums_B[blocks] += y.sum(dim=1)
        return sums_B


def _pad_to_words(rows: torch.Tensor) -> torch.Tensor:
    """`(blocks, bytes)` with rows of whole 8-byte words, each starting at one; a copy only where it is needed."""
    rest = -rows.shape[1] % 8
    if rest == 0 and rows.data_ptr() % 8 == 0:
        return rows
    padded = rows.new_zeros((rows.shape[0], rows.shape[1] + rest))
    padded[:, : rows.shape[1]] = rows
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
