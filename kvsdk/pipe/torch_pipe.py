"""Pipes over `torch.distributed`: gloo between CPUs, NCCL between GPUs.

Each pair has process groups of its own, constructed directly over a `TCPStore` of its own on an ephemeral port of the
address asked for: never `init_process_group`, never vLLM's groups. So pairs come and go while others serve.

A gloo group of the pair carries what controls it, and on CPUs the tensors too. Before each tensor both ends exchange a
header with its number and size, so a disagreement ends in `ProtocolError` on both, and an NCCL kernel is enqueued only
once the other end is about to enqueue its own: none spins on a GPU for a peer that is not there. A peer that dies
closes its gloo sockets, which is how the other end of an NCCL pair learns of it.

There is one way to break a gloo pair from another thread with public calls: let a receive that nobody answers time
out. Gloo then closes the pair's connections, and every call on them fails, here and on the peer.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import math
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from kvsdk.errors import ConfigError, DeadlineExceeded, KVError, PeerGone, PipeClosed, ProtocolError
from kvsdk.pipe.base import Drain, Draining, Fill, Pipe, check_contiguous

logger = logging.getLogger("kvsdk.pipe")

_MAGIC = 0x6B7673646B706970
# Gloo's tags; the first six add the rank that sends the tensor.
_HELLO, _SENDER, _RECEIVER, _DATA, _TRAILER, _RECEIPT, _WATCH, _BREAK = 0, 2, 4, 6, 8, 10, 12, 13
_FOREVER = timedelta(days=365)
_PRODUCER, _CONSUMER = 0, 1
# A peer that has its tensor closes at once; this end may still be copying out the same one.
_GRACE_AFTER_PEER = 0.5
_EVENT_LIMIT = 2.0
_ABORT_LIMIT = 2.0
_STORE_POLL = 0.005
_STORE_ATTEMPT = timedelta(seconds=1)
_SLICE = 0.05  # seconds between two looks at whether a pair that is being made is still wanted
# Gloo's own rendezvous takes a fraction of a second and cannot be interrupted. It waits so long for the peer's word,
# and five times as long for its connection (2.0 s were seen with 0.4, 5.0 with 1), in a thread that nobody waits for.
_RENDEZVOUS_LIMIT = timedelta(seconds=5)


def prepare_process(device_type: str) -> None:
    """Keeps NCCL's watchdog from ending the process. Call once in a worker's main thread, before any pipe exists.

    PyTorch reads these variables in the constructor of each NCCL process group, and by default its watchdog and its
    monitor end the process when a peer dies: right for training, wrong for a server whose peers come and go.
    Environment variables must not change while other threads run, so this is not done when a pipe is made. Groups that
    exist already, such as vLLM's own by the time it makes its connector, are not affected.

    Args:
        device_type: `cuda`; anything else changes nothing.
    """
    if device_type != "cuda":
        return
    wanted = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # errors are this module's to handle: do not tear the process down
        "TORCH_NCCL_ENABLE_MONITORING": "0",  # nor when the watchdog itself is slow
        "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",  # nor when the watchdog sees a CUDA error: it would be uncaught
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",  # the dump would poll the store of a peer that may be gone
        "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false",  # a pair has one operation at a time anyway
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",  # after an error the watchdog sleeps 4 times this; 15 s by default
    }
    for name, value in wanted.items():
        if os.environ.get(name, value) != value:
            logger.warning("%s=%s becomes %s, so that NCCL never ends this server", name, os.environ[name], value)
        os.environ[name] = value


class TorchListener:
    """The producer's side of one pair that is being made.

    Args:
        kind: `gloo` or `nccl`.
        pair: sets the pair's keys in the store apart.
        ip: address to listen on.
        device: where the tensors are.
        max_ctas: thread blocks that NCCL may use for a transfer; 0 leaves it to NCCL.

    Raises:
        ConfigError: `ip` is no address of this machine.
    """

    def __init__(
        self, kind: str, pair: str, ip: str, device: torch.device, max_ctas: int, num_slots: int, slot_bytes: int
    ):
        self._kind, self._pair, self._ip, self._device, self._max_ctas = kind, pair, ip, device, max_ctas
        self._slots = num_slots, slot_bytes
        try:
            listener = socket.create_server((ip, 0), family=_family(ip))
        except OSError as error:
            raise ConfigError(f"cannot listen on {ip}: {error}") from error
        port = listener.getsockname()[1]
        self.fields = {"host": ip, "port": port, "max_ctas": max_ctas}
        # Handing our socket over keeps the store off the wildcard address, where it would listen otherwise.
        self._store: dist.TCPStore | None = dist.TCPStore(
            ip, port, 2, is_master=True, timeout=_FOREVER, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def joined(self) -> bool:
        """Whether the peer is there. Raises PipeClosed after `close`."""
        return self._open_store().check([_joined_key(self._pair)])

    def connect(self, deadline: float, wanted: Callable[[], None]) -> Pipe:
        """The producer's end; see `PipeHost.accept`."""
        invite = {"kind": self._kind, "pair": self._pair, "max_ctas": self._max_ctas}
        return _connect(self._open_store(), _PRODUCER, invite, self._device, self._ip, self._slots, deadline, wanted)

    def close(self) -> None:
        # By name, since the traceback of an error may keep this object, and the store would go on listening.
        self._store = None

    def _open_store(self) -> dist.TCPStore:
        store = self._store
        if store is None:
            raise PipeClosed("the invite is used up, or the pipe host is closed")
        return store


