"""The consumer's worker: reads offered blocks from producers' workers, a thread for each producer."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from kvsdk.connector.counters import Counters
from kvsdk.connector.tasks import LoadTask
from kvsdk.connectors.pynccl.channel import Bell, Channel
from kvsdk.connectors.pynccl.protocol import chunk_blocks, cut, row_blocks
from kvsdk.connectors.pynccl.serving import PAIR_TIMEOUT, Streams
from kvsdk.errors import KVError, ProtocolError, TaskEnded, WindowUnavailable
from kvsdk.kernels import BlockStore, PeerBlocks, PeerCache
from kvsdk.pipe import OpenWindow, Pipe, open_window

logger = logging.getLogger("kvsdk.pynccl")

PART_WAIT = 0.004
"""Seconds that a read waits at the producer for blocks that are still to be computed, before others have their turn."""

OFFER_TIMEOUT = 10.0
"""Seconds for the producer's worker to hear of an offer: it does in its next step, and steps may be long."""

WRITERS = max(1, min(2, len(os.sched_getaffinity(0)) - 1))
"""Threads that digest and write what one producer sends, on a CPU. Where a second one has a core, one chunk is digested
while another is written; where the producer needs that core, the two only take turns at it."""

READERS = min(2, len(os.sched_getaffinity(0)))
"""Threads that read another process's memory on a CPU: the producer needs no core for that."""

HALVED_BYTES = 4 << 20
"""What is less is read by one thread."""

AT_ONCE_BYTES = 256 << 20
"""That is read of another process's memory before it is looked whether the load is still wanted: 57 ms at the 4.7 GB/s
of benchmarks/results/2026-11-22-cpu.md."""

KNOWN_BLOCKS, KNOWN_OFFERS = 1 << 20, 4096
"""Of how many blocks and offers, that a producer told of and nobody has loaded yet, ids and digests are kept: 12 MiB on
the host and 20 on the device at most. The oldest offers go first; a load of one of them asks."""

IDLE_SECONDS = 120.0
"""A pair that loads nothing for so long is closed, with its memory and its thread; the next load opens a new one."""


def local_ip_towards(address: str) -> str:
    """This host's address on the way to `host:port`; sends nothing."""
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return probe.getsockname()[0]


@dataclasses.dataclass
class _Read:
    """What has come of one load, in one part or many.

    Attributes:
        began: when its first part was asked for; None before.
        known: whether the producer's worker has heard of the offer.
        received: blocks, in order.
        bad: indices into the task's blocks that are not valid.
        reason: why the producer sends no more.
        stopped: the task has ended; what still comes is dropped.
    """

    task: LoadTask
    began: float | None = None
    known: bool = False
    received: int = 0
    bad: list[np.ndarray] = dataclasses.field(default_factory=list)
    reason: KVError | None = None
    stopped: bool = False

    @property
    def total(self) -> int:
        return len(self.task.blocks[0])


@dataclasses.dataclass
class _Told:
    """What a producer told of an offer: its first blocks' ids and digests; and those that the device was told of."""

    total: int
    ids: np.ndarray
    digests: np.ndarray
    chosen: PeerBlocks | None = None

    @property
    def whole(self) -> bool:
        return len(self.ids) == self.total


