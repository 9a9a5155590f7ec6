"""The digest of blocks, `mix64-v2`, on CPUs and by PyTorch on GPUs; `csrc/blocks.cu` computes the same.

A layer's part of a block is read as little-endian 32-bit words, filled up with zeros to an even number of them. Word i
is multiplied with a key of its own, the odd number `splitmix64(i) | 1`, and the products are added up modulo 2^64: a
sum that may be taken in any order, of one multiplication and one addition a word (multilinear hashing). Each layer's
sum is then mixed with a seed of its layer and of the block's position in its prompt, by a bijection, and the digest is
the sum of these over the layers.

What it finds, where a word's difference is what its value changed by, a number from 1 to 2^32 - 1 or minus that:

- **Certainly**, whatever changes within one aligned word of one layer, and so every flipped bit: an odd key times the
  difference is not 0 modulo 2^64, so the layer's sum changes, its mixed sum with it, and the other layers' do not.
- Several changed words: the sum stays as it was if the differences times their keys add up to 0. For differences that
  were not chosen to fit the keys, one key decides over that with its 63 free bits, all but v of which count if 2^v is
  the largest power of two in every difference: once in 2^(63 - v) cases. v is 0 when anything is changed at random,
  also where words, or blocks of random content, are exchanged: once in 2^63. It is at most 31, where nothing but the
  top bits of words flip, as with the signs of float32 numbers: once in 2^32.
- Exchanged layers and blocks at other positions have other seeds: what is then mixed differs, and the digests are equal
  once in 2^64 cases. A block at another position within one layer alone differs for certain.

It is no protection against an adversary, who knows the keys.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

logger = logging.getLogger("kvsdk.kernels")

DIGEST_ALGORITHM = "mix64-v2"
"""Named in handshakes: two servers compare digests only if they compute the same ones."""

_C1 = 0xBF58476D1CE4E5B9
_C2 = 0x94D049BB133111EB
_GOLDEN = 0x9E3779B97F4A7C15
_LAYER_SEED = 0xD6E8FEB86659FD93
_HALF = 32
_LOW = (1 << _HALF) - 1
_CPU_PIECE = 131072  # 64-bit words: 1 MiB, which stays in a core's second-level cache from the first pass to the second
_MATMUL_BYTES = 1 << 16  # of a row at a time: 2^16 products of a byte and a digit, 255 * 128 at most, fit 31 bits
_MATMUL_ROWS = 16  # for fewer, a product is not worth the time in which its other factor is laid out anew
_PROBE_ROWS = 64
_CUDA_PIECE = 1 << 21  # words; with a temporary 32 MiB, which stays in the second-level cache of data-centre GPUs


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The splitmix64 generator's output for state `x`, element by element: a bijection of 64-bit words."""
    z = x + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_C1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_C2)
    return z ^ (z >> np.uint64(31))


