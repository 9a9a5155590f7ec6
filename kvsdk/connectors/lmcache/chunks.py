"""What lies under a chunk's name: a header, and the blocks of all layers.

    magic 8 | blocks 4 | parts 4 | bytes of a block 8 | hash of the name 16 | digest 16 | blocks of each part 4 x blocks
    | hash of all before 16 | the parts, each as `BlockStore.gather` packs its blocks

Little-endian. A chunk whose blocks were computed in several steps has as many parts. The header is as long for every
chunk of as many blocks, so that the length of what is there is known before it is fetched.

**The digest** is made and compared in host memory, where it must not cost more than the network does, and in few NumPy
calls, since each takes Python's lock from the threads that receive: a hash over the sums, modulo 2**64, of the rows
and of the columns of the payload as a matrix of 512 words in a row. Any error in up to three words shows, and any other
one that is not a pattern of rectangles whose corners cancel out; so do exchanged and shifted pieces, whatever their
size. It is no protection against an adversary.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kvsdk.errors import ConfigError, ProtocolError
from kvsdk.layout import CacheLayout

FORMAT = "kvsdkLM1"
_FIXED = struct.Struct("<8sIIQ16s16s")
_HASH_BYTES = 16
_ROW = 512  # words
_PIECE = 256  # rows: 1 MiB, which stays in a core's second-level cache for the second sum


def digest(payload: torch.Tensor) -> bytes:
    """16 bytes over host memory: see the module.

    Args:
        payload: 1-D uint8, contiguous; a whole number of 8-byte words.
    """
    words = payload.numpy().view("<u8")
    whole = len(words) // _ROW
    matrix, rest = words[: whole * _ROW].reshape(whole, _ROW), words[whole * _ROW :]
    row_sums, column_sums = np.zeros(whole + 1, np.uint64), np.zeros(_ROW, np.uint64)
    for start in range(0, whole, _PIECE):
        piece = matrix[start : start + _PIECE]
        np.sum(piece, axis=1, out=row_sums[start : start + len(piece)])
        column_sums += piece.sum(axis=0)
    row_sums[whole] = rest.sum(dtype=np.uint64)
    column_sums[: len(rest)] += rest
    return _hash(row_sums.astype("<u8").tobytes() + column_sums.astype("<u8").tobytes())


COMING_SECONDS = 10.0
"""How long word of a coming chunk is believed: whoever gave it may have died, and the server keeps it for ever."""

_COMING = struct.Struct("<8sd")
COMING_BYTES = _COMING.size


def coming(now: float) -> bytes:
    """What says that a chunk is about to be stored; `now` is wall-clock time, since other hosts read it."""
    return _COMING.pack(FORMAT.encode(), now + COMING_SECONDS)


def is_coming(said: bytes | bytearray, now: float) -> bool:
    """Whether what `coming` made, on any host, is still to be believed."""
    magic, until = _COMING.unpack(said)
    return magic == FORMAT.encode() and now < until < now + 2 * COMING_SECONDS


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_HASH_BYTES).digest()


class ChunkFormat:
    """Chunks of one worker.

    Args:
        layout: of its KV cache.
        num_blocks: blocks of a chunk.

    Attributes:
        header_bytes: of each chunk.
        payload_bytes: of its blocks.

    Raises:
        ConfigError: blocks of this layout cannot be laid end to end.
    """

    def __init__(self, layout: CacheLayout, num_blocks: int):
        if layout.block_bytes % 8:
            raise ConfigError(f"a block of {layout.block_bytes} bytes is no whole number of 8-byte words")
        self.num_blocks, self._layout = num_blocks, layout
        self.header_bytes = _FIXED.size + 4 * num_blocks + _HASH_BYTES
        self.payload_bytes = num_blocks * layout.block_bytes

    def header(self, name: str, parts: Sequence[int], payload_digest: bytes) -> bytes:
        """The header of a chunk.

        Args:
            name: under which it is stored.
            parts: blocks of each part; together `num_blocks`.
            payload_digest: of all parts, from `digest`.
        """
        block_bytes, hashed = self._layout.block_bytes, _hash(name.encode())
        fixed = _FIXED.pack(FORMAT.encode(), self.num_blocks, len(parts), block_bytes, hashed, payload_digest)
        content = fixed + np.asarray(parts, "<u4").tobytes().ljust(4 * self.num_blocks, b"\0")
        return content + _hash(content)

    def read_header(self, name: str, header: bytes | bytearray) -> tuple[list[int], bytes]:
        """The blocks of each part, and the payload's digest.

        Raises:
            ProtocolError: it is damaged, or another chunk's.
        """
        header = bytes(header)
        content, told = header[:-_HASH_BYTES], header[-_HASH_BYTES:]
        if len(header) != self.header_bytes or _hash(content) != told:
            raise ProtocolError("its header is damaged")
        magic, blocks, count, block_bytes, hashed, payload_digest = _FIXED.unpack_from(content)
        ours = (FORMAT.encode(), self.num_blocks, self._layout.block_bytes, _hash(name.encode()))
        if (magic, blocks, block_bytes, hashed) != ours:
            raise ProtocolError("it is another chunk")
        parts = np.frombuffer(content, "<u4", self.num_blocks, _FIXED.size)[:count].tolist()
        if not 0 < count <= self.num_blocks or sum(parts) != self.num_blocks or not all(parts):
            raise ProtocolError(f"its parts are {parts[:8]}, not {self.num_blocks} blocks")
        return parts, payload_digest

    def spans(self, parts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """The first block of each part, and the one behind its last, within the chunk."""
        first = 0
        for count in parts:
            yield first, first + count
            first += count

    def part(self, payload: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """A part's bytes, as a staging buffer: a view."""
        return payload[first * self._layout.block_bytes : last * self._layout.block_bytes]

    def cut(self, part: torch.Tensor, count: int, first: int, last: int) -> torch.Tensor:
        """Blocks `first` to `last` of a part of `count` blocks, as a staging buffer of their own."""
        pieces, start = [], 0
        for layer in self._layout.layers:
            rows = part[start : start + count * layer.block_bytes].view(count, layer.block_bytes)
            pieces.append(rows[first:last].reshape(-1))
            start += count * layer.block_bytes
        return torch.cat(pieces)
