"""Copies fetched chunks from host memory into the KV cache."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time

import numpy as np
import torch

from kvsdk.connector.counters import Counters
from kvsdk.connector.tasks import LoadTask, SaveTask
from kvsdk.connectors.lmcache.chunks import ChunkFormat
from kvsdk.connectors.lmcache.fetching import Chunk, Chunks
from kvsdk.connectors.pynccl.serving import Streams
from kvsdk.errors import KVError, TaskEnded
from kvsdk.kernels import BlockStore

logger = logging.getLogger("kvsdk.lmcache")


def wait_for_fence(task: LoadTask | SaveTask) -> None:
    """Return once the model's earlier work on the GPU is done. A GPU that never comes to it is waited for until the
    task's deadline.

    Raises:
        TaskEnded: the task has ended, or its deadline has passed.
    """
    pause = 0.0001
    while task.fence is not None and not task.fence.query():
        if task.ended:
            raise TaskEnded(f"the model's work before request {task.request_id} was not done in time")
        time.sleep(pause)
        pause = min(2 * pause, 0.002)


class Loader:
    """Carries out load tasks, one after the other, in a thread of its own. A task's `source` is its lookup's ticket."""

    def __init__(self, store: BlockStore, *, form: ChunkFormat, chunks: Chunks, streams: Streams, counters: Counters):
        self._store, self._form, self._chunks, self._streams = store, form, chunks, streams
        self._counters = counters
        # At once, before vLLM has taken the rest of the device's memory.
        self._staging = store.staging(form.num_blocks) if store.device.type == "cuda" else None
        self._tasks: queue.SimpleQueue[LoadTask | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvsdk-lmcache-load", daemon=True)
        self._thread.start()

    def load(self, task: LoadTask) -> None:
        """Queue a task; never waits."""
        self._tasks.put(task)

    def _run(self) -> None:
        with self._streams.own():
            while (task := self._tasks.get()) is not None:
                began = time.monotonic()
                try:
                    self._load(task)
                except TaskEnded:
                    logger.info("the load of request %s was given up", task.request_id)
                except Exception as error:
                    if not isinstance(error, KVError):
                        logger.exception("loading blocks of request %s failed", task.request_id)
                    with contextlib.suppress(TaskEnded):
                        task.fail(error)
                self._counters.add("load_seconds", time.monotonic() - began)

    def _load(self, task: LoadTask) -> None:
        ticket = self._chunks.pin(task.source)
        if ticket is None:
            raise KVError("the fetched chunks are gone: their lease is over")
        try:
            wait_for_fence(task)
            (ids,), first = task.blocks, task.first_block
            # Sliding-window layers: vLLM wants nothing before the window, where it has its null block.
            null = int(np.argmax(ids != 0)) if ids.any() else len(ids)
            ids, first = ids[null:], first + null
            loaded = sum(self._load_chunk(task, chunk, ids, first) for chunk in ticket.chunks)
        finally:
            self._chunks.unpin(ticket)
        if loaded != len(ids):
            raise KVError(f"{loaded} of {len(ids)} blocks were fetched")
        self._counters.add("loaded_blocks", loaded)
        self._counters.add("loaded_bytes", self._store.staging_bytes(loaded))
        task.done()

    def _load_chunk(self, task: LoadTask, chunk: Chunk, ids: np.ndarray, first: int) -> int:
        """Copy those blocks of a chunk that the task has; returns how many."""
        loaded, begin = 0, chunk.index * self._form.num_blocks
        assert chunk.buffer is not None
        for start, stop in self._form.spans(chunk.parts):
            low, high = max(first, begin + start), min(first + len(ids), begin + stop)
            if low >= high:
                continue
            part = self._form.part(chunk.buffer, start, stop)
            if high - low < stop - start:  # vLLM has the others itself
                part = self._form.cut(part, stop - start, low - begin - start, high - begin - start)
            self._write(task, ids[low - first : high - first], part)
            loaded += high - low
        return loaded

    def _write(self, task: LoadTask, ids: np.ndarray, part: torch.Tensor) -> None:
        if self._staging is None:
            with task.using():
                self._store.scatter(ids, part)
            return
        staging = self._staging[: part.numel()]
        staging.copy_(part, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        with task.using():
            self._store.scatter(ids, staging)
            torch.cuda.current_stream().synchronize()

    def stop(self) -> None:
        """Begin to close, without waiting: the thread ends with what it does now. Twice is fine."""
        self._tasks.put(None)

    def close(self, deadline: float) -> bool:
        """End the thread, with what it does now; false if it has not ended by `deadline`. Twice is fine."""
        self.stop()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        ended = not self._thread.is_alive()
        if not ended:
            logger.warning("the thread that loads chunks has not ended in time")
        return ended
