"""What every pipe promises, and the part of it that all kinds share."""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch

from kvsdk.errors import DeadlineExceeded, KVError, PeerGone, PipeBusy, PipeClosed, ProtocolError

SLOTS = 3
"""Messages that a pipe's staging memory holds: one is filled or drained, one is on its way, one is ready."""

SLOT_BYTES = 1 << 20
"""Most bytes of a message of a row, unless the pipe is made for longer ones."""

Fill = Callable[[int, torch.Tensor], None]
Drain = Callable[[int, torch.Tensor], Callable[[], None] | None]


class Pipe(ABC):
    """An ordered stream of tensors between exactly two workers.

    Deadlines are absolute, on `time.monotonic()`. Every call ends by its deadline, save for the moment that it takes to
    let go of the connection, in a result or in one of these: `DeadlineExceeded`, also when the deadline had passed
    before the call; `PeerGone`, when the other side closed, aborted or died; `PipeClosed`, when this side did;
    `ProtocolError`, when the two sides disagree over a message. After any of them the pipe is broken and stays broken:
    each later call raises the same type again. `PipeBusy` (two threads in one direction) and `ValueError` (a tensor
    that cannot travel) leave the pipe as it was.

    One thread may send while another receives, unless the kind says otherwise.

    Rows travel through the pipe's own staging memory, which it allocates for a direction with the first row there and
    keeps until it is closed: where two workers share memory, what one fills is what the other drains.

    Args:
        num_slots: how many messages the staging memory of a direction holds. Two or more let filling and sending, or
            receiving and draining, overlap.
        slot_bytes: the longest message of a row.
    """

    def __init__(self, num_slots: int = SLOTS, slot_bytes: int = SLOT_BYTES) -> None:
        if num_slots < 1 or slot_bytes < 1:
            raise ValueError(f"{num_slots} slots of {slot_bytes} bytes hold no message")
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        self._staging: dict[str, list[torch.Tensor]] = {}
        self._state = threading.Lock()
        self._failure: KVError | None = None
        self._sending = threading.Lock()
        self._receiving = threading.Lock()

    @property
    @abstractmethod
    def kind(self) -> str:
        """`in-process`, `shm`, `gloo` or `nccl`."""

    @property
    def broken(self) -> bool:
        """Whether later calls can only fail. False is a snapshot: the peer may die the next moment."""
        return self._failure is not None

    def send(self, tensor: torch.Tensor, deadline: float) -> None:
        """Sends a tensor's bytes; returns when the tensor may be written again.

        Args:
            tensor: contiguous, of any dtype, on the pipe's device.
            deadline: absolute, in seconds of `time.monotonic()`.

        Raises:
            DeadlineExceeded, PeerGone, PipeClosed, ProtocolError, PipeBusy, ValueError: see the class.
        """
        self._check(tensor)
        with self._direction(self._sending, "send"):
            self._enter(deadline)
            self._send(_as_bytes(tensor), deadline)

    def recv(self, tensor: torch.Tensor, deadline: float) -> None:
        """Fills a tensor with what the peer sends next.

        After an error the tensor's contents are unknown.

        Args:
            tensor: contiguous, uint8, on the pipe's device, of exactly as many bytes as the peer sends.
            deadline: absolute, in seconds of `time.monotonic()`.

        Raises:
            DeadlineExceeded, PeerGone, PipeClosed, ProtocolError, PipeBusy, ValueError: see the class.
        """
        self._check(tensor)
        if tensor.dtype != torch.uint8:
            raise ValueError(f"a tensor to receive into must be uint8, not {tensor.dtype}")
        with self._direction(self._receiving, "recv"):
            self._enter(deadline)
            self._recv(_as_bytes(tensor), deadline)

    def send_row(self, sizes: Sequence[int], fill: Fill, deadline: float) -> None:
        """Sends a row of messages, filling the next ones while one is on its way; the peer takes it by `recv_row`.

        Args:
            sizes: bytes of each message, `slot_bytes` at most.
            fill: called in order, with a message's index and where its bytes go: a 1-D uint8 tensor on the pipe's
                device, to be used during the call alone. On CUDA it may leave its work on the current stream. What it
                raises breaks the pipe and comes out of here.
            deadline: absolute, in seconds of `time.monotonic()`.

        Raises:
            DeadlineExceeded, PeerGone, PipeClosed, ProtocolError, PipeBusy, ValueError: see the class.
        """

        def guarded(i: int, part: torch.Tensor) -> None:
            with self._or_given_up("send_row"):
                fill(i, part)

        self._check_sizes(sizes)
        with self._direction(self._sending, "send_row"):
            self._enter(deadline)
            self._send_row(list(sizes), guarded, deadline)

    def recv_row(self, sizes: Sequence[int], drain: Drain, deadline: float) -> None:
        """Receives a row of messages, the next ones while one is drained.

        Args:
            sizes: bytes of each message, the same as the sender's.
            drain: called in order, with a message's index and a 1-D uint8 tensor that holds it. The memory is used
                again when `drain` returns; or, where it returns a callable, when that returns, which is called from
                this thread after `drain` of the next message, and waits for what `drain` left to others. So a message
                may be drained in a thread while the next one comes. On CUDA it may leave its work on the current
                stream: that is over when the row is, or when an error was raised and the stream has been waited for.
                What either raises breaks the pipe and comes out of here, and others may be left at work then.
            deadline: absolute, in seconds of `time.monotonic()`.

        Raises:
            DeadlineExceeded, PeerGone, PipeClosed, ProtocolError, PipeBusy, ValueError: see the class.
        """

        def guarded(i: int, part: torch.Tensor) -> Callable[[], None] | None:
            with self._or_given_up("recv_row"):
                wait = drain(i, part)
            return None if wait is None else functools.partial(waited, wait)

        def waited(wait: Callable[[], None]) -> None:
            with self._or_given_up("recv_row"):
                wait()

        self._check_sizes(sizes)
        with self._direction(self._receiving, "recv_row"):
            self._enter(deadline)
            self._recv_row(list(sizes), guarded, deadline)

    def _check_sizes(self, sizes: Sequence[int]) -> None:
        if any(not 0 <= size <= self.slot_bytes for size in sizes):
            raise ValueError(f"messages of {list(sizes)} bytes do not fit slots of {self.slot_bytes}")

    @contextlib.contextmanager
    def _or_given_up(self, name: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._fail(PipeClosed(f"{name} was given up: {type(error).__name__}: {error}"))
            raise

    def _send_row(self, sizes: list[int], fill: Fill, deadline: float) -> None:
        for i, part in enumerate(self._parts("send", sizes)):
            fill(i, part)
            self._send(part, deadline)

    def _recv_row(self, sizes: list[int], drain: Drain, deadline: float) -> None:
        draining = Draining(drain, self.num_slots)
        for i, part in enumerate(self._parts("recv", sizes)):
            self._recv(part, deadline)
            draining.start(i, part)
        draining.finish()

    def _parts(self, way: str, sizes: list[int]) -> list[torch.Tensor]:
        """Where each message of a row lies in the staging memory of a direction."""
        if way not in self._staging:
            with torch.inference_mode(False):
                self._staging[way] = [self._new_slot() for _ in range(self.num_slots)]
        slots = self._staging[way]
        return [slots[i % len(slots)][:size] for i, size in enumerate(sizes)]

    def _new_slot(self) -> torch.Tensor:
        return torch.empty(self.slot_bytes, dtype=torch.uint8)

    def wait_for_stream(self, deadline: float) -> None:
        """Waits, within a fill or a drain, until the current stream has done what it was given: the pipe's operations,
        too, which a peer that stands still does not end. Nothing on CPUs, where fills and drains leave nothing.

        Args:
            deadline: absolute, in seconds of `time.monotonic()`.

        Raises:
            DeadlineExceeded, PeerGone, PipeClosed, ProtocolError: see the class.
        """
        return

    def abort(self) -> None:
        """Breaks the pipe at once, from any thread: calls that run here raise `PipeClosed`, the peer's `PeerGone`."""
        self._fail(PipeClosed("the pipe was aborted"))

    @abstractmethod
    def close(self, deadline: float) -> None:
        """Aborts what runs and gives everything back that the pipe holds; by the deadline, and twice is fine."""

    @abstractmethod
    def _send(self, data: torch.Tensor, deadline: float) -> None: ...

    @abstractmethod
    def _recv(self, data: torch.Tensor, deadline: float) -> None: ...

    @abstractmethod
    def _check(self, tensor: torch.Tensor) -> None:
        """Raises ValueError if the tensor cannot travel here."""

    @abstractmethod
    def _break(self) -> None:
        """Wakes whatever waits on the connection, on both sides. Called once, by whoever broke the pipe first."""

    def _enter(self, deadline: float) -> None:
        self._raise_if_broken()
        if time.monotonic() >= deadline:
            raise self._fail(DeadlineExceeded("the deadline had passed before the call"))

    def _raise_if_broken(self) -> None:
        if self._failure is not None:
            raise _again(self._failure)

    def _fail(self, error: KVError) -> KVError:
        """Breaks the pipe with `error` unless it is broken already; returns what the caller should raise."""
        with self._state:
            first = self._failure is None
            if first:
                self._failure = error
        if first:
            self._break()
            return error
        return _again(self._failure)

    @contextlib.contextmanager
    def _direction(self, lock: threading.Lock, name: str) -> Iterator[None]:
        if not lock.acquire(blocking=False):
            raise PipeBusy(f"another thread is in {name} of this pipe")
        try:
            yield
        finally:
            lock.release()

    def _wait_idle(self, deadline: float) -> bool:
        """Waits until no call is inside the pipe; false if one still is at the deadline."""
        idle = True
        for lock in {id(lock): lock for lock in (self._sending, self._receiving)}.values():
            if lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                lock.release()
            else:
                idle = False
        return idle


class Draining:
    """Messages of a row that are being drained: one may be while the next one comes, if there is a slot for that."""

    def __init__(self, drain: Drain, num_slots: int):
        self._drain, self._at_once = drain, min(num_slots - 1, 1)
        self._running: collections.deque[Callable[[], None] | None] = collections.deque()

    def start(self, i: int, part: torch.Tensor) -> int:
        """Drains message i; returns how many slots are free again, the oldest first."""
        self._running.append(self._drain(i, part))
        return self._end(self._at_once)

    def finish(self) -> int:
        """Waits for the rest; returns as `start`."""
        return self._end(0)

    def _end(self, at_most: int) -> int:
        before = len(self._running)
        while self._running and (len(self._running) > at_most or self._running[0] is None):
            wait = self._running.popleft()
            if wait is not None:
                wait()
        return before - len(self._running)


def check_contiguous(tensor: torch.Tensor) -> None:
    """Raises ValueError unless the tensor's bytes are one run of memory."""
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor must be contiguous to travel: {tuple(tensor.shape)}, strides {tensor.stride()}")


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _again(failure: KVError) -> KVError:
    """A new error of the same type: one exception object must not gather the tracebacks of several threads."""
    kinds = (DeadlineExceeded, PeerGone, PipeClosed, ProtocolError)
    kind = next(kind for kind in kinds if isinstance(failure, kind))
    error = kind(f"the pipe is broken: {failure}")
    error.__cause__ = failure
    return error
