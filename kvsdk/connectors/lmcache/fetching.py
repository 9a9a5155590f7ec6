"""Fetches chunks from the server into host memory, checks them there, and keeps them until they are loaded."""

from __future__ import annotations

import collections
import dataclasses
import enum
import logging
import threading
import time
from collections.abc import Callable

import torch

from kvsdk.buffer.keys import KEY_BYTES
from kvsdk.connector.counters import Counters
from kvsdk.connectors.lmcache.chunks import COMING_SECONDS, ChunkFormat, Incoming
from kvsdk.connectors.lmcache.client import Connection, Damaged, Job, Pool, Server, Stalled
from kvsdk.connectors.lmcache.host_cache import HostMemory
from kvsdk.connectors.lmcache.keys import ChunkNames, Known
from kvsdk.errors import DeadlineExceeded, PeerGone, ProtocolError

logger = logging.getLogger("kvsdk.lmcache")

MAX_TICKETS = 4096
"""Lookups at a time; more are answered with nothing."""


class _State(enum.Enum):
    WAITING = enum.auto()
    READY = enum.auto()
    MISSING = enum.auto()


@dataclasses.dataclass(eq=False)
class Chunk:
    """A chunk that tickets ask for: several of them, where prompts begin alike.

    Attributes:
        name: on the server.
        coming: the name under which a server says that it is about to store it.
        index: in its prompt.
        begun: since when a connection fetches it, on `time.monotonic`; 0 if none does.
        expected_until: on `time.monotonic`; until then a server that said it was about to store it is believed.
        buffer: its blocks, in host memory, once it is there.
        parts: blocks of each part.
    """

    name: str
    coming: str
    index: int
    state: _State = _State.WAITING
    references: int = 0
    begun: float = 0.0
    expected_until: float = 0.0
    buffer: torch.Tensor | None = None
    parts: list[int] = dataclasses.field(default_factory=list)
    waiting: set[Ticket] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(eq=False)
class Ticket:
    """A lookup: the chunks that it asks for, then those that are there."""

    chunks: list[Chunk]
    deadline: float
    expires: float
    answer: Callable[[int], None]
    ready: int = 0
    answered: bool = False
    pins: int = 0
    released: bool = False


