"""A worker half of LMCacheConnector over a KV cache of random bytes, without vLLM."""

from __future__ import annotations

import threading
import time

import numpy as np
import torch

from kvsdk.config import parse_options
from kvsdk.connector.interface import CacheGeometry, Context
from kvsdk.connector.tasks import LoadOrder, LoadTask, SaveOrder, SaveTask
from kvsdk.connectors.lmcache import LMCacheConnector, LMCacheWorker
from kvsdk.connectors.lmcache.keys import chunk_keys
from kvsdk.errors import DeadlineExceeded
from kvsdk.layout import layout_of

BLOCK, BLOCKS = 4, 64


class Worker:
    """Saves and loads.

    Args:
        url: of the server.
        role: `kv_role`.
        device: of the KV cache.
        chunk_size: tokens; blocks have `BLOCK`.
        page: heads and content of a token in each of `layers` layers of bfloat16.
    """

    def __init__(
        self,
        url,
        role="kv_both",
        device="cpu",
        *,
        chunk_size=8,
        page=(2, 8),
        layers=3,
        blocks=BLOCKS,
        lookup_timeout=5.0,
    ):
        heads, content = page
        generator = torch.Generator().manual_seed(7)
        self.caches = {
            f"layers.{i}": torch.randint(0, 1 << 15, (blocks, heads, BLOCK, content), generator=generator)
            .to(torch.int16).view(torch.bfloat16).to(device)
            for i in range(layers)
        }  # fmt: skip
        layout = layout_of(self.caches, num_blocks=blocks, block_size=BLOCK)
        extra = {
            "remote_url": url,
            "chunk_size": chunk_size,
            "lookup_timeout": lookup_timeout,
            "max_local_cpu_size": 0.5,
        }
        options = parse_options({"kv_role": role}, extra=extra, also=LMCacheConnector.option_names)
        cache = CacheGeometry(BLOCK, blocks, layout.block_bytes)
        self.per_chunk = chunk_size // BLOCK
        self.half = LMCacheWorker(Context(options, "test", 0, 1, {"id": "test"}, cache))
        self.half.register(self.caches, layout)
        self._cuda = device != "cpu"

    def _fence(self):
        if not self._cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def save(self, ids, keys, first=0, fence=None, of=None):
        """Hand blocks over that are those of a prompt of `of` blocks from block `first` on, and the last ones unless
        `of` says otherwise; `keys` has 16 bytes for each."""
        end = first + len(ids)
        order = SaveOrder(1, "r", (ids,), first, end * BLOCK, (of or end) * BLOCK, keys, 60.0)
        task = SaveTask(order, time.monotonic() + 60, fence or self._fence())
        self.half.save(task)
        return task

    def stored(self):
        """Wait until everything that was handed over has been stored."""
        return self.half._saver.drain(time.monotonic() + 30.0)

    def fetch(self, keys, ticket=1):
        """How many chunks of a prompt with these block keys are in host memory afterwards."""
        counts, done = [], threading.Event()

        def answer(count):
            counts.append(count)
            done.set()

        self.half._loader._chunks.open(ticket, chunk_keys(keys, self.per_chunk), 0, 5.0, answer)
        assert done.wait(10.0)
        return counts[0]

    def load(self, ids, ticket=1, first=0, fence=None, expire_after=None):
        """Copy fetched blocks into these; returns the task, which has ended, or was ended after so many seconds."""
        order = LoadOrder(1, "r", (ids,), first, (first + len(ids)) * BLOCK, ticket, 60.0)
        task = LoadTask(order, time.monotonic() + 60, fence or self._fence())
        self.half.load(task)
        if expire_after is not None:
            time.sleep(expire_after)
            task.expire(DeadlineExceeded("its time is up"))
        deadline = time.monotonic() + 30.0
        while not task.ended:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return task

    def blocks(self, ids):
        """Bytes of blocks, by layer."""
        index = torch.from_numpy(ids.astype(np.int64))
        return [cache.cpu().view(torch.int16)[index].clone() for cache in self.caches.values()]

    def close(self):
        self.half.close()