class _Known:
    """Where the blocks of a producer's offers lie and what their digests are, as it told unasked: for a window.

    Args:
        choose: tells the device: `choose(ids, digests)`.
    """

    def __init__(self, choose: Callable[[np.ndarray, np.ndarray], PeerBlocks]):
        self._choose = choose
        self._offers: collections.OrderedDict[str, _Told] = collections.OrderedDict()
        self._blocks = 0

    def add(self, transfer_id: str, total: int, first: int, ids: np.ndarray, digests: np.ndarray) -> None:
        """More of an offer of `total` blocks, from its block `first` on; nothing where what comes before it is not
        known."""
        if first == 0:
            self.drop(transfer_id)
            self._offers[transfer_id] = _Told(total, ids[:0], digests[:0])
        told = self._offers.get(transfer_id)
        if told is None or len(told.ids) != first:
            return
        told.ids, told.digests = np.concatenate([told.ids, ids]), np.concatenate([told.digests, digests])
        self._blocks += len(ids)
        while self._blocks > KNOWN_BLOCKS or len(self._offers) > KNOWN_OFFERS:
            self.drop(next(iter(self._offers)))
        if told.whole:
            try:
                told.chosen = self._choose(told.ids, told.digests)
            except (KVError, RuntimeError) as error:  # a help, for want of which no load fails
                logger.warning("the device has no room for what is known of an offer: %s", error)
                self.drop(transfer_id)

    def get(self, transfer_id: str, more_than: int) -> PeerBlocks | None:
        """The first blocks of an offer, if more than so many are known."""
        told = self._offers.get(transfer_id)
        if told is None or len(told.ids) <= more_than:
            return None
        if told.chosen is None or told.chosen.count < len(told.ids):
            told.chosen = self._choose(told.ids, told.digests)
        return told.chosen

    def drop(self, transfer_id: str) -> None:
        told = self._offers.pop(transfer_id, None)
        self._blocks -= len(told.ids) if told is not None else 0


