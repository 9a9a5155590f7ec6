"""Asks producers' lookup buffers over ZMQ, without ever waiting for them."""

from __future__ import annotations

import enum
import itertools
import logging
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import zmq

from kvsdk.buffer.curve import ClientCurve
from kvsdk.buffer.keys import PrefixKeys
from kvsdk.buffer.wire import BUFFER_WIRE, MAX_ITEMS, VersionError, Wire
from kvsdk.errors import ConfigError, MismatchError, ProtocolError

logger = logging.getLogger("kvsdk.buffer")

FIRST_CONNECT_WARNING_S = 5.0
REFUSED_AGAIN_S = 10.0
TEMPORARY_IDLE_S = 60.0
ANSWER_KEPT_S = 60.0
MISSED_HEARTBEATS = 3
# Addresses of temporary peers come from requests, so their number has to be bounded.
MAX_TEMPORARY = 256

# Seconds that the thread sleeps at most, so that it follows an injected clock.
_TICK = 0.1
_CLOSING_TICK = 0.01
_BATCH = 256
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.%\w]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})")


class PendingType(enum.Enum):
    """The type of `Pending`, for annotations: an enum, so that `answer is Pending` narrows the type of the rest."""

    PENDING = "pending"


Pending = PendingType.PENDING
"""What `BufferClient.poll` says while there is no answer."""


class UnheardType(enum.Enum):
    """The type of `Unheard`."""

    UNHEARD = "unheard"


Unheard = UnheardType.UNHEARD
"""What `BufferClient.poll` says when the producer has not heard of a transfer: it may be announced yet."""


@dataclass(frozen=True)
class RemoteClaim:
    """A claim at a producer. The client renews it until it is released.

    Attributes:
        claim_id, transfer_id, num_tokens, generation, exclusive: as in `kvsdk.buffer.Claim`.
        address: the producer's `host:port`.
        engine_id: of the producer's server; another one at the same address is another server.
        identity: what the producer sent about itself.
    """

    claim_id: str
    transfer_id: str
    num_tokens: int
    generation: int
    exclusive: bool
    address: str
    engine_id: str
    identity: dict[str, Any] = field(repr=False, hash=False)


@dataclass(frozen=True)
class PeerState:
    """How a producer stands.

    Attributes:
        state: `connecting`, `up`, `refused` (a `MismatchError` on either side) or `down`.
        engine_id: of the server there, once it is known.
        reason: why it is refused or down, in one line.
    """

    state: str
    engine_id: str | None
    reason: str


class _Peer:
    """One producer address. Only the thread touches `socket`; everything else is under the client's lock."""

    def __init__(self, address: str, temporary: bool, now: float):
        self.address, self.temporary = address, temporary
        self.socket: zmq.Socket | None = None
        self.state = "connecting"
        self.reason = ""
        self.engine_id: str | None = None
        self.identity: dict[str, Any] = {}
        self.lease = 0.0
        self.since = self.last_used = now
        self.warned_refusal: tuple[str | None, str] | None = None
        self.hello_at = self.ping_at = self.renew_at = self.renewed_at = now
        self.unanswered_pings = 0
        self.probe_until: float | None = None
        # What it owes a reply to, and since when: lookups by number, even if their ticket is over; releases by claim.
        self.expecting: dict[int | str, float] = {}
        # Lookups to send once it is up.
        self.waiting: list[tuple[int, bytes]] = []


@dataclass(slots=True)
class _Lookup:
    """A question that is open: at `deadline`, or when `unanswered` (addresses) is empty, `best` is the answer.

    `message` asks it; `repeated` are the addresses that were asked a second time; `unheard` is set when a producer said
    that it has not heard of the transfer.
    """

    ticket: str
    message: bytes
    keys: PrefixKeys | None
    min_tokens: int
    deadline: float
    unanswered: set[str]
    best: RemoteClaim | None = None
    repeated: set[str] = field(default_factory=set)
    unheard: bool = False


@dataclass(slots=True)
class _HeldClaim:
    """A claim that was not released; at `expires_at` it is lost unless the producer has renewed it."""

    claim: RemoteClaim
    expires_at: float
    lost: bool = False