def join_torch(
    invite: Mapping[str, Any],
    device: torch.device,
    bind_ip: str,
    num_slots: int,
    slot_bytes: int,
    deadline: float,
    wanted: Callable[[], None],
) -> Pipe:
    """The consumer's end of a pair over gloo or NCCL; see `kvsdk.pipe.join`, which has checked the invite's types."""

    def connect_store() -> dist.TCPStore:
        # PyTorch goes on trying for twice its timeout where a peer that dies has reset the connection. In short
        # attempts this thread does not outlive the deadline by much.
        host, port, limit = invite["host"], invite["port"], _STORE_ATTEMPT
        while True:
            _probe(host, port, deadline)
            try:
                store = dist.TCPStore(host, port, 2, is_master=False, timeout=limit, wait_for_workers=False)
            except RuntimeError:
                logger.debug("connecting to %s:%d failed", host, port, exc_info=True)
                continue
            store.set_timeout(_remaining(deadline))
            store.set(_joined_key(invite["pair"]), b"1")
            return store

    store = _within(deadline, wanted, "connecting to the peer's store", connect_store)
    return _connect(store, _CONSUMER, invite, device, bind_ip, (num_slots, slot_bytes), deadline, wanted)


class TorchPipe(Pipe):
    """A pair over gloo. One thread may send while another receives.

    `send` returns once the peer has the bytes.
    """

    kind = "gloo"

    def __init__(self, group: dist.ProcessGroupGloo, rank: int, num_slots: int, slot_bytes: int):
        super().__init__(num_slots, slot_bytes)
        self._gloo: dist.ProcessGroupGloo | None = group
        self._rank, self._peer = rank, 1 - rank
        self._numbers = [0, 0]  # of the next tensor, by the rank that sends it

    def close(self, deadline: float) -> None:
        self._fail(PipeClosed("the pipe was closed"))
        if self._wait_idle(deadline):
            self._release(deadline)
        else:
            logger.error("a call was still inside a closed pipe at the deadline; its process group is kept")

    def _check(self, tensor: torch.Tensor) -> None:
        check_contiguous(tensor)
        if tensor.device.type != "cpu":
            raise ValueError(f"a gloo pipe carries CPU tensors, not tensors on {tensor.device}")

    def _send(self, data: torch.Tensor, deadline: float) -> None:
        self._meet([data.numel()], self._rank, deadline)
        self._carry(data, self._rank, deadline)

    def _recv(self, data: torch.Tensor, deadline: float) -> None:
        self._meet([data.numel()], self._peer, deadline)
        self._carry(data, self._peer, deadline)

    def _carry(self, data: torch.Tensor, sender: int, deadline: float) -> None:
        self._finish(self._begin(data, sender, deadline), deadline)

    def _send_row(self, sizes: list[int], fill: Fill, deadline: float) -> None:
        self._meet(sizes, self._rank, deadline)
        under_way: collections.deque[Any] = collections.deque()
        for i, part in enumerate(self._parts("send", sizes)):
            if len(under_way) == self.num_slots:
                self._finish(under_way.popleft(), deadline)
            fill(i, part)
            under_way.append(self._begin(part, self._rank, deadline))
        while under_way:
            self._finish(under_way.popleft(), deadline)

    def _recv_row(self, sizes: list[int], drain: Drain, deadline: float) -> None:
        self._meet(sizes, self._peer, deadline)
        parts, draining = self._parts("recv", sizes), Draining(drain, self.num_slots)
        under_way: collections.deque[Any] = collections.deque()
        begun, free = 0, self.num_slots
        for i, part in enumerate(parts):
            for following in parts[begun : begun + free]:
                under_way.append(self._begin(following, self._peer, deadline))
                begun += 1
            self._finish(under_way.popleft(), deadline)
            free = draining.start(i, part)
        draining.finish()

    def _begin(self, data: torch.Tensor, sender: int, deadline: float) -> Any:
        """Starts to move a tensor; the peer is about to do the other half. Returns what `_finish` takes."""
        if not data.numel():
            return None
        sending = sender == self._rank
        trailer, receipt = torch.zeros((2, 1), dtype=torch.uint8)
        with self._typed_errors(deadline, "the tensor"):
            moved = self._post(data, sending, _DATA + sender)
            trailed = self._post(trailer, sending, _TRAILER + sender)
            received = self._post(receipt, False, _RECEIPT + sender) if sending else None
        return moved, trailed, received, (data, trailer, receipt)

    def _finish(self, begun: Any, deadline: float) -> None:
        """Waits until the tensor has been moved; calls come in the order of `_begin`."""
        # When the connection ends, gloo wakes receives that have not begun, but nothing that is halfway. So each end
        # waits for a small message behind the tensor, the receiver for a trailer and the sender for a receipt; the
        # tensor's own operation is over by then.
        if begun is None:
            return
        moved, trailed, received, (_, _, receipt) = begun
        with self._typed_errors(deadline, "the tensor"):
            if received is not None:
                received.wait(_remaining(deadline))
            trailed.wait(_remaining(deadline))
            moved.wait(_remaining(deadline))
            if received is None:
                self._post(receipt, True, _RECEIPT + self._peer).wait(_remaining(deadline))
        # A pair that is broken from another thread ends some waits without an error.
        self._raise_if_broken()

    def _meet(
        self, sizes: Sequence[int], sender: int, deadline: float, meanwhile: Callable[[], None] | None = None
    ) -> None:
        """Exchanges headers with the peer, which must be about to do the other half of the same transfer; `meanwhile`
        is called while they are on their way."""
        sending = sender == self._rank
        own_tag, peer_tag = (_SENDER, _RECEIVER) if sending else (_RECEIVER, _SENDER)
        number, self._numbers[sender] = self._numbers[sender], self._numbers[sender] + 1
        ours = torch.tensor([_MAGIC, number, sum(sizes), zlib.crc32(repr(list(sizes)).encode())])
        theirs = torch.zeros_like(ours)
        with self._typed_errors(deadline, "the peer to be ready"):
            ours_sent = self._post(ours, True, own_tag + sender)
            theirs_here = self._post(theirs, False, peer_tag + sender)
        if meanwhile is not None:
            meanwhile()
        with self._typed_errors(deadline, "the peer to be ready"):
            theirs_here.wait(_remaining(deadline))
        self._raise_if_broken()
        magic, their_number, their_nbytes, their_crc = theirs.tolist()
        error = None
        if magic != _MAGIC or their_number != number:
            error = f"the two ends are out of step: at tensor {number} here, at {their_number} there"
        elif their_nbytes != sum(sizes):
            nbytes = (sum(sizes), their_nbytes) if sending else (their_nbytes, sum(sizes))
            error = f"the sender's tensor has {nbytes[0]} bytes, the receiver's {nbytes[1]}"
        elif their_crc != ours[3]:
            error = f"the two ends cut {sum(sizes)} bytes into messages of other sizes"
        with self._typed_errors(deadline, "the peer to be ready"):
            # Also before an error, so that the peer learns of the disagreement rather than of a closed connection.
            ours_sent.wait(_remaining(deadline))
        if error:
            raise self._fail(ProtocolError(error))
        self._raise_if_broken()

    def _post(self, tensor: torch.Tensor, sending: bool, tag: int) -> dist.Work:
        group = self._gloo
        if group is None:
            raise PipeClosed("the pipe was closed")
        return group.send([tensor], self._peer, tag) if sending else group.recv([tensor], self._peer, tag)

    @contextlib.contextmanager
    def _typed_errors(self, deadline: float, what: str) -> Iterator[None]:
        """Turns what gloo raises, always a RuntimeError, into the error that the caller can act on."""
        try:
            yield
        except RuntimeError as error:
            self._raise_if_broken()
            if time.monotonic() >= deadline or _says_timeout(error):
                raise self._fail(DeadlineExceeded(f"waited for {what} until the deadline")) from error
            raise self._fail(PeerGone(f"the connection ended while waiting for {what}: {error}")) from error

    def _break(self) -> None:
        group = self._gloo
        if group is None:
            return
        try:
            group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, _BREAK).wait(timedelta(milliseconds=1))
        except RuntimeError as error:
            logger.debug("broke the connection to the peer: %s", error)

    def _release(self, deadline: float) -> None:
        self._gloo = None
        self._staging.clear()

    def _hello(self, deadline: float) -> None:
        """One small message each way, so that a pair that cannot talk fails before it is used.

        Raises:
            DeadlineExceeded, PeerGone: the peer did not answer.
        """
        theirs = torch.zeros(1, dtype=torch.int64)
        with self._typed_errors(deadline, "the peer's first message"):
            sent = self._post(torch.tensor([_MAGIC]), True, _HELLO + self._rank)
            self._post(theirs, False, _HELLO + self._peer).wait(_remaining(deadline))
            sent.wait(_remaining(deadline))
        if theirs.item() != _MAGIC:
            raise self._fail(ProtocolError("the peer's first message is not of this protocol"))


