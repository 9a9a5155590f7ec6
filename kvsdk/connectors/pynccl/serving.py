"""The producer's worker: answers other workers' reads of offered blocks, a thread for each pair."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import zmq

from kvsdk.connector.counters import Counters
from kvsdk.connectors.pynccl.channel import Bell, Channel, zmq_context
from kvsdk.connectors.pynccl.protocol import WORKER_WIRE, chunk_blocks, cut, row_blocks
from kvsdk.errors import (
    ConfigError,
    DeadlineExceeded,
    KVError,
    PeerGone,
    PipeClosed,
    ProtocolError,
    WindowUnavailable,
)
from kvsdk.kernels import BlockStore
from kvsdk.pipe import Pipe, PipeHost, lay_open

logger = logging.getLogger("kvsdk.pynccl")

PAIR_TIMEOUT = 20.0
"""Most seconds to connect a pair."""

LONGEST_WAIT = 1.0
"""Most seconds that a consumer may have a read wait for blocks that are still to be computed."""

MAX_PAIRS = 256
"""Most pairs at a time, those included that are being made: strangers can ask for them."""

DIGEST_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""What is digested before it is told, by the kind of device: a read need not wait for more. A GPU takes 0.2 ms."""

_ENDED_REMEMBERED = 1024
_NEWS_KEPT = 4096


