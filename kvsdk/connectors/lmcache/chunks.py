"""What a chunk is on the server: a header under the chunk's name, and the blocks of all layers in pieces.

    magic 8 | blocks 4 | parts 4 | bytes of a block 8 | hash of the name 16 | blocks of each part 4 x blocks
    | digest of each piece 16 x pieces | hash of all before 16

Little-endian. A chunk whose blocks were computed in several steps has as many parts, each as `BlockStore.gather` packs
its blocks. The header is as long for every chunk of as many blocks, so that the length of what is there is known before
it is fetched.

**Pieces** are 4 MiB of the payload, the last one what is left, each with a digest of its own. Where a server keeps
values by name, pieces are values of their own, named by the chunk, their place in it and their digest: the header,
which is stored last, can only lead to what belongs together, also where two store the same chunk at once.

**The digest** is made and compared in host memory, where it must not cost more than the network does, and in few NumPy
calls, since each takes Python's lock from the threads that receive: a hash over the sums, modulo 2**64, of the rows
and of the columns of the piece as a matrix of 512 words in a row. Any error in up to three words shows, and any other
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

PIECE_BYTES = 4 * 2**20
"""LMCache's `lm://` server receives into memory as long as what is still to come, and gives the rest of it back, after
each segment: pieces of this size cost it a third less than whole chunks. Whole 8-byte words."""

_FIXED = struct.Struct("<8sIIQ16s")
_HASH_BYTES = 16
_ROW = 512  # words
_ROWS = 256  # 1 MiB, which stays in a core's second-level cache for the second sum


def digest(piece: memoryview | np.ndarray) -> bytes:
    """16 bytes over host memory: see the module.

    Args:
        piece: contiguous; a whole number of 8-byte words.
    """
    words = np.frombuffer(piece, "<u8")
    whole = len(words) // _ROW
    matrix, rest = words[: whole * _ROW].reshape(whole, _ROW), words[whole * _ROW :]
    row_sums, column_sums = np.zeros(whole + 1, np.uint64), np.zeros(_ROW, np.uint64)
    for start in range(0, whole, _ROWS):
        rows = matrix[start : start + _ROWS]
        np.sum(rows, axis=1, out=row_sums[start : start + len(rows)])
        column_sums += rows.sum(axis=0)
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
        num_pieces: of its payload.

    Raises:
        ConfigError: blocks of this layout cannot be laid end to end.
    """

    def __init__(self, layout: CacheLayout, num_blocks: int):
        if layout.block_bytes % 8:
            raise ConfigError(f"a block of {layout.block_bytes} bytes is no whole number of 8-byte words")
        self.num_blocks, self._layout = num_blocks, layout
        self.payload_bytes, self._piece_bytes = num_blocks * layout.block_bytes, PIECE_BYTES
        self.num_pieces = -(-self.payload_bytes // PIECE_BYTES)
        self.header_bytes = _FIXED.size + 4 * num_blocks + _HASH_BYTES * (self.num_pieces + 1)

    def pieces(self, payload: memoryview) -> list[memoryview]:
        """A payload's pieces: views."""
        return [payload[at : at + self._piece_bytes] for at in range(0, self.payload_bytes, self._piece_bytes)]

    def header(self, name: str, parts: Sequence[int], digests: Sequence[bytes]) -> bytes:
        """The header of a chunk.

        Args:
            name: under which it is stored.
            parts: blocks of each part; together `num_blocks`.
            digests: of the pieces, from `digest`.
        """
        block_bytes, hashed = self._layout.block_bytes, _hash(name.encode())
        fixed = _FIXED.pack(FORMAT.encode(), self.num_blocks, len(parts), block_bytes, hashed)
        content = fixed + np.asarray(parts, "<u4").tobytes().ljust(4 * self.num_blocks, b"\0") + b"".join(digests)
        return content + _hash(content)

    def read_header(self, name: str, header: bytes | bytearray) -> tuple[list[int], list[bytes]]:
        """The blocks of each part, and the pieces' digests.

        Raises:
            ProtocolError: it is damaged, or another chunk's.
        """
        header = bytes(header)
        content, told = header[:-_HASH_BYTES], header[-_HASH_BYTES:]
        if len(header) != self.header_bytes or _hash(content) != told:
            raise ProtocolError("its header is damaged")
        magic, blocks, count, block_bytes, hashed = _FIXED.unpack_from(content)
        ours = (FORMAT.encode(), self.num_blocks, self._layout.block_bytes, _hash(name.encode()))
        if (magic, blocks, block_bytes, hashed) != ours:
            raise ProtocolError("it is another chunk")
        parts = np.frombuffer(content, "<u4", self.num_blocks, _FIXED.size)[:count].tolist()
        if not 0 < count <= self.num_blocks or sum(parts) != self.num_blocks or not all(parts):
            raise ProtocolError(f"its parts are {parts[:8]}, not {self.num_blocks} blocks")
        first = _FIXED.size + 4 * self.num_blocks
        return parts, [content[at : at + _HASH_BYTES] for at in range(first, len(content), _HASH_BYTES)]

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


class Outgoing:
    """A chunk that a connection stores: the pieces in order, then the header.

    Args:
        name: of the chunk.
        parts: blocks of each part.
        payload: uint8, as long as a chunk's.
    """

    def __init__(self, form: ChunkFormat, name: str, parts: Sequence[int], payload: torch.Tensor):
        self.form, self.name, self._parts = form, name, parts
        self._pieces, self._digests = form.pieces(memoryview(payload.numpy())), []

    def pieces(self) -> Iterator[tuple[bytes, memoryview]]:
        """Each piece and its digest, which is made when its turn comes."""
        self._digests = []
        for piece in self._pieces:
            self._digests.append(digest(piece))
            yield self._digests[-1], piece

    def header(self) -> bytes:
        """Once `pieces` has come to its end."""
        return self.form.header(self.name, self._parts, self._digests)


class Incoming:
    """A chunk that a connection fetches: `header` is filled, then `open` called, then each piece filled and `check`
    called for it.

    Args:
        name: of the chunk.
        payload: uint8, as long as a chunk's.
        verify: whether pieces are compared with their digests.

    Attributes:
        header: to be filled.
        parts: blocks of each part, once it is open.
        pieces: to be filled.
        digests: of the pieces, once it is open.
        damage: what is wrong with a piece, if anything is.
    """

    def __init__(self, form: ChunkFormat, name: str, payload: torch.Tensor, *, verify: bool = True):
        self.form, self.name, self._verify = form, name, verify
        self.header = bytearray(form.header_bytes)
        self.pieces = form.pieces(memoryview(payload.numpy()))
        self.parts: list[int] = []
        self.digests: list[bytes] = []
        self.damage = ""

    def open(self) -> None:
        """Raises ProtocolError when the header is damaged, or another chunk's."""
        self.parts, self.digests = self.form.read_header(self.name, self.header)

    def check(self, index: int) -> None:
        """Piece `index` is there; `damage` says so if it is not what was stored."""
        if self._verify and digest(self.pieces[index]) != self.digests[index]:
            self.damage = f"piece {index} does not match its digest"