class NcclPipe(TorchPipe):
    """A pair over NCCL with gloo beside it. One operation at a time: a second thread gets `PipeBusy`, whatever it does.

    Operations wait for the work that the calling thread's current stream holds when they start, and are over on the
    host when they return, so any stream may use the tensor afterwards. Fills and drains of a row leave their work on
    that stream, and what they leave is over when the row is.

    A kernel that waits for a dead peer ends when its communicator is aborted. Where the abort itself does not end
    within seconds, that is logged and the tensor is kept alive for ever: do not write to it again. NCCL chooses its own
    network interfaces (`NCCL_SOCKET_IFNAME`); `bind_ip` does not bind those.
    """

    kind = "nccl"

    def __init__(
        self,
        group: dist.ProcessGroupGloo,
        rank: int,
        num_slots: int,
        slot_bytes: int,
        device: torch.device,
        pair_name: str,
    ):
        super().__init__(group, rank, num_slots, slot_bytes)
        self._receiving = self._sending
        self._device = device
        self._name = pair_name
        self._nccl: Any = None
        self._aborter: threading.Thread | None = None
        self._lent: collections.deque[torch.Tensor] = collections.deque()  # NCCL may touch them
        self._watcher = threading.Thread(target=self._watch, name=f"kvsdk-pipe-watch-{pair_name}", daemon=True)

    def _connect_nccl(
        self, store: dist.Store, max_ctas: int, deadline: float, still_wanted: Callable[[], None]
    ) -> None:
        """Makes the communicator, eagerly, and sends one tensor each way.

        Raises:
            DeadlineExceeded, PeerGone: the peer did not take part.
        """
        self._watcher.start()
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _FOREVER  # deadlines are this module's; the watchdog must never find a transfer too slow
        if max_ctas:
            options.config.max_ctas = max_ctas

        def connect() -> None:
            with torch.cuda.device(self._device):
                group = dist.ProcessGroupNCCL(store, self._rank, 2, options)
                # Point-to-point calls then use this communicator rather than one more for the pair of ranks.
                group.eager_connect_single_device(self._device)
            with self._state:
                self._nccl = group
            if self.broken:
                self._abort_nccl()

        def warm_up() -> None:
            with torch.cuda.device(self._device):
                token = torch.zeros(8, dtype=torch.uint8, device=self._device)
            for sender in (_PRODUCER, _CONSUMER):
                self._meet([token.numel()], sender, deadline)
                self._carry(token, sender, deadline)

        def wanted() -> None:
            still_wanted()
            self._raise_if_broken()  # the peer was lost meanwhile

        # Both ends must be at the communicator before either is, since NCCL waits for the other without a deadline,
        # also when the first operation in a direction connects it.
        meet = functools.partial(self._meet, [], _PRODUCER, deadline)
        try:
            _within(deadline, wanted, "the peer's being ready", meet)
            _within(deadline, wanted, "making the NCCL communicator", connect)
            _within(deadline, wanted, "the first tensor over NCCL", warm_up)
        except KVError as error:
            raise self._fail(error) from error

    def _check(self, tensor: torch.Tensor) -> None:
        check_contiguous(tensor)
        if tensor.device != self._device:
            raise ValueError(f"this pipe carries tensors on {self._device}, not on {tensor.device}")

    def _new_slot(self) -> torch.Tensor:
        return torch.empty(self.slot_bytes, dtype=torch.uint8, device=self._device)

    # Of a row all is enqueued without a look at the GPU: that takes the host longer than a message takes to arrive.
    # Fills, drains and NCCL's operations wait for each other on the GPU, by way of the calling thread's stream.

    def _send_row(self, sizes: list[int], fill: Fill, deadline: float) -> None:
        parts, works = self._parts("send", sizes), []
        self._meet(sizes, self._rank, deadline, functools.partial(fill, 0, parts[0]) if parts else None)
        for i, part in enumerate(parts):
            if i >= self.num_slots:
                self._behind(works[i - self.num_slots])  # the message that was in this slot
            if i:
                fill(i, part)
            works.append(self._begin(part, self._rank, deadline))
        self._finish_all(works, deadline)

    def _recv_row(self, sizes: list[int], drain: Drain, deadline: float) -> None:
        self._meet(sizes, self._peer, deadline)
        parts = self._parts("recv", sizes)
        works = [self._begin(part, self._peer, deadline) for part in parts[: self.num_slots]]
        for i, part in enumerate(parts):
            self._behind(works[i])
            wait = drain(i, part)
            if wait is not None:
                wait()
            for following in parts[len(works) : i + 1 + self.num_slots]:
                works.append(self._begin(following, self._peer, deadline))
        self._finish_all(works, deadline)

    def _begin(self, data: torch.Tensor, sender: int, deadline: float) -> Any:
        if not data.numel():
            return None
        self._lent.append(data)
        with self._nccl_errors():
            group = self._nccl
            self._raise_if_broken()
            return (group.send if sender == self._rank else group.recv)([data], self._peer, 0)

    def _behind(self, work: Any) -> None:
        """What is given to the current stream from now on waits for an operation, on the GPU."""
        if work is not None:
            with self._nccl_errors():
                work.wait()  # the host goes on

    def wait_for_stream(self, deadline: float) -> None:
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        self._poll(done.query, deadline, DeadlineExceeded("waited for the peer's half of a row until the deadline"))

    def _finish(self, begun: Any, deadline: float) -> None:
        self._finish_all([begun], deadline)

    def _finish_all(self, works: list[Any], deadline: float) -> None:
        """Waits for operations, and for what the current stream has to do behind them."""
        works = [work for work in works if work is not None]
        if not works:
            return
        try:
            with self._nccl_errors():
                self._behind(works[-1])
                done = torch.cuda.Event()
                done.record(torch.cuda.current_stream(self._device))
                late = DeadlineExceeded("waited for the tensor until the deadline")
                self._poll(works[-1].is_completed, deadline, late)
                # Complete also means failed. The GPU's own word is the event behind the operation.
                failed = PeerGone("NCCL ended the operation without the GPU's having done it")
                self._poll(done.query, time.monotonic() + _EVENT_LIMIT, failed)
        except KVError as error:
            self._fail(error)
        # An aborted kernel ends as if it had done its work, so the pipe's state decides.
        if self.broken:
            self._let_go()
            self._raise_if_broken()
        self._lent.clear()

    @contextlib.contextmanager
    def _nccl_errors(self) -> Iterator[None]:
        """Breaks the pipe where PyTorch's NCCL raises, and raises why it is broken."""
        try:
            yield
        except RuntimeError as error:
            self._fail(PeerGone(f"NCCL failed: {error}"))
            self._let_go()
            self._raise_if_broken()

    def _poll(self, done: Callable[[], bool], limit: float, late: KVError) -> None:
        """Waits for `done`, in sleeps that grow with the wait: short transfers end soon, long ones cost little.

        Raises `late` at the limit, or what broke the pipe meanwhile.
        """
        start = time.monotonic()
        while not done():
            now = time.monotonic()
            self._raise_if_broken()
            if now >= limit:
                raise late
            time.sleep(min(max((now - start) / 32, 20e-6), 1e-3))

    def _watch(self) -> None:
        """Waits on the gloo group for a message that never comes: its end is the peer's, or this pipe's own."""
        try:
            self._post(torch.zeros(1, dtype=torch.uint8), False, _WATCH).wait(_FOREVER)
            ended = PeerGone("the peer sent what no peer sends")
        except (RuntimeError, KVError) as error:
            ended = PeerGone(f"the peer went away: {error}")
        limit = time.monotonic() + _GRACE_AFTER_PEER
        while not self.broken and self._sending.locked() and time.monotonic() < limit:
            time.sleep(_STORE_POLL)
        self._fail(ended)

    def _break(self) -> None:
        super()._break()
        self._abort_nccl()

    def _abort_nccl(self) -> None:
        with self._state:
            if self._nccl is None:
                return
            # In a thread, since an abort can hang, and whoever breaks a pipe must not. The thread also has the last
            # reference: the group's destructor waits for PyTorch's watchdog.
            self._aborter = threading.Thread(
                target=self._run_abort, args=(self._nccl,), name=f"kvsdk-pipe-abort-{self._name}", daemon=True
            )
            self._nccl = None
            self._aborter.start()

    def _run_abort(self, group: Any) -> None:
        try:
            group.abort()
        except Exception:
            logger.exception("aborting NCCL's communicator of pair %s failed", self._name)

    def _let_go(self) -> None:
        """Waits until NCCL no longer touches the tensors that it was given."""
        self._abort_nccl()  # whoever broke the pipe may not have come to that yet
        aborter = self._aborter
        if aborter is not None:
            aborter.join(_ABORT_LIMIT)
            if aborter.is_alive():
                nbytes = sum(data.numel() for data in self._lent)
                logger.error("NCCL's abort of pair %s does not end; %d bytes are given up", self._name, nbytes)
                return
        self._lent.clear()

    def _release(self, deadline: float) -> None:
        super()._release(deadline)
        for thread in (self._watcher, self._aborter):
            if thread is not None and thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._aborter is not None and self._aborter.is_alive():
            logger.error("NCCL's abort of pair %s did not end by the deadline", self._name)