class Streams:
    """CUDA streams for threads that come and go; nothing on a CPU.

    A stream that a thread is done with goes to the next one, and with it the memory that PyTorch's allocator keeps for
    that stream: otherwise each pair that ends would leave a staging buffer behind.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._free: list[torch.cuda.Stream] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def own(self) -> Iterator[torch.cuda.Stream | None]:
        """Run this thread's GPU work on the device, on a stream that no other thread has: the one that is yielded.

        Memory has to be allocated inside as well: PyTorch hands out what another stream's work, such as the model's,
        has just given up, and only work on the same stream comes after that.
        """
        if self._device.type != "cuda":
            yield None
            return
        torch.cuda.set_device(self._device)
        with self._lock:
            stream = self._free.pop() if self._free else torch.cuda.Stream(self._device)
        try:
            with torch.cuda.stream(stream):
                yield stream
        finally:
            with self._lock:
                self._free.append(stream)


class _Offer:
    """Blocks that may be read.

    Attributes:
        transfer_id: its name.
        num_blocks: of the whole prompt.
        block_ids: of those that are computed, or will be behind a fence; in the prompt's order.
        digests: uint64, of the first of them, computed while the offer stood.
        failure: why there will be no more digests.
    """

    def __init__(self, transfer_id: str, num_blocks: int):
        self.transfer_id, self.num_blocks = transfer_id, num_blocks
        self.block_ids = np.zeros(0, np.int32)
        self.digests = np.zeros(0, np.uint64)
        self.standing = True
        self.failure: str | None = None
        self._fences: list[tuple[int, Any]] = []

    def grow(self, block_ids: np.ndarray, fence: Any) -> None:
        self.block_ids = np.concatenate([self.block_ids, block_ids])
        if fence is not None:
            self._fences.append((len(self.block_ids), fence))

    def fences(self, first: int) -> list[Any]:
        """What the blocks from `first` on are ready behind."""
        return [fence for end, fence in list(self._fences) if end > first]


class News:
    """What was digested of all offers, for the thread of one pair.

    Args:
        bell: rung when there is some.
    """

    def __init__(self, bell: Bell):
        self._bell = bell
        self._parts: queue.SimpleQueue[tuple[_Offer, int, np.ndarray]] = queue.SimpleQueue()
        self._answered: tuple[_Offer | None, int] = None, 0

    def put(self, offer: _Offer, first: int, digests: np.ndarray) -> None:
        """From any thread. What nobody hears in time is not kept for ever: a consumer can ask."""
        if self._parts.qsize() < _NEWS_KEPT:
            self._parts.put((offer, first, digests))
            self._bell.ring()

    def answered(self, offer: _Offer, end: int) -> None:
        """The consumer has heard of the blocks up to `end` in answer to its read."""
        self._answered = offer, end

    def tell(self, channel: Channel) -> None:
        """Send what there is, unless it is old or the consumer reads nothing."""
        while True:
            try:
                offer, first, digests = self._parts.get_nowait()
            except queue.Empty:
                return
            known, end = self._answered
            if offer.standing and not (offer is known and first + len(digests) <= end):
                channel.offer(
                    "digested",
                    transfer_id=offer.transfer_id,
                    total=offer.num_blocks,
                    first=first,
                    ids=offer.block_ids[first : first + len(digests)].astype("<i4").tobytes(),
                    digests=digests.astype("<u8").tobytes(),
                )


class Offers:
    """The offers that this worker may read from its KV cache, by transfer id."""

    def __init__(self) -> None:
        self._offers: dict[str, _Offer] = {}
        self._ended: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._closed = False
        self._changed = threading.Condition()
        self._listeners: list[News] = []

    @contextlib.contextmanager
    def told(self, news: News) -> Iterator[None]:
        """What is digested meanwhile goes to `news`, too."""
        with self._changed:
            self._listeners.append(news)
        try:
            yield
        finally:
            with self._changed:
                self._listeners.remove(news)

    def add(self, transfer_id: str, block_ids: np.ndarray) -> _Offer:
        """An offer of a computed prompt."""
        with self._changed:
            self._ended.pop(transfer_id, None)
            offer = self._offers[transfer_id] = _Offer(transfer_id, len(block_ids))
            offer.grow(block_ids, None)
            self._changed.notify_all()
            return offer

    def grow(self, transfer_id: str, block_ids: np.ndarray, num_blocks: int, fence: Any) -> _Offer:
        """More of a prompt that is being computed."""
        with self._changed:
            offer = self._offers.get(transfer_id)
            if offer is None:
                self._ended.pop(transfer_id, None)
                offer = self._offers[transfer_id] = _Offer(transfer_id, num_blocks)
            offer.grow(block_ids, fence)
            self._changed.notify_all()
            return offer

    def digested(self, offer: _Offer, digests: np.ndarray) -> None:
        """The digests of the next blocks of an offer. If it ended before, they may be of anything and are dropped."""
        with self._changed:
            first, listeners = len(offer.digests), list(self._listeners) if offer.standing else []
            if offer.standing:
                offer.digests = np.concatenate([offer.digests, digests])
            told = offer.digests[first:]  # a copy: the caller writes the next ones over these
            self._changed.notify_all()
        # Not under the lock, which the thread that runs the model takes, too.
        for news in listeners:
            news.put(offer, first, told)

    def not_digested(self, offer: _Offer, failure: str) -> None:
        """The next blocks of an offer cannot be digested, so nobody can read them."""
        with self._changed:
            offer.failure = failure
            self._changed.notify_all()

    def ready(self, offer: _Offer, first: int, deadline: float, *, digested: bool) -> int:
        """Up to which block an offer can be read, once it is more than `first` or the deadline has passed.

        Raises:
            KVError: the offer has ended, or its next blocks cannot be digested.
        """
        with self._changed:
            while True:
                if not offer.standing or self._closed:
                    raise KVError("the offer has ended")
                ready = len(offer.digests if digested else offer.block_ids)
                remaining = deadline - time.monotonic()
                if ready > first:
                    return ready
                if offer.failure is not None:
                    raise KVError(offer.failure)
                if remaining <= 0:
                    return ready
                self._changed.wait(remaining)

    def end(self, transfer_id: str) -> None:
        """After this returns, `still` is false for the offer, whatever was read from its blocks."""
        with self._changed:
            offer = self._offers.pop(transfer_id, None)
            if offer is not None:
                offer.standing = False
            self._ended[transfer_id] = None
            if len(self._ended) > _ENDED_REMEMBERED:
                self._ended.popitem(last=False)
            self._changed.notify_all()

    def get(self, transfer_id: str, deadline: float) -> _Offer | None:
        """The offer, or None if it has not been here by the deadline: a consumer may hear of it a step before this
        worker does.

        Raises:
            KVError: it has ended.
        """
        with self._changed:
            while transfer_id not in self._offers:
                if transfer_id in self._ended or self._closed:
                    raise KVError(f"the offer {transfer_id} has ended")
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return None
                self._changed.wait(remaining)
            return self._offers[transfer_id]

    def close(self) -> None:
        """Nobody waits any longer for an offer to come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def still(self, offer: _Offer) -> bool:
        with self._changed:
            return offer.standing

    def __len__(self) -> int:
        return len(self._offers)


