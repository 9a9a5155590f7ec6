"""Pipes between two threads of one process, for tests of everything that stands on a pipe."""

from __future__ import annotations

import threading
import time
from collections import deque

import torch

from kvsdk.errors import DeadlineExceeded, PeerGone, PipeClosed, ProtocolError
from kvsdk.pipe.base import Pipe, check_contiguous


def in_process_pair(capacity: int = 1) -> tuple[Pipe, Pipe]:
    """Two connected ends with a buffer of `capacity` tensors in each direction.

    `send` copies and returns while the buffer has room. What was sent before a `close` can still be received; `abort`
    drops it.

    Raises:
        ValueError: `capacity` is not positive.
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, not {capacity}")
    return _connect(capacity)


def lockstep_pair() -> tuple[Pipe, Pipe]:
    """Two connected ends with no buffer at all: `send` returns only once the peer has received.

    What relies on buffering hangs over this pair, and so fails its test.
    """
    return _connect(0)


def _connect(capacity: int) -> tuple[Pipe, Pipe]:
    changed = threading.Condition()
    there, back = _Channel(capacity, changed), _Channel(capacity, changed)
    a, b = InProcessPipe(there, back), InProcessPipe(back, there)
    a._peer, b._peer = b, a
    return a, b


class _Channel:
    """One direction; `changed` guards it and is notified of every change."""

    def __init__(self, capacity: int, changed: threading.Condition):
        self.capacity = capacity
        self.changed = changed
        self.queue: deque[torch.Tensor] = deque()
        self.received = 0


class InProcessPipe(Pipe):
    """One end of `in_process_pair` or `lockstep_pair`. One thread may send while another receives."""

    kind = "in-process"

    def __init__(self, outgoing: _Channel, incoming: _Channel):
        super().__init__()
        self._outgoing, self._incoming = outgoing, incoming
        self._changed = outgoing.changed
        self._peer: InProcessPipe
        self._closed = False
        self._sent = 0

    def close(self, deadline: float) -> None:
        with self._changed:
            # What an aborted pipe had sent is dropped, also when it is closed later.
            self._closed = self._closed or not self.broken
        self._fail(PipeClosed("the pipe was closed"))
        self._wait_idle(deadline)

    def _check(self, tensor: torch.Tensor) -> None:
        check_contiguous(tensor)

    def _break(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _send(self, data: torch.Tensor, deadline: float) -> None:
        channel = self._outgoing
        with self._changed:
            if channel.capacity:
                self._wait(lambda: len(channel.queue) < channel.capacity, deadline)
                channel.queue.append(data.clone())
                self._changed.notify_all()
                return
            self._wait(lambda: True, deadline)
            channel.queue.append(data)
            self._sent += 1
            self._changed.notify_all()
            try:
                self._wait(lambda: channel.received >= self._sent, deadline)
            finally:
                # The caller owns the tensor again, so a peer must not find it any more.
                if channel.received < self._sent:
                    channel.queue.clear()

    def _recv(self, data: torch.Tensor, deadline: float) -> None:
        channel = self._incoming
        with self._changed:
            self._wait(lambda: bool(channel.queue), deadline, drain=True)
            sent = channel.queue.popleft()
            if sent.numel() == data.numel():
                data.copy_(sent)
                channel.received += 1
                self._changed.notify_all()
                return
        error = f"the peer sent {sent.numel()} bytes where {data.numel()} were expected"
        self._peer._fail(ProtocolError(error))
        raise self._fail(ProtocolError(error))

    def _wait(self, ready, deadline: float, drain: bool = False) -> None:
        """Waits for `ready` or the first error; with `drain`, what a closed peer had sent comes before its end."""
        while True:
            self._raise_if_broken()
            peer = self._peer._failure
            if ready() and (peer is None or (drain and self._peer._closed)):
                return
            if peer is not None:
                raise self._fail(PeerGone(f"the other end is broken: {peer}"))
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise self._fail(DeadlineExceeded("the peer was not ready by the deadline"))
            self._changed.wait(remaining)