def _connect(
    store: dist.Store,
    rank: int,
    invite: Mapping[str, Any],
    device: torch.device,
    bind_ip: str,
    slots: tuple[int, int],
    deadline: float,
    wanted: Callable[[], None],
) -> Pipe:
    """Makes this end of a pair once both ends are at the store."""
    pair_store = dist.PrefixStore(invite["pair"], store)

    def make_group() -> dist.ProcessGroupGloo:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = min(_remaining(deadline), _RENDEZVOUS_LIMIT)
        options._threads = 1
        # By host name, or gloo would listen on an interface of its own choice.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=bind_ip, lazy_init=False)]
        return dist.ProcessGroupGloo(dist.PrefixStore("gloo", pair_store), rank, 2, options)

    group = _within(deadline, wanted, "connecting to the peer", make_group)
    nccl = invite["kind"] == "nccl"
    pipe = NcclPipe(group, rank, *slots, device, invite["pair"][:8]) if nccl else TorchPipe(group, rank, *slots)
    try:
        _within(deadline, wanted, "the peer's first message", functools.partial(pipe._hello, deadline))
        if isinstance(pipe, NcclPipe):
            pipe._connect_nccl(dist.PrefixStore("nccl", pair_store), invite["max_ctas"], deadline, wanted)
    except BaseException:
        pipe.close(time.monotonic() + _ABORT_LIMIT)
        raise
    return pipe


