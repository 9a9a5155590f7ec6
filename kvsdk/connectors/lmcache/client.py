"""What the clients of both of LMCache's servers have in common: whether the server answers, and threads that ask it.

Every operation ends by its deadline. A server that stalls is waited for once: it counts as down from then on, and what
is asked of it fails at once, until a probe in the background succeeds.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from kvsdk.config import format_address
from kvsdk.connectors.lmcache.chunks import Incoming, Outgoing
from kvsdk.errors import DeadlineExceeded, KVError, PeerGone, PipeClosed

logger = logging.getLogger("kvsdk.lmcache")

HEARTBEAT = 2.0
"""Seconds between two questions for the server's health while it answers."""

RETRY, MAX_RETRY = 0.25, 3.0
"""Seconds between two attempts while it does not; they double up to the second figure."""


IDLE, MAX_IDLE = 2.0, 60.0
"""Seconds between two looks of an idle thread at whether the server of its connection is gone, and how long an idle
connection is kept."""

MAX_SUSPENSION = 30.0
"""Most seconds in which a server that answers when it is asked for its health, and nothing else, is left alone."""


class Stalled(DeadlineExceeded):
    """Not a byte of an answer within the time-out."""


class Damaged(PeerGone):
    """The server began to send what it has, and closed the connection: it has less than it says."""


class Connection(ABC):
    """One request to the server at a time. Of one thread, but for `abort`.

    After any error it is out of step: close it. Names are those of `ChunkNames`, deadlines are on `time.monotonic`.
    Every method but the last two raises

        DeadlineExceeded: the server is not done by the deadline; `Stalled`, if it did nothing at all.
        PeerGone: it is lost, or was aborted.
        ProtocolError: the server answers what it cannot have been asked.
    """

    @abstractmethod
    def exists(self, name: str, deadline: float) -> bool:
        """Whether the server has a chunk of this name, which was not condemned."""

    @abstractmethod
    def get(self, chunk: Incoming, deadline: float) -> bool:
        """Fetch a chunk; false when there is none. What is wrong with its pieces, it says itself.

        Raises:
            Damaged, ProtocolError: what is there is not what was stored.
        """

    @abstractmethod
    def put(self, chunk: Outgoing, deadline: float) -> bool:
        """Store a chunk in place of what is there; whether the server has kept it."""

    @abstractmethod
    def condemn(self, name: str, deadline: float) -> None:
        """What the server has of this chunk is not what was stored: it is as if there were none, until it is stored
        again.
        """

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
        self._suspension, self._suspended_until = 0.0, 0.0
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

    def connect(self, timeout: float | None = None) -> Connection:
        """Raises DeadlineExceeded or PeerGone, and is down then.

        Args:
            timeout: instead of the server's own, for what is asked over this connection.
        """
        if not self.up:
            raise PeerGone(f"the LMCache server at {self.address} is down")
        try:
            return self._connect(self.timeout if timeout is None else timeout)
        except (DeadlineExceeded, PeerGone) as error:
            self.down(error)
            raise

    def lost(self) -> None:
        """A connection was lost."""
        with self._lock:
            self._losses += 1

    def down(self, reason: Exception) -> None:
        """It does not answer: ask it no more until a probe in the background succeeds.

        A server that stalls may still say that it is well, so it is left alone for a time that doubles, until `worked`.
        """
        with self._lock:
            now = time.monotonic()
            if isinstance(reason, Stalled) and now >= self._suspended_until:
                self._suspension = min(2 * self._suspension or 1.0, MAX_SUSPENSION)
                self._suspended_until = now + self._suspension
        self._set(False, reason)
        self._wake()

    def worked(self) -> None:
        """It did what it was asked."""
        self._suspension = 0.0

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
                    self._pause_after(pause)
                    pause = min(2 * pause, MAX_RETRY)
                    continue
                suspended = self._suspended_until - time.monotonic()
                if suspended <= 0:
                    self._set(True)
                    pause = RETRY
                self._pause_after(max(0.0, suspended) or HEARTBEAT)
        except Exception as error:
            logger.exception("the thread that watches %s failed", self.address)
            self._set(False, error)
        finally:
            self._disconnect()

    def _pause_after(self, seconds: float) -> None:
        self._known.set()
        self._pause(seconds)

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
    def _connect(self, timeout: float) -> Connection:
        """A new connection."""

    @abstractmethod
    def _disconnect(self) -> None:
        """The thread that watches ends."""

    @abstractmethod
    def _abort(self) -> None:
        """Make a question under way fail. From any thread."""

    def stop(self) -> None:
        """Begin to close, without waiting: a question under way fails. Twice is fine."""
        self._stop.set()
        self._wake()
        self._abort()

    def close(self, deadline: float) -> None:
        """Stop the thread; bounded by `deadline`, twice is fine."""
        self.stop()
        self._thread.join(max(0.0, deadline - time.monotonic()))


