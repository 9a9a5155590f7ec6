"""Copies finished chunks out of the KV cache into host memory, and stores them on the server in the background."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch

from kvsdk.buffer.keys import KEY_BYTES
from kvsdk.connector.counters import Counters
from kvsdk.connector.tasks import SaveTask
from kvsdk.connectors.lmcache.chunks import ChunkFormat, Outgoing
from kvsdk.connectors.lmcache.client import Connection, Damaged, Job, Pool, Server
from kvsdk.connectors.lmcache.host_cache import HostMemory
from kvsdk.connectors.lmcache.keys import ChunkNames, Known
from kvsdk.connectors.lmcache.loading import wait_for_fence
from kvsdk.connectors.pynccl.serving import Streams
from kvsdk.errors import KVError, TaskEnded
from kvsdk.kernels import BlockStore

logger = logging.getLogger("kvsdk.lmcache")

PATIENCE = 1.0
"""Seconds that a save waits for host memory: meanwhile it holds blocks that vLLM may need."""

MAX_PARTIAL, PARTIAL_SECONDS = 64, 60.0
"""Chunks of which only the beginning has been computed, and how long the rest is waited for: nobody says when a request
was aborted. Of more requests at a time the oldest are not saved."""

PAUSE, MAX_PAUSE = 1.0, 30.0
"""Seconds in which nothing is stored after the server has refused a chunk; they double up to the second figure."""


@dataclasses.dataclass
class _Partial:
    """The beginning of a chunk.

    Attributes:
        index: of the chunk in its prompt.
        began: on `time.monotonic`.
        ends: where each part ends, in blocks of the chunk.
    """

    index: int
    buffer: torch.Tensor
    began: float
    ends: list[int] = dataclasses.field(default_factory=list)


class Saver:
    """Carries out save tasks, one after the other, in a thread of its own.

    A task ends when its blocks have been copied, so that vLLM has them back whatever the network does; `drain` waits
    for the rest.

    Args:
        pool: whose connections store.
        announcements: whose connection says which chunks are coming.
        limit: seconds that storing one chunk may take.
    """

    def __init__(
        self,
        store: BlockStore,
        *,
        form: ChunkFormat,
        names: ChunkNames,
        known: Known,
        server: Server,
        pool: Pool,
        announcements: Pool,
        memory: HostMemory,
        block_size: int,
        limit: float,
        streams: Streams,
        counters: Counters,
    ):
        self._store, self._form, self._names, self._known = store, form, names, known
        self._server, self._pool, self._memory, self._block_size = server, pool, memory, block_size
        self._limit, self._streams, self._counters = limit, streams, counters
        self._announcements = announcements
        # At once, before vLLM has taken the rest of the device's memory.
        self._staging = store.staging(form.num_blocks) if store.device.type == "cuda" else None
        self._partials: collections.OrderedDict[str, _Partial] = collections.OrderedDict()
        self._tasks: queue.SimpleQueue[SaveTask | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._open = 0  # tasks that have not ended
        self._pending = 0  # chunks that were copied and are not stored
        self._full_since = 0.0
        self._pause, self._paused_until, self._why_paused = PAUSE, 0.0, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvsdk-lmcache-save", daemon=True)
        self._thread.start()

    def save(self, task: SaveTask) -> None:
        """Queue a task; never waits."""
        self._count(tasks=1)
        if self.open:
            self._announcements.submit(_Announce(self, task))
        self._tasks.put(task)

    @property
    def open(self) -> bool:
        """Whether anything can be stored now."""
        full = self._full_since and time.monotonic() - self._full_since >= PATIENCE
        return self._server.up and time.monotonic() >= self._paused_until and not full

    def announce(self, task: SaveTask, connection: Connection) -> None:
        """Say which chunks are coming: the prompt may be asked for elsewhere before they have been stored."""
        losses = self._server.losses
        keys = [key for _, _, _, key in self._spans(task) if key is not None]
        new = [key for key in keys if not self._known.has(self._names.name(key), losses)]
        if new:
            connection.announce([self._names.coming(key) for key in new], time.monotonic() + self._limit)

    def _spans(self, task: SaveTask) -> Iterator[tuple[int, int, int, bytes | None]]:
        """For each chunk of which a task has whole blocks, and which the prompt fills: its index, the first block, the
        one behind the last, and the chunk's key if it ends with them.
        """
        per_chunk, first = self._form.num_blocks, task.first_block
        whole = task.num_prompt_tokens // (per_chunk * self._block_size) * per_chunk
        end = min(first + len(task.blocks[0]), task.num_tokens // self._block_size, whole)
        for index in range(first // per_chunk, -(-end // per_chunk)):
            start, stop = max(first, index * per_chunk), min(end, (index + 1) * per_chunk)
            last = slice((stop - 1 - first) * KEY_BYTES, (stop - first) * KEY_BYTES)
            yield index, start, stop, task.keys[last] if stop == (index + 1) * per_chunk else None

    def drain(self, deadline: float) -> bool:
        """Wait until everything is stored or given up; false if it is not by `deadline` (on `time.monotonic`)."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._open and not self._pending, max(0.0, deadline - time.monotonic())
            )

    def drain_tasks(self, deadline: float) -> bool:
        """Wait until every task has ended, which frees its blocks; false if one has not by `deadline`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, max(0.0, deadline - time.monotonic()))

    def _count(self, *, tasks: int = 0, chunks: int = 0) -> None:
        with self._changed:
            self._open += tasks
            self._pending += chunks
            self._changed.notify_all()

    def _run(self) -> None:
        with self._streams.own():
            while True:
                task = self._tasks.get()
                if task is None:
                    return
                try:
                    self._save(task)
                    task.done()
                except TaskEnded as ended:
                    logger.info("%s", ended)
                except Exception as error:
                    if not isinstance(error, KVError):
                        logger.exception("saving blocks of request %s failed", task.request_id)
                    with contextlib.suppress(TaskEnded):
                        task.fail(error)
                finally:
                    self._count(tasks=-1)

    def _save(self, task: SaveTask) -> None:
        if task.first_block == 0:
            # Of another request, where an id comes again.
            self._forget_partial(task.request_id)
        if not self._server.up or time.monotonic() < self._paused_until:
            self._counters.add("store_failures")  # which the log has said once
            return
        for index, start, stop, key in self._spans(task):
            if key is None:
                self._copy_part(task, index, start, stop)
                return
            name = self._names.name(key)
            if self._known.has(name, self._server.losses):
                self._forget_partial(task.request_id)
                continue
            partial = self._copy_part(task, index, start, stop)
            if partial is not None:
                del self._partials[task.request_id]
                self._submit(name, partial)

    def _copy_part(self, task: SaveTask, index: int, start: int, stop: int) -> _Partial | None:
        """Copy blocks `start` to `stop` of the prompt; None where the chunk's beginning is not there."""
        begin = index * self._form.num_blocks
        partial = self._partials.get(task.request_id)
        if partial is not None and (partial.index != index or (start > begin and start - begin not in partial.ends)):
            self._forget_partial(task.request_id)
            partial = None
        if partial is None:
            if start > begin:
                return None
            partial = _Partial(index, self._take_memory(), time.monotonic())
            self._partials[task.request_id] = partial
        partial.ends = [end for end in partial.ends if end <= start - begin]
        wait_for_fence(task)
        ids = task.blocks[0][start - task.first_block : stop - task.first_block]
        into = self._form.part(partial.buffer, start - begin, stop - begin)
        self._copy(task, ids, into)
        partial.ends.append(stop - begin)
        return partial

    def _take_memory(self) -> torch.Tensor:
        oldest = next(iter(self._partials.values()), None)
        while oldest is not None and (
            len(self._partials) >= MAX_PARTIAL or time.monotonic() - oldest.began >= PARTIAL_SECONDS
        ):
            self._forget_partial(next(iter(self._partials)))
            oldest = next(iter(self._partials.values()), None)
        now = time.monotonic()
        # One save waits, and those behind it do not: each holds blocks that vLLM may need.
        patience = 0.0 if self._full_since else PATIENCE
        buffer = self._memory.take(patience)
        while buffer is None and self._partials:
            self._forget_partial(next(iter(self._partials)))
            self._counters.add("store_failures")
            buffer = self._memory.take()
        if buffer is None:
            self._counters.add("store_failures")
            if not self._full_since:
                self._full_since = now
                logger.warning(
                    "the server takes chunks too slowly: the host memory for them is full, some are not saved"
                )
            raise KVError("the host memory for chunks that are to be stored is full")
        self._full_since = 0.0
        return buffer

    def _copy(self, task: SaveTask, ids: np.ndarray, into: torch.Tensor) -> None:
        """Copy blocks into host memory."""
        if self._staging is None:
            with task.using():
                self._store.gather(ids, into)
            return
        staging = self._staging[: into.numel()]
        with task.using():
            self._store.gather(ids, staging)
            torch.cuda.current_stream().synchronize()
        into.copy_(staging, non_blocking=True)
        torch.cuda.current_stream().synchronize()

    def _forget_partial(self, request_id: str) -> None:
        partial = self._partials.pop(request_id, None)
        if partial is not None:
            self._memory.give_back(partial.buffer)

    def _submit(self, name: str, partial: _Partial) -> None:
        parts = np.diff([0, *partial.ends]).tolist()
        self._count(chunks=1)
        self._pool.submit(_Store(self, name, parts, partial.buffer))

    # ---- in a connection's thread

    def store(self, name: str, parts: list[int], buffer: torch.Tensor, connection: Connection) -> None:
        """Store one chunk, unless the server has it."""
        losses, deadline = self._server.losses, time.monotonic() + self._limit
        if self._known.is_damaged(name) or not self._exists(name, connection, deadline):
            if not connection.put(Outgoing(self._form, name, parts, buffer), deadline):
                raise KVError(f"the LMCache server at {self._server.address} does not keep what is stored")
            self._counters.add("stored_chunks")
            self._counters.add("sent_bytes", self._form.header_bytes + buffer.numel())
        self._pause = PAUSE
        self._known.add(name, losses)
        self._end(buffer)

    def _exists(self, name: str, connection: Connection, deadline: float) -> bool:
        try:
            return connection.exists(name, deadline)
        except Damaged:
            self._known.discard(name, damaged=True)  # the next attempt does not ask
            raise

    def not_stored(self, name: str, buffer: torch.Tensor, error: Exception) -> None:
        """A chunk could not be stored; nothing is for a while."""
        self._counters.add("store_failures")
        now = time.monotonic()
        if self._server.up and now >= self._paused_until and not self._stop.is_set():
            self._why_paused = f"nothing is stored for {self._pause:.3g} s: {error}"
            logger.warning("the chunk %s was not stored; %s", name, self._why_paused)
            self._paused_until, self._pause = now + self._pause, min(2 * self._pause, MAX_PAUSE)
        self._end(buffer)

    def _end(self, buffer: torch.Tensor) -> None:
        self._memory.give_back(buffer)
        self._count(chunks=-1)

    def stop(self) -> None:
        """Begin to close, without waiting: the thread ends with what it does now. Twice is fine."""
        self._stop.set()
        self._tasks.put(None)

    def close(self, deadline: float) -> bool:
        """End the thread, with what it does now; false if it has not ended by `deadline`. Twice is fine."""
        self.stop()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        ended = not self._thread.is_alive()
        if not ended:
            logger.warning("the thread that saves chunks has not ended in time")
        return ended


class _Store(Job):
    def __init__(self, saver: Saver, name: str, parts: list[int], buffer: torch.Tensor):
        self._saver, self._name, self._parts, self._buffer = saver, name, parts, buffer

    def run(self, connection: Connection) -> None:
        self._saver.store(self._name, self._parts, self._buffer, connection)

    def fail(self, error: Exception) -> None:
        self._saver.not_stored(self._name, self._buffer, error)


class _Announce(Job):
    def __init__(self, saver: Saver, task: SaveTask):
        self._saver, self._task = saver, task

    def run(self, connection: Connection) -> None:
        self._saver.announce(self._task, connection)

    def fail(self, error: Exception) -> None:
        logger.debug("chunks of request %s come unannounced: %s", self._task.request_id, error)
