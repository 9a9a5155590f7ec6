"""LMCacheConnector passes the suite over LMCache's own multi-process server, `lmcache server`."""

import pathlib
import time

import pytest
import test_suite_lmcache as over_lm
import torch
from support.lmcache_servers import MPServer, needs_lmcache
from test_suite_lmcache import connector, stored

from kvsdk.connectors.lmcache import mp_client
from kvsdk.connectors.lmcache.chunks import Incoming, Outgoing
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
    model, form = notes[0].model, notes[0].form
    assert all(note.model == model for note in notes), "of one rank"
    port, value_bytes = int(server_url.rpartition(":")[2]), form.header_bytes + form.payload_bytes
    server = mp_client.MPServer("127.0.0.1", port, model=model, value_bytes=value_bytes, slots=1, timeout=5.0)
    try:
        assert server.wait_known(10.0)
        connection = server.connect()
        contents = {}
        for note in notes:
            payload = torch.zeros(form.payload_bytes, dtype=torch.uint8)
            contents[note.name] = Incoming(form, note.name, payload), payload
            assert connection.get(contents[note.name][0], time.monotonic() + 5.0)
        last = {note.name for note in notes[-2:]}
        server._session.ask("clear", True).result(5.0)
        for name, (incoming, payload) in contents.items():
            one = (over_lm.FlippedAfter if name in last else Outgoing)(form, name, incoming.parts, payload)
            assert connection.put(one, time.monotonic() + 5.0)
        connection.close()
    finally:
        server.close(time.monotonic() + 5.0)


__all__ = ["capabilities", "connector", "damage", "mp_server", "options"]
