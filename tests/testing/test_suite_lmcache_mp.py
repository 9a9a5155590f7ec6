"""LMCacheConnector passes the suite over LMCache's own multi-process server, `lmcache server`."""

import pathlib
import time

import pytest
import test_suite_lmcache as over_lm
from support.lmcache_servers import MPServer, needs_lmcache
from test_suite_lmcache import connector, stored

from kvsdk.connectors.lmcache import mp_client
from kvsdk.testing.capabilities import LMCACHE_MP as capabilities
from kvsdk.testing.suite import *  # noqa: F403

pytestmark = needs_lmcache

server_url = ""


@pytest.fixture(scope="module", autouse=True)
def mp_server():
    global server_url
    with MPServer() as server:
        server_url = server.url
        yield


def options(place):
    return over_lm.options(place) | {"remote_url": server_url}


def damage(place):
    """Flip a bit of the two chunks that were stored last. The server never replaces what it has, so it is told to drop
    everything first."""
    notes = stored[pathlib.Path(place.folder).name]
    if not notes:
        return
    model, num_bytes = notes[0].model, notes[0].num_bytes
    assert all(note.model == model for note in notes), "of one rank"
    port = int(server_url.rpartition(":")[2])
    server = mp_client.MPServer("127.0.0.1", port, model=model, value_bytes=num_bytes, slots=1, timeout=5.0)
    try:
        assert server.wait_known(10.0)
        connection = server.connect()
        contents = {}
        for note in notes:
            content = contents[note.name] = bytearray(num_bytes)
            assert connection.get(note.name, [memoryview(content)], time.monotonic() + 5.0)
        for note in notes[-2:]:
            contents[note.name][-1] ^= 1
        server._session.ask("clear", True).result(5.0)
        for name, content in contents.items():
            assert connection.put(name, [memoryview(content)], time.monotonic() + 5.0)
        connection.close()
    finally:
        server.close(time.monotonic() + 5.0)


__all__ = ["capabilities", "connector", "damage", "mp_server", "options"]