@dataclasses.dataclass
class _Pair:
    """What the thread of one pair has, and may be waiting for.

    Attributes:
        channel: to the consumer.
        host: of the pipe that is being made; not for a window.
        bell: ends a wait for the channel; for a window.
        pipe: once it is made.
    """

    channel: Channel
    host: PipeHost | None = None
    bell: Bell | None = None
    pipe: Pipe | None = None

    def interrupt(self) -> None:
        """From any thread: end what the pair's thread is waiting for."""
        if self.bell is not None:
            self.bell.ring()
        if self.host is not None:
            self.host.close()
        if self.pipe is not None:
            self.pipe.abort()

    def close(self) -> None:
        """By the pair's thread."""
        with contextlib.ExitStack() as stack:
            if self.bell is not None:
                stack.callback(self.bell.close)
            if self.pipe is not None:
                stack.callback(self.pipe.close, time.monotonic() + 2.0)
            if self.host is not None:
                stack.callback(self.host.close)
            stack.callback(self.channel.close)


class WorkerServer:
    """Listens for other servers' workers and serves each in a thread of its own.

    Args:
        store: this worker's KV cache.
        offers: what may be read.
        kinds: of pipes, those that consumers may open.
        bind_ip: where to listen; the port is ephemeral.
        staging_bytes: of one pair's staging memory.
        streams: where pairs take their streams from.
        counters: where `sent_bytes` is counted.

    Raises:
        ConfigError: `bind_ip` is not an address of this host.
    """

    def __init__(
        self,
        store: BlockStore,
        offers: Offers,
        *,
        kinds: Sequence[str],
        make_host: Callable[[str], PipeHost],
        bind_ip: str,
        staging_bytes: int,
        streams: Streams,
        verify: bool,
        counters: Counters,
    ):
        self._streams = streams
        self._store, self._offers, self._kinds, self._make_host = store, offers, kinds, make_host
        self._bind_ip, self._verify, self._counters = bind_ip, verify, counters
        self._chunk = chunk_blocks(staging_bytes, store.staging_bytes(1))
        self._listener = zmq_context().socket(zmq.ROUTER)
        self._listener.setsockopt(zmq.LINGER, 0)
        self._listener.setsockopt(zmq.MAXMSGSIZE, WORKER_WIRE.max_bytes)
        try:
            port = self._listener.bind_to_random_port(f"tcp://{bind_ip}")
        except zmq.ZMQError as error:
            # Left open, the socket would warn from its finalizer; vLLM's SIGTERM can be lost in there, and the server
            # hangs.
            self._listener.close()
            raise ConfigError(
                f"cannot listen on kv_ip={bind_ip} ({os.strerror(error.errno)}); set kv_ip to an address of this host"
            ) from error
        self.address = f"{bind_ip}:{port}"
        self._laid_open: dict[str, Any] | None = None
        self._stop = threading.Event()
        self._pairs: dict[threading.Thread, _Pair] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="kvsdk-worker-server", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        try:
            while not self._stop.is_set():
                if not self._listener.poll(200):
                    continue
                identity, *frames = self._listener.recv_multipart()
                try:
                    reply = self._open(frames)
                except ProtocolError as error:
                    logger.warning("a malformed message was dropped: %s", error)
                    continue
                except Exception as error:  # one reply to each message, whatever fails
                    logger.exception("a pair could not be opened")
                    reply = WORKER_WIRE.encode("refused", reason=f"{type(error).__name__}: {error}"[:1000])
                self._listener.send_multipart([identity, reply])
        except zmq.ZMQError:
            if not self._stop.is_set():
                logger.exception("the worker's listener failed; no new pairs can be opened")
        finally:
            self._listener.close()

    def _open(self, frames: list[bytes]) -> bytes:
        if len(frames) != 1:
            raise ProtocolError(f"{len(frames)} frames")
        kind, fields = WORKER_WIRE.decode(frames[0])
        if kind != "open":
            raise ProtocolError(f"{kind} at the listener")
        if fields["pipe"] not in self._kinds:
            reason = f"this worker speaks {' and '.join(self._kinds)}, not {fields['pipe']}"
            return WORKER_WIRE.encode("unavailable", reason=reason)
        if len(self._pairs) >= MAX_PAIRS:
            logger.warning("a pair was refused: %d are open", MAX_PAIRS)
            return WORKER_WIRE.encode("refused", reason=f"{MAX_PAIRS} pairs are open, which is the limit")
        if fields["chunk"] < 1:
            raise ProtocolError(f"messages of {fields['chunk']} blocks")
        timeout = min(max(fields["timeout"], 0.1), PAIR_TIMEOUT)
        if fields["pipe"] == "peer":
            try:
                window = self._window()
            except WindowUnavailable as error:
                return WORKER_WIRE.encode("unavailable", reason=str(error)[:1000])
            bell = Bell()
            pair = _Pair(Channel(bind_ip=self._bind_ip, bell=bell), bell=bell)
            self._start(pair, self._serve_window, News(bell), timeout)
            return WORKER_WIRE.encode("invited", invite=window, control=pair.channel.address, chunk=1)
        chunk = min(self._chunk, fields["chunk"])
        host = self._make_host(fields["pipe"])
        try:
            invite = host.prepare()
        except WindowUnavailable as error:
            return WORKER_WIRE.encode("unavailable", reason=str(error)[:1000])
        try:
            pair = _Pair(Channel(bind_ip=self._bind_ip), host=host)
        except BaseException:  # no more sockets
            host.close()
            raise
        self._start(pair, self._serve, host, invite, chunk, timeout)
        return WORKER_WIRE.encode("invited", invite=dict(invite), control=pair.channel.address, chunk=chunk)

    def _start(self, pair: _Pair, serve: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=self._run_pair, args=(pair, serve, *args), name="kvsdk-pair", daemon=True)
        try:
            with self._lock:
                thread.start()
                self._pairs[thread] = pair
        except BaseException:  # the system has no more threads
            pair.close()
            raise

    def _run_pair(self, pair: _Pair, serve: Callable[..., None], *args: Any) -> None:
        try:
            with _ends_of_pairs(self._stop), contextlib.closing(pair):
                # `close` may have come before this pair was in its list.
                if not self._stop.is_set():
                    serve(pair, *args)
        finally:
            with self._lock:
                del self._pairs[threading.current_thread()]

    def _window(self) -> dict[str, Any]:
        if self._laid_open is None:
            self._laid_open = lay_open(self._store.layout, self._store.addresses, self._store.device)
        return self._laid_open

    def _serve_window(self, pair: _Pair, news: News, timeout: float) -> None:
        channel = pair.channel
        with self._offers.told(news):
            if channel.recv(time.monotonic() + timeout, self._stop)[0] != "opened":
                return
            logger.info("a consumer reads this worker's memory in place")
            while not self._stop.is_set():
                news.tell(channel)
                if channel.poll(0.5):
                    kind, fields = channel.recv(time.monotonic() + 1.0)
                    if kind == "bye":
                        return
                    if kind == "read":
                        self._tell(channel, news, fields)
                    elif kind == "took":
                        self._took(fields)
                    else:
                        raise ProtocolError(f"{kind} on a pair's channel")

    def _took(self, fields: dict[str, Any]) -> None:
        if not 0 < fields["count"] <= self._store.layout.num_blocks:
            raise ProtocolError(f"a consumer that took {fields['count']} blocks")
        self._counters.add("sent_bytes", self._store.staging_bytes(fields["count"]))

    def _tell(self, channel: Channel, news: News, fields: dict[str, Any]) -> None:
        """Answer a read of this worker's memory: which blocks, and their digests."""
        read_id, first = fields["read_id"], fields["first"]
        deadline = time.monotonic() + max(0.0, fields["timeout"])
        found = find_part(self._offers, channel, fields, digested=self._verify)
        if found is None:
            return
        offer, count = found
        if not self._verify:
            for fence in offer.fences(first):
                fence.synchronize()
        ids = offer.block_ids[first : first + count].astype("<i4").tobytes()
        told = offer.digests[first : first + count].astype("<u8").tobytes() if self._verify else b""
        channel.send("blocks", read_id=read_id, ids=ids, digests=told)
        if self._verify:
            news.answered(offer, first + count)
        while not channel.poll(0.5):
            if self._stop.is_set() or time.monotonic() > deadline:
                return
        kind, message = channel.recv(deadline)
        if kind == "bye":
            raise PeerGone("it gave the pair up in the middle of a read")
        if kind not in ("confirm", "stop", "took") or message["read_id"] != read_id:
            raise ProtocolError(f"{kind} during a read")
        if kind == "took":
            self._took(message)
        elif kind == "confirm" and self._offers.still(offer):
            channel.send("stands", read_id=read_id)
            self._counters.add("sent_bytes", self._store.staging_bytes(count))
        elif kind == "confirm":
            channel.send("failed", read_id=read_id, reason="the offer ended meanwhile")

    def _serve(self, pair: _Pair, host: PipeHost, invite: dict[str, Any], chunk: int, timeout: float) -> None:
        wanted = functools.partial(pair.channel.check_wanted, self._stop)
        pair.pipe = pipe = host.accept(invite, time.monotonic() + timeout, wanted)
        logger.info("paired with a consumer over %s", pipe.kind)
        with self._streams.own():
            self._answer_reads(pipe, pair.channel, chunk)

    def _answer_reads(self, pipe: Pipe, channel: Channel, chunk: int) -> None:
        while not self._stop.is_set():
            if not channel.poll(0.5):
                continue
            kind, fields = channel.recv(time.monotonic() + 1.0)
            if kind == "bye":
                return
            if kind == "read":
                _Read(self._store, self._offers, pipe, channel, chunk, self._verify).answer(fields, self._counters)
            elif kind != "stop":  # a stop that came after the last message
                raise ProtocolError(f"{kind} on a pair's channel")

    @property
    def num_pairs(self) -> int:
        return len(self._pairs)

    def close(self, timeout: float) -> None:
        """Stop listening, abort every pair; bounded by `timeout` seconds; twice is fine."""
        self._stop.set()
        deadline = time.monotonic() + timeout
        with self._lock:
            pairs, threads = list(self._pairs.values()), [self._thread, *self._pairs]
        for pair in pairs:
            pair.interrupt()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def _ends_of_pairs(stop: threading.Event) -> Iterator[None]:
    """Logs how a pair's thread ends."""
    try:
        yield
    except PeerGone as error:
        logger.info("a consumer left: %s", error)
    except PipeClosed:
        if not stop.is_set():
            logger.warning("a pair was closed")
    except DeadlineExceeded as error:
        logger.warning("a pair ends, its consumer does not answer: %s", error)
    except Exception:
        logger.exception("a pair ends with an error")


