"""LMCache's own servers, as processes. A test that needs them is marked with `needs_lmcache`."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

needs_lmcache = pytest.mark.skipif(importlib.util.find_spec("lmcache") is None, reason="lmcache is not installed")

START_TIMEOUT = 120.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


class RealServer:
    """A server that can be killed, frozen and started again on its port. Use it in `with`."""

    scheme = ""

    def __init__(self, *options: str, wait: bool = True) -> None:
        self.port = free_port()
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.start(wait=wait)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        raise NotImplementedError

    def start(self, *, wait: bool = True) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.upper().startswith("LMCACHE")}
        environ |= {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"}
        self._environ = environ
        self._run()
        if wait:
            self.wait()

    def _run(self) -> None:
        self._process = subprocess.Popen(
            self._command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self._environ
        )

    def wait(self) -> None:
        """Until it takes connections."""
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, "the server did not come up"
                time.sleep(0.1)
                if self._process.poll() is not None:
                    self._run()  # as a supervisor does: its port may not be free yet

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


class LMServer(RealServer):
    """`python -m lmcache.v1.server`."""

    scheme = "lm"

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(self.port)]


class MPServer(RealServer):
    """`lmcache server`, as it is unless told otherwise, but for what it cannot start without and its metrics."""

    scheme = "tcp"

    def _command(self) -> list[str]:
        run = "from lmcache.cli.main import main; main()"
        ports = ["--port", str(self.port), "--http-port", str(free_port())]
        needed = ["--eviction-policy", "LRU", "--l1-size-gb", "0.5", "--disable-observability", *self._options]
        return [sys.executable, "-c", run, "server", "--host", "127.0.0.1", *ports, *needed]
