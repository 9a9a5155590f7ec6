"""A client of LMCache's `lm://` server: a deadline on every socket operation, reconnection, and a state
that says whether the server answers, so that one which does not is waited for once and not with every request.

A `Connection` belongs to one thread. A `Pool` has a few threads with a connection each, which carry out jobs; so there
is one request in flight a connection. A `Server` watches: it asks for the server's health now and then.
"""

from __future__ import annotations

import logging
import queue
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from kvsdk.config import format_address
from kvsdk.connectors.lmcache.lm_protocol import REPLY_BYTES, Command, decode_reply, encode_request
from kvsdk.errors import DeadlineExceeded, KVError, PeerGone, PipeClosed, ProtocolError

logger = logging.getLogger("kvsdk.lmcache")

HEARTBEAT = 2.0
"""Seconds between two questions for the server's health while it answers."""

RETRY, MAX_RETRY = 0.25, 3.0
"""Seconds between two attempts while it does not; they double up to the second figure."""

PIECE_BYTES = 8 * 2**20
"""Received at a time: a time-out that comes after some of it is told from one without a byte."""

HEALTH_KEY = "kvsdk@1@0@0@uint8"
"""The server parses a key even where none is asked for."""


class Connection:
    """One TCP connection to the server, with one request at a time. Of one thread, but for `abort`.

    After any error but `ProtocolError` from an argument, replies may be out of step: close it.

    Args:
        timeout: seconds without a byte in either direction after which the server counts as stalled.

    Raises:
        DeadlineExceeded: nobody answered within `timeout`.
        PeerGone: nobody listens there.
    """

    def __init__(self, host: str, port: int, timeout: float):
        self.address, self._timeout = format_address(host, port), timeout
        try:
            self._socket = socket.create_connection((host, port), timeout)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.address} took no connection within {timeout:.3g} s") from error
        except OSError as error:
            raise PeerGone(f"nobody answers on {self.address} ({error.strerror or error})") from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel keeps the time. With Python's own time-outs an operation polls first and ends with each segment,
        # which takes the interpreter's lock hundreds of times a chunk from the threads that do other work.
        self._socket.settimeout(None)

    def exists(self, key: str, deadline: float) -> bool:
        """Whether the server has something under `key`."""
        self._send([encode_request(Command.EXIST, key)], deadline)
        return self._reply(deadline) is not None

    def health(self, deadline: float) -> None:
        """Returns once the server has answered."""
        self._send([encode_request(Command.HEALTH, HEALTH_KEY)], deadline)
        if self._reply(deadline) is None:
            raise ProtocolError(f"{self.address} says that it is not well")

    def get(self, key: str, into: Sequence[memoryview], deadline: float) -> bool:
        """Fill buffers with what is under `key`; false when there is nothing.

        Args:
            into: writable bytes; together as long as what was stored.

        Raises:
            ProtocolError: what is there has another length or kind.
        """
        self._send([encode_request(Command.GET, key)], deadline)
        length = self._reply(deadline)
        if length is None:
            return False
        wanted = sum(map(len, into))
        if length != wanted:
            raise ProtocolError(f"{self.address} has {length} bytes under {key}, not {wanted}")
        for buffer in into:
            self._receive(buffer, deadline)
        return True

    def put(self, key: str, buffers: Sequence[memoryview], deadline: float) -> bool:
        """Store bytes under `key`, in place of what is there.

        A PUT has no reply. The server reads the next request of a connection when it is done with the one before, so
        an EXIST behind it answers for it.

        Returns:
            Whether the server has kept it.
        """
        length = sum(map(len, buffers))
        confirm = encode_request(Command.EXIST, key)
        self._send([encode_request(Command.PUT, key, length), *buffers, confirm], deadline)
        return self._reply(deadline) is not None

    def put_unconfirmed(self, items: Sequence[tuple[str, bytes]], deadline: float) -> None:
        """Store small values under their keys, all in one go, without asking whether the server keeps them."""
        parts = [part for key, value in items for part in (encode_request(Command.PUT, key, len(value)), value)]
        self._send([b"".join(parts)], deadline)

    def _reply(self, deadline: float) -> int | None:
        data = bytearray(REPLY_BYTES)
        self._receive(memoryview(data), deadline)
        return decode_reply(data)

    def _send(self, buffers: Sequence[bytes | memoryview], deadline: float) -> None:
        rest = [memoryview(buffer) for buffer in buffers]
        try:
            while rest:
                self._set_timeout(socket.SO_SNDTIMEO, deadline)
                sent = self._socket.sendmsg(rest)
                while rest and sent >= len(rest[0]):
                    sent -= len(rest.pop(0))
                if sent:
                    rest[0] = rest[0][sent:]
        except OSError as error:
            raise self._error(error) from error

    def _receive(self, buffer: memoryview, deadline: float) -> None:
        try:
            while buffer:
                self._set_timeout(socket.SO_RCVTIMEO, deadline)
                received = self._socket.recv_into(buffer[:PIECE_BYTES], 0, socket.MSG_WAITALL)
                if not received:
                    raise PeerGone(f"{self.address} closed the connection")
                buffer = buffer[received:]
        except OSError as error:
            raise self._error(error) from error

    def _set_timeout(self, option: int, deadline: float) -> None:
        """Have the next operation in one direction fail when not a byte has moved for the time-out."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded(f"{self.address} was not done in time")
        microseconds = max(1, int(1e6 * min(self._timeout, remaining)))
        self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", *divmod(microseconds, 1_000_000)))

    def _error(self, error: OSError) -> KVError:
        if isinstance(error, KVError):
            return error
        if isinstance(error, (BlockingIOError, TimeoutError)):
            return DeadlineExceeded(f"no byte from {self.address} within {self._timeout:.3g} s")
        return PeerGone(f"the connection to {self.address} is lost ({error.strerror or error})")

    def abort(self) -> None:
        """Make what waits in another thread raise."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            logger.debug("%s: %s", self.address, error)

    def close(self) -> None:
        self._socket.close()