def finish(sums_LB: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Digests of blocks, uint64, from the sums of their words, a row a layer, and their positions (int64)."""
    layers = np.arange(len(sums_LB), dtype=np.uint64)[:, None]
    place = splitmix64(positions.view(np.uint64))[None, :]
    seeds = splitmix64(layers * np.uint64(_GOLDEN) + np.uint64(_LAYER_SEED) + place)
    return splitmix64(sums_LB ^ seeds).sum(axis=0, dtype=np.uint64)


class WordMixer:
    """Multiplies and adds up the words of blocks.

    Args:
        longest: bytes of the longest row that will be asked for.
        device: where the rows lie.
    """

    def __init__(self, longest: int, device: torch.device):
        words = np.arange(2 * -(-longest // 8), dtype=np.uint64)
        low, high = (splitmix64(words) | np.uint64(1)).reshape(-1, 2).T
        self._device = device
        self._device_keys = [torch.from_numpy(keys.view(np.int64).copy()).to(device) for keys in (low, high)]
        # NumPy has no sum of products of 32-bit words with 64-bit keys, but a fast one of 64-bit words. So two sums are
        # taken: of the 64-bit words h·2^32 + l, and of the 64-bit words that lie between them, from one's high half to
        # the next one's low half, where l counts 2^32 times. These are the keys with which both add up to the same:
        #   low[i] = here[i] + 2^32 between[i - 1]    high[i] = between[i] + 2^32 here[i]
        self._between = high - (low << np.uint64(_HALF))
        self._here = low.copy()
        self._here[1:] -= high[:-1] << np.uint64(_HALF)
        self._digits: torch.Tensor | None = None
        if device.type == "cpu":
            self._digits = _digits_of_keys(np.stack([low, high], axis=1).reshape(-1)[: -(-longest // 4)])
            if not self._matmul_pays(min(longest, _MATMUL_BYTES)):
                self._digits = None

    def row_sums(self, rows: torch.Tensor) -> np.ndarray | torch.Tensor:
        """The sums of words times keys, one for each of `rows`, which is `(blocks, bytes)`.

        For `digests`: on CUDA that alone waits.
        """
        if self._device.type == "cuda":
            return self.by_torch(rows)
        if self._digits is not None and len(rows) >= _MATMUL_ROWS:
            return self.by_matmul(rows)
        return self.by_numpy(rows)

    def digests(self, sums: list[Any], positions: np.ndarray) -> np.ndarray:
        """Digests of blocks, uint64, from one `row_sums` a layer. On CUDA this waits for the current stream."""
        if self._device.type == "cuda":
            return finish(torch.stack(sums).cpu().numpy().view(np.uint64), positions)
        return finish(np.stack(sums), positions)

    def by_numpy(self, rows: torch.Tensor) -> np.ndarray:
        """For any CPU: a pass over a piece that is in the cache then, and one more."""
        words_BW = _pad_to_words(rows).numpy().view(np.uint64)
        last = words_BW.shape[1] - 1
        between_BW = words_BW.view(np.uint32)[:, 1:-1].view(np.uint64)
        sums_B = words_BW.view(np.uint32)[:, -1] * self._between[last]
        for blocks, columns in _pieces(words_BW.shape, _CPU_PIECE):
            sums_B[blocks] += np.einsum("bw,w->b", words_BW[blocks, columns], self._here[columns])
            columns = slice(columns.start, min(columns.stop, last))
            sums_B[blocks] += np.einsum("bw,w->b", between_BW[blocks, columns], self._between[columns])
        return sums_B

    def by_matmul(self, rows: torch.Tensor) -> np.ndarray:
        """For CPUs that multiply matrices of bytes: 8 numbers a row, a digit of the keys each, and these put together.

        Raises:
            RuntimeError, AttributeError: this PyTorch has no such product.
        """
        assert self._digits is not None
        sums_B = np.zeros(len(rows), np.uint64)
        places = np.uint64(1) << (np.uint64(8) * np.arange(8, dtype=np.uint64))
        with _one_thread():
            for first in range(0, rows.shape[1], _MATMUL_BYTES):
                part = rows[:, first : first + _MATMUL_BYTES]
                products = torch._int_mm(part, self._digits[first : first + part.shape[1]])
                sums_B += products.numpy().astype(np.uint64) @ places
        return sums_B

    def _matmul_pays(self, nbytes: int) -> bool:
        """Whether this CPU and this PyTorch multiply matrices of bytes exactly, and faster than NumPy takes two passes.

        CPUs from 2019 on have instructions for that (VNNI, AMX). Older ones add two products up in 16 bits, where the
        largest bytes meet digits of one sign and the sum is cut off.
        """
        digits = self._digits[:nbytes].numpy().T
        largest = np.concatenate([digits < 0, digits > 0, np.ones((1, nbytes), bool)]) * np.uint8(255)
        rest = np.random.default_rng(0).integers(0, 256, (_PROBE_ROWS - len(largest), nbytes), np.uint8)
        rows = torch.from_numpy(np.concatenate([largest, rest]))
        try:
            if not np.array_equal(self.by_matmul(rows), self.by_numpy(rows)):
                logger.debug("this CPU's products of matrices of bytes are not exact")
                return False
        except (RuntimeError, AttributeError) as error:
            logger.debug("this PyTorch has no product of matrices of bytes: %s", error)
            return False
        return _fastest_of(3, self.by_matmul, rows) < _fastest_of(3, self.by_numpy, rows)

    def by_torch(self, rows: torch.Tensor) -> torch.Tensor:
        """For GPUs, int64. PyTorch's int64 wraps like uint64 but shifts in the sign, which a mask undoes."""
        words_BW = _pad_to_words(rows).view(torch.int64)
        low, high = self._device_keys
        with torch.inference_mode(False):
            sums_B = torch.zeros(len(words_BW), dtype=torch.int64, device=rows.device)
            temporary = torch.empty(min(_CUDA_PIECE, words_BW.numel()), dtype=torch.int64, device=rows.device)
        for blocks, columns in _pieces(tuple(words_BW.shape), _CUDA_PIECE):
            x = words_BW[blocks, columns]
            y = temporary[: x.numel()].view(x.shape)
            torch.bitwise_and(x, _LOW, out=y)
            sums_B[blocks] += y.mul_(low[columns]).sum(dim=1)
            torch.bitwise_right_shift(x, _HALF, out=y)
            sums_B[blocks] += y.bitwise_and_(_LOW).mul_(high[columns]).sum(dim=1)
        return sums_B


def _digits_of_keys(keys: np.ndarray) -> torch.Tensor:
    """`(bytes, 8)`, int8: what a byte of a row is multiplied with, modulo 2^64, in digits of the base 256.

    That is its word's key times 256 for each byte before it in the word; digits are from -128 to 127, the lowest first.
    """
    rest = (keys[:, None] << (np.uint64(8) * np.arange(4, dtype=np.uint64))).reshape(-1)
    digits = np.empty((8, len(rest)), np.int8)
    for row in digits:
        row[:] = rest.astype(np.uint8).view(np.int8)
        rest = (rest - row.astype(np.uint64)) >> np.uint64(8)
    return torch.from_numpy(digits).t()


def _pad_to_words(rows: torch.Tensor) -> torch.Tensor:
    """`(blocks, bytes)` with rows of whole 8-byte words, each starting at one; a copy only where it is needed."""
    rest = -rows.shape[1] % 8
    if rest == 0 and rows.data_ptr() % 8 == 0:
        return rows
    padded = rows.new_zeros((rows.shape[0], rows.shape[1] + rest))
    padded[:, : rows.shape[1]] = rows
    return padded


@functools.cache
def _openmp() -> Any:
    """The OpenMP that PyTorch computes with: symbols are looked for in what a library was linked with, too."""
    return ctypes.PyDLL(torch._C.__file__)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps a product in the calling thread.

    Else each thread that digests would have a team of threads of its own, as many as there are cores, which go on
    spinning for a while after each product: on the cores that the model computes with.

    Raises:
        AttributeError: PyTorch computes without OpenMP.
    """
    before = _openmp().omp_get_max_threads()
    _openmp().omp_set_num_threads(1)
    try:
        yield
    finally:
        _openmp().omp_set_num_threads(before)


def _fastest_of(times: int, digest: Callable[[torch.Tensor], Any], rows: torch.Tensor) -> float:
    """Seconds of the fastest call: the others may have been interrupted."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        digest(rows)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


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
