"""Wakes a thread that polls sockets."""

from __future__ import annotations

import contextlib
import socket


class Waker:
    """Wakes a thread that polls, from any other one."""

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)

    def wake(self) -> None:
        # Full or closed: the thread will look, or it has ended.
        with contextlib.suppress(OSError):
            self._writer.send(b"x")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.reader.recv(4096)

    def close(self) -> None:
        self.reader.close()
        self._writer.close()
