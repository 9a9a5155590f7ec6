"""LMCacheConnector passes the suite over LMCache's own `lm://` server; where lmcache is missing, over one that speaks
its protocol.
"""

import dataclasses
import importlib.util
import pathlib
import time

import pytest
import torch
from support.lm_server import LMServer
from support.lmcache_servers import LMServer as LMCacheLMServer

from kvsdk.connectors.lmcache import LMCacheConnector, LMCacheWorker
from kvsdk.connectors.lmcache.chunks import ChunkFormat, Incoming, Outgoing
from kvsdk.connectors.lmcache.lm_client import LMConnection
from kvsdk.connectors.lmcache.saving import Saver
from kvsdk.testing.capabilities import LMCACHE_LM as capabilities
from kvsdk.testing.suite import *  # noqa: F403

server_port = 0


@dataclasses.dataclass(frozen=True)
class Note:
    name: str
    form: ChunkFormat
    model: str


stored: dict[str, list[Note]] = {}


class Worker(LMCacheWorker):
    """Ends a save when the server has the chunks, which the suite waits for, and notes their names."""

    def register(self, kv_caches, layout):
        super().register(kv_caches, layout)
        if self._saver is not None:
            self._saver.__class__ = NotingSaver
            self._saver.notes = stored.setdefault(self.context.options.model_id, [])

    def save(self, task):
        done = task.done

        def when_stored():
            self._saver.wait_stored(time.monotonic() + 5.0)
            done()

        task.done = when_stored
        super().save(task)


class NotingSaver(Saver):
    def _submit(self, name, partial):
        self.notes.append(Note(name, self._form, self._names.model))
        super()._submit(name, partial)

    def wait_stored(self, deadline):
        with self._changed:
            self._changed.wait_for(lambda: not self._pending, max(0.0, deadline - time.monotonic()))


class connector(LMCacheConnector):
    worker_half = Worker


@pytest.fixture(scope="module", autouse=True)
def lm_server():
    global server_port
    with LMCacheLMServer() if importlib.util.find_spec("lmcache") else LMServer() as server:
        server_port = server.port
        yield


def options(place):
    # The server outlives a test: what is stored for one is another model's for the next.
    return {
        "remote_url": f"lm://127.0.0.1:{server_port}",
        "chunk_size": 4,
        "max_local_cpu_size": 0.01,
        "lookup_timeout": 5.0,  # a server beside other tests has to wait for its turn
        "model_id": pathlib.Path(place.folder).name,
    }


def damage(place):
    """Flip a bit of the two chunks that were stored last. Two, since of a prompt of whole chunks the last one saves
    nothing that the suite counts: vLLM computes its last token anyway."""
    connection = LMConnection("127.0.0.1", server_port, 5.0)
    for note in stored[pathlib.Path(place.folder).name][-2:]:
        damage_one(note, connection)
    connection.close()


def damage_one(note, connection):
    """Store the chunk again, with a bit that changes after its digest was made."""
    payload = torch.zeros(note.form.payload_bytes, dtype=torch.uint8)
    incoming = Incoming(note.form, note.name, payload)
    assert connection.get(incoming, time.monotonic() + 5.0)
    assert connection.put(FlippedAfter(note.form, note.name, incoming.parts, payload), time.monotonic() + 5.0)


class FlippedAfter(Outgoing):
    def pieces(self):
        for told, piece in super().pieces():
            piece[-1] ^= 1
            yield told, piece


__all__ = ["capabilities", "connector", "damage", "lm_server", "options"]
