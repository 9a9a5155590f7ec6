"""What every pipe promises, and the part of it that all kinds share."""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

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
