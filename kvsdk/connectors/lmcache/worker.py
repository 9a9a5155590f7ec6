"""The worker half: stores chunks of its KV cache on the server, fetches others into host memory and loads them."""

from __future__ import annotations

import logging
import multiprocessing.util
import time
from typing import Any

import torch

from kvsdk.connector.counters import Counters
from kvsdk.connector.interface import ConsumerWorker, Context, ProducerWorker
from kvsdk.connector.tasks import LoadTask, SaveTask
from kvsdk.connectors.lmcache.chunks import ChunkFormat
from kvsdk.connectors.lmcache.client import Pool, Server
from kvsdk.connectors.lmcache.fetching import Chunks
from kvsdk.connectors.lmcache.host_cache import HostMemory
from kvsdk.connectors.lmcache.keys import ChunkNames, Known
from kvsdk.connectors.lmcache.lm_client import LMServer
from kvsdk.connectors.lmcache.loading import Loader
from kvsdk.connectors.lmcache.lookup import LookupServer
from kvsdk.connectors.lmcache.mp_client import REGISTER_TIMEOUT, MPServer, require_lmcache
from kvsdk.connectors.lmcache.saving import Saver
from kvsdk.connectors.lmcache.settings import read_settings
from kvsdk.connectors.pynccl.serving import Streams
from kvsdk.errors import ConfigError
from kvsdk.kernels import BlockStore
from kvsdk.layout import CacheLayout

logger = logging.getLogger("kvsdk.lmcache")

FETCH_CONNECTIONS, STORE_CONNECTIONS, ANNOUNCE_CONNECTIONS = 4, 2, 1
"""Apart, so that a lookup never waits behind a chunk that is being stored."""

STORE_TIMEOUT = 5.0
"""Least seconds without an answer after which storing pauses. Nobody waits for it, and a server under load is slow."""