class Server:
    """What is known of the server: whether it answers, and whether it may have lost what it had.

    Args:
        timeout: seconds without a byte after which it counts as stalled.
        on_state: called with `up` after each change, from any thread.
    """

    def __init__(self, host: str, port: int, *, timeout: float, on_state: Callable[[bool], None] = lambda up: None):
        self.host, self.port, self.timeout = host, port, timeout
        self.address = format_address(host, port)
        self._on_state = on_state
        self._lock = threading.Lock()
        self._up: bool | None = None
        self._losses = 0
        self._stop = threading.Event()
        self._look = threading.Event()
        self._known = threading.Event()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._watch, name="kvsdk-lmcache-watch", daemon=True)
        self._thread.start()

    @property
    def up(self) -> bool:
        """Whether it answered when it was last asked. What is asked of a server that is down fails at once."""
        return bool(self._up)

    @property
    def losses(self) -> int:
        """Connections lost so far. After each one the server may be another, without what the last one held."""
        return self._losses

    def connect(self) -> Connection:
        """Raises DeadlineExceeded or PeerGone, and is down then."""
        if not self.up:
            raise PeerGone(f"the LMCache server at {self.address} is down")
        try:
            return Connection(self.host, self.port, self.timeout)
        except (DeadlineExceeded, PeerGone) as error:
            self.down(error)
            raise

    def lost(self) -> None:
        """A connection was lost."""
        with self._lock:
            self._losses += 1

    def down(self, reason: Exception) -> None:
        """It does not answer: ask it no more until a probe in the background succeeds."""
        self._set(False, reason)
        self._look.set()

    def wait_known(self, timeout: float) -> bool:
        """Wait until it has been asked once; whether it is up."""
        self._known.wait(timeout)
        return self.up

    def _set(self, up: bool, reason: Exception | None = None) -> None:
        with self._lock:
            changed, self._up = self._up is not up, up
            if changed and not up:
                self._losses += 1
        if not changed:
            return
        if up:
            logger.info("the LMCache server at %s is up", self.address)
        elif not self._stop.is_set():
            logger.warning("the LMCache server at %s is down: %s; prompts are computed here", self.address, reason)
        self._on_state(up)

    def _watch(self) -> None:
        pause = RETRY
        try:
            while not self._stop.is_set():
                self._look.clear()
                self._ask()
                self._known.set()
                self._look.wait(HEARTBEAT if self.up else pause)
                pause = RETRY if self.up else min(2 * pause, MAX_RETRY)
        except Exception as error:
            logger.exception("the thread that watches %s failed", self.address)
            self._set(False, error)
        finally:
            self._disconnect()

    def _ask(self) -> None:
        """Ask for its health; over a new connection where there is none or where it is lost."""
        while True:
            fresh = self._connection is None
            try:
                if self._connection is None:
                    self._connection = Connection(self.host, self.port, self.timeout)
                self._connection.health(time.monotonic() + self.timeout)
            except KVError as error:
                self._disconnect()
                self.lost()
                if isinstance(error, PeerGone) and not fresh and not self._stop.is_set():
                    continue
                self._set(False, error)
            else:
                self._set(True)
            return

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def close(self, deadline: float) -> None:
        """Stop the thread; bounded by `deadline`, twice is fine."""
        self._stop.set()
        self._look.set()
        connection = self._connection
        if connection is not None:
            connection.abort()
        self._thread.join(max(0.0, deadline - time.monotonic()))