class Fetcher:
    """Loads from one producer's worker, until it has had nothing to do for `IDLE_SECONDS`.

    One load after the other, but for those that wait for blocks which are still being computed: the others go on
    meanwhile.

    Args:
        address: `host:port` of the producer's worker.
        join: makes the consumer's end of a pipe from an invitation: `join(invite, bind_ip, deadline, wanted)`.
        kinds: of pipes, the best one first; the first that both workers can use is used.
        streams: where the thread takes its stream from.
    """

    def __init__(
        self,
        address: str,
        store: BlockStore,
        *,
        kinds: Sequence[str],
        join: Callable[[dict[str, Any], str, float, Callable[[], None]], Pipe],
        staging_bytes: int,
        streams: Streams,
        verify: bool,
        counters: Counters,
    ):
        self.address, self._streams = address, streams
        self._store, self._kinds, self._join, self._verify, self._counters = store, list(kinds), join, verify, counters
        self._room = chunk_blocks(staging_bytes, store.staging_bytes(1))
        self._chunk = self._room
        self._tasks: queue.SimpleQueue[LoadTask] = queue.SimpleQueue()
        self._bell = Bell()
        self._reads: collections.deque[_Read] = collections.deque()  # under way; the thread's alone
        self._lock = threading.Lock()
        self._ended = False  # nothing is queued any more
        self._stop = threading.Event()
        self._pipe: Pipe | None = None
        self._window: OpenWindow | None = None
        self._peer: PeerCache | None = None
        self._channel: Channel | None = None
        self._stream: torch.cuda.Stream | None = None
        self._known = _Known(self._choose)
        self._wrong = store.new_wrong(self._room)
        self._wrong_bytes = self._wrong.numpy()
        # On a CPU, where a thread that digests and writes is slower than what feeds it.
        self._writers = ThreadPoolExecutor(WRITERS, "kvsdk-write") if store.device.type == "cpu" else None
        self._read_id = 0
        self._thread = threading.Thread(target=self._run, name=f"kvsdk-fetch-{address}", daemon=True)
        self._thread.start()

    def load(self, task: LoadTask) -> bool:
        """Queue a load; never waits. False when this fetcher has ended: the load is for another one."""
        with self._lock:
            if self._ended:
                return False
            self._tasks.put(task)
        self._bell.ring()
        return True

    @property
    def ended(self) -> bool:
        return self._ended

    def _run(self) -> None:
        reason: Exception = KVError("the worker closes")
        try:
            with self._streams.own() as self._stream:
                while not self._stop.is_set():
                    if not self._take_new():
                        return
                    if self._reads:
                        if self._go_on(self._reads[0]):
                            self._reads.rotate(-1)
                        else:
                            self._reads.popleft()
        except Exception as error:
            logger.exception("the thread that loads from %s failed", self.address)
            reason = error
        finally:
            self._end()
            self._disconnect()
            if self._writers is not None:
                self._writers.shutdown()
            self._fail_queued(reason)
            self._bell.close()

    def _end(self, *, only_if_idle: bool = False) -> bool:
        with self._lock:
            self._ended = self._ended or not only_if_idle or self._tasks.empty()
            return self._ended

    def _take_new(self) -> bool:
        """Take over what was queued; waits for it when there is nothing else to do. False when the thread is to end."""
        idle = time.monotonic() + IDLE_SECONDS
        while True:
            while not self._tasks.empty():
                task = self._tasks.get_nowait()
                if not task.ended:
                    self._reads.append(_Read(task))
            if self._reads or self._stop.is_set():
                return True
            left = idle - time.monotonic()
            if left > 0:
                self._idle(left)
            elif self._end(only_if_idle=True):
                return False

    def _idle(self, timeout: float) -> None:
        """Wait for the bell, and hear meanwhile what the producer tells unasked."""
        if self._channel is None:
            self._bell.wait(timeout)
            return
        try:
            if self._channel.poll(timeout):
                self._note(*self._channel.recv(time.monotonic() + 1.0))
        except KVError as error:
            logger.info("the pair with %s ends: %s", self.address, error)
            self._disconnect()

    def _note(self, kind: str, fields: dict[str, Any]) -> None:
        """Hear what the producer tells unasked: blocks that can be read in place."""
        if kind != "digested" or self._peer is None:
            raise ProtocolError(f"{self.address} sent {kind} out of turn")
        total, first, ids, digests = (fields[name] for name in ("total", "first", "ids", "digests"))
        count, rest = divmod(len(ids), 4)
        if rest or not count or len(digests) != 8 * count or not 0 <= first <= total - count:
            raise ProtocolError(f"{self.address} tells of {len(ids)} bytes of ids, {len(digests)} of digests")
        if self._verify:
            told = np.frombuffer(digests, "<u8").astype(np.uint64)
            self._known.add(fields["transfer_id"], total, first, self._ids_of(ids), told)

    def _fail_queued(self, error: Exception) -> None:
        for read in self._reads:
            _fail(read.task, error)
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                return
            _fail(task, error)

    def _go_on(self, read: _Read) -> bool:
        """Get what there is of a load now. False when it has ended."""
        task = read.task
        if read.began is None:
            read.began = time.monotonic()
        try:
            if not task.ended and self._fetch(read):
                return True
        except TaskEnded:
            logger.info("the load of request %s was given up", task.request_id)
        except KVError as error:
            self._disconnect()
            _fail(task, error)
        except Exception as error:
            logger.exception("loading from %s failed", self.address)
            self._disconnect()
            _fail(task, error)
        self._known.drop(task.source.transfer_id)
        self._counters.add("load_seconds", time.monotonic() - read.began)
        return False

    def _connect_if_needed(self, deadline: float) -> None:
        if self._channel is not None:
            try:
                while self._channel.poll(0):
                    self._note(*self._channel.recv(deadline))
                return
            except KVError:
                self._disconnect()
        began = time.monotonic()
        deadline = min(deadline, began + PAIR_TIMEOUT)
        while self._channel is None:
            kind = self._kinds[0]
            try:
                self._open(kind, deadline)
            except WindowUnavailable as error:
                self._disconnect()
                if len(self._kinds) == 1:
                    raise
                del self._kinds[0]
                logger.info("%s is read over %s, not over %s: %s", self.address, self._kinds[0], kind, error)
        if self._stop.is_set():
            raise KVError("the worker closes")
        logger.info("paired with %s over %s in %.0f ms", self.address, kind, (time.monotonic() - began) * 1e3)

    def _open(self, kind: str, deadline: float) -> None:
        opening = Channel(address=self.address, bell=self._bell)
        try:
            opening.send("open", pipe=kind, timeout=deadline - time.monotonic(), chunk=self._room)
            answer, fields = opening.recv(deadline, self._stop)
        finally:
            opening.close()
        if answer in ("refused", "unavailable"):
            reason = f"{self.address} refused to pair: {fields['reason']}"
            raise WindowUnavailable(reason) if answer == "unavailable" else KVError(reason)
        if answer != "invited":
            raise ProtocolError(f"{self.address} answered {answer}")
        if not 0 < fields["chunk"] <= self._room:
            raise ProtocolError(f"{self.address} sends messages of {fields['chunk']} blocks")
        self._chunk = fields["chunk"]
        self._channel = Channel(address=fields["control"], bell=self._bell)
        if kind == "peer":
            self._window = open_window(fields["invite"], self._store.layout, self._store.device)
            self._peer = self._store.peer(self._window.layout, self._window.addresses, self._window, self._window.pid)
            self._channel.send("opened")
        else:
            wanted = functools.partial(self._channel.check_wanted, self._stop)
            self._pipe = self._join(fields["invite"], local_ip_towards(self.address), deadline, wanted)

    def _fetch(self, read: _Read) -> bool:
        """Get a part of a load. False when it has ended, because all of it has come or because the rest will not."""
        task, source = read.task, read.task.source
        first, count = task.first_block + read.received, read.total - read.received
        # What is known is read without a word or a look at the channel: in small loads every microsecond shows.
        known = self._known.get(source.transfer_id, first)
        if known is None or known.count < first + count:
            self._connect_if_needed(task.deadline)
            known = self._known.get(source.transfer_id, first)
        assert self._channel is not None
        self._read_id += 1
        if known is not None:
            right = self._read_known(read, known, first, min(count, known.count - first))
            going = read.received < read.total or self._finish(read)
            self._took(right)
            return going
        self._channel.send(
            "read",
            read_id=self._read_id,
            transfer_id=source.transfer_id,
            first=first,
            count=count,
            timeout=max(0.0, task.deadline - time.monotonic()),
            wait=PART_WAIT,
        )
        kind, fields = self._hear(task)
        if kind == "later":
            read.known = read.known or fields["known"]
            if not read.known and time.monotonic() > read.began + OFFER_TIMEOUT:
                raise KVError(f"{self.address} has no offer {source.transfer_id}")
            return True
        right = 0
        if kind == "failed":
            read.reason = KVError(f"{self.address}: {fields['reason']}")
        elif self._window is not None:
            right = self._read_told(read, kind, fields)
        else:
            self._receive(read, kind, fields)
        if read.stopped:
            raise TaskEnded(f"load of request {task.request_id}")
        going = (read.reason is None and read.received < read.total) or self._finish(read)
        self._took(right)
        return going

    def _finish(self, read: _Read) -> bool:
        """End a load of which no more will come."""
        task = read.task
        if not read.bad and read.received == read.total:
            try:
                self._counters.add_all(loaded_blocks=read.total, loaded_bytes=self._store.staging_bytes(read.total))
                task.done()
            except TaskEnded:
                logger.info("the load of request %s was given up when all had come", task.request_id)
        else:
            bad = np.concatenate([*read.bad, np.arange(read.received, read.total)])
            reason = read.reason or KVError(f"{len(bad)} blocks from {self.address} do not match their digests")
            _fail(task, reason, bad)
        return False

    def _flags(self, count: int) -> torch.Tensor:
        """Room to tell of so many blocks whether they are wrong."""
        if count > len(self._wrong_bytes):
            self._wrong = self._store.new_wrong(2 * count)
            self._wrong_bytes = self._wrong.numpy()
        return self._wrong

    def _count(self, read: _Read, count: int, wrong: np.ndarray, *, if_told: str) -> None:
        """Hear whether the next `count` blocks of a load are the offer's. If so they count, and `wrong` has the indices
        of those that are damaged."""
        kind, fields = self._hear(read.task)
        if kind == "failed":
            read.reason = KVError(f"{self.address}: {fields['reason']}")
            return
        if kind != if_told:
            raise ProtocolError(f"{self.address} sent {kind} out of turn")
        if len(wrong):
            read.bad.append(wrong + read.received)
            self._counters.add("corrupt_blocks", len(wrong))
        read.received += count

    # ---- a window

    def _ids_of(self, told: bytes) -> np.ndarray:
        """Ids of the producer's blocks, from a message."""
        if len(told) % 4:
            raise ProtocolError(f"{self.address} sent {len(told)} bytes of block ids")
        ids = np.frombuffer(told, "<i4").astype(np.int32)
        if ids.min() < 0 or ids.max() >= self._peer.layout.num_blocks:
            raise ProtocolError(f"{self.address} names blocks from {ids.min()} to {ids.max()}")
        return ids

    def _choose(self, ids: np.ndarray, digests: np.ndarray | None, first: int = 0) -> PeerBlocks:
        """Tell the device of the producer's blocks, from its offer's block `first` on."""
        positions = np.arange(first, first + len(ids)) if digests is not None else None
        return self._store.choose(self._peer, ids, positions, digests)

    def _read_known(self, read: _Read, known: PeerBlocks, first: int, count: int) -> int:
        """Read blocks that the producer told of before. If all match their digests, they are what was offered, whatever
        has become of the offer; if not, the producer is asked. Returns for how many blocks it is to hear of that."""
        wrong = self._pull(read.task, read.received, known, first, count)
        if len(wrong):
            self._known.drop(read.task.source.transfer_id)
            return 0
        read.received += count
        return count

    def _read_told(self, read: _Read, kind: str, fields: dict[str, Any]) -> int:
        """Read blocks that the producer told of in answer to a read; returns the same."""
        assert self._channel is not None
        count = len(fields.get("ids", b"")) // 4
        if (
            kind != "blocks"
            or not 0 < count <= read.total - read.received
            or (self._verify and len(fields["digests"]) != 8 * count)
        ):
            raise ProtocolError(f"{self.address} sent {kind} out of turn")
        digests = np.frombuffer(fields["digests"], "<u8").astype(np.uint64) if self._verify else None
        try:
            chosen = self._choose(self._ids_of(fields["ids"]), digests, read.task.first_block + read.received)
            wrong = self._pull(read.task, read.received, chosen, 0, count)
        except TaskEnded:
            self._channel.send("stop", read_id=self._read_id)
            raise
        if self._verify and not len(wrong):
            read.received += count
            return count
        # Before unchecked blocks count, and before a difference is taken for damage: did they stay what they were?
        self._channel.send("confirm", read_id=self._read_id)
        self._count(read, count, wrong, if_told="stands")
        return 0

    def _took(self, count: int) -> None:
        if count and self._channel is not None:
            self._channel.send("took", read_id=self._read_id, count=count)

    def _pull(self, task: LoadTask, start: int, chosen: PeerBlocks, first: int, count: int) -> np.ndarray:
        """Copy blocks out of the window, from the `first` of those chosen to the task's `start`; returns the indices of
        those that are not what they should be."""
        self._flags(count)
        block_ids = task.order.blocks[0][start : start + count]
        if self._writers is None:
            self._pull_on_gpu(task, chosen, first, block_ids)
        else:
            at_once = max(1, AT_ONCE_BYTES // self._store.staging_bytes(1))
            for at in range(0, count, at_once):
                if self._stop.is_set():
                    raise KVError("the worker closes")
                with task.using():
                    self._pull_by_two(block_ids, chosen, first, slice(at, min(at + at_once, count)))
        return self._wrong_bytes[:count].nonzero()[0] if self._verify else np.empty(0, np.int64)

    def _pull_on_gpu(self, task: LoadTask, chosen: PeerBlocks, first: int, block_ids: np.ndarray) -> None:
        """Copy these blocks by one kernel."""
        assert self._stream is not None
        with task.using():
            if task.fence is not None:
                self._stream.wait_event(task.fence)
            try:
                self._store.pull(chosen, block_ids, first=first, wrong=self._wrong if self._verify else None)
            finally:
                # Also where only half of it could be launched: the task's blocks are its own no longer than this.
                self._stream.synchronize()

    def _pull_by_two(self, block_ids: np.ndarray, chosen: PeerBlocks, first: int, part: slice) -> None:
        """Copy a part of these blocks; where that is worth while, by two threads."""
        assert self._writers is not None
        count = part.stop - part.start
        if READERS < 2 or count < 2 or self._store.staging_bytes(count) < HALVED_BYTES:
            self._pull_part(block_ids, chosen, first, part)
            return
        half = part.start + count // 2
        other = self._writers.submit(self._pull_part, block_ids, chosen, first, slice(half, part.stop))
        try:
            self._pull_part(block_ids, chosen, first, slice(part.start, half))
        finally:
            # As long as it takes: given up, it could still write into blocks that are somebody else's by then.
            concurrent.futures.wait([other])
        other.result(0)

    def _pull_part(self, block_ids: np.ndarray, chosen: PeerBlocks, first: int, part: slice) -> None:
        wrong = self._wrong[part] if self._verify else None
        self._store.pull(chosen, block_ids[part], first=first + part.start, wrong=wrong)

    # ---- a stream

    def _receive(self, read: _Read, kind: str, fields: dict[str, Any]) -> None:
        assert self._pipe is not None
        end = read.received + fields.get("count", 0)
        if kind != "part" or not read.received < end <= read.total:
            raise ProtocolError(f"{self.address} sent {kind} out of turn")
        longest = row_blocks(self._chunk, self._store.staging_bytes(1))
        while read.reason is None and read.received < end:
            kind, fields = self._hear(read.task)
            if kind == "failed":
                read.reason = KVError(f"{self.address}: {fields['reason']}")
                return
            count = fields.get("count", 0)
            if (
                kind != "row"
                or not 0 < count <= min(longest, end - read.received)
                or (self._verify and len(fields["digests"]) != 8 * count)
            ):
                raise ProtocolError(f"{self.address} sent {kind} out of turn")
            self._receive_row(read, count, fields["digests"])

    def _receive_row(self, read: _Read, count: int, digests: bytes) -> None:
        """Take the next `count` blocks. They count if the offer stood until the producer had gathered them all."""
        expected = np.frombuffer(digests, "<u8").astype(np.uint64) if self._verify else None
        sizes = [self._store.staging_bytes(blocks) for blocks in cut(count, self._chunk)]
        receive = self._receive_on_gpu if self._writers is None else self._receive_on_cpu
        self._count(read, count, receive(read, sizes, expected), if_told="sent")

    def _hear(self, task: LoadTask) -> tuple[str, dict[str, Any]]:
        assert self._channel is not None
        kind, fields = self._channel.recv(task.deadline, self._stop)
        while kind == "digested":
            self._note(kind, fields)
            kind, fields = self._channel.recv(task.deadline, self._stop)
        if fields.get("read_id") != self._read_id:
            raise ProtocolError(f"{self.address} sent {kind} of another read")
        return kind, fields

    def _receive_on_gpu(self, read: _Read, sizes: list[int], expected: np.ndarray | None) -> np.ndarray:
        """Write a row into the KV cache as it comes; returns the indices of its blocks that were not written, since
        they do not match their digests.

        The task is in use for as long as the row, since its blocks may be written at any moment until then: so is one
        whose pair has broken, until NCCL's abort has ended what was enqueued.
        """
        assert self._pipe is not None and self._stream is not None
        task, pipe = read.task, self._pipe
        count = sum(sizes) // self._store.staging_bytes(1)
        block_ids = task.blocks[0][read.received : read.received + count]
        positions = np.arange(task.first_block + read.received, task.first_block + read.received + count)
        flags = self._flags(count)

        def drain(i: int, part: torch.Tensor) -> None:
            its = slice(i * self._chunk, i * self._chunk + part.numel() // self._store.staging_bytes(1))
            if not self._store.accelerated:
                pipe.wait_for_stream(task.deadline)  # or PyTorch would, and without a deadline
            if expected is None:
                self._store.scatter(block_ids[its], part)
            else:
                self._store.scatter_verified(block_ids[its], positions[its], part, expected[its], flags[its])

        if task.fence is not None:
            task.fence.synchronize()  # here, or NCCL would wait on the producer's GPU
        try:
            with task.using():
                try:
                    pipe.recv_row(sizes, drain, task.deadline)
                finally:
                    self._stream.synchronize()
        except TaskEnded:
            self._tell_stopped(read)
            pipe.recv_row(sizes, lambda _, part: None, task.deadline)
            return np.empty(0, np.int64)
        return self._wrong_bytes[:count].nonzero()[0] if expected is not None else np.empty(0, np.int64)

    def _receive_on_cpu(self, read: _Read, sizes: list[int], expected: np.ndarray | None) -> np.ndarray:
        """The same; one message is written by a thread while the next one comes."""
        assert self._pipe is not None and self._writers is not None
        writers, wrong = self._writers, []

        def drain(i: int, part: torch.Tensor) -> Callable[[], None] | None:
            if read.stopped:
                return None
            at, n = i * self._chunk, part.numel() // self._store.staging_bytes(1)
            told = None if expected is None else expected[at : at + n]
            writing = writers.submit(self._write, read.task, read.received + at, n, part, told)
            return functools.partial(written, at, writing.result)

        def written(at: int, write: Callable[[], np.ndarray]) -> None:
            try:
                wrong.append(write() + at)
            except TaskEnded:
                self._tell_stopped(read)

        self._pipe.recv_row(sizes, drain, read.task.deadline)
        return np.concatenate([np.empty(0, np.int64), *wrong])

    def _tell_stopped(self, read: _Read) -> None:
        """The task has ended: what still comes is dropped."""
        assert self._channel is not None
        if not read.stopped:
            self._channel.send("stop", read_id=self._read_id)
        read.stopped = True

    def _write(self, task: LoadTask, start: int, n: int, part: torch.Tensor, expected: np.ndarray | None) -> np.ndarray:
        """Write what is right of a message into the KV cache; returns the indices of what is not."""
        block_ids, wrong = task.blocks[0][start : start + n], np.empty(0, np.int64)
        positions = np.arange(task.first_block + start, task.first_block + start + n)
        # Digested before the task is in use, so that one message is digested while another one is written.
        right = None
        if expected is not None:
            same = self._store.digest(part, n, positions) == expected
            wrong = np.flatnonzero(~same)
            right = np.flatnonzero(same) if len(wrong) else None
        with task.using():
            self._store.scatter(block_ids, part, right)
        return wrong

    def _disconnect(self) -> None:
        channel, pipe, window = self._channel, self._pipe, self._window
        self._channel = self._pipe = self._window = self._peer = None
        self._known = _Known(self._choose)
        if channel is not None:
            try:
                channel.send("bye")
            except KVError as error:
                logger.debug("%s: %s", self.address, error)
            channel.close()
        if pipe is not None:
            pipe.close(time.monotonic() + 2.0)
        if window is not None:
            try:
                window.close()
            except (KVError, RuntimeError) as error:  # of a device that has failed
                logger.error("the memory of %s cannot be unmapped: %s", self.address, error)

    def stop(self) -> None:
        """Begin to close, without waiting: what runs and what is queued fails."""
        self._stop.set()
        self._bell.ring()
        pipe = self._pipe
        if pipe is not None:
            pipe.abort()

    def join(self, deadline: float) -> None:
        """Wait for the thread until `deadline` at most; after `stop`."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("the thread that loads from %s has not ended in time", self.address)


def _fail(task: LoadTask, error: Exception, failed: np.ndarray | None = None) -> None:
    try:
        task.fail(error, failed)
    except TaskEnded:
        logger.debug("the load of request %s had ended before it failed: %s", task.request_id, error)
