"""A pair's control channel: one ZMQ socket on each side, used by one thread, with deadlines and word of a lost peer."""

from __future__ import annotations

import functools
import time
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from kvsdk.connectors.pynccl.protocol import WORKER_WIRE
from kvsdk.errors import DeadlineExceeded, PeerGone, PipeClosed


@functools.cache
def zmq_context() -> zmq.Context[Any]:
    """One for the process, never terminated: that would wait for every socket of every thread."""
    return zmq.Context()


class Channel:
    """Messages of `WORKER_WIRE` between two threads of two processes.

    Args:
        address: `host:port` to connect to; or `None` to bind.
        bind_ip: where to listen, on an ephemeral port, when there is no address.
        heartbeat: seconds between libzmq's own pings; a peer that answers none for three times as long is gone. It
            covers a host that vanishes and closes nothing.
    """

    def __init__(self, *, address: str | None = None, bind_ip: str = "", heartbeat: float = 5.0):
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
            else:
                self._socket.connect(f"tcp://{address}")
                self.address = address
        except zmq.ZMQError:
            self._close_sockets()
            raise
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._gone = False
        self._closed = False

    def send(self, kind: str, **fields: Any) -> None:
        """Raises PipeClosed after `close`, PeerGone when the peer takes nothing any more."""
        self._check()
        try:
            self._socket.send(WORKER_WIRE.encode(kind, **fields), zmq.NOBLOCK)
        except zmq.Again as error:
            raise PeerGone(f"{self.address} takes no more messages") from error

    def poll(self, timeout: float) -> bool:
        """Whether a message is there, after at most `timeout` seconds. Raises PeerGone once the peer is and all it sent
        was read.
        """
        self._check()
        ready = dict(self._poller.poll(max(0, int(timeout * 1000))))
        if self._socket in ready:
            return True
        if self._monitor in ready:
            recv_monitor_message(self._monitor)
            self._gone = True
        if self._gone:
            if self._socket.poll(0):
                return True
            raise PeerGone(f"{self.address} closed the connection")
        return False

    def recv(self, deadline: float) -> tuple[str, dict[str, Any]]:
        """The next message.

        Raises:
            DeadlineExceeded: none came in time.
            PeerGone: the peer is gone.
            ProtocolError: it was not a message of this protocol.
        """
        while not self.poll(min(1.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"no word from {self.address}")
        return WORKER_WIRE.decode(self._socket.recv())

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
