"""Storing and loading KV through LMCache's servers: kvsdk's connector and LMCache's own client, on one server.

    python -m benchmarks.lmcache --server lm --gib 1 --rounds 5 --out FILE

Chunks have 256 tokens of an 8B Llama in bfloat16, 32 MiB each. For kvsdk, storing is the way from the KV cache until
the server has confirmed the last chunk: copied, digested, sent. Loading is the way from the lookup until all chunks are
in host memory and compared with their digests, which is where a prompt is promised; `to cache` adds the copy into the
KV cache. LMCache's client of the `lm://` server starts and ends in its own host memory and checks nothing: it is asked
to put every chunk and then whether the last one is there, and to get every chunk. Its client of the multi-process
server, which is that of its connector, has the server read and write the KV cache: it is asked to store, for 8,192
tokens at a time, until the server has answered, and to look the prompt up and retrieve it. That server runs with its
default transfer mode, which is the faster one of the two that LMCache has on a CPU.

The rounds take turns. Beside the seconds are those of the processor that this process and the server have spent. Needs
the extra `lmcache`. The `lm://` server never evicts, and each round has a new one; the other one is told to drop all.
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
from kvsdk.errors import PeerGone
from kvsdk.layout import layout_of

LAYERS, HEADS, CONTENT, BLOCK, CHUNK = 32, 8, 256, 16, 256
CHUNK_BYTES = LAYERS * HEADS * CONTENT * CHUNK * 2
STEP = 8192
"""Tokens that are handed over at a time, as prefills come."""


def new_cache(num_chunks: int) -> dict[str, torch.Tensor]:
    """A KV cache of random bytes, with room for what is stored and, behind it, for what is loaded."""
    page = (1 + 2 * num_chunks * CHUNK // BLOCK, HEADS, BLOCK, CONTENT)
    return {
        f"layers.{i}": torch.randint(0, 1 << 15, page, dtype=torch.int16).view(torch.bfloat16) for i in range(LAYERS)
    }


def check(caches: dict[str, torch.Tensor]) -> None:
    """What was loaded is what was stored."""
    for cache in caches.values():
        stored, loaded = cache[1:].view(torch.int16).chunk(2)
        assert torch.equal(stored, loaded)


class Kvsdk:
    """The connector's worker half over a KV cache of random bytes."""

    def __init__(self, url: str, num_chunks: int):
        self._num_chunks = num_chunks
        self.caches = new_cache(num_chunks)
        num_blocks = len(self.caches["layers.0"])
        layout = layout_of(self.caches, num_blocks=num_blocks, block_size=BLOCK)
        options = parse_options(
            {"kv_role": "kv_both"},
            extra={
                "remote_url": url,
                "lookup_timeout": 30.0,
                "load_timeout": 60.0,
                "max_local_cpu_size": 2.5 * num_chunks * CHUNK_BYTES / 2**30,
            },
            also=LMCacheConnector.option_names,
        )
        cache = CacheGeometry(BLOCK, num_blocks, layout.block_bytes)
        self._worker = LMCacheWorker(Context(options, "bench", 0, 1, {"id": "bench"}, cache))
        self._worker.register(self.caches, layout)
        self._saved = np.arange(1, 1 + num_chunks * CHUNK // BLOCK, dtype=np.int32)

    def store(self, keys: bytes) -> None:
        """From the KV cache until the server has all chunks."""
        for first in range(0, len(self._saved), STEP // BLOCK):
            ids = self._saved[first : first + STEP // BLOCK]
            part = keys[first * KEY_BYTES : (first + len(ids)) * KEY_BYTES]
            end = (first + len(ids)) * BLOCK
            order = SaveOrder(first, "r", (ids,), first, end, len(self._saved) * BLOCK, part, 60.0)
            self._worker.save(SaveTask(order, time.monotonic() + 60))
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
        chunks.open(ticket, b"".join(_ends(keys)), 0, 60.0, answer)
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

    def move_to(self, port: int) -> None:
        """There is another server now, and the one before is gone."""
        server, deadline = self._worker._server, time.monotonic() + 20
        assert server is not None
        server.port = port
        server.down(PeerGone("it was ended"))
        while not server.up:
            assert time.monotonic() < deadline, "the new server is not found"
            time.sleep(0.05)

    def close(self) -> None:
        self._worker.close()


def _ends(keys: bytes) -> list[bytes]:
    """The keys of chunks, which are those of their last blocks."""
    step = CHUNK // BLOCK * KEY_BYTES
    return [keys[at + step - KEY_BYTES : at + step] for at in range(0, len(keys), step)]


class LMCacheLM:
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
        self._connect = lambda port: LMCServerConnector("127.0.0.1", port, self._loop, self._memory)
        self._client = self._connect(port)
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
        """From its host memory until the server has all chunks."""
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

    def move_to(self, port: int) -> None:
        """There is another server now, and the one before is gone."""
        self._call(self._client.close())
        self._client = self._connect(port)

    def close(self) -> None:
        self._call(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)


class LMCacheMP:
    """What LMCache's connector for the multi-process server consists of, without vLLM."""

    def __init__(self, port: int, num_chunks: int):
        import zmq
        from lmcache.integration.vllm.vllm_multi_process_adapter import (
            LMCacheMPSchedulerAdapter,
            LMCacheMPWorkerAdapter,
            LoadStoreOp,
            ParallelStrategy,
        )

        one = ParallelStrategy(
            mla_only=False, vllm_world_size=1, vllm_worker_id=0, tp_size=1, pp_size=1, n_servers=1
        )  # fmt: skip
        url, extra = f"tcp://127.0.0.1:{port}", {"lmcache.mp.mp_transfer_mode": "lmcache_driven"}
        context = zmq.Context.instance()
        self._worker = LMCacheMPWorkerAdapter(url, context, "bench", BLOCK, one, extra_config=extra)
        self._scheduler = LMCacheMPSchedulerAdapter([url], context, "bench", BLOCK, one, extra_config=extra)
        self._worker.register_kv_caches(new_cache(num_chunks), layout_hints={"kv_layout": "HND"})
        self._new_operation, self._num_tokens = LoadStoreOp, num_chunks * CHUNK
        self._tokens: list[int] = []
        self._number = 0

    def _operation(self, start: int, end: int, first_block: int) -> Any:
        blocks = list(range(first_block + start // BLOCK, first_block + end // BLOCK))
        return self._new_operation(self._tokens, [blocks], start, end)

    def _request(self) -> str:
        self._number += 1
        return f"request-{self._number}"

    def store(self) -> None:
        """From the KV cache until the server has answered."""
        self._tokens = [secrets.randbelow(1 << 17) for _ in range(self._num_tokens)]
        for start in range(0, self._num_tokens, STEP):
            operation = self._operation(start, min(start + STEP, self._num_tokens), 1)
            self._worker.submit_store_request(self._request(), operation, self._worker.create_recorded_event())
        assert all(future.result(120) for future in self._worker.store_futures.values())
        self._worker.store_futures.clear()
        self._worker.store_events.clear()

    def wait(self) -> None:
        """Until what was stored can be found, which is some time after the answer."""
        deadline = time.monotonic() + 30
        while self._look_up(request := self._request()) < self._num_tokens:
            self._scheduler.end_session(request)
            assert time.monotonic() < deadline, "it is not found"
            time.sleep(0.1)
        self._free(request)

    def _look_up(self, request: str) -> int:
        self._scheduler.maybe_submit_lookup_request(request, self._tokens)
        while (found := self._scheduler.check_lookup_result(request)) is None:
            time.sleep(0.0002)
        self._scheduler.cleanup_lookup_result(request)
        return found

    def _free(self, request: str) -> None:
        self._scheduler.free_lookup_locks(self._tokens, 0, self._num_tokens, request)
        self._scheduler.end_session(request)

    def load(self) -> None:
        """From the lookup until the KV cache has all."""
        request = self._request()
        assert self._look_up(request) == self._num_tokens
        operation = self._operation(0, self._num_tokens, 1 + self._num_tokens // BLOCK)
        self._worker.submit_retrieve_request(request, operation, self._worker.create_recorded_event())
        assert self._worker.retrieve_futures[request][0].result(120)
        self._worker.retrieve_futures.clear()
        self._worker.retrieve_events.clear()
        self._scheduler.end_session(request)

    def check(self) -> None:
        """What was loaded is what was stored."""
        check(self._worker.kv_caches)

    def forget(self) -> None:
        """Have the server drop everything."""
        self._scheduler.reset_cache()

    def close(self) -> None:
        self._worker.shutdown()
        self._scheduler.shutdown()


def start_server(kind: str, gib: float) -> tuple[subprocess.Popen[bytes], int]:
    """LMCache's own server, in a process of its own.

    Args:
        kind: `lm` or `mp`.
        gib: memory for chunks, of one that says so.
    """
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as one:
            ports.append(str(one.getsockname()[1]))
    if kind == "lm":
        command = [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", ports[0]]
    else:
        command = [sys.executable, "-c", "from lmcache.cli.main import main; main()", "server", "--host", "127.0.0.1"]
        command += ["--port", ports[0], "--http-port", ports[1], "--l1-size-gb", f"{gib:g}", "--eviction-policy", "LRU"]
        command += ["--disable-observability"]
    environ = {**os.environ, "LMCACHE_TRACK_USAGE": "false", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ)
    port, deadline = int(ports[0]), time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process, port
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise
            time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


class Turns:
    """Times what clients do.

    Attributes:
        server: the server's process.
    """

    def __init__(self, server: subprocess.Popen[bytes]):
        self.server = server
        self.samples: dict[str, dict[str, list[float]]] = {}

    def time(self, name: str, what: Callable[[], Any]) -> Any:
        before, server, began = time.process_time(), self._server_seconds(), time.perf_counter()
        result = what()
        spent = {
            "seconds": time.perf_counter() - began,
            "own processor": time.process_time() - before,
            "server's processor": self._server_seconds() - server,
        }
        for kind, value in spent.items():
            self.samples.setdefault(kind, {}).setdefault(name, []).append(round(value, 4))
        return result

    def _server_seconds(self) -> float:
        user, system = Path(f"/proc/{self.server.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _our_turn(ours: Kvsdk, turns: Turns, num_chunks: int) -> None:
    keys = secrets.token_bytes(num_chunks * (CHUNK // BLOCK) * KEY_BYTES)
    turns.time("kvsdk store", lambda: ours.store(keys))
    ticket = turns.time("kvsdk load", lambda: ours.fetch(keys))
    turns.time("kvsdk into cache", lambda: ours.load(ticket))
    check(ours.caches)


def _their_turn(theirs: LMCacheLM | LMCacheMP, turns: Turns) -> None:
    turns.time("lmcache store", theirs.store)
    if isinstance(theirs, LMCacheMP):
        theirs.wait()
    turns.time("lmcache load", theirs.load)
    if isinstance(theirs, LMCacheMP):
        theirs.check()


def run(kind: str, num_chunks: int, rounds: int) -> dict[str, Any]:
    """Seconds of each round, by client and direction."""
    size = num_chunks * CHUNK_BYTES
    process, port = start_server(kind, 4 * size / 2**30 + 1)
    turns = Turns(process)
    try:
        ours = Kvsdk(f"{'lm' if kind == 'lm' else 'tcp'}://127.0.0.1:{port}", num_chunks)
        theirs = (LMCacheLM if kind == "lm" else LMCacheMP)(port, num_chunks)
        try:
            for number in range(rounds + 1):
                if number and isinstance(theirs, LMCacheLM):
                    _end(turns.server)
                    turns.server, port = start_server(kind, 0)
                    ours.move_to(port)
                    theirs.move_to(port)
                for one in (ours, theirs) if number % 2 else (theirs, ours):
                    if one is ours:
                        _our_turn(ours, turns, num_chunks)
                    else:
                        _their_turn(theirs, turns)
                    if isinstance(theirs, LMCacheMP):
                        theirs.forget()
        finally:
            ours.close()
            theirs.close()
    finally:
        _end(turns.server)
    # The first round makes memory and connections.
    samples = {what: {name: values[1:] for name, values in one.items()} for what, one in turns.samples.items()}
    return {"server": kind, "bytes": size, **samples}


def report(result: dict[str, Any]) -> str:
    """GB/s by median, ratios, and the processor's seconds for a GB."""
    seconds = dict(result["seconds"])
    into = seconds.pop("kvsdk into cache")
    seconds["kvsdk to cache"] = [sum(both) for both in zip(seconds["kvsdk load"], into, strict=True)]
    rate = {name: result["bytes"] / statistics.median(values) / 1e9 for name, values in seconds.items()}
    rows = [("GB/s", "kvsdk", "lmcache", "ratio")]
    for ours, theirs in (("store", "store"), ("load", "load"), ("to cache", "load")):
        one, other = rate[f"kvsdk {ours}"], rate[f"lmcache {theirs}"]
        rows.append((ours, one, other, one / other))
    rows.append(("s/GB", "own", "server's", ""))
    for name in ("kvsdk store", "lmcache store", "kvsdk load", "lmcache load", "kvsdk into cache"):
        spent = [result[f"{who} processor"][name] for who in ("own", "server's")]
        rows.append((name, *(1e9 * statistics.median(values) / result["bytes"] for values in spent), ""))
    return table(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=("lm", "mp"), default="lm")
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    # As vLLM sets it for its workers on GPUs. Two threads that share a busy core with others wait for each other.
    torch.set_num_threads(1)
    result = run(arguments.server, max(1, int(arguments.gib * 2**30 / CHUNK_BYTES)), arguments.rounds)
    print(report(result))
    write(arguments.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