class Job(ABC):
    """Something to be done over a connection: `run` returns, or `fail` is called."""

    @abstractmethod
    def run(self, connection: Connection) -> None:
        """Do it. May be called a second time, over a new connection, after the first one was lost."""

    @abstractmethod
    def fail(self, error: Exception) -> None:
        """It will not be done."""


class Pool:
    """Threads with a connection each, which carry out jobs in order.

    Args:
        connections: how many, which is how many requests are in flight.
    """

    def __init__(self, server: Server, name: str, connections: int):
        self._server, self._name = server, name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._threads = [
            threading.Thread(target=self._run, name=f"kvsdk-lmcache-{name}-{i}", daemon=True)
            for i in range(connections)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; never waits, and never raises: a pool that is closed fails it."""
        with self._lock:
            if not self._stop.is_set():
                self._jobs.put(job)
                return
        job.fail(PipeClosed(f"the LMCache client's {self._name} threads are closed"))

    def _run(self) -> None:
        connection: Connection | None = None
        try:
            while (job := self._jobs.get()) is not None:
                connection = self._carry_out(job, connection)
        finally:
            if connection is not None:
                self._drop(connection)

    def _carry_out(self, job: Job, connection: Connection | None) -> Connection | None:
        """Returns the connection if it can be used again."""
        while True:
            fresh = connection is None
            try:
                if self._stop.is_set():
                    raise PipeClosed("the worker closes")
                if not self._server.up:
                    raise PeerGone(f"the LMCache server at {self._server.address} is down")
                if connection is None:
                    connection = self._server.connect()
                    with self._lock:
                        self._connections.add(connection)
                job.run(connection)
                return connection
            except Exception as error:  # a job's thread goes on whatever the job met, and says so
                if connection is not None:
                    self._drop(connection)
                    connection = None
                    if isinstance(error, PeerGone):
                        self._server.lost()
                        # The server may have closed it long ago, while nobody asked anything.
                        if not fresh and not self._stop.is_set():
                            continue
                    elif isinstance(error, DeadlineExceeded) and not self._stop.is_set():
                        self._server.down(error)
                if not isinstance(error, KVError):
                    logger.exception("a job of the LMCache client's %s threads failed", self._name)
                job.fail(error)
                return None

    def _drop(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)
        connection.close()

    def close(self, deadline: float) -> None:
        """Fail what is queued and under way, end the threads; bounded by `deadline`, twice is fine."""
        with self._lock:
            self._stop.set()
            for _ in self._threads:
                self._jobs.put(None)
            connections = list(self._connections)
        for connection in connections:
            connection.abort()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("%s has not ended in time", thread.name)
