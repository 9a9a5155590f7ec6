"""What the clients of both of LMCache's servers have in common: whether the server answers, and threads that ask it.

Every operation ends by its deadline. A server that stalls is waited for once: it counts as down from then on, and what
is asked of it fails at once, until a probe in the background succeeds.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from kvsdk.config import format_address
from kvsdk.errors import DeadlineExceeded, KVError, PeerGone, PipeClosed

logger = logging.getLogger("kvsdk.lmcache")

HEARTBEAT = 2.0
"""Seconds between two questions for the server's health while it answers."""

RETRY, MAX_RETRY = 0.25, 3.0
"""Seconds between two attempts while it does not; they double up to the second figure."""


class Connection(ABC):
    """One request to the server at a time. Of one thread, but for `abort`.

    After any error but `ProtocolError` from an argument it is out of step: close it. Names are those of `ChunkNames`,
    deadlines are on `time.monotonic`. Every method but the last two raises

        DeadlineExceeded: the server stalls, or is not done by the deadline.
        PeerGone: it is lost, or was aborted.
        ProtocolError: the server answers what it cannot have been asked.
    """

    @abstractmethod
    def exists(self, name: str, deadline: float) -> bool:
        """Whether the server has something under `name`."""

    @abstractmethod
    def get(self, name: str, into: Sequence[memoryview], deadline: float) -> bool:
        """Fill buffers with what is under `name`; false when there is nothing.

        Args:
            into: writable bytes; together as long as what was stored.
        """

    @abstractmethod
    def put(self, name: str, buffers: Sequence[memoryview], deadline: float) -> bool:
        """Store bytes under `name`; whether the server has kept them."""

    @abstractmethod
    def announce(self, names: Sequence[str], deadline: float) -> None:
        """Say that something is about to be stored; `names` are those of `ChunkNames.coming`."""

    @abstractmethod
    def is_announced(self, name: str, deadline: float) -> bool:
        """Whether some server has said so, not long ago."""

    @abstractmethod
    def abort(self) -> None:
        """Make what waits in another thread raise."""

    @abstractmethod
    def close(self) -> None:
        """Twice is fine."""


class Server(ABC):
    """What is known of the server: whether it answers, and whether it may have lost what it had.

    Args:
        timeout: seconds without an answer after which it counts as stalled.
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
        self._known = threading.Event()
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
            return self._connect()
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
        self._wake()

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
                try:
                    self._ask()
                except KVError as error:
                    self._set(False, error)
                else:
                    self._set(True)
                self._known.set()
                self._pause(HEARTBEAT if self.up else pause)
                pause = RETRY if self.up else min(2 * pause, MAX_RETRY)
        except Exception as error:
            logger.exception("the thread that watches %s failed", self.address)
            self._set(False, error)
        finally:
            self._disconnect()

    @abstractmethod
    def _ask(self) -> None:
        """Returns once the server has answered; raises a KVError, and has called `lost`, if it does not in time."""

    @abstractmethod
    def _pause(self, seconds: float) -> None:
        """Wait in the thread that watches; `_wake` ends it."""

    @abstractmethod
    def _wake(self) -> None:
        """Have the server asked soon. From any thread."""

    @abstractmethod
    def _connect(self) -> Connection:
        """A new connection."""

    @abstractmethod
    def _disconnect(self) -> None:
        """The thread that watches ends."""

    @abstractmethod
    def _abort(self) -> None:
        """Make a question under way fail. From any thread."""

    def close(self, deadline: float) -> None:
        """Stop the thread; bounded by `deadline`, twice is fine."""
        self._stop.set()
        self._wake()
        self._abort()
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