def _joined_key(pair: str) -> str:
    return f"{pair}/joined"


def _family(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


def _probe(host: str, port: int, deadline: float) -> None:
    """Finds out whether anybody listens: the store's own client retries a refused connection past its timeout."""
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise DeadlineExceeded("the deadline had passed before the call")
    try:
        socket.create_connection((host, port), timeout=remaining).close()
    except TimeoutError as error:
        raise DeadlineExceeded(f"nobody answered at {host}:{port} by the deadline") from error
    except OSError as error:
        raise PeerGone(f"nobody listens at {host}:{port}: {error}") from error


def _says_timeout(error: BaseException) -> bool:
    text = str(error).lower()
    return "timed out" in text or "timeout" in text


def _remaining(deadline: float) -> timedelta:
    """What is left, at least a millisecond: gloo counts in those, and takes 0 for *no limit*."""
    return timedelta(milliseconds=max(1, math.ceil((deadline - time.monotonic()) * 1000)))


def _within(deadline: float, wanted: Callable[[], None], what: str, make: Callable[[], Any]) -> Any:
    """Runs a call of PyTorch's that can outlast its own timeout, and gives up on it at the deadline.

    The thread of a call that was given up on ends when PyTorch's own timeout does; what it made is dropped.

    Args:
        wanted: called again and again meanwhile; what it raises comes out of here.

    Raises:
        DeadlineExceeded: the call had not ended by the deadline.
        PeerGone: the call failed before it.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(make())
        except Exception as error:
            logger.debug("%s failed", what, exc_info=True)
            future.set_exception(error)

    threading.Thread(target=run, name="kvsdk-pipe-connect", daemon=True).start()
    while not wait([future], max(0.0, min(_SLICE, deadline - time.monotonic()))).done:
        wanted()
        if time.monotonic() >= deadline:
            raise DeadlineExceeded(f"{what} had not ended by the deadline")
    try:
        return future.result(0)
    except RuntimeError as error:
        if time.monotonic() < deadline and not _says_timeout(error):
            raise PeerGone(f"{what} failed: {error}") from error
        raise DeadlineExceeded(f"{what} had not ended by the deadline") from error
