"""A pair's control channel: one ZMQ socket on each side, used by one thread, with deadlines and word of a lost peer."""

from __future__ import annotations

import collections
import ctypes
import functools
import os
import select
import threading
import time
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from kvsdk.connectors.pynccl.protocol import WORKER_WIRE
from kvsdk.errors import DeadlineExceeded, PeerGone, PipeClosed, ProtocolError


@functools.cache
def zmq_context() -> zmq.Context[Any]:
    """One for the process, never terminated: that would wait for every socket of every thread."""
    return zmq.Context()


@functools.cache
def _libc() -> ctypes.PyDLL:
    library = ctypes.PyDLL(None, use_errno=True)
    library.eventfd_write.argtypes = [ctypes.c_int, ctypes.c_uint64]
    return library


class Bell:
    """Wakes the one thread that waits for it, or for a `Channel` that has it; rung from any thread.

    Whoever is woken looks for what there is to do: rings that come before the look count once.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def ring(self) -> None:
        """Nothing once it is closed. Keeps Python's interpreter lock, unlike `os.eventfd_write`: the thread that runs
        the model would have to win it back."""
        with self._lock:
            if self._fd >= 0 and _libc().eventfd_write(self._fd, 1) != 0:
                raise OSError(ctypes.get_errno(), "a bell cannot be rung")

    def wait(self, timeout: float) -> None:
        """Until it rings, at most `timeout` seconds."""
        self._poll.poll(max(0, int(timeout * 1000)))
        self.heed()

    def heed(self) -> None:
        """Forget its rings."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()


class Channel:
    """Messages of `WORKER_WIRE` between two threads of two processes.

    Args:
        address: `host:port` to connect to; or `None` to bind.
        bind_ip: where to listen, on an ephemeral port, when there is no address.
        heartbeat: seconds between libzmq's own pings; a peer that answers none for three times as long is gone. It
            covers a host that vanishes and closes nothing.
        bell: ends a `poll` early. The channel does not own it.
    """

    def __init__(
        self, *, address: str | None = None, bind_ip: str = "", heartbeat: float = 5.0, bell: Bell | None = None
    ):
        self._socket = zmq_context().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, int(1000 * heartbeat))
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(3000 * heartbeat))
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, WORKER_WIRE.max_bytes)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        try:
            if address is None:
                port = self._socket.bind_to_random_port(f"tcp://{bind_ip}")
                self.address = f"{bind_ip}:{port}"
                self._peer = "the peer"
            else:
                self._socket.connect(f"tcp://{address}")
                self.address = self._peer = address
        except zmq.ZMQError:
            self._close_sockets()
            raise
        # Not a zmq.Poller, which takes longer than the rest of a short wait.
        self._poll = select.poll()
        self._bell, self._bell_fd = bell, bell.fileno() if bell is not None else -1
        for fd in (self._socket.fileno(), self._monitor.fileno(), *([bell] if bell is not None else [])):
            self._poll.register(fd, select.POLLIN)
        self._gone = False
        self._closed = False
        self._kept: collections.deque[tuple[str, dict[str, Any]]] = collections.deque()

    def send(self, kind: str, **fields: Any) -> None:
        """Raises PipeClosed after `close`, PeerGone when the peer takes nothing any more."""
        self._check()
        try:
            self._socket.send(WORKER_WIRE.encode(kind, **fields), zmq.NOBLOCK)
        except zmq.Again as error:
            raise PeerGone(f"{self._peer} takes no more messages") from error

    def offer(self, kind: str, **fields: Any) -> bool:
        """Send what the peer can do without. False if there is no room for it; raises PipeClosed after `close`."""
        try:
            self.send(kind, **fields)
        except PeerGone:
            return False
        return True

    def poll(self, timeout: float) -> bool:
        """Whether a message is there, after at most `timeout` seconds, or when the bell rings. Raises PeerGone once the
        peer is and all it sent was read.
        """
        self._check()
        return bool(self._kept) or self._poll_socket(timeout)

    def _poll_socket(self, timeout: float) -> bool:
        """Whether the socket has a message; the rest as `poll`."""
        until = time.monotonic() + timeout
        while True:
            # The descriptors say that there may be something; whether there is, only this does.
            if self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                return True
            if self._monitor.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                recv_monitor_message(self._monitor)
                self._gone = True
                continue
            if self._gone:
                raise PeerGone(f"{self._peer} closed the connection")
            left = until - time.monotonic()
            if left <= 0:
                return False
            for fd, _ in self._poll.poll(1000 * left):
                if fd == self._bell_fd:
                    self._bell.heed()
                    return False

    def recv(self, deadline: float, stop: threading.Event | None = None) -> tuple[str, dict[str, Any]]:
        """The next message.

        Raises:
            PipeClosed: `stop` was set before it came.
            DeadlineExceeded: none came in time.
            PeerGone: the peer is gone.
            ProtocolError: it was not a message of this protocol.
        """
        while not self.poll(min(1.0, deadline - time.monotonic())):
            if stop is not None and stop.is_set():
                raise PipeClosed("this side closes")
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"no word from {self._peer}")
        return self._kept.popleft() if self._kept else self._take()

    def _take(self) -> tuple[str, dict[str, Any]]:
        """The message that the socket has."""
        return WORKER_WIRE.decode(self._socket.recv(zmq.NOBLOCK))

    def check_wanted(self, stop: threading.Event | None = None) -> None:
        """See whether both sides still want the pair, in the middle of something else. Never waits; what else the peer
        says is for `recv`.

        Raises:
            PipeClosed: `stop` is set.
            PeerGone: the peer is gone, or has said `bye`.
            ProtocolError: it says what is no message of this protocol, or too much.
        """
        self._check()
        if stop is not None and stop.is_set():
            raise PipeClosed("this side closes")
        while self._poll_socket(0):
            message = self._take()
            if message[0] == "bye":
                raise PeerGone(f"{self._peer} gave the pair up")
            if len(self._kept) == 4:
                raise ProtocolError(f"{self._peer} sent {message[0]} out of turn")
            self._kept.append(message)

    def _check(self) -> None:
        if self._closed:
            raise PipeClosed("the control channel is closed")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
