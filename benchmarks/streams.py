"""Clients of streamed answers in a process of their own, which notes when each token came.

    echo '{"port": 8000, "bodies": ["{...}", ...], "seconds": 60}' | python -m benchmarks.streams

prints `running` once every stream has had its first token, and at the end a JSON object: for each stream the times
(`time.monotonic`, seconds) of its events, and what failed. Nothing else runs in this process, so that no other work of
the benchmark delays the times.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time

MARK = b"data: {"
ERROR = b'data: {"error'


class Events:
    """Finds the events of one stream in what arrives, however it is cut, and notes when each began to be there."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.head = b""
        self.failed = False
        self._rest = b""

    def feed(self, data: bytes, now: float) -> None:
        if len(self.head) < 400:
            self.head += data[:400]
        whole = self._rest + data
        self.failed |= ERROR in whole
        self.times += [now] * (whole.count(MARK) - self._rest.count(MARK))
        self._rest = whole[1 - len(ERROR) :]

    @property
    def fault(self) -> str | None:
        if not self.head.startswith(b"HTTP/1.1 200"):
            return f"answered {self.head[:300]!r}"
        return "an error in the stream" if self.failed else None


def follow(port: int, bodies: list[str], seconds: float) -> dict[str, object]:
    """Ask for all at once and read until each has ended, or for so many seconds."""
    deadline = time.monotonic() + seconds
    selector = selectors.DefaultSelector()
    streams = [Events() for _ in bodies]
    open_streams = set()
    for body, events in zip(bodies, streams, strict=True):
        connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        payload = body.encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
        )
        connection.sendall(head.encode() + payload)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, events)
        open_streams.add(connection)
    said = False
    while open_streams and (left := deadline - time.monotonic()) > 0:
        for key, _ in selector.select(left):
            now = time.monotonic()
            data = key.fileobj.recv(65536)
            if data:
                key.data.feed(data, now)
                continue
            selector.unregister(key.fileobj)
            key.fileobj.close()
            open_streams.discard(key.fileobj)
        if not said and all(events.times for events in streams):
            said = True
            print("running", flush=True)
    faults = [f"stream {i}: {events.fault}" for i, events in enumerate(streams) if events.fault]
    if open_streams:
        faults.append(f"{len(open_streams)} streams had not ended after {seconds:.0f} s")
    return {"times": [[round(at, 6) for at in events.times] for events in streams], "faults": faults}


def main() -> int:
    spec = json.loads(sys.stdin.readline())
    print(json.dumps(follow(spec["port"], spec["bodies"], spec["seconds"])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
