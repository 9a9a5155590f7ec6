"""Names of chunks on the server: the same in every process, and different for everything that separates caches."""

from __future__ import annotations

import collections
import hashlib
import json
import re
import threading
import time

import numpy as np

from kvsdk.buffer.keys import KEY_BYTES
from kvsdk.connector.interface import Context
from kvsdk.connectors.lmcache.chunks import FORMAT
from kvsdk.layout import CacheLayout

_DTYPES = {
    "bfloat16": "bfloat16",
    "float16": "half",
    "float32": "float",
    "float64": "double",
    "float8_e4m3fn": "fp8_e4m3fn",
    "float8_e5m2": "fp8_e5m2",
}
"""LMCache's words; its server cannot read a key that ends with another one."""

_REMEMBERED = 100_000

KNOWN_SECONDS = 60.0
"""How long the server is believed to have a chunk: another server may find it damaged, which this one is not told."""


def chunk_keys(blocks: bytes, blocks_per_chunk: int) -> bytes:
    """The prefix keys of the last block of each whole chunk, 16 bytes each, of a prompt's block keys.

    Such a key stands for every token up to the chunk's end, the cache salt, the LoRA adapter and multimodal content.
    """
    keys = np.frombuffer(blocks, dtype=f"V{KEY_BYTES}")
    return keys[blocks_per_chunk - 1 :: blocks_per_chunk].tobytes()


class ChunkNames:
    """Names for one worker's chunks, in LMCache's form `model@world@worker@hash@dtype`.

    Readable are the model's id, the parallel sizes and the dtype; that and all else that must be equal for the same
    tokens to have the same bytes (model, layout, block size, chunk size, format) is in the hash as well.
    """

    def __init__(self, context: Context, layout: CacheLayout, chunk_size: int):
        same = [
            FORMAT,
            dict(context.model),
            context.options.model_id or context.model_path,
            layout.fingerprint(),
            context.world_size,
            context.rank,
            chunk_size,
        ]
        encoded = json.dumps(same, sort_keys=True, default=str).encode()
        self._identity = hashlib.blake2b(encoded, digest_size=32).digest()
        model = re.sub(r"[^A-Za-z0-9._-]", "_", str(context.model.get("id", "")))[:48]
        self._begin = f"{model}-{self._identity.hex()[:8]}@{context.world_size}@{context.rank}@"
        self._end = f"@{_DTYPES.get(layout.layers[0].dtype, 'uint8')}"

    @property
    def model(self) -> str:
        """What all of them have in common, for servers that ask for a model; without `@`."""
        return self._begin.strip("@").replace("@", "-")

    def name(self, key: bytes) -> str:
        """The name of the chunk that ends with the block of this prefix key; at most 150 ASCII characters."""
        return self._name(key, b"kvsdk.lmcache/1")

    def coming(self, key: bytes) -> str:
        """The name under which a server says that it is about to store this chunk."""
        return self._name(key, b"kvsdk.coming/1")

    def _name(self, key: bytes, purpose: bytes) -> str:
        hashed = hashlib.blake2b(key, digest_size=16, key=self._identity, person=purpose).hexdigest()
        return f"{self._begin}{hashed}{self._end}"


class Known:
    """Chunks that the server is known to hold, so that they are neither copied nor sent again; of the last minute, and
    100,000 at most.

    Any thread may use it. Whoever adds says how many connections had been lost when the server was asked: after another
    one it may be another server, or an empty one.
    """

    def __init__(self) -> None:
        self._names: collections.OrderedDict[str, float] = collections.OrderedDict()
        self._damaged: set[str] = set()
        self._losses = 0
        self._lock = threading.Lock()

    def add(self, name: str, losses: int) -> None:
        """The server has it."""
        with self._lock:
            self._forget_if_lost(losses)
            if losses == self._losses:
                self._damaged.discard(name)
                self._names[name] = time.monotonic() + KNOWN_SECONDS
                self._names.move_to_end(name)
                if len(self._names) > _REMEMBERED:
                    self._names.popitem(last=False)

    def has(self, name: str, losses: int) -> bool:
        """Whether the server has it, as far as is known."""
        with self._lock:
            self._forget_if_lost(losses)
            return time.monotonic() < self._names.get(name, 0.0)

    def discard(self, name: str, *, damaged: bool = False) -> None:
        """The server does not have it, or something else in its place, which the next save replaces."""
        with self._lock:
            self._names.pop(name, None)
            if damaged and len(self._damaged) < _REMEMBERED:
                self._damaged.add(name)

    def is_damaged(self, name: str) -> bool:
        """Whether what the server has under this name is not what was stored."""
        with self._lock:
            return name in self._damaged

    def _forget_if_lost(self, losses: int) -> None:
        if losses > self._losses:
            self._names.clear()
            self._losses = losses
