"""The client of LMCache's `lm://` server: a TCP connection for each thread, a deadline on every socket operation."""

from __future__ import annotations

import hashlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

from kvsdk.config import format_address
from kvsdk.connectors.lmcache.chunks import COMING_BYTES, Incoming, Outgoing, coming, is_coming
from kvsdk.connectors.lmcache.client import Connection, Damaged, Server, Stalled
from kvsdk.connectors.lmcache.lm_protocol import REPLY_BYTES, Command, decode_reply, encode_request
from kvsdk.errors import DeadlineExceeded, KVError, PeerGone, ProtocolError

logger = logging.getLogger("kvsdk.lmcache")

AHEAD = 4
"""Pieces that are asked for before the first of them has come: the server takes up the next request when it has handed
the last answer to its kernel."""

MAX_HEADER_BYTES = 2**22
"""A chunk of a million blocks. What is longer is none, and not received."""

_DAMAGED = b"kvsdkLM1 damage"

HEALTH_KEY = "kvsdk@1@0@0@uint8"
"""The server parses a key even where none is asked for."""


class LMConnection(Connection):
    """One TCP connection to the server.

    When the payload of a PUT is cut short, LMCache's server keeps nothing under the key and says for ever that it has
    it. So the header of a chunk, of a few hundred bytes, is sent when all pieces have been: that it can be read is what
    says that the chunk is there. `condemn` puts a mark in its place.

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
            raise Stalled(f"{self.address} took no connection within {timeout:.3g} s") from error
        except OSError as error:
            raise PeerGone(f"nobody answers on {self.address} ({error.strerror or error})") from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel keeps the time. With Python's own time-outs an operation polls first and ends with each segment,
        # which takes the interpreter's lock hundreds of times a chunk from the threads that do other work.
        self._socket.settimeout(None)
        # Closed by a reset: LMCache's server binds its port without SO_REUSEADDR, so that after it was killed no other
        # one can be started there while its side of a connection waits for the end of it.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))

    def exists(self, name: str, deadline: float) -> bool:
        return self._value(name, deadline) not in (None, _DAMAGED)

    def health(self, deadline: float) -> None:
        """Returns once the server has answered."""
        self._send([encode_request(Command.HEALTH, HEALTH_KEY)], deadline)
        if self._reply(deadline) is None:
            raise ProtocolError(f"{self.address} says that it is not well")

    def get(self, chunk: Incoming, deadline: float) -> bool:
        header = self._value(chunk.name, deadline)
        if header is None or header == _DAMAGED:
            return False
        if len(header) != len(chunk.header):
            raise ProtocolError(f"{self.address} has {len(header)} bytes under {chunk.name}, not {len(chunk.header)}")
        chunk.header[:] = header
        chunk.open()
        names = [piece_name(chunk.name, index, one) for index, one in enumerate(chunk.digests)]
        asked = 0
        for index, piece in enumerate(chunk.pieces):
            ask = names[asked : index + AHEAD]
            if ask:
                self._send([b"".join(encode_request(Command.GET, name) for name in ask)], deadline)
                asked += len(ask)
            length = self._reply(deadline)
            if length != len(piece):
                raise ProtocolError(f"{self.address} has {length or 'no'} bytes of piece {index} of {chunk.name}")
            self._receive_value(names[index], piece, deadline)
            chunk.check(index)
        return True

    def put(self, chunk: Outgoing, deadline: float) -> bool:
        """Store a chunk.

        A PUT has no reply. The server reads the next request of a connection when it is done with the one before, so
        an EXIST behind it answers for it.
        """
        for index, (hashed, piece) in enumerate(chunk.pieces()):
            name = piece_name(chunk.name, index, hashed)
            self._send([encode_request(Command.PUT, name, len(piece)), piece], deadline)
        header = chunk.header()
        put, asked = encode_request(Command.PUT, chunk.name, len(header)), encode_request(Command.EXIST, chunk.name)
        self._send([put + header + asked], deadline)
        return self._reply(deadline) is not None

    def condemn(self, name: str, deadline: float) -> None:
        self._send([encode_request(Command.PUT, name, len(_DAMAGED)) + _DAMAGED], deadline)

    def announce(self, names: Sequence[str], deadline: float) -> None:
        # Without asking whether the server keeps them: nothing is lost with them but a load.
        value = coming(time.time())
        parts = [part for name in names for part in (encode_request(Command.PUT, name, len(value)), value)]
        self._send([b"".join(parts)], deadline)

    def is_announced(self, name: str, deadline: float) -> bool:
        said = self._value(name, deadline)
        return said is not None and len(said) == COMING_BYTES and is_coming(said, time.time())

    def _value(self, name: str, deadline: float) -> bytearray | None:
        """A short value."""
        self._send([encode_request(Command.GET, name)], deadline)
        length = self._reply(deadline)
        if length is None:
            return None
        if length > MAX_HEADER_BYTES:
            raise ProtocolError(f"{self.address} has {length} bytes under {name}, which is no header")
        value = bytearray(length)
        self._receive_value(name, memoryview(value), deadline)
        return value

    def _receive_value(self, name: str, into: memoryview, deadline: float) -> None:
        try:
            self._receive(into, deadline)
        except PeerGone as error:
            raise Damaged(f"{self.address} does not have all of what it says to have under {name}: {error}") from error

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
                # The server sends a header, then the payload; a delayed acknowledgement of the one would hold up the
                # other for 40 ms.
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                received = self._socket.recv_into(buffer, 0, socket.MSG_WAITALL)
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
            return Stalled(f"no byte from {self.address} within {self._timeout:.3g} s")
        return PeerGone(f"the connection to {self.address} is lost ({error.strerror or error})")

    def abort(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            logger.debug("%s: %s", self.address, error)

    def close(self) -> None:
        self._socket.close()


def piece_name(name: str, index: int, hashed: bytes) -> str:
    """The name of a piece of the chunk `name`, by its place and its digest."""
    model, world, worker, _, dtype = name.split("@")
    content = name.encode() + index.to_bytes(4, "little") + hashed
    hashed_all = hashlib.blake2b(content, digest_size=16, person=b"kvsdk.piece/1").hexdigest()
    return "@".join((model, world, worker, hashed_all, dtype))


class LMServer(Server):
    """An `lm://` server."""

    def __init__(self, host: str, port: int, *, timeout: float, on_state: Callable[[bool], None] = lambda up: None):
        self._look = threading.Event()
        self._connection: LMConnection | None = None
        # By name it is looked for in the thread that watches, since the system's look-up knows no deadline.
        self._numeric = host
        super().__init__(host, port, timeout=timeout, on_state=on_state)

    def _ask(self) -> None:
        """Over a new connection where there is none or where it is lost."""
        while True:
            fresh = self._connection is None
            try:
                if self._connection is None:
                    self._connection = self._find()
                    if self._stop.is_set():  # `_abort` has come before there was this connection
                        raise PeerGone("the worker closes")
                self._connection.health(time.monotonic() + self.timeout)
                return
            except KVError as error:
                self._disconnect()
                self.lost()
                if not isinstance(error, PeerGone) or fresh or self._stop.is_set():
                    raise

    def _find(self) -> LMConnection:
        """A connection to the first of the host's addresses that takes one."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise PeerGone(f"{self.host} has no address ({error.strerror or error})") from error
        for *_, (numeric, *_) in found:
            try:
                connection = LMConnection(numeric, self.port, self.timeout)
            except (DeadlineExceeded, PeerGone) as error:
                last: KVError = error
                continue
            self._numeric = numeric
            return connection
        raise last

    def _pause(self, seconds: float) -> None:
        self._look.wait(seconds)
        self._look.clear()

    def _wake(self) -> None:
        self._look.set()

    def _connect(self, timeout: float) -> LMConnection:
        return LMConnection(self._numeric, self.port, timeout)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _abort(self) -> None:
        connection = self._connection
        if connection is not None:
            connection.abort()
