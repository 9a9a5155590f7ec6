"""LMCacheConnector passes the suite over LMCache's own server, `python -m lmcache.v1.server`."""

import importlib.util
import os
import socket
import subprocess
import sys
import time

import pytest
import test_suite_lmcache as over_lm
from test_suite_lmcache import capabilities, connector, damage, options

from kvsdk.testing.suite import *  # noqa: F403

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lmcache") is None, reason="lmcache is not installed")


@pytest.fixture(scope="module", autouse=True)
def lm_server():
    with socket.create_server(("127.0.0.1", 0)) as one:
        over_lm.server_port = one.getsockname()[1]
    command = [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(over_lm.server_port)]
    environ = {**os.environ, "LMCACHE_TRACK_USAGE": "false"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", over_lm.server_port), 1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "the server did not come up"
                time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


__all__ = ["capabilities", "connector", "damage", "lm_server", "options"]
