"""What every pipe promises, and the part of it that all kinds share."""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch

from kvsdk.errors import DeadlineExceeded, KVError, PeerGone, PipeBusy, PipeClosed, ProtocolError


class Pipe(ABC):
    """An ordered stream of tensors between exactly two workers.

    Deadlines are absolute, on `time.monotonic()`. Every call ends by its deadline, save for the moment that it takes to
    let go of the connection, in a result or in one of these: `DeadlineExceeded`, also when the deadline had passed
    before the call; `PeerGone`, when the other side closed, aborted or died; `PipeClosed`, when this side did;
    `ProtocolError`, when the two sides disagree over a message. After any of them the pipe is broken and stays broken:
    each later call raises the same type again. `PipeBusy` (two threads in one direction) and `ValueError` (a tensor
    that cannot travel) leave the pipe as it was.

    One thread may send while another receives, unless the kind says otherwise.
    """

    def __init__(self) -> None:
        self._state = threading.Lock()
        self._failure: KVError | None = None
        self._sending = threading.Lock()
        self._receiving = threading.Lock()

    @property
    @abstractmethod
    def kind(self) -> str:
        """`in-process`, `gloo` or `nccl`."""

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

    def send_row(
        self,
        sizes: Sequence[int],
        slots: Sequence[torch.Tensor],
        fill: Callable[[int, torch.Tensor], None],
        deadline: float,
    ) -> None:
        """Sends a row of messages, filling the next ones while one is on its way; the peer takes it by `recv_row`.

        Args:
            sizes: bytes of each message.
            slots: message i travels in the front of `slots[i % len(slots)]`: contiguous, uint8, on the pipe's device,
                large enough. Two or more let filling and sending overlap.
            fill: called in order, with a message's index and its part of a slot, once the slot may be written. On CUDA
                it may leave its work on the current stream. What it raises breaks the pipe and comes out of here.
            deadline: absolute, in seconds of `time.monotonic()`.

        Raises:
            DeadlineExceeded, PeerGone, PipeClosed, ProtocolError, PipeBusy, ValueError: see the class.
        """
        self._row(self._sending, "send_row", self._send_row, sizes, slots, fill, deadline)

    def recv_row(
        self,
        sizes: Sequence[int],
        slots: Sequence[torch.Tensor],
        drain: Callable[[int, torch.Tensor], None],
        deadline: float,
    ) -> None:
        """Receives a row of messages, the next ones while one is drained.

        Args:
            sizes: bytes of each message, the same as the sender's.
            slots: see `send_row`; the two sides may have different numbers of them.
            drain: called in order, with a message's index and the part of a slot that holds it. The slot is used again
                when it returns, so on CUDA it waits for what it left on the current stream. What it raises breaks the
                pipe and comes out of here.
            deadline: absolute, in seconds of `time.monotonic()`.

        Raises:
            DeadlineExceeded, PeerGone, PipeClosed, ProtocolError, PipeBusy, ValueError: see the class.
        """
        self._row(self._receiving, "recv_row", self._recv_row, sizes, slots, drain, deadline)

    def _row(
        self,
        lock: threading.Lock,
        name: str,
        carry: Callable[..., None],
        sizes: Sequence[int],
        slots: Sequence[torch.Tensor],
        work: Callable[[int, torch.Tensor], None],
        deadline: float,
    ) -> None:
        for slot in slots:
            self._check(slot)
            if slot.dtype != torch.uint8 or slot.dim() != 1:
                raise ValueError(f"a slot must be 1-D and uint8, not {slot.dtype} of shape {tuple(slot.shape)}")
        room = [slot.numel() for slot in slots] or [-1]
        if any(not 0 <= size <= room[i % len(room)] for i, size in enumerate(sizes)):
            raise ValueError(f"messages of {list(sizes)} bytes do not fit slots of {[slot.numel() for slot in slots]}")
        parts = [slots[i % len(slots)][:size] for i, size in enumerate(sizes)]

        def guarded(i: int) -> None:
            try:
                work(i, parts[i])
            except BaseException as error:
                self._fail(PipeClosed(f"{name} was given up: {type(error).__name__}: {error}"))
                raise

        with self._direction(lock, name):
            self._enter(deadline)
            carry(parts, len(slots), guarded, deadline)

    def _send_row(
        self, parts: Sequence[torch.Tensor], num_slots: int, fill: Callable[[int], None], deadline: float
    ) -> None:
        for i, part in enumerate(parts):
            fill(i)
            self._send(part, deadline)

    def _recv_row(
        self, parts: Sequence[torch.Tensor], num_slots: int, drain: Callable[[int], None], deadline: float
    ) -> None:
        for i, part in enumerate(parts):
            self._recv(part, deadline)
            drain(i)

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