class Chunks:
    """The chunks in a worker's host memory. Any thread may use it.

    Args:
        pool: whose connections fetch.
        lease: seconds that a ticket lasts without word from its holder.
        limit: seconds that fetching one chunk may take.
        verify: whether chunks are compared with their digests.
        clock: of leases.
    """

    def __init__(
        self,
        *,
        form: ChunkFormat,
        names: ChunkNames,
        known: Known,
        server: Server,
        pool: Pool,
        memory: HostMemory,
        lease: float,
        limit: float,
        verify: bool,
        clock: Callable[[], float],
        counters: Counters,
    ):
        self._form, self._names, self._known, self._server, self._pool = form, names, known, server, pool
        self._memory, self._lease, self._limit, self._verify = memory, lease, limit, verify
        self._clock, self._counters = clock, counters
        self._lock = threading.Lock()
        self._chunks: dict[str, Chunk] = {}
        self._tickets: collections.OrderedDict[int, Ticket] = collections.OrderedDict()
        self._again: list[Chunk] = []  # announced and not there yet, or without memory
        self._queue: collections.deque[tuple[Ticket, list[tuple[str, str]], int]] = collections.deque()
        self._full = False

    def open(self, ticket_id: int, keys: bytes, first: int, timeout: float, answer: Callable[[int], None]) -> None:
        """Fetch chunks; `answer` is called once with the number of those at the beginning that are there.

        Args:
            keys: 16 bytes for each chunk, in prompt order.
            first: index of the first one in its prompt.
            timeout: seconds after which `answer` is called with what is there by then.
        """
        each = [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]
        # More than there is memory for could not be promised, and the last of them would be waited for.
        names = [(self._names.name(key), self._names.coming(key)) for key in each[: self._memory.limit]]
        with self._lock:
            if len(self._tickets) >= MAX_TICKETS or ticket_id in self._tickets or not self._server.up:
                answer(0)
                return
            ticket = Ticket([], time.monotonic() + timeout, self._clock() + self._lease, answer)
            self._tickets[ticket_id] = ticket
            self._queue.append((ticket, names, first))
        self._admit()

    def _admit(self) -> None:
        """Begin with lookups, in order, while there is host memory for all that they ask for. If each had a part of it,
        none would get to its end.
        """
        new: list[Chunk] = []
        with self._lock:
            while self._queue:
                ticket, names, first = self._queue[0]
                if not ticket.answered:
                    missing = {name for name, _ in names if self._is_missing(name)}
                    waiting = sum(one.state is _State.WAITING for one in self._chunks.values())
                    if self._memory.num_used + waiting + len(missing) > self._memory.limit:
                        if not self._full:
                            logger.info("prompts wait for host memory: all of max_local_cpu_size is in use")
                        self._full = True
                        break
                    self._full = False
                    new += self._begin_ticket(ticket, names, first)
                self._queue.popleft()
        for chunk in new:
            self._pool.submit(_Fetch(self, chunk))

    def _is_missing(self, name: str) -> bool:
        chunk = self._chunks.get(name)
        return chunk is None or chunk.state is _State.MISSING

    def _begin_ticket(self, ticket: Ticket, names: list[tuple[str, str]], first: int) -> list[Chunk]:
        """Returns the chunks that are to be fetched for it."""
        new = []
        for index, (name, coming) in enumerate(names, first):
            if self._is_missing(name):
                self._chunks[name] = Chunk(name, coming, index)
                new.append(self._chunks[name])
            chunk = self._chunks[name]
            chunk.references += 1
            ticket.chunks.append(chunk)
            if chunk.state is _State.WAITING:
                chunk.waiting.add(ticket)
        self._advance(ticket)
        return new

    def renew(self, ticket_ids: list[int]) -> None:
        """Whoever holds these tickets is alive."""
        with self._lock:
            for ticket_id in ticket_ids:
                if ticket_id in self._tickets:
                    self._tickets[ticket_id].expires = self._clock() + self._lease

    def release(self, ticket_id: int) -> None:
        """The chunks are not needed any more; those that are being loaded stay until they are."""
        with self._lock:
            ticket = self._tickets.pop(ticket_id, None)
            if ticket is not None:
                ticket.released = True
                self._answer(ticket)
                self._drop_if_unused(ticket)

    def tick(self) -> bool:
        """Ask again for what is coming, answer lookups whose time is up, end leases. Whether a lookup is open."""
        now, lease_now, stalled = time.monotonic(), self._clock(), False
        with self._lock:
            again, self._again = self._again, []
        for chunk in again:
            self._pool.submit(_Fetch(self, chunk))
        self._admit()
        with self._lock:
            open_lookups = False
            for ticket_id, ticket in list(self._tickets.items()):
                if not ticket.answered and now >= ticket.deadline:
                    begun = ticket.chunks[0].begun if ticket.chunks and not ticket.ready else 0.0
                    stalled = stalled or 0.0 < begun < now - 0.5 * self._server.timeout
                    self._answer(ticket)
                open_lookups = open_lookups or not ticket.answered
                if lease_now >= ticket.expires and not ticket.pins:
                    logger.warning("a lease of %.3g s on %d fetched chunks is over", self._lease, ticket.ready)
                    del self._tickets[ticket_id]
                    ticket.released = True
                    self._answer(ticket)
                    self._drop_if_unused(ticket)
        if stalled:
            # Bytes may come, one now and then: it is not to be waited for with every prompt.
            self._server.down(Stalled("it did not send one chunk in the time of a lookup"))
        return open_lookups

    def pin(self, ticket_id: int) -> Ticket | None:
        """A ticket whose chunks stay until `unpin`; None if it has ended."""
        with self._lock:
            ticket = self._tickets.get(ticket_id)
            if ticket is not None:
                ticket.pins += 1
            return ticket

    def unpin(self, ticket: Ticket) -> None:
        """What `pin` returned is not used any more."""
        with self._lock:
            ticket.pins -= 1
            self._drop_if_unused(ticket)

    @property
    def num_tickets(self) -> int:
        """Lookups whose chunks are held."""
        return len(self._tickets)

    # ---- with the lock

    def _advance(self, ticket: Ticket) -> None:
        while ticket.ready < len(ticket.chunks) and ticket.chunks[ticket.ready].state is _State.READY:
            ticket.ready += 1
        if ticket.ready == len(ticket.chunks) or ticket.chunks[ticket.ready].state is _State.MISSING:
            self._answer(ticket)

    def _answer(self, ticket: Ticket) -> None:
        if ticket.answered:
            return
        ticket.answered = True
        rest, ticket.chunks = ticket.chunks[ticket.ready :], ticket.chunks[: ticket.ready]
        for chunk in rest:
            chunk.waiting.discard(ticket)
            self._drop(chunk)
        ticket.answer(ticket.ready)

    def _drop_if_unused(self, ticket: Ticket) -> None:
        if ticket.released and not ticket.pins:
            chunks, ticket.chunks = ticket.chunks, []
            for chunk in chunks:
                self._drop(chunk)

    def _drop(self, chunk: Chunk) -> None:
        chunk.references -= 1
        if chunk.references:
            return
        if self._chunks.get(chunk.name) is chunk:
            del self._chunks[chunk.name]
        if chunk.buffer is not None:
            self._memory.give_back(chunk.buffer)
            chunk.buffer = None

    # ---- in a connection's thread

    def wanted(self, chunk: Chunk) -> bool:
        """Whether a lookup still waits for it."""
        with self._lock:
            return chunk.references > 0

    def fetch(self, chunk: Chunk, connection: Connection) -> None:
        """Fetch and check one chunk. Raises what `Connection.get` does."""
        buffer = self._memory.take()
        if buffer is None:
            self._ask_again(chunk)  # one that is not wanted any more has it, and gives it back
            return
        ready = False
        try:
            losses, deadline = self._server.losses, self._begin(chunk)
            incoming = Incoming(self._form, chunk.name, buffer, verify=self._verify)
            if not connection.get(incoming, deadline):
                self._known.discard(chunk.name)
                if self._is_expected(chunk, connection, deadline):
                    self._ask_again(chunk)
                    return
            elif incoming.damage:
                self.damaged(chunk, incoming.damage)
            else:
                self._known.add(chunk.name, losses)
                chunk.parts, ready = incoming.parts, True
        finally:
            if not ready:
                self._memory.give_back(buffer)
        self._finish(chunk, buffer if ready else None)

    def _begin(self, chunk: Chunk) -> float:
        """Until when somebody waits for it."""
        now = time.monotonic()
        with self._lock:
            chunk.begun = now
            return min(now + self._limit, max((ticket.deadline for ticket in chunk.waiting), default=now))

    def _ask_again(self, chunk: Chunk) -> None:
        with self._lock:
            chunk.begun = 0.0
            self._again.append(chunk)

    def _is_expected(self, chunk: Chunk, connection: Connection, deadline: float) -> bool:
        """Whether a server has said that it is about to store the chunk. It is asked for once."""
        now = time.monotonic()
        if not chunk.expected_until and connection.is_announced(chunk.coming, deadline):
            chunk.expected_until = now + COMING_SECONDS
        return now < chunk.expected_until

    def missing(self, chunk: Chunk) -> None:
        """It cannot be had."""
        self._finish(chunk, None)

    def late(self, chunk: Chunk) -> None:
        """The lookups that it was fetched for have ended; others may have come to it."""
        now = time.monotonic()
        with self._lock:
            if any(ticket.deadline > now for ticket in chunk.waiting):
                chunk.begun = 0.0
                self._again.append(chunk)
                return
        self.missing(chunk)

    def damaged(self, chunk: Chunk, reason: str) -> None:
        """The server has something else under its name; the next one that computes it stores it again."""
        logger.warning("the chunk %s is damaged on the server and computed instead: %s", chunk.name, reason)
        self._counters.add("corrupt_blocks", self._form.num_blocks)
        self._known.discard(chunk.name, damaged=True)
        self._pool.submit(_Condemn(chunk.name, self._limit))

    def _finish(self, chunk: Chunk, buffer: torch.Tensor | None) -> None:
        with self._lock:
            if buffer is not None and not chunk.references:
                self._memory.give_back(buffer)
                return
            chunk.buffer, chunk.begun = buffer, 0.0
            chunk.state = _State.MISSING if buffer is None else _State.READY
            waiting, chunk.waiting = chunk.waiting, set()
            for ticket in waiting:
                if not ticket.answered:
                    self._advance(ticket)


class _Fetch(Job):
    def __init__(self, chunks: Chunks, chunk: Chunk):
        self._chunks, self._chunk = chunks, chunk

    def run(self, connection: Connection) -> None:
        if self._chunks.wanted(self._chunk):
            self._chunks.fetch(self._chunk, connection)

    def fail(self, error: Exception) -> None:
        if isinstance(error, (ProtocolError, Damaged)):
            self._chunks.damaged(self._chunk, str(error))
        elif isinstance(error, DeadlineExceeded) and not isinstance(error, Stalled):
            self._chunks.late(self._chunk)
            return
        elif not isinstance(error, PeerGone):
            logger.info("the chunk %s was not fetched: %s", self._chunk.name, error)
        self._chunks.missing(self._chunk)


class _Condemn(Job):
    def __init__(self, name: str, limit: float):
        self._name, self._limit = name, limit

    def run(self, connection: Connection) -> None:
        connection.condemn(self._name, time.monotonic() + self._limit)

    def fail(self, error: Exception) -> None:
        logger.info("the server could not be told that %s is damaged: %s", self._name, error)
