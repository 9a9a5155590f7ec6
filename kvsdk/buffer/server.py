"""Serves a `LookupBuffer` to consumers over ZMQ."""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import zmq

from kvsdk.buffer.curve import ZAP_ENDPOINT, ServerCurve
from kvsdk.buffer.keys import PrefixKeys
from kvsdk.buffer.lookup import Claim, LookupBuffer
from kvsdk.buffer.wire import BUFFER_WIRE, VersionError, Wire
from kvsdk.errors import ConfigError, MismatchError, ProtocolError

logger = logging.getLogger("kvsdk.buffer")

# Seconds between two looks at the leases when no message comes: how late one may end that started meanwhile.
_TICK = 1.0
# A consumer that reconnects comes under a new name, so old names have to go. One that is forgotten says hello again.
_MAX_WELCOMED = 4096
_BATCH = 256


class BufferServer:
    """Answers consumers' messages from one background thread, and ends leases in time.

    Every message that decodes gets exactly one reply. What does not decode is counted (`counters["dropped"]`) and
    dropped; beyond twice the wire's limit libzmq cuts the connection before a message is in memory.

    Attributes:
        address: `host:port` as bound.
        port: as bound, also when 0 was asked for.
        engine_id: the one given and a random suffix, so that consumers notice a restart under the same name.
        error: the last unexpected exception in the thread, or None. It was logged; the thread goes on.
    """

    def __init__(
        self,
        buffer: LookupBuffer,
        *,
        bind: str,
        port: int,
        identity: dict[str, Any],
        check: Callable[[dict[str, Any]], None] = lambda theirs: None,
        wire: Wire = BUFFER_WIRE,
        curve: ServerCurve | None = None,
        engine_id: str = "",
    ):
        """Binds; `start` serves.

        Args:
            buffer: outlives the server; closing the server does not close it.
            bind: the IP address to listen on.
            port: 0 for any that is free.
            identity: what this server is (fingerprints, its workers' addresses); sent to each consumer.
            check: called with a consumer's identity in the server's thread; raises MismatchError to refuse it.
            wire: the messages.
            curve: keys, if the connections are to be encrypted.
            engine_id: a name for the logs of consumers.

        Raises:
            ConfigError: the address cannot be bound, or a key is not one.
            ProtocolError: `identity` does not fit a message.
        """
        self._buffer, self._check, self._wire, self._curve = buffer, check, wire, curve
        self.engine_id = f"{engine_id[:256]}/{secrets.token_hex(8)}"
        self.error: Exception | None = None
        self._welcome = wire.encode("welcome", engine_id=self.engine_id, identity=identity, lease=buffer.lease)
        self._counters = dict.fromkeys(("messages", "replies", "dropped", "rejected", "refused", "errors"), 0)
        self._welcomed: OrderedDict[bytes, None] = OrderedDict()
        self._handlers: dict[str, Callable[[bytes, dict[str, Any]], bytes]] = {
            "hello": self._on_hello,
            "find": self._on_find,
            "find_by_id": self._on_find_by_id,
            "renew": self._on_renew,
            "release": self._on_release,
            "ping": self._on_ping,
        }
        self._closing = threading.Event()
        self._context = zmq.Context()
        try:
            self._zap = self._bind_zap() if curve else None
            self._socket, self.address, self.port = self._bind(bind, port)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"kvsdk-buffer-server-{self.port}", daemon=True)

    def start(self) -> BufferServer:
        """Serve from a background thread; returns itself. Raises RuntimeError the second time, and after `close`."""
        if self._closing.is_set():
            raise RuntimeError("the lookup server is closed")
        self._thread.start()
        return self

    @property
    def counters(self) -> dict[str, int]:
        """Since the start: messages received, replies sent, messages dropped without a reply, messages answered with an
        error because of what they say (`rejected`), consumers refused, unexpected errors.
        """
        return dict(self._counters)

    def close(self, timeout: float = 2.0) -> None:
        """Stop serving and free the port. Returns within `timeout` seconds; twice is fine."""
        if not self._closing.is_set():
            self._closing.set()
            if self._thread.ident is None:
                # It was never started: the sockets are still this thread's to close.
                self._release()
            else:
                # Its thread may have seen that by itself, and ended.
                with contextlib.suppress(OSError):
                    self._wake_w.send(b"x")
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if self._thread.is_alive():
            logger.error("the lookup server on %s did not stop within %.1f s", self.address, timeout)
            return
        self._wake_w.close()

    # -- in the constructor

    def _bind(self, bind: str, port: int) -> tuple[zmq.Socket, str, int]:
        host = f"[{bind}]" if ":" in bind else bind
        router = self._context.socket(zmq.ROUTER)
        router.linger = 0
        router.maxmsgsize = 2 * self._wire.max_bytes
        router.ipv6 = ":" in bind
        if self._curve:
            self._curve.apply(router)
        try:
            router.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as e:
            if e.errno == errno.EADDRINUSE:
                advice = "it is in use; end the process that listens there, or set kv_port to a free port"
            elif e.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
                advice = "no interface of this host has the address; set kv_ip to one that has"
            else:
                advice = f"{e.strerror}; set kv_ip to an IP address of this host and kv_port to a free port"
            raise ConfigError(f"cannot listen on {host}:{port}: {advice}") from e
        bound = int(router.last_endpoint.rpartition(b":")[2])
        return router, f"{host}:{bound}", bound

    def _bind_zap(self) -> zmq.Socket:
        zap = self._context.socket(zmq.REP)
        zap.linger = 0
        zap.bind(ZAP_ENDPOINT)
        return zap

    # -- in the thread

    def _run(self) -> None:
        try:
            poller = zmq.Poller()
            for source in filter(None, (self._socket, self._zap, self._wake_r)):
                poller.register(source, zmq.POLLIN)
            while not self._closing.is_set():
                try:
                    ready = dict(poller.poll(1000 * self._until_next_lease()))
                    if self._zap in ready:
                        self._zap.send_multipart(self._curve.answer(self._zap.recv_multipart()))
                    if self._socket in ready:
                        self._receive()
                    self._buffer.expire()
                except Exception as e:  # noqa: BLE001 - whatever it is, other consumers are to be served
                    self._failed(e)
                    # An error that comes back at once must not turn the thread into a busy loop.
                    self._closing.wait(0.01)
        finally:
            self._release()

    def _release(self) -> None:
        self._context.destroy(linger=0)
        self._wake_r.close()

    def _until_next_lease(self) -> float:
        deadline = self._buffer.next_deadline()
        return _TICK if deadline is None else min(_TICK, max(0.0, deadline - self._buffer.clock()))

    def _receive(self) -> None:
        for _ in range(_BATCH):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._counters["messages"] += 1
            reply = self._answer(frames)
            if reply is not None:
                # A ROUTER never blocks: what cannot be delivered is dropped, and the consumer's deadline ends its wait.
                self._counters["replies"] += 1
                self._socket.send_multipart([frames[0], reply], zmq.NOBLOCK)

    def _answer(self, frames: list[bytes]) -> bytes | None:
        try:
            if len(frames) != 2:
                raise ProtocolError(f"{len(frames) - 1} frames, not 1")
            kind, fields = self._wire.decode(frames[1])
            handler = self._handlers.get(kind)
            if handler is None:
                raise ProtocolError(f"{kind} is not for a server")
        except VersionError as e:
            if e.kind == "hello":
                return self._refuse("protocol", e.ours, e.theirs)
            return self._drop(e)
        except ProtocolError as e:
            return self._drop(e)
        try:
            return handler(frames[0], fields)
        except Exception as e:  # noqa: BLE001 - each message gets its reply, whatever fails
            if isinstance(e, ProtocolError):
                self._counters["rejected"] += 1
                logger.debug("%s: %s", kind, e)
            else:
                self._failed(e)
            return self._wire.encode("error", message=f"{kind}: {e!r}"[:1000], ticket=fields.get("ticket"))

    def _drop(self, error: ProtocolError) -> None:
        self._counters["dropped"] += 1
        logger.debug("dropped a message: %s", error)

    def _failed(self, error: Exception) -> None:
        self._counters["errors"] += 1
        self.error = error
        logger.error("the lookup server on %s failed at a message and goes on", self.address, exc_info=error)

    def _on_hello(self, peer: bytes, fields: dict[str, Any]) -> bytes:
        self._welcomed.pop(peer, None)
        try:
            self._check(fields["identity"])
        except MismatchError as e:
            return self._refuse(e.field, e.ours, e.theirs)
        self._welcomed[peer] = None
        if len(self._welcomed) > _MAX_WELCOMED:
            self._welcomed.popitem(last=False)
        return self._welcome

    def _refuse(self, field: str, ours: Any, theirs: Any) -> bytes:
        self._counters["refused"] += 1
        logger.warning("refused a consumer: %s", MismatchError(field, ours, theirs))
        return self._wire.encode(
            "refused", engine_id=self.engine_id, field=field, ours=repr(ours)[:1000], theirs=repr(theirs)[:1000]
        )

    def _on_find(self, peer: bytes, fields: dict[str, Any]) -> bytes:
        if peer not in self._welcomed:
            return self._hello_first(fields["ticket"])
        keys = PrefixKeys.from_wire(fields["keys"])
        return self._found(fields["ticket"], self._buffer.find(keys, fields["min_tokens"]))

    def _on_find_by_id(self, peer: bytes, fields: dict[str, Any]) -> bytes:
        if peer not in self._welcomed:
            return self._hello_first(fields["ticket"])
        keys = None if fields["keys"] is None else PrefixKeys.from_wire(fields["keys"])
        transfer_id = fields["transfer_id"]
        claim = self._buffer.claim(transfer_id, keys, fields["min_tokens"])
        # In this order: an offer that comes in between is heard of, and asked for once more.
        heard = claim is not None or self._buffer.standing(transfer_id) or self._buffer.over(transfer_id)
        return self._found(fields["ticket"], claim, heard)

    def _found(self, ticket: int, claim: Claim | None, heard: bool = True) -> bytes:
        if claim is None:
            return self._wire.encode("found", ticket=ticket, claim=None, heard=heard)
        values = {
            "claim_id": claim.claim_id,
            "transfer_id": claim.transfer_id,
            "num_tokens": claim.num_tokens,
            "exclusive": claim.exclusive,
            "generation": claim.generation,
        }
        return self._wire.encode("found", ticket=ticket, claim=values, heard=True)

    # Renewing, releasing and pinging need no hello: a consumer whose connection broke keeps what it holds, and only its
    # holder knows the id of a claim.

    def _on_renew(self, peer: bytes, fields: dict[str, Any]) -> bytes:
        alive = self._buffer.renew(fields["claim_ids"])
        ended = list(set(fields["claim_ids"]).difference(alive))
        return self._wire.encode("renewed", alive=alive, ended=ended)

    def _on_release(self, peer: bytes, fields: dict[str, Any]) -> bytes:
        known = self._buffer.release(fields["claim_id"], fields["used"])
        return self._wire.encode("released", claim_id=fields["claim_id"], known=known)

    def _on_ping(self, peer: bytes, fields: dict[str, Any]) -> bytes:
        return self._wire.encode("pong", engine_id=self.engine_id)

    def _hello_first(self, ticket: int) -> bytes:
        return self._wire.encode("hello_first", engine_id=self.engine_id, ticket=ticket)