class Job(ABC):
    """Something to be done over a connection: `run` returns, or `fail` is called."""

    @abstractmethod
    def run(self, connection: Connection) -> None:
        """Do it. May be called a second time, over a new connection, after the first one was lost."""

    @abstractmethod
    def fail(self, error: Exception) -> None:
        """It will not be done."""


class _Idle(Job):
    def run(self, connection: Connection) -> None:
        """Nothing."""

    def fail(self, error: Exception) -> None:
        """Nothing."""


_IDLE = _Idle()


class Pool:
    """Threads with a connection each, which carry out jobs in order.

    Args:
        connections: how many, which is how many requests are in flight.
        timeout: of the connections, if it is not the server's own; a server that stalls here does not count as down.
    """

    def __init__(self, server: Server, name: str, connections: int, timeout: float | None = None):
        self._server, self._name, self._timeout = server, name, timeout
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
            while (job := self._next(connection)) is not None:
                connection = None if job is _IDLE else self._carry_out(job, connection)
        finally:
            if connection is not None:
                self._drop(connection)

    def _next(self, connection: Connection | None) -> Job | None:
        """The next job; `_IDLE` once the connection has been closed for want of one, or of a server."""
        if connection is None:
            return self._jobs.get()
        for _ in range(int(MAX_IDLE / IDLE)):
            with contextlib.suppress(queue.Empty):
                return self._jobs.get(timeout=IDLE)
            if not self._server.up:
                break
        self._drop(connection)
        return _IDLE

    def _carry_out(self, job: Job, connection: Connection | None) -> Connection | None:
        """Returns the connection if it can be used again."""
        asked_again = False
        while True:
            fresh = connection is None
            try:
                if self._stop.is_set():
                    raise PipeClosed("the worker closes")
                if not self._server.up:
                    raise PeerGone(f"the LMCache server at {self._server.address} is down")
                if connection is None:
                    connection = self._server.connect(self._timeout)
                    with self._lock:
                        self._connections.add(connection)
                    if self._stop.is_set():  # `stop` has come before this connection was in its list
                        raise PipeClosed("the worker closes")
                job.run(connection)
                self._server.worked()
                return connection
            except Exception as error:  # a job's thread goes on whatever the job met, and says so
                if connection is not None:
                    self._drop(connection)
                    connection = None
                    if isinstance(error, PeerGone):
                        self._server.lost()
                        # The server may have closed it long ago, while nobody asked anything; or the network did, in
                        # the middle of an answer.
                        again = not fresh or (isinstance(error, Damaged) and not asked_again)
                        if again and not self._stop.is_set():
                            asked_again = True
                            continue
                    elif isinstance(error, Stalled) and self._timeout is None and not self._stop.is_set():
                        self._server.down(error)
                if not isinstance(error, KVError):
                    logger.exception("a job of the LMCache client's %s threads failed", self._name)
                job.fail(error)
                return None

    def _drop(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)
        connection.close()

    def stop(self) -> None:
        """Begin to close, without waiting: fail what is queued and under way. Twice is fine."""
        with self._lock:
            self._stop.set()
            for _ in self._threads:
                self._jobs.put(None)
            connections = list(self._connections)
        for connection in connections:
            connection.abort()

    def close(self, deadline: float) -> None:
        """Fail what is queued and under way, end the threads; bounded by `deadline`, twice is fine."""
        self.stop()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("%s has not ended in time", thread.name)
