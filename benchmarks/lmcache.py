"""Storing and loading KV through LMCache's `lm://` server: kvsdk's connector and LMCache's own client, on one server.

    python -m benchmarks.lmcache --gib 1 --rounds 3 --out FILE

Chunks have 256 tokens of an 8B Llama in bfloat16, 32 MiB each. For kvsdk, storing is the way from the KV cache until
the server has confirmed the last chunk: copied, digested, sent. Loading is the way from the lookup until all chunks are
in host memory and compared with their digests, which is where a prompt is promised; `to cache` adds the copy into the
KV cache. LMCache's client starts and ends in its own host memory and checks nothing: it is asked to put every chunk and
then whether the last one is there, and to get every chunk. The rounds take turns. Needs the extra `lmcache`. The server
never evicts: each round takes twice the size of its memory.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import table, write
from kvsdk.buffer.keys import KEY_BYTES
from kvsdk.config import parse_options
from kvsdk.connector.interface import CacheGeometry, Context
from kvsdk.connector.tasks import LoadOrder, LoadTask, SaveOrder, SaveTask, TaskState
from kvsdk.connectors.lmcache import LMCacheConnector, LMCacheWorker
from kvsdk.layout import layout_of

LAYERS, HEADS, CONTENT, BLOCK, CHUNK = 32, 8, 256, 16, 256
CHUNK_BYTES = LAYERS * HEADS * CONTENT * CHUNK * 2


class Kvsdk:
    """The connector's worker half over a KV cache of random bytes."""

    def __init__(self, port: int, num_chunks: int):
        self._num_chunks, self._port = num_chunks, port
        num_blocks = 1 + 2 * num_chunks * CHUNK // BLOCK
        page = (num_blocks, HEADS, BLOCK, CONTENT)
        self._caches = {
            f"layers.{i}": torch.randint(0, 1 << 15, page, dtype=torch.int16).view(torch.bfloat16)
            for i in range(LAYERS)
        }
        layout = layout_of(self._caches, num_blocks=num_blocks, block_size=BLOCK)
        options = parse_options(
            {"kv_role": "kv_both"},
            extra={
                "remote_url": f"lm://127.0.0.1:{port}",
                "lookup_timeout": 30.0,
                "load_timeout": 60.0,
                "max_local_cpu_size": 2.5 * num_chunks * CHUNK_BYTES / 2**30,
            },
            also=LMCacheConnector.option_names,
        )
        cache = CacheGeometry(BLOCK, num_blocks, layout.block_bytes)
        self._worker = LMCacheWorker(Context(options, "bench", 0, 1, {"id": "bench"}, cache))
        self._worker.register(self._caches, layout)
        self._saved = np.arange(1, 1 + num_chunks * CHUNK // BLOCK, dtype=np.int32)

    def store(self, keys: bytes) -> None:
        """From the KV cache until the server has all chunks."""
        step = 8192 // BLOCK  # as prefills come: 8,192 tokens a step
        for first in range(0, len(self._saved), step):
            ids = self._saved[first : first + step]
            part = keys[first * KEY_BYTES : (first + len(ids)) * KEY_BYTES]
            end = (first + len(ids)) * BLOCK
            self._worker.save(SaveTask(SaveOrder(first, "r", (ids,), first, end, part, 60.0), time.monotonic() + 60))
        assert self._worker._saver is not None
        assert self._worker._saver.drain(time.monotonic() + 120), "not stored in time"

    def fetch(self, keys: bytes) -> int:
        """From the lookup until all chunks are checked; returns a ticket."""
        done, count, ticket = threading.Event(), [], secrets.randbits(60)

        def answer(number: int) -> None:
            count.append(number)
            done.set()

        assert self._worker._loader is not None
        chunks = self._worker._loader._chunks
        per_chunk = CHUNK // BLOCK
        ends = np.frombuffer(keys, f"V{KEY_BYTES}")[per_chunk - 1 :: per_chunk].tobytes()
        chunks.open(ticket, ends, 0, 60.0, answer)
        assert done.wait(60) and count == [self._num_chunks], count
        return ticket

    def load(self, ticket: int) -> None:
        """From host memory into other blocks of the KV cache."""
        ids = self._saved + np.int32(len(self._saved))
        task = LoadTask(LoadOrder(1, "r", (ids,), 0, len(ids) * BLOCK, ticket, 60.0), time.monotonic() + 60)
        self._worker.load(task)
        while not task.ended:
            time.sleep(0.0002)
        assert task.state is TaskState.DONE, task.error
        assert self._worker._loader is not None
        self._worker._loader._chunks.release(ticket)

    def check(self) -> None:
        """What was loaded is what was stored."""
        for cache in self._caches.values():
            half = len(self._saved)
            assert torch.equal(cache[1 : 1 + half].view(torch.int16), cache[1 + half : 1 + 2 * half].view(torch.int16))

    def close(self) -> None:
        self._worker.close()


class LMCache:
    """LMCache's `LMCServerConnector` with its own memory."""

    def __init__(self, port: int, num_chunks: int):
        os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.connector.lm_connector import LMCServerConnector
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

        size = 2.5 * num_chunks * CHUNK_BYTES / 2**30
        config = LMCacheEngineConfig.from_defaults(chunk_size=CHUNK, local_cpu=False, max_local_cpu_size=size)
        shape = (LAYERS, 2, CHUNK, HEADS, CONTENT // 2)
        metadata = LMCacheMetadata("bench", 1, 1, 0, 0, torch.bfloat16, shape)
        self._memory = LocalCPUBackend(config, metadata, "cpu")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client = LMCServerConnector("127.0.0.1", port, self._loop, self._memory)
        self._new_key = lambda number: CacheEngineKey("bench", 1, 0, number, torch.bfloat16)
        self._keys: list[Any] = []
        wanted = torch.Size([2, LAYERS, CHUNK, HEADS * CONTENT // 2])
        self._stored = []
        for _ in range(num_chunks):
            one = self._memory.allocate(wanted, torch.bfloat16, MemoryFormat.KV_2LTD)
            one.tensor.view(torch.int16).random_(0, 1 << 15)
            self._stored.append(one)

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(120)

    def store(self) -> None:
        # Others than in the round before, as kvsdk's: a chunk that is replaced gives the server memory that it has.
        self._keys = [self._new_key(secrets.randbits(63)) for _ in self._stored]

        async def put_all() -> bool:
            for key, one in zip(self._keys, self._stored, strict=True):
                await self._client.put(key, one)
            return await self._client.exists(self._keys[-1])

        assert self._call(put_all())

    def load(self) -> None:
        async def get_all() -> list[Any]:
            return [await self._client.get(key) for key in self._keys]

        found = self._call(get_all())
        assert all(one is not None for one in found)
        for one in found:
            one.ref_count_down()

    def close(self) -> None:
        self._call(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)


def start_server() -> tuple[subprocess.Popen[bytes], int]:
    """LMCache's own server, in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(port)]
    environ = {**os.environ, "LMCACHE_TRACK_USAGE": "false"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ)
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process, port
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise
            time.sleep(0.1)


def timed(what: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = what()
    return time.perf_counter() - began, result


def _our_turn(ours: Kvsdk, num_chunks: int) -> dict[str, float]:
    keys = secrets.token_bytes(num_chunks * (CHUNK // BLOCK) * KEY_BYTES)
    store, _ = timed(lambda: ours.store(keys))
    load, ticket = timed(lambda: ours.fetch(keys))
    scatter, _ = timed(lambda: ours.load(ticket))
    ours.check()
    return {"kvsdk store": store, "kvsdk load": load, "kvsdk to cache": load + scatter}


def _their_turn(theirs: LMCache, num_chunks: int) -> dict[str, float]:
    return {"lmcache store": timed(theirs.store)[0], "lmcache load": timed(theirs.load)[0]}


def run(num_chunks: int, rounds: int) -> dict[str, Any]:
    """Seconds of each round, by client and direction."""
    process, port = start_server()
    samples: dict[str, list[float]] = {
        name: [] for name in ("kvsdk store", "lmcache store", "kvsdk load", "lmcache load", "kvsdk to cache")
    }
    try:
        ours, theirs = Kvsdk(port, num_chunks), LMCache(port, num_chunks)
        try:
            for number in range(rounds + 1):
                seconds: dict[str, float] = {}
                for turn in (_our_turn, _their_turn) if number % 2 else (_their_turn, _our_turn):
                    seconds |= turn(ours if turn is _our_turn else theirs, num_chunks)
                if number:  # the first one makes memory and connections
                    for name, value in seconds.items():
                        samples[name].append(value)
        finally:
            ours.close()
            theirs.close()
    finally:
        process.kill()
        process.wait()
    return {"bytes": num_chunks * CHUNK_BYTES, "seconds": samples}


def report(result: dict[str, Any]) -> str:
    """GB/s by median, and ratios."""
    rate = {name: result["bytes"] / statistics.median(values) / 1e9 for name, values in result["seconds"].items()}
    rows = [
        ("GB/s", "kvsdk", "lmcache", "ratio"),
        ("store", rate["kvsdk store"], rate["lmcache store"], rate["kvsdk store"] / rate["lmcache store"]),
        ("load", rate["kvsdk load"], rate["lmcache load"], rate["kvsdk load"] / rate["lmcache load"]),
        ("to cache", rate["kvsdk to cache"], "", rate["kvsdk to cache"] / rate["lmcache load"]),
    ]
    return table(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    # As vLLM sets it for its workers on GPUs. Two threads that share a busy core with others wait for each other.
    torch.set_num_threads(1)
    result = run(max(1, int(arguments.gib * 2**30 / CHUNK_BYTES)), arguments.rounds)
    print(report(result))
    write(arguments.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
