"""An `lm://` server that speaks LMCache's protocol byte for byte, with faults; it shares nothing with the client under
test. It runs in threads of its own.
"""

from __future__ import annotations

import socket
import struct
import threading
import time

REQUEST = struct.Struct("=iiiiiiiii150s")
REPLY = struct.Struct("=iiiiiiiii")
PUT, GET, EXIST, LIST, HEALTH = 1, 2, 3, 4, 5


class LMServer:
    """A server and its faults, which may be set at any time.

    Attributes:
        stored: key to (format, dtype, shape, payload).
        requests: (command, key) of every request, in order.
        frozen: while it is set nothing is answered; connections are still taken, as the kernel does for a stopped one.
        cut_after: bytes of a GET's payload after which the connection is closed; None for never.
        cuts: how many payloads are cut before that ends; None for all.
        capacity: bytes that fit; a PUT past them closes the connection, as LMCache's does when it is out of memory.
        delay: seconds before each reply.
        mute: commands that are not answered, while others are.
    """

    def __init__(self, port: int = 0):
        self.stored: dict[str, tuple[int, int, tuple[int, ...], bytes]] = {}
        self.requests: list[tuple[int, str]] = []
        self.frozen = threading.Event()
        self.cut_after: int | None = None
        self.cuts: int | None = None
        self.capacity: int | None = None
        self.delay = 0.0
        self.mute: set[int] = set()
        self.port = port
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.start()

    def start(self) -> None:
        """Listen; again, on the same port, after `close`."""
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"lm://127.0.0.1:{self.port}"

    def count(self, command: int) -> int:
        return sum(1 for one, _ in list(self.requests) if one == command)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._closed.is_set():
                    connection.close()
                    return
                self._connections.add(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            while (header := _receive(connection, REQUEST.size)) is not None:
                while self.frozen.is_set() and not self._closed.is_set():
                    time.sleep(0.01)
                if not self._answer(connection, *REQUEST.unpack(header)):
                    return
        except OSError:
            return
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _answer(self, connection, command, length, form, dtype, location, *rest) -> bool:
        *shape, padded = rest
        key = padded.decode().strip()
        _, world, worker, hashed, _ = key.split("@")
        int(world), int(worker), int(hashed, 16)
        self.requests.append((command, key))
        while command in self.mute and not self._closed.is_set():
            time.sleep(0.01)
        if self.delay and self._closed.wait(self.delay):
            return False
        if command == PUT:
            payload = _receive(connection, length)
            used = sum(len(one[3]) for one in self.stored.values())
            if self.capacity is not None and used + length > self.capacity:
                return False
            # LMCache's server keeps what a cut payload has become, which is nothing, and says that it has it.
            self.stored[key] = (form, dtype, tuple(shape), b"" if payload is None else bytes(payload))
            return payload is not None
        elif command == GET and key in self.stored:
            form, dtype, shape, payload = self.stored[key]
            connection.sendall(REPLY.pack(200, shape[0], form, dtype, *shape, 0))
            if not payload:
                return False
            if self.cut_after is not None and self.cuts != 0 and len(payload) > self.cut_after:
                self.cuts = None if self.cuts is None else self.cuts - 1
                connection.sendall(payload[: self.cut_after])
                return False
            connection.sendall(payload)
        elif command in (GET, EXIST, HEALTH):
            found = command == HEALTH or (command == EXIST and key in self.stored)
            connection.sendall(REPLY.pack(200 if found else 400, 0, 1, 1, 0, 0, 0, 0, 0))
        return True

    def drop_connections(self) -> None:
        """Close every connection, as a server that is killed does."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        """As if it were killed."""
        self._closed.set()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            self._listener.close()
        self._listener.close()
        self.drop_connections()
        for thread in list(self._threads):
            thread.join(2.0)

    def __enter__(self) -> LMServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _receive(connection: socket.socket, count: int) -> bytearray | None:
    data = bytearray()
    while len(data) < count:
        more = connection.recv(min(1 << 20, count - len(data)))
        if not more:
            return None
        data += more
    return data
