"""What lies under a chunk's name: a header with a digest of each block, and the blocks of all layers.

    magic 8 | blocks 4 | parts 4 | bytes of a block 8 | hash of the name 16 | blocks of each part 4 x blocks, to 8 bytes
    | digests 8 x blocks | hash of all before 16 | the parts, each as `BlockStore.gather` packs its blocks

Little-endian. A chunk whose blocks were computed in several steps has as many parts. The header is as long for every
chunk of as many blocks, so that the length of what is there is known before it is fetched.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kvsdk.errors import ConfigError, ProtocolError
from kvsdk.kernels.digest import WordMixer
from kvsdk.layout import CacheLayout

FORMAT = "kvsdkLM1"
_FIXED = struct.Struct("<8sIIQ16s")
_HASH_BYTES = 16


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
        self._parts_bytes = -(-4 * num_blocks // 8) * 8
        self.header_bytes = _FIXED.size + self._parts_bytes + 8 * num_blocks + _HASH_BYTES
        self.payload_bytes = num_blocks * layout.block_bytes
        self._mixer = WordMixer(max(layer.block_bytes for layer in layout.layers), torch.device("cpu"))

    def header(self, name: str, parts: Sequence[int], digests: np.ndarray) -> bytes:
        """The header of a chunk.

        Args:
            name: under which it is stored.
            parts: blocks of each part; together `num_blocks`.
            digests: uint64, one a block.
        """
        fixed = _FIXED.pack(
            FORMAT.encode(), self.num_blocks, len(parts), self._layout.block_bytes, _hash(name.encode())
        )
        sizes = np.asarray(parts, "<u4").tobytes().ljust(self._parts_bytes, b"\0")
        content = fixed + sizes + np.asarray(digests).astype("<u8").tobytes()
        return content + _hash(content)

    def read_header(self, name: str, header: bytes | bytearray) -> tuple[list[int], np.ndarray]:
        """The blocks of each part, and the blocks' digests.

        Raises:
            ProtocolError: it is damaged, or another chunk's.
        """
        header = bytes(header)
        content, told = header[:-_HASH_BYTES], header[-_HASH_BYTES:]
        if len(header) != self.header_bytes or _hash(content) != told:
            raise ProtocolError(f"the header of {name} is damaged")
        magic, blocks, count, block_bytes, hashed = _FIXED.unpack_from(content)
        ours = (FORMAT.encode(), self.num_blocks, self._layout.block_bytes, _hash(name.encode()))
        if (magic, blocks, block_bytes, hashed) != ours:
            raise ProtocolError(f"what lies under {name} is another chunk")
        parts = np.frombuffer(content, "<u4", self.num_blocks, _FIXED.size)[:count].tolist()
        if not 0 < count <= self.num_blocks or sum(parts) != self.num_blocks or not all(parts):
            raise ProtocolError(f"the parts of {name} are {parts[:8]}, not {self.num_blocks} blocks")
        return parts, np.frombuffer(content, "<u8", self.num_blocks, _FIXED.size + self._parts_bytes)

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
        return torch.cat([rows[first:last].reshape(-1) for rows in self._rows(part, count)])

    def num_wrong(self, payload: torch.Tensor, parts: Sequence[int], digests: np.ndarray, position: int) -> int:
        """How many blocks in host memory are not what was stored.

        Args:
            position: of the chunk's first block in its prompt, in blocks.
        """
        wrong = 0
        for first, last in self.spans(parts):
            sums = [self._mixer.row_sums(rows) for rows in self._rows(self.part(payload, first, last), last - first)]
            found = self._mixer.digests(sums, np.arange(position + first, position + last))
            wrong += int(np.count_nonzero(found != digests[first:last]))
        return wrong

    def _rows(self, part: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """Each layer's `(blocks, bytes)` of a part."""
        start = 0
        for layer in self._layout.layers:
            yield part[start : start + count * layer.block_bytes].view(count, layer.block_bytes)
            start += count * layer.block_bytes
