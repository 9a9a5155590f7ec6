"""How a scheduler half asks its workers to fetch chunks: one ZMQ socket a worker, over this host's loopback.

A worker's answer says how many chunks it has, fetched and checked, in its host memory. They stay there under the
lookup's ticket until it is released, or until nobody has renewed it for a lease.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq

from kvsdk.buffer.wire import Field, Wire
from kvsdk.connectors.pynccl.channel import Bell, zmq_context
from kvsdk.errors import ProtocolError

logger = logging.getLogger("kvsdk.lmcache")

LOOKUP_WIRE = Wire(
    "kvsdk.lmcache/1",
    {
        # scheduler -> worker
        "hello": {},
        "fetch": {"ticket": int, "keys": bytes, "first": int, "timeout": float},
        "renew": {"tickets": Field(list, of=int)},
        "release": {"ticket": int},
        # worker -> scheduler: `state` answers hello and tells each change, `fetched` answers fetch
        "state": {"up": bool},
        "fetched": {"ticket": int, "count": int},
    },
)

HELLO = 2.0
"""Seconds between two questions for the state of workers, while one of them is down."""

MAX_RENEWED = 1024
"""Tickets of one `renew`."""


@dataclasses.dataclass
class _Lookup:
    deadline: float
    counts: dict[int, int] = dataclasses.field(default_factory=dict)


class LookupClient:
    """The scheduler half's side. No method waits.

    Args:
        addresses: `host:port` of each worker, by rank.
        lease: seconds after which a worker drops chunks that nobody has renewed.
    """

    def __init__(self, addresses: list[str], lease: float):
        self._lease = lease
        self._up: dict[int, bool] = {}
        self._lookups: dict[int, _Lookup] = {}
        self._outbox: collections.deque[bytes] = collections.deque()
        self._lock = threading.Lock()
        self._heard = threading.Event()
        self._stop = threading.Event()
        self._bell = Bell()
        self._sockets = []
        for address in addresses:
            one = zmq_context().socket(zmq.DEALER)
            one.setsockopt(zmq.LINGER, 0)
            # vLLM asks for every waiting request in one step.
            one.setsockopt(zmq.SNDHWM, 0)
            one.setsockopt(zmq.RCVHWM, 0)
            one.connect(f"tcp://{address}")
            one.send(LOOKUP_WIRE.encode("hello"))
            self._sockets.append(one)
        self._thread = threading.Thread(target=self._run, name="kvsdk-lmcache-lookup", daemon=True)
        self._thread.start()

    def wait_heard(self, timeout: float) -> bool:
        """Wait until every worker has said whether it reaches the server; false if one has not within `timeout`."""
        return self._heard.wait(timeout)

    @property
    def up(self) -> bool:
        """Whether every worker reaches the server."""
        return len(self._up) == len(self._sockets) and all(self._up.values())

    def fetch(self, keys: bytes, first: int, timeout: float) -> int:
        """Have every worker fetch chunks.

        Args:
            keys: of the chunks, 16 bytes each, in prompt order.
            first: index of the first of them in its prompt.
            timeout: seconds after which a worker answers with what it has.

        Returns:
            A ticket, for `count` and `release`.
        """
        ticket = secrets.randbits(62)
        with self._lock:
            # A worker answers in time, and one that does not is not waited for.
            self._lookups[ticket] = _Lookup(time.monotonic() + timeout + 0.5)
        self._send("fetch", ticket=ticket, keys=keys, first=first, timeout=timeout)
        return ticket

    def count(self, ticket: int) -> int | None:
        """Chunks that every worker has; None while one has not answered. One that does not in time counts as down until
        it says something.
        """
        with self._lock:
            lookup = self._lookups.get(ticket)
            if lookup is None:
                return 0
            if len(lookup.counts) == len(self._sockets):
                return min(lookup.counts.values())
            if time.monotonic() < lookup.deadline:
                return None
            for rank in range(len(self._sockets)):
                if rank not in lookup.counts and self._up.get(rank):
                    logger.warning("worker %d does not answer lookups; prompts are computed here until it does", rank)
                    self._up[rank] = False
            return 0

    def release(self, ticket: int) -> None:
        """The chunks are not needed any more."""
        with self._lock:
            self._lookups.pop(ticket, None)
        self._send("release", ticket=ticket)

    def _send(self, kind: str, **fields: Any) -> None:
        self._outbox.append(LOOKUP_WIRE.encode(kind, **fields))
        self._bell.ring()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._bell, zmq.POLLIN)
        for one in self._sockets:
            poller.register(one, zmq.POLLIN)
        renew_at, hello_at = time.monotonic() + self._lease / 3, time.monotonic() + HELLO
        try:
            while not self._stop.is_set():
                ready = dict(poller.poll(max(1, int(1000 * (min(renew_at, hello_at) - time.monotonic())))))
                if self._bell.fileno() in ready:
                    self._bell.heed()
                for rank, one in enumerate(self._sockets):
                    if one in ready:
                        self._take(rank, one.recv())
                if time.monotonic() >= renew_at:
                    renew_at = time.monotonic() + self._lease / 3
                    self._renew()
                if time.monotonic() >= hello_at:
                    hello_at = time.monotonic() + HELLO
                    if not self.up:
                        self._outbox.append(LOOKUP_WIRE.encode("hello"))
                while self._outbox:
                    message = self._outbox.popleft()
                    for one in self._sockets:
                        one.send(message, zmq.NOBLOCK)
        except Exception:
            logger.exception("the thread that asks the workers for chunks failed; prompts are computed here")
            self._up = dict.fromkeys(self._up, False)
        finally:
            for one in self._sockets:
                one.close()
            self._bell.close()

    def _take(self, rank: int, message: bytes) -> None:
        try:
            kind, fields = LOOKUP_WIRE.decode(message)
        except ProtocolError as error:
            logger.warning("a malformed message of worker %d was dropped: %s", rank, error)
            return
        with self._lock:
            if kind == "state":
                self._up[rank] = fields["up"]
                if len(self._up) == len(self._sockets):
                    self._heard.set()
            elif kind == "fetched" and fields["ticket"] in self._lookups:
                self._lookups[fields["ticket"]].counts[rank] = fields["count"]

    def _renew(self) -> None:
        with self._lock:
            tickets = list(self._lookups)
        for start in range(0, len(tickets), MAX_RENEWED):
            self._outbox.append(LOOKUP_WIRE.encode("renew", tickets=tickets[start : start + MAX_RENEWED]))

    def close(self, deadline: float) -> None:
        """Bounded by `deadline`; twice is fine."""
        self._stop.set()
        self._bell.ring()
        self._thread.join(max(0.0, deadline - time.monotonic()))


class LookupServer:
    """A worker's side: hands what it is asked to others, in a thread of its own.

    Args:
        fetch: called with ticket, keys, first, timeout and a function that takes the count and may be called from any
            thread, once.
        renew, release: called with tickets.
        tick: called at least every `TICK` seconds.
    """

    TICK = 0.01

    def __init__(
        self,
        *,
        fetch: Callable[[int, bytes, int, float, Callable[[int], None]], None],
        renew: Callable[[list[int]], None],
        release: Callable[[int], None],
        tick: Callable[[], bool],
        up: Callable[[], bool],
    ):
        self._fetch, self._renew, self._release, self._tick, self._is_up = fetch, renew, release, tick, up
        self._outbox: collections.deque[list[bytes]] = collections.deque()
        self._peers: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._stop = threading.Event()
        self._bell = Bell()
        self._socket = zmq_context().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, LOOKUP_WIRE.max_bytes)
        self.address = f"127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._told: bool | None = None
        self._thread = threading.Thread(target=self._run, name="kvsdk-lmcache-fetch", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """The server's state has changed. Any thread may say so."""
        self._bell.ring()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        busy = False
        try:
            while not self._stop.is_set():
                ready = dict(poller.poll(int(1000 * (self.TICK if busy else 0.5))))
                if self._bell.fileno() in ready:
                    self._bell.heed()
                while self._socket in ready and self._socket.poll(0):
                    self._take(self._socket.recv_multipart())
                busy = self._tick_or_log()
                if self._told != (up := self._is_up()):
                    self._told = up
                    self._outbox.extend([peer, LOOKUP_WIRE.encode("state", up=up)] for peer in self._peers)
                while self._outbox:
                    self._socket.send_multipart(self._outbox.popleft(), zmq.NOBLOCK)
        except Exception:
            logger.exception("the thread that takes lookups failed; no more chunks are fetched")
        finally:
            self._socket.close()
            self._bell.close()

    def _tick_or_log(self) -> bool:
        try:
            return self._tick()
        except Exception:
            logger.exception("what is due for lookups failed; going on with the next ones")
            self._stop.wait(1.0)
            return False

    def _take(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 2:
                raise ProtocolError(f"{len(frames)} frames")
            kind, fields = LOOKUP_WIRE.decode(frames[1])
            if kind == "hello":
                self._hello(frames[0])
            elif kind == "fetch":
                self._begin(frames[0], fields)
            elif kind == "renew":
                self._renew(fields["tickets"])
            elif kind == "release":
                self._release(fields["ticket"])
            else:
                raise ProtocolError(f"{kind} at a worker")
        except ProtocolError as error:
            logger.warning("a malformed message was dropped: %s", error)
        except Exception:
            logger.exception("a lookup failed; its prompt is computed")

    def _hello(self, peer: bytes) -> None:
        if len(self._peers) < 16:  # one scheduler half asks, the first; others can only be strangers
            self._peers[peer] = None
        self._outbox.append([peer, LOOKUP_WIRE.encode("state", up=self._is_up())])

    def _begin(self, peer: bytes, fields: dict[str, Any]) -> None:
        ticket, keys, timeout = fields["ticket"], fields["keys"], fields["timeout"]
        if not keys or len(keys) % 16 or fields["first"] < 0 or not 0 < timeout < 3600:
            raise ProtocolError(f"fetch: {len(keys)} bytes of keys, first {fields['first']}, {timeout} s")

        def answer(count: int) -> None:
            self._outbox.append([peer, LOOKUP_WIRE.encode("fetched", ticket=ticket, count=count)])
            self._bell.ring()

        self._fetch(ticket, keys, fields["first"], timeout, answer)

    def stop(self) -> None:
        """Begin to close, without waiting. Twice is fine."""
        self._stop.set()
        self._bell.ring()

    def close(self, deadline: float) -> None:
        """Bounded by `deadline`; twice is fine."""
        self.stop()
        self._thread.join(max(0.0, deadline - time.monotonic()))