class BufferClient:
    """Finds and holds claims at producers, from one background thread. Thread-safe; no method but `close` and
    `wait_ready` waits.

    A lookup has a ticket. `find` starts it, `poll` says how it went, and whoever loses interest calls `cancel`. The
    answer is polled once; whoever gets a claim calls `release` in the end.

    Attributes:
        error: the last unexpected exception in the thread, or None. It was logged; the thread goes on.
    """

    def __init__(
        self,
        *,
        identity: dict[str, Any],
        producers: Iterable[str] = (),
        check: Callable[[dict[str, Any]], None] = lambda theirs: None,
        lookup_timeout: float = 1.0,
        heartbeat: float = 1.0,
        wire: Wire = BUFFER_WIRE,
        clock: Callable[[], float] = time.monotonic,
        curve: ClientCurve | None = None,
    ):
        """
        Args:
            identity: what this consumer is; sent to each producer, which may refuse it.
            producers: addresses, `host:port`. Nobody need listen there yet.
            check: called with a producer's identity in the client's thread; raises MismatchError to refuse it.
            lookup_timeout: seconds until a lookup is answered with the best that came.
            heartbeat: seconds between pings; a producer that misses 3 is down until it answers again.
            wire: the messages.
            clock: the time in seconds; never goes back.
            curve: keys, if the connections are to be encrypted.

        Raises:
            ConfigError: an address is not `host:port`, a time is not above 0, or a key is not one.
            ProtocolError: `identity` does not fit a message.
        """
        for name, value in (("lookup_timeout", lookup_timeout), ("heartbeat", heartbeat)):
            if not value > 0:
                raise ConfigError(f"{name}={value!r} is not above 0")
        self._check, self._wire, self._clock, self._curve = check, wire, clock, curve
        self._lookup_timeout, self._heartbeat = lookup_timeout, heartbeat
        self._hello = wire.encode("hello", identity=identity)
        self._ping = wire.encode("ping")
        self.error: Exception | None = None
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._peers: dict[str, _Peer] = {}
        self._gone: list[_Peer] = []
        self._uids = itertools.count(1)
        self._tickets: dict[str, int] = {}
        # All lookups have the same timeout, and answers are kept equally long: in both, the first is the first to go.
        self._lookups: dict[int, _Lookup] = {}
        self._answers: dict[str, tuple[RemoteClaim | UnheardType | None, float]] = {}
        self._held: dict[tuple[str, str], _HeldClaim] = {}
        # What the thread is to send: peer, message, and under which key a reply is expected.
        self._outbox: deque[tuple[_Peer, bytes, int | str | None]] = deque()
        self._dropped = 0
        self._closing = self._closed = False
        self._close_by = 0.0
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._context = zmq.Context()
        try:
            if curve:
                with self._context.socket(zmq.DEALER) as probe:
                    curve.apply(probe)
            self.set_producers(producers)
        except BaseException:
            self._context.destroy(linger=0)
            self._wake_r.close()
            self._wake_w.close()
            raise
        self._thread = threading.Thread(target=self._run, name="kvsdk-buffer-client", daemon=True)
        self._thread.start()

    # -- what a scheduler calls

    def set_producers(self, producers: Iterable[str]) -> None:
        """Ask these addresses from now on, and no others. Claims at a producer that is left out stay alive.

        Raises:
            ConfigError: an address is not `host:port`; nothing has changed then.
        """
        wanted = list(producers)
        for address in wanted:
            _check_address(address)
        with self._lock:
            now = self._clock()
            for address in wanted:
                if address in self._peers:
                    self._peers[address].temporary = False
                else:
                    self._peers[address] = _Peer(address, False, now)
            for address in self._peers.keys() - set(wanted):
                peer = self._peers[address]
                if not peer.temporary:
                    peer.temporary, peer.last_used = True, now
                    if not self._in_use(peer):
                        self._forget(peer)
            self._changed.notify_all()
            self._wake()

    def find(self, ticket: str, keys: PrefixKeys, min_tokens: int = 0) -> None:
        """Start to look a prompt up at every producer that is up. With none up, the answer is there at once: None.

        Of several claims the one with most tokens is kept, among equals an exclusive one, then the first; the others
        are released.

        Args:
            ticket: the caller's name for this lookup; one already in use under this name is cancelled first.
            keys: of the whole prompt.
            min_tokens: tokens that are here already; a producer with no more than these does not count.
        """
        with self._lock:
            self._cancel(ticket)
            peers = [peer for peer in self._peers.values() if peer.state == "up" and not peer.temporary]
            self._start(ticket, keys, min_tokens, peers, "find")

    def find_by_id(
        self, ticket: str, address: str, transfer_id: str, keys: PrefixKeys | None, min_tokens: int = 0
    ) -> None:
        """Start to look a transfer up at one producer, which need not be among those set.

        A new address is connected to, and forgotten 60 s after its last use; until it is up the lookup waits for it,
        within the lookup's timeout. A producer that is down or refused is not asked: the answer is None at once. So it
        is for an address that is not one, because it comes from a request.
        """
        with self._lock:
            self._cancel(ticket)
            peer = self._peers.get(address) or self._add_temporary(address)
            usable = peer is not None and peer.state in ("connecting", "up")
            self._start(ticket, keys, min_tokens, [peer] if usable else [], "find_by_id", transfer_id=transfer_id)

    def poll(self, ticket: str) -> PendingType | RemoteClaim | UnheardType | None:
        """`Pending` until the lookup is answered or its timeout is over, then its answer, once: a claim, `Unheard` for
        a transfer that its producer has not heard of, or None.

        An unknown ticket is None. An answer that nobody polls for 60 s is dropped and its claim released.
        """
        with self._lock:
            now = self._clock()
            uid = self._tickets.get(ticket)
            if uid is not None:
                if now < self._lookups[uid].deadline:
                    return Pending
                self._time_out(uid, now)
            answer, _ = self._answers.pop(ticket, (None, 0.0))
            if isinstance(answer, RemoteClaim) and self._is_lost(answer, now):
                self._release(answer, used=False)
                return None
            return answer

    def cancel(self, ticket: str) -> None:
        """Forget a lookup; a claim that it got or still gets is released. An unknown ticket is fine."""
        with self._lock:
            self._cancel(ticket)

    def release(self, claim: RemoteClaim, used: bool) -> None:
        """End a claim: `used` when the KV is here, else the offer is there for others. Twice is fine."""
        with self._lock:
            if (claim.address, claim.claim_id) in self._held:
                self._release(claim, used)

    def lost(self, claim: RemoteClaim) -> bool:
        """Whether the claim is over: its lease ended, its producer is down or was replaced, or it was released."""
        with self._lock:
            return self._is_lost(claim, self._clock())

    def peers(self) -> dict[str, PeerState]:
        """Every producer known, temporary ones too, by address."""
        with self._lock:
            return {p.address: PeerState(p.state, p.engine_id, p.reason) for p in self._peers.values()}

    @property
    def num_tickets(self) -> int:
        """Lookups that were started, and neither polled to their end nor cancelled."""
        with self._lock:
            return len(self._lookups) + len(self._answers)

    @property
    def num_claims(self) -> int:
        """Claims held, lost ones too, that were not released."""
        with self._lock:
            return len(self._held)

    @property
    def dropped(self) -> int:
        """Messages from producers that were dropped because they were malformed."""
        return self._dropped

    def wait_ready(self, timeout: float) -> bool:
        """Wait until every producer set is up; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(
                lambda: all(peer.state == "up" for peer in self._peers.values() if not peer.temporary), timeout
            )

    def close(self, timeout: float = 2.0) -> None:
        """Release every claim, also of lookups under way, and stop. Returns within `timeout` seconds; twice is fine.

        Afterwards every lookup is answered None.
        """
        with self._lock:
            if not self._closing:
                for ticket in [*self._tickets, *self._answers]:
                    self._cancel(ticket)
                for held in list(self._held.values()):
                    self._release(held.claim, used=False)
                self._closing = True
                # On the real clock, and with time left to close the sockets.
                self._close_by = time.monotonic() + 0.5 * timeout
                self._wake()
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.error("the lookup client did not stop within %.1f s", timeout)
            return
        with self._lock:
            self._closed = True
            self._wake_r.close()
            self._wake_w.close()

    # -- under the lock, from any thread

    def _wake(self) -> None:
        if self._closed:
            return
        try:
            self._wake_w.send(b"x")
        except BlockingIOError:
            # So many wake-ups wait to be read that one more changes nothing.
            return

    def _add_temporary(self, address: str) -> _Peer | None:
        try:
            _check_address(address)
        except ConfigError as e:
            logger.warning("a request names a producer that cannot be asked: %s", e)
            return None
        if sum(peer.temporary for peer in self._peers.values()) >= MAX_TEMPORARY:
            logger.warning("%s is not asked: requests name more than %d producers", address, MAX_TEMPORARY)
            return None
        self._peers[address] = _Peer(address, True, self._clock())
        return self._peers[address]

    def _forget(self, peer: _Peer) -> None:
        del self._peers[peer.address]
        self._gone.append(peer)
        self._wake()

    def _in_use(self, peer: _Peer) -> bool:
        return (
            bool(peer.expecting)
            or any(peer.address in lookup.unanswered for lookup in self._lookups.values())
            or any(held.claim.address == peer.address for held in self._held.values())
        )

    def _start(
        self, ticket: str, keys: PrefixKeys | None, min_tokens: int, peers: list[_Peer], kind: str, **fields: str
    ) -> None:
        now = self._clock()
        uid = next(self._uids)
        if self._closing:
            peers = []
        if peers:
            wire_keys = None if keys is None else keys.to_wire()
            try:
                data = self._wire.encode(kind, ticket=uid, keys=wire_keys, min_tokens=min_tokens, **fields)
            except ProtocolError as e:
                # The scheduler asks; a prompt that cannot be looked up is computed here, it does not end the server.
                logger.warning("a prompt cannot be looked up: %s", e)
                peers = []
        if not peers:
            self._answers[ticket] = (None, now + ANSWER_KEPT_S)
            return
        self._tickets[ticket] = uid
        addresses = {peer.address for peer in peers}
        self._lookups[uid] = _Lookup(ticket, data, keys, min_tokens, now + self._lookup_timeout, addresses)
        for peer in peers:
            peer.last_used = now
            if peer.state == "up":
                self._outbox.append((peer, data, uid))
            else:
                peer.waiting.append((uid, data))
        self._wake()

    def _cancel(self, ticket: str) -> None:
        uid = self._tickets.pop(ticket, None)
        answer = self._lookups.pop(uid).best if uid is not None else self._answers.pop(ticket, (None, 0.0))[0]
        if isinstance(answer, RemoteClaim):
            self._release(answer, used=False)

    def _release(self, claim: RemoteClaim, used: bool) -> None:
        self._held.pop((claim.address, claim.claim_id), None)
        peer = self._peers.get(claim.address)
        if peer is not None:
            peer.last_used = self._clock()
            data = self._wire.encode("release", claim_id=claim.claim_id, used=used)
            self._outbox.append((peer, data, claim.claim_id))
            self._wake()

    def _is_lost(self, claim: RemoteClaim, now: float) -> bool:
        held = self._held.get((claim.address, claim.claim_id))
        return held is None or held.lost or now >= held.expires_at

    def _finish(self, uid: int, now: float) -> None:
        lookup = self._lookups.pop(uid)
        del self._tickets[lookup.ticket]
        answer = lookup.best or (Unheard if lookup.unheard else None)
        self._answers[lookup.ticket] = (answer, now + ANSWER_KEPT_S)

    def _time_out(self, uid: int, now: float) -> None:
        for address in self._lookups[uid].unanswered:
            peer = self._peers.get(address)
            if peer is not None and peer.state == "up" and peer.probe_until is None:
                # Slow or dead? A peer answers in order, so one that lives answers this ping.
                peer.probe_until = now + self._heartbeat
                self._outbox.append((peer, self._ping, None))
        self._finish(uid, now)
        self._wake()

    # -- in the thread

    def _run(self) -> None:
        tick = min(_TICK, self._heartbeat / 2)
        try:
            while not self._done():
                try:
                    self._step(_CLOSING_TICK if self._closing else tick)
                except Exception as e:
                    self.error = e
                    logger.error("the lookup client failed and goes on", exc_info=e)
                    # An error that comes back at once must not turn the thread into a busy loop.
                    time.sleep(0.01)
        finally:
            self._context.destroy(linger=0)

    def _done(self) -> bool:
        with self._lock:
            if not self._closing:
                return False
            owed = self._outbox or any(peer.state == "up" and peer.expecting for peer in self._peers.values())
            return not owed or time.monotonic() >= self._close_by

    def _step(self, tick: float) -> None:
        with self._lock:
            now = self._clock()
            sources = [(self._wake_r, zmq.POLLIN)]
            for peer in self._peers.values():
                if peer.socket is not None:
                    # Not writable means not connected: the hello goes out as soon as the connection stands.
                    hello_due = peer.state != "up" and now >= peer.hello_at
                    sources.append((peer.socket, zmq.POLLIN | (zmq.POLLOUT if hello_due else 0)))
        zmq.zmq_poll(sources, int(1000 * tick))
        with self._lock:
            self._drain_wake()
            for peer in self._gone:
                if peer.socket is not None:
                    peer.socket.close(linger=0)
                    peer.socket = None
            self._gone.clear()
            # First what came, then what is overdue: after a pause of the whole process the answers are already here.
            for peer in list(self._peers.values()):
                self._receive(peer)
            now = self._clock()
            self._expire(now)
            for peer in list(self._peers.values()):
                self._keep_alive(peer, now)
            self._flush(now)

    def _drain_wake(self) -> None:
        try:
            self._wake_r.recv(4096)
        except BlockingIOError:
            return

    def _connect(self, peer: _Peer) -> None:
        dealer = self._context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.maxmsgsize = 2 * self._wire.max_bytes
        # Messages go to a standing connection or nowhere; nothing piles up for a peer that is away.
        dealer.immediate = 1
        dealer.reconnect_ivl, dealer.reconnect_ivl_max = 100, 1000
        dealer.connect_timeout = 5000
        # libzmq's own heartbeat ends a connection whose other host has vanished, so that it is made anew. It is the
        # more patient one: a busy machine is not to lose connections that stand.
        dealer.heartbeat_ivl = int(1000 * min(max(self._heartbeat, 0.1), 30))
        dealer.heartbeat_timeout = 4 * MISSED_HEARTBEATS * dealer.heartbeat_ivl
        dealer.ipv6 = peer.address.startswith("[")
        if self._curve:
            self._curve.apply(dealer)
        try:
            dealer.connect(f"tcp://{peer.address}")
        except zmq.ZMQError:
            dealer.close()
            raise
        peer.socket = dealer

    def _send(self, peer: _Peer, data: bytes) -> bool:
        if peer.socket is None:
            return False
        try:
            peer.socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _flush(self, now: float) -> None:
        while self._outbox:
            peer, data, key = self._outbox.popleft()
            if self._send(peer, data):
                if key is not None:
                    peer.expecting[key] = now
            elif type(key) is int:
                self._nothing(peer, key, now)

    def _expire(self, now: float) -> None:
        while self._lookups:
            uid, lookup = next(iter(self._lookups.items()))
            if now < lookup.deadline:
                break
            self._time_out(uid, now)
        while self._answers:
            ticket, (_, until) = next(iter(self._answers.items()))
            if now < until:
                break
            self._cancel(ticket)
        for held in self._held.values():
            if not held.lost and now >= held.expires_at:
                held.lost = True
                claim = held.claim
                logger.warning("the claim on %s at %s was not renewed in time", claim.transfer_id, claim.address)

    def _keep_alive(self, peer: _Peer, now: float) -> None:
        while peer.expecting:
            key, since = next(iter(peer.expecting.items()))
            if now < since + ANSWER_KEPT_S:
                break
            del peer.expecting[key]
        if peer.temporary and now >= peer.last_used + TEMPORARY_IDLE_S and not self._in_use(peer):
            self._forget(peer)
            return
        if peer.state == "connecting" and now >= peer.since + FIRST_CONNECT_WARNING_S:
            self._down(peer, f"nobody answers on {peer.address}; is the address right, and the producer started?", now)
        if peer.probe_until is not None and now >= peer.probe_until:
            self._down(peer, "it answered neither a lookup nor a ping", now)
        if peer.state == "up" and now >= peer.ping_at and peer.unanswered_pings >= MISSED_HEARTBEATS:
            self._down(peer, f"it missed {MISSED_HEARTBEATS} heartbeats", now)
        if peer.state != "up" and now >= peer.hello_at:
            if peer.socket is None:
                # If this raises, the next try is as far off as after a refusal.
                peer.hello_at = now + REFUSED_AGAIN_S
                self._connect(peer)
                peer.hello_at = now
            if self._send(peer, self._hello):
                peer.hello_at = now + (REFUSED_AGAIN_S if peer.state == "refused" else self._heartbeat)
        if peer.state in ("up", "refused") and now >= peer.ping_at:
            self._send(peer, self._ping)
            peer.unanswered_pings += 1
            peer.ping_at = now + self._heartbeat
        if peer.state == "up" and now >= peer.renew_at:
            alive = [h.claim.claim_id for h in self._held.values() if h.claim.address == peer.address and not h.lost]
            for start in range(0, len(alive), MAX_ITEMS):
                self._send(peer, self._wire.encode("renew", claim_ids=alive[start : start + MAX_ITEMS]))
            peer.renew_at, peer.renewed_at = now + peer.lease / 3, now

    def _receive(self, peer: _Peer) -> None:
        for _ in range(_BATCH):
            if peer.socket is None:
                return
            try:
                frames = peer.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            now = self._clock()
            try:
                if len(frames) != 1:
                    raise ProtocolError(f"{len(frames)} frames, not 1")
                kind, fields = self._wire.decode(frames[0])
                handler = getattr(self, f"_on_{kind}", None)
                if handler is None:
                    raise ProtocolError(f"{kind} is not for a client")
                peer.unanswered_pings, peer.probe_until = 0, None
                handler(peer, fields, now)
            except VersionError as e:
                self._refused(peer, f"protocol differs: ours is {e.ours}, the peer's is {e.theirs}", None, now)
            except ProtocolError as e:
                self._dropped += 1
                logger.debug("dropped a message of %s: %s", peer.address, e)

    def _on_welcome(self, peer: _Peer, fields: dict[str, Any], now: float) -> None:
        if not fields["lease"] > 0:
            raise ProtocolError("welcome: the lease is not above 0")
        try:
            self._check(fields["identity"])
        except MismatchError as e:
            self._refused(peer, str(e), fields["engine_id"], now)
            return
        self._lose(peer, but=fields["engine_id"])
        peer.engine_id, peer.identity, peer.lease = fields["engine_id"], fields["identity"], fields["lease"]
        if peer.state != "up":
            logger.info("the producer on %s is up", peer.address)
            peer.state, peer.reason = "up", ""
            peer.ping_at = now + self._heartbeat
            peer.renew_at = now
        for uid, data in peer.waiting:
            if uid in self._lookups:
                self._outbox.append((peer, data, uid))
        peer.waiting.clear()
        self._changed.notify_all()

    def _on_refused(self, peer: _Peer, fields: dict[str, Any], now: float) -> None:
        # The producer's view: its value is "ours" there.
        reason = f"{fields['field']} differs: ours is {fields['theirs']}, the peer's is {fields['ours']}"
        self._refused(peer, reason, fields["engine_id"], now)

    def _on_found(self, peer: _Peer, fields: dict[str, Any], now: float) -> None:
        uid, answer = fields["ticket"], fields["claim"]
        peer.expecting.pop(uid, None)
        lookup = self._lookups.get(uid)
        if answer is None:
            if lookup is not None and not fields["heard"]:
                lookup.unheard = True
            self._nothing(peer, uid, now)
            return
        claim = RemoteClaim(**answer, address=peer.address, engine_id=peer.engine_id or "", identity=peer.identity)
        if lookup is None or peer.address not in lookup.unanswered:
            self._release(claim, used=False)
            return
        longest = lookup.keys.num_tokens if lookup.keys else claim.num_tokens
        if not lookup.min_tokens < claim.num_tokens <= longest:
            self._release(claim, used=False)
            self._nothing(peer, uid, now)
            raise ProtocolError(f"found: a claim on {claim.num_tokens} tokens of {longest}")
        best = lookup.best
        if best is not None and (claim.num_tokens, claim.exclusive) <= (best.num_tokens, best.exclusive):
            self._release(claim, used=False)
        else:
            # The lease started after the lookup was sent, so this is never too late.
            sent = lookup.deadline - self._lookup_timeout
            self._held[claim.address, claim.claim_id] = _HeldClaim(claim, sent + peer.lease)
            lookup.best = claim
            if best is not None:
                self._release(best, used=False)
            if claim.exclusive and claim.num_tokens == longest:
                # Nothing better can come; what comes is released.
                self._finish(uid, now)
        self._nothing(peer, uid, now)

    def _on_renewed(self, peer: _Peer, fields: dict[str, Any], now: float) -> None:
        for claim_id in fields["alive"]:
            held = self._held.get((peer.address, claim_id))
            if held is not None:
                held.expires_at = peer.renewed_at + peer.lease
        for claim_id in fields["ended"]:
            held = self._held.get((peer.address, claim_id))
            if held is not None and not held.lost:
                held.lost = True
                logger.warning("the claim on %s at %s has ended there", held.claim.transfer_id, peer.address)

    def _on_released(self, peer: _Peer, fields: dict[str, Any], now: float) -> None:
        peer.expecting.pop(fields["claim_id"], None)

    def _on_pong(self, peer: _Peer, fields: dict[str, Any], now: float) -> None:
        if fields["engine_id"] != peer.engine_id:
            self._replaced(peer, fields["engine_id"], now)

    def _on_hello_first(self, peer: _Peer, fields: dict[str, Any], now: float) -> None:
        uid = fields["ticket"]
        peer.expecting.pop(uid, None)
        if fields["engine_id"] != peer.engine_id:
            self._replaced(peer, fields["engine_id"], now)
            return
        # The same server over a new connection, which libzmq made: the claims stand, and what was asked is asked again
        # behind a greeting.
        lookup = self._lookups.get(uid)
        if lookup is None or peer.state != "up" or peer.address in lookup.repeated:
            self._nothing(peer, uid, now)
            return
        lookup.repeated.add(peer.address)
        self._outbox.append((peer, self._hello, None))
        self._outbox.append((peer, lookup.message, uid))

    def _on_error(self, peer: _Peer, fields: dict[str, Any], now: float) -> None:
        logger.warning("the producer on %s answers with an error: %s", peer.address, fields["message"][:400])
        if fields["ticket"] is not None:
            peer.expecting.pop(fields["ticket"], None)
            self._nothing(peer, fields["ticket"], now)

    def _nothing(self, peer: _Peer, uid: int, now: float) -> None:
        """This peer has no (other) answer to the lookup."""
        lookup = self._lookups.get(uid)
        if lookup is not None:
            lookup.unanswered.discard(peer.address)
            if not lookup.unanswered:
                self._finish(uid, now)

    def _replaced(self, peer: _Peer, engine_id: str, now: float) -> None:
        """Another server answers on the address. Its welcome, refusal or silence ends the claims at the one before."""
        peer.engine_id = engine_id
        self._greet_again(peer, now)

    def _greet_again(self, peer: _Peer, now: float) -> None:
        self._answer_all(peer, now)
        if peer.state != "down":
            peer.state, peer.reason, peer.since = "connecting", "", now
        peer.hello_at = now

    def _refused(self, peer: _Peer, reason: str, engine_id: str | None, now: float) -> None:
        peer.engine_id = engine_id
        self._lose(peer)
        self._answer_all(peer, now)
        if peer.state != "refused":
            peer.state = "refused"
            peer.hello_at = now + REFUSED_AGAIN_S
            peer.ping_at = now + self._heartbeat
        peer.reason = reason
        if peer.warned_refusal != (engine_id, reason):
            peer.warned_refusal = (engine_id, reason)
            logger.warning("no KV comes from the producer on %s: %s", peer.address, reason)

    def _down(self, peer: _Peer, reason: str, now: float) -> None:
        # From here only a welcome or a refusal leads out, so an address that never answers is warned about once.
        logger.warning("the producer on %s is down: %s", peer.address, reason)
        peer.state, peer.reason = "down", reason
        peer.unanswered_pings, peer.probe_until = 0, None
        peer.hello_at = now
        self._lose(peer)
        self._answer_all(peer, now)

    def _answer_all(self, peer: _Peer, now: float) -> None:
        """Nobody is to wait for this peer any longer."""
        peer.expecting.clear()
        peer.waiting.clear()
        for uid in [uid for uid, lookup in self._lookups.items() if peer.address in lookup.unanswered]:
            self._nothing(peer, uid, now)

    def _lose(self, peer: _Peer, but: str | None = None) -> None:
        """The claims at this address are lost, except those at the server `but`."""
        count = 0
        for held in self._held.values():
            if held.claim.address == peer.address and held.claim.engine_id != but and not held.lost:
                held.lost = True
                count += 1
        if count:
            logger.warning("%d claims at %s are lost", count, peer.address)


def _check_address(address: str) -> None:
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match[1]) < 65536:
        raise ConfigError(f"producer {address[:200]!r} is not of the form host:port")