def find_part(offers: Offers, channel: Channel, fields: dict[str, Any], *, digested: bool) -> tuple[_Offer, int] | None:
    """What of an offer a read gets now: as many of its blocks as there are. None when the consumer was told why not."""
    read_id, first, count = fields["read_id"], fields["first"], fields["count"]
    by = time.monotonic() + min(max(0.0, fields["wait"]), LONGEST_WAIT)
    try:
        offer = offers.get(fields["transfer_id"], by)
        if offer is None:
            channel.send("later", read_id=read_id, known=False)
            return None
        if not 0 <= first < first + count <= offer.num_blocks:
            raise KVError(f"the offer has {offer.num_blocks} blocks, not {first}..{first + count}")
        count = min(count, offers.ready(offer, first, by, digested=digested) - first)
    except KVError as error:
        channel.send("failed", read_id=read_id, reason=str(error))
        return None
    if count <= 0:
        channel.send("later", read_id=read_id, known=True)
        return None
    return offer, count


class Digester:
    """Digests the blocks of offers where they lie, in a thread and on a stream of its own.

    So no consumer waits for more than what is left of that when it reads; and the digest is one of the blocks as they
    were offered, whatever carries them: what is written over an offer's blocks later, and what goes wrong when they are
    gathered, does not match. The blocks are complete behind their fence.
    """

    def __init__(self, store: BlockStore, offers: Offers, streams: Streams):
        self._store, self._offers, self._streams = store, offers, streams
        self._queue: queue.SimpleQueue[tuple[_Offer, int, np.ndarray, Any] | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvsdk-digest", daemon=True)
        self._thread.start()

    def add(self, offer: _Offer, first: int, block_ids: np.ndarray, fence: Any) -> None:
        """The blocks of an offer from `first` on; never waits."""
        self._queue.put((offer, first, block_ids, fence))

    def _run(self) -> None:
        with self._streams.own():
            while (part := self._queue.get()) is not None:
                offer = part[0]
                try:
                    if offer.failure is None:
                        self._digest(*part)
                except Exception as error:
                    logger.exception("blocks of an offer could not be digested; reads of them fail")
                    self._offers.not_digested(offer, f"its blocks could not be digested: {type(error).__name__}")

    def _digest(self, offer: _Offer, first: int, block_ids: np.ndarray, fence: Any) -> None:
        count, piece = len(block_ids), max(1, DIGEST_BYTES[self._store.device.type] // self._store.staging_bytes(1))
        digests = self._store.new_digests(min(count, piece))
        if fence is not None:
            torch.cuda.current_stream().wait_event(fence)
        for start in range(0, count, piece):
            if self._stop.is_set() or not self._offers.still(offer):
                return
            ids, told = block_ids[start : start + piece], digests[: min(piece, count - start)]
            self._store.digest_in_place(ids, np.arange(first + start, first + start + len(ids)), told)
            if self._store.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
            self._offers.digested(offer, told.numpy().view(np.uint64))

    def stop(self) -> None:
        """Begin to close, without waiting: what is queued is not digested."""
        self._stop.set()
        self._queue.put(None)

    def join(self, deadline: float) -> None:
        """Wait for the thread until `deadline` at most; after `stop`."""
        self._thread.join(max(0.0, deadline - time.monotonic()))


class _Read:
    """One consumer's read of an offer's blocks.

    Args:
        chunk: most blocks of a message.
        verify: whether digests go with them.
    """

    def __init__(self, store: BlockStore, offers: Offers, pipe: Pipe, channel: Channel, chunk: int, verify: bool):
        self._store, self._offers, self._pipe, self._channel = store, offers, pipe, channel
        self._chunk, self._verify = chunk, verify
        self._failed = False

    def answer(self, fields: dict[str, Any], counters: Counters) -> None:
        self._read_id, first = fields["read_id"], fields["first"]
        self._deadline = time.monotonic() + max(0.0, fields["timeout"])
        found = find_part(self._offers, self._channel, fields, digested=self._verify)
        if found is None:
            return
        offer, count = found
        for fence in offer.fences(first):
            fence.synchronize()  # here, or NCCL would wait on the consumer's GPU
        self._channel.send("part", read_id=self._read_id, count=count)
        longest = row_blocks(self._chunk, self._store.staging_bytes(1))
        for start in range(first, first + count, longest):
            self._heed()
            if self._failed:
                return
            n = min(longest, first + count - start)
            told = offer.digests[start : start + n].astype("<u8").tobytes() if self._verify else b""
            self._channel.send("row", read_id=self._read_id, count=n, digests=told)
            sizes = [self._store.staging_bytes(blocks) for blocks in cut(n, self._chunk)]
            self._pipe.send_row(sizes, functools.partial(self._fill, offer, start, start + n), self._deadline)
            counters.add("sent_bytes", sum(sizes))

    def _fill(self, offer: _Offer, start: int, end: int, i: int, part: torch.Tensor) -> None:
        """Gather message `i` of the row with the offer's blocks from `start` to `end`."""
        if not self._failed and not self._offers.still(offer):
            self._fail("the offer ended meanwhile")
        if self._failed:
            return
        first = start + i * self._chunk
        last = min(first + self._chunk, end)
        self._store.gather(offer.block_ids[first:last], part)
        self._heed()
        if self._failed or last < end:
            return
        self._pipe.wait_for_stream(self._deadline)
        # What was gathered counts only if the offer stood until now: its blocks are written again only after
        # `Offers.end`.
        if self._offers.still(offer):
            self._channel.send("sent", read_id=self._read_id)
        else:
            self._fail("the offer ended meanwhile")

    def _heed(self) -> None:
        """Whether the consumer wants no more."""
        # Not once it was told that this read has failed: what comes then may be its next one.
        while not self._failed and self._channel.poll(0):
            kind, message = self._channel.recv(self._deadline)
            if kind == "stop" and message["read_id"] == self._read_id:
                self._fail("stopped by the consumer")
                return
            if kind == "bye":
                raise PeerGone("it gave the pair up in the middle of a read")
            raise ProtocolError(f"{kind} during a read")

    def _fail(self, reason: str) -> None:
        self._failed = True
        self._channel.send("failed", read_id=self._read_id, reason=reason)
