"""Prefix keys: names for a prompt and for each whole block of it, the same in every process.

Key `i` is a cryptographic hash over the root and every token before the end of block `i`. Two prompts therefore share a
key only if they share everything before it, and a longest common prefix is found by comparing keys, never tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from kvsdk.errors import ProtocolError

KEY_BYTES = 16
# 500,000 keys are 8,000,000 bytes: the longest prompt whose keys still fit one message (8 MiB).
MAX_BLOCKS = 500_000
MAX_BLOCK_SIZE = 65_536

_TOKENS_AT_ONCE, _BLOCKS_AT_ONCE = 16384, 512
_CHAIN = b"kvsdk.prefix/1"
_TAIL = b"kvsdk.tail/1"
_WIRE_FIELDS = frozenset({"num_tokens", "block_size", "blocks", "tail"})


@dataclass(frozen=True)
class PrefixKeys:
    """The keys of one prompt.

    Attributes:
        num_tokens: length of the prompt, in tokens.
        block_size: tokens a block.
        blocks: the keys of the whole blocks, 16 bytes each, concatenated.
        tail: 16 bytes over all `num_tokens` tokens, or `b""` when they end with a whole block. By it a prompt shorter
            than a block is found, and a prompt is told from one that only starts alike.
    """

    num_tokens: int
    block_size: int
    blocks: bytes
    tail: bytes

    @property
    def num_blocks(self) -> int:
        """Whole blocks, each with a key."""
        return len(self.blocks) // KEY_BYTES

    @property
    def full_key(self) -> bytes:
        """The key that covers the whole prompt: the tail's, or the last block's."""
        return self.tail or self.blocks[-KEY_BYTES:]

    def key(self, index: int) -> bytes:
        """The 16 bytes of block `index`; raises IndexError outside `0 <= index < num_blocks`."""
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} of {self.num_blocks}")
        return self.blocks[index * KEY_BYTES : (index + 1) * KEY_BYTES]

    def common_blocks(self, other: PrefixKeys) -> int:
        """Whole blocks at the start of both prompts; 0 when their block sizes differ."""
        if self.block_size != other.block_size:
            return 0
        return common_keys(self.blocks, other.blocks)

    def to_wire(self) -> dict[str, Any]:
        """Plain values for msgpack."""
        return {
            "num_tokens": self.num_tokens,
            "block_size": self.block_size,
            "blocks": self.blocks,
            "tail": self.tail,
        }

    @classmethod
    def from_wire(cls, value: Any) -> PrefixKeys:
        """What `to_wire` made, checked as something a stranger sent.

        Raises:
            ProtocolError: a field is missing, unknown, of another type, out of range or contradicts another.
        """
        if type(value) is not dict or value.keys() != _WIRE_FIELDS:
            raise ProtocolError("prefix keys: not the fields num_tokens, block_size, blocks, tail")
        num_tokens, block_size = value["num_tokens"], value["block_size"]
        blocks, tail = value["blocks"], value["tail"]
        if type(block_size) is not int or not 1 <= block_size <= MAX_BLOCK_SIZE:
            raise ProtocolError(f"prefix keys: block_size is not a number from 1 to {MAX_BLOCK_SIZE}")
        if type(num_tokens) is not int or not 1 <= num_tokens < (MAX_BLOCKS + 1) * block_size:
            raise ProtocolError(f"prefix keys: num_tokens is not between 1 token and {MAX_BLOCKS} whole blocks")
        num_blocks, rest = divmod(num_tokens, block_size)
        if type(blocks) is not bytes or len(blocks) != num_blocks * KEY_BYTES:
            raise ProtocolError(f"prefix keys: {num_tokens} tokens need {num_blocks} keys of {KEY_BYTES} bytes")
        if type(tail) is not bytes or len(tail) != (KEY_BYTES if rest else 0):
            raise ProtocolError(f"prefix keys: the tail of {rest} tokens has a key of the wrong length")
        return cls(num_tokens, block_size, blocks, tail)


def _no_pause() -> None:
    return


def as_tokens(tokens: Sequence[int], count: int, pause: Callable[[], None] = _no_pause) -> np.ndarray:
    """The first `count` of a prompt's token ids as int32; `pause` is called every 16,384, which take 0.3 ms:
    `python -m timeit -s "import numpy; t = list(range(16384)); a = numpy.empty(16384, 'i4')" "a[:] = t"`."""
    found = np.empty(count, np.int32)
    for start in range(0, count, _TOKENS_AT_ONCE):
        if start:
            pause()
        end = min(start + _TOKENS_AT_ONCE, count)
        found[start:end] = tokens[start:end]
    return found


def prefix_keys(
    tokens: np.ndarray, block_size: int, root: bytes = b"", pause: Callable[[], None] = _no_pause
) -> PrefixKeys:
    """The keys of a prompt.

    Args:
        tokens: shape (P,), int32, P from 1 to `MAX_BLOCKS` blocks: the prompt's token ids.
        block_size: tokens a block. It is part of every key.
        root: whatever else separates caches, as `separator` encodes it. It is part of every key.
        pause: called every 512 blocks (0.26 ms at the 0.5 us a block of benchmarks/results/README.md): Python's threads
            run one at a time, and one that does not pause keeps the one that runs the model waiting for 5 ms, which is
            `sys.getswitchinterval()`.

    Raises:
        ValueError: `tokens` has another shape or dtype, is empty or too long; `block_size` is out of range.
    """
    if tokens.ndim != 1 or tokens.dtype != np.int32 or not len(tokens):
        raise ValueError(f"tokens have shape {tokens.shape} and dtype {tokens.dtype}; need (P,), P >= 1, int32")
    if not 1 <= block_size <= MAX_BLOCK_SIZE:
        raise ValueError(f"block_size={block_size} is not from 1 to {MAX_BLOCK_SIZE}")
    num_blocks, rest = divmod(len(tokens), block_size)
    if num_blocks > MAX_BLOCKS:
        raise ValueError(f"{num_blocks} blocks are more than {MAX_BLOCKS}, the most that a message carries")
    chain = hashlib.blake2b(digest_size=KEY_BYTES, person=_CHAIN)
    # The root's length goes first, so that no root can pass for another root and some tokens.
    chain.update(len(root).to_bytes(8, "little") + root + block_size.to_bytes(8, "little"))
    content = tokens.astype("<i4", copy=False).tobytes()
    step = 4 * block_size
    keys = []
    update, digest = chain.update, chain.digest
    for first in range(0, num_blocks, _BLOCKS_AT_ONCE):
        if first:
            pause()
        for start in range(first * step, min(first + _BLOCKS_AT_ONCE, num_blocks) * step, step):
            update(content[start : start + step])
            keys.append(digest())
    tail = b""
    if rest:
        update(content[num_blocks * step :])
        # A second hash under another personalisation: no block key of any prompt can equal a tail key.
        tail = hashlib.blake2b(digest(), digest_size=KEY_BYTES, person=_TAIL).digest()
    return PrefixKeys(len(tokens), block_size, b"".join(keys), tail)


def separator(
    *,
    cache_salt: str | None,
    lora: str | None,
    multimodal: Sequence[tuple[str, int, int]],
    extra: str = "",
) -> bytes:
    """A root for `prefix_keys`: prompts with different values never share a key.

    Args:
        cache_salt: the request's cache salt.
        lora: the adapter's name, or None for the base model.
        multimodal: (identifier of the content, offset in tokens, length in tokens) of each item, in the prompt's order.
        extra: anything else that changes the KV of the same tokens.
    """
    items = [[identifier, offset, length] for identifier, offset, length in multimodal]
    # msgpack puts a type and a length before every value, so no two lists of values share an encoding. A salt comes out
    # of a client's JSON, where half a surrogate pair is legal; it must make a key, not an exception in the scheduler.
    return msgpack.packb([cache_salt, lora, items, extra], use_bin_type=True, unicode_errors="surrogatepass")


def common_keys(a: bytes, b: bytes, start: int = 0) -> int:
    """How many 16-byte keys at the start of `a` equal those of `b` from byte `start` on."""
    if b.startswith(a, start):
        return len(a) // KEY_BYTES
    count = min(len(a), len(b) - start) // KEY_BYTES
    if count <= 0:
        return 0
    keys_a = np.frombuffer(a, dtype=np.uint64, count=2 * count)
    keys_b = np.frombuffer(b, dtype=np.uint64, count=2 * count, offset=start)
    differ = keys_a != keys_b
    first = int(differ.argmax())
    return first // 2 if differ[first] else count