class LMCacheWorker(ProducerWorker, ConsumerWorker):
    """Moves chunks between one worker's KV cache and the server."""

    def __init__(self, context: Context):
        super().__init__(context)
        self._settings = read_settings(context.options.extra, context.cache.block_size)
        if self._settings.multi_process:
            require_lmcache()
        self._counters = Counters()
        self._server: Server | None = None
        self._pools: list[Pool] = []
        self._memories: list[HostMemory] = []
        self._saver: Saver | None = None
        self._loader: Loader | None = None
        self._lookups: LookupServer | None = None
        self._at_exit: Any = None
        self._end_by: float | None = None

    def register(self, kv_caches: dict[str, torch.Tensor], layout: CacheLayout) -> None:
        context, options, settings = self.context, self.context.options, self._settings
        store = BlockStore(kv_caches, layout)
        form = ChunkFormat(layout, settings.chunk_size // layout.block_size)
        names, known = ChunkNames(context, layout, settings.chunk_size), Known()
        buffers = settings.host_bytes // form.payload_bytes
        if buffers < options.produces + options.consumes:
            gigabytes = (options.produces + options.consumes) * form.payload_bytes / 2**30
            raise ConfigError(
                f"max_local_cpu_size holds {buffers} chunks of {form.payload_bytes} bytes; set it to at least "
                f"{gigabytes:.3g} (GiB)"
            )
        # Half of it each, so that chunks which are to be stored never keep lookups waiting.
        pinned, share = store.device.type == "cuda", buffers // (options.produces + options.consumes)
        streams = Streams(store.device)
        self._server = self._connect(form, names)
        common = {"form": form, "names": names, "known": known, "server": self._server, "counters": self._counters}
        if options.produces:
            self._saver = Saver(
                store,
                pool=self._pool("store", STORE_CONNECTIONS, max(options.lookup_timeout, STORE_TIMEOUT)),
                announcements=self._pool("announce", ANNOUNCE_CONNECTIONS, max(options.lookup_timeout, STORE_TIMEOUT)),
                memory=self._memory(form, share, pinned),
                block_size=layout.block_size,
                limit=options.load_timeout,
                streams=streams,
                **common,
            )
        if options.consumes:
            chunks = Chunks(
                pool=self._pool("fetch", FETCH_CONNECTIONS),
                memory=self._memory(form, share, pinned),
                lease=options.lease,
                limit=options.load_timeout,
                verify=options.verify,
                clock=context.clock,
                **common,
            )
            self._loader = Loader(store, form=form, chunks=chunks, streams=streams, counters=self._counters)
            self._lookups = LookupServer(
                fetch=chunks.open,
                renew=chunks.renew,
                release=chunks.release,
                tick=chunks.tick,
                up=lambda server=self._server: server.up,
            )
        self._wait_for_server()
        # vLLM does not close in every case, and a process of multiprocessing leaves out `atexit`.
        self._at_exit = multiprocessing.util.Finalize(None, self._close_at_exit, exitpriority=100)
        logger.info(
            "chunks of %d tokens (%d bytes) at %s://%s, up to %d in host memory",
            settings.chunk_size,
            form.payload_bytes,
            "tcp" if settings.multi_process else "lm",
            self._server.address,
            buffers,
        )

    def _connect(self, form: ChunkFormat, names: ChunkNames) -> Server:
        settings, options = self._settings, self.context.options
        if not settings.multi_process:
            return LMServer(settings.host, settings.port, timeout=options.lookup_timeout, on_state=self._tell)
        return MPServer(
            settings.host,
            settings.port,
            model=names.model,
            value_bytes=form.header_bytes + form.payload_bytes,
            slots=options.consumes * FETCH_CONNECTIONS + options.produces * (STORE_CONNECTIONS + ANNOUNCE_CONNECTIONS),
            timeout=options.lookup_timeout,
            on_state=self._tell,
        )

    def _wait_for_server(self) -> None:
        """Raises ConfigError when a server is there that cannot be used."""
        assert self._server is not None
        limit = REGISTER_TIMEOUT if self._settings.multi_process else 0.0
        self._server.wait_known(limit + self.context.options.lookup_timeout + 1.0)
        if isinstance(self._server, MPServer) and self._server.refused is not None:
            refused = self._server.refused
            self.close()
            raise refused

    def _pool(self, name: str, connections: int, timeout: float | None = None) -> Pool:
        assert self._server is not None
        pool = Pool(self._server, name, connections, timeout)
        self._pools.append(pool)
        return pool

    def _memory(self, form: ChunkFormat, buffers: int, pinned: bool) -> HostMemory:
        self._memories.append(HostMemory(form.payload_bytes, buffers, pinned=pinned))
        return self._memories[-1]

    def _tell(self, up: bool) -> None:
        if self._lookups is not None:
            self._lookups.look()

    def handshake(self) -> dict[str, Any]:
        return {"address": self._lookups.address if self._lookups is not None else ""}

    def load(self, task: LoadTask) -> None:
        assert self._loader is not None
        self._loader.load(task)

    def save(self, task: SaveTask) -> None:
        assert self._saver is not None
        self._saver.save(task)

    def flush(self) -> None:
        if self._saver is not None:
            self._saver.drain_tasks(self._drain_by())

    def _drain_by(self) -> float:
        """Until when chunks are stored at the end; a fifth of `close_timeout` is kept for the threads' ends."""
        if self._end_by is None:
            self._end_by = time.monotonic() + self.context.options.close_timeout
        return self._end_by - 0.2 * self.context.options.close_timeout

    def take_counters(self) -> dict[str, float]:
        return self._counters.take()

    def _close_at_exit(self) -> None:
        self.flush()
        self.close()

    def close(self) -> None:
        if self._at_exit is not None:
            self._at_exit.cancel()
        if self._saver is not None and not self._saver.drain(self._drain_by()):
            logger.warning("the server took chunks too slowly: some were not stored before the end")
        deadline = time.monotonic() + 0.2 * self.context.options.close_timeout
        copiers = [part for part in (self._saver, self._loader) if part is not None]
        others = [part for part in (self._lookups, *self._pools, self._server) if part is not None]
        for part in (*copiers, *others):
            part.stop()
        ended = [part.close(deadline) for part in copiers]
        for part in others:
            part.close(deadline)
        if all(ended):  # or a copy between the memory and the device may be under way
            for memory in self._memories:
                memory.close()
