"""The client of LMCache's multi-process server, and a worker half over it; the server may die or freeze at any time."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from support import lm_chunks
from support.lm_worker import BLOCK, Worker
from support.lmcache_servers import MPServer as RealServer
from support.lmcache_servers import needs_lmcache

from kvsdk.connectors.lmcache import LMCacheConnector, mp_client
from kvsdk.connectors.lmcache.client import Job, Pool
from kvsdk.connectors.lmcache.mp_client import MPServer
from kvsdk.errors import ConfigError, DeadlineExceeded, PeerGone
from kvsdk.testing import Prompt, Subject, World
from kvsdk.testing.capabilities import LMCACHE_MP

pytestmark = [needs_lmcache, pytest.mark.usefixtures("no_thread_left")]

SIZE, CHUNK = 5000, 8


@pytest.fixture(scope="module")
def servers():
    """One as its users start it; one that is small, evicts nothing, and is killed and frozen; one that cannot be used.
    They boot side by side, in seconds."""
    with contextlib.ExitStack() as stack:
        options = {
            "real": [],
            "own": ["--eviction-policy", "noop", "--l1-size-gb", "0.02"],
            "refused": ["--supported-transfer-mode", "engine_driven"],
        }
        started = {name: stack.enter_context(RealServer(*more, wait=False)) for name, more in options.items()}
        for server in started.values():
            server.wait()
        yield started


@pytest.fixture
def real(servers):
    return servers["real"]


@pytest.fixture
def own(servers):
    yield servers["own"]
    servers["own"].thaw()


def soon(seconds=10.0):
    return time.monotonic() + seconds


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@contextlib.contextmanager
def watched(real, *, timeout=5.0, slots=4, value_bytes=SIZE, model=None):
    server = MPServer(
        "127.0.0.1", real.port, model=model or secrets.token_hex(4), value_bytes=value_bytes + 4096, slots=slots,
        timeout=timeout,
    )  # fmt: skip
    try:
        server.wait_known(20.0)
        yield server
    finally:
        server.close(soon(5.0))


def value():
    return secrets.token_bytes(SIZE)


def get(connection, name, size=SIZE):
    return lm_chunks.get(connection, name, size, soon())


def put(connection, name, content):
    return lm_chunks.put(connection, name, content, soon())


def segments():
    return {name for name in os.listdir("/dev/shm") if name.startswith("kvsdk-")}


# ---- the client


def test_what_was_put_is_got_back_byte_for_byte(real):
    with watched(real) as server:
        connection = server.connect()
        content = value()
        assert not connection.exists("a", soon())
        assert get(connection, "a") is None
        assert put(connection, "a", content)
        assert connection.exists("a", soon())
        assert get(connection, "a") == content
        assert get(connection, "b") is None
        connection.close()


def test_every_worker_of_a_model_finds_it_and_no_other_does(real):
    with (
        watched(real, model="one") as server,
        watched(real, model="one") as same,
        watched(real, model="other") as other,
    ):
        content = value()
        connections = [each.connect() for each in (server, same, other)]
        assert put(connections[0], "a", content)
        assert get(connections[1], "a") == content
        assert get(connections[2], "a") is None
        for connection in connections:
            connection.close()


def test_two_put_the_same_at_once(real):
    with watched(real) as server:
        content, kept = value(), []

        def put_one():
            connection = server.connect()
            kept.append(put(connection, "a", content))
            connection.close()

        threads = [threading.Thread(target=put_one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert kept == [True] * 4
        connection = server.connect()
        assert get(connection, "a") == content
        connection.close()


def test_word_of_what_is_coming_spreads_and_ages(real, monkeypatch):
    with watched(real) as server:
        connection = server.connect()
        assert not connection.is_announced("a", soon())
        connection.announce(["a", "b"], soon())
        wait_until(lambda: connection.is_announced("a", soon()) and connection.is_announced("b", soon()))
        assert not connection.is_announced("c", soon())
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 20.0)
        assert not connection.is_announced("a", soon())
        connection.close()


def test_nothing_is_left_in_shared_memory_whoever_dies(real):
    before = segments()
    with watched(real):
        assert segments() == before, "it must be gone while it is in use, since nobody may be there to remove it"


def test_a_server_that_keeps_nothing_more_is_told_from_one_that_does(own):
    with watched(own, value_bytes=2**22) as server:
        server._session.ask("clear", True).result(5.0)
        connection = server.connect()
        content = bytes(2**22 - 4096)
        kept = [put(connection, f"{i}", content) for i in range(8)]
        assert kept[0]
        assert not kept[-1]
        assert get(connection, "0", len(content)) == content
        connection.close()
        server._session.ask("clear", True).result(5.0)


def test_a_server_without_the_transfer_it_takes_is_refused_by_name(servers, monkeypatch):
    monkeypatch.setattr(mp_client, "REGISTER_TIMEOUT", 1.0)
    with watched(servers["refused"]) as server:
        wait_until(lambda: server.refused is not None, 20.0)
        assert isinstance(server.refused, ConfigError)
        assert "--supported-transfer-mode lmcache_driven or auto" in str(server.refused)
        assert not server.up


# ---- faults


class Ask(Job):
    def __init__(self):
        self.ended, self.said = threading.Event(), None

    def run(self, connection):
        self.said = connection.exists("a", soon(20.0))
        self.ended.set()

    def fail(self, error):
        self.said = error
        self.ended.set()

    def answer(self, seconds=20.0):
        assert self.ended.wait(seconds), "no answer"
        return self.said


def test_a_frozen_server_is_waited_for_once_and_found_again(own):
    with watched(own, timeout=1.0) as server:
        pool = Pool(server, "test", 2)

        def ask():
            job = Ask()
            pool.submit(job)
            return job

        try:
            assert ask().answer() is False
            own.freeze()
            began = time.monotonic()
            assert isinstance(ask().answer(), (DeadlineExceeded, PeerGone))
            assert time.monotonic() - began < 3.0
            assert not server.up
            began = time.monotonic()
            for _ in range(10):
                assert isinstance(ask().answer(), PeerGone)
            assert time.monotonic() - began < 1.5
            own.thaw()
            wait_until(lambda: server.up)
            assert ask().answer() is False
        finally:
            own.thaw()
            pool.close(soon(5.0))


def test_a_slot_that_a_late_answer_may_write_to_is_used_again_only_after_it(own):
    with watched(own, timeout=30.0, slots=1) as server:
        connection = server.connect()
        assert put(connection, "a", value())
        session, row = server._session, server._session.values[1]
        # The server is stopped when it has been asked to write, and not before.
        ask = session.ask

        def ask_and_freeze(operation, *arguments):
            if operation == "retrieve":
                own.freeze()
            return ask(operation, *arguments)

        session.ask = ask_and_freeze
        with pytest.raises(DeadlineExceeded):
            lm_chunks.get(connection, "a", SIZE, soon(0.5))
        session.ask = ask
        connection.close()
        with pytest.raises(PeerGone):
            session.take_slot()
        row[:] = 0
        own.thaw()
        wait_until(lambda: row.any())
        wait_until(lambda: _slot(session))


def _slot(session):
    try:
        return session.take_slot()
    except PeerGone:
        return None


def test_closing_is_bounded_while_the_server_is_frozen(own):
    with watched(own, timeout=30.0) as server:
        own.freeze()
        began = time.monotonic()
        server.close(soon(2.0))
        assert time.monotonic() - began < 2.5


# ---- a worker half


def test_blocks_come_back_byte_for_byte(real):
    worker = Worker(real.url)
    ids, target = np.arange(1, 13, dtype=np.int32), np.arange(21, 33, dtype=np.int32)
    keys = secrets.token_bytes(16 * len(ids))
    try:
        worker.save(ids, keys)
        assert worker.stored()
        assert worker.fetch(keys) == 6
        assert worker.load(target).error is None
        for source, after in zip(worker.blocks(ids), worker.blocks(target), strict=True):
            assert torch.equal(source, after)
    finally:
        worker.close()


def test_a_producer_that_is_not_closed_loses_no_chunk_and_leaves_no_memory(real):
    code = f"""
import secrets, sys
import numpy as np
sys.path[:0] = {sys.path!r}
from support import lm_chunks
from support.lm_worker import Worker
worker = Worker({real.url!r})
keys = bytes(range(16 * 12))
worker.save(np.arange(1, 13, dtype=np.int32), keys)
"""
    before = segments()
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
    assert segments() == before
    worker = Worker(real.url)
    try:
        assert worker.fetch(bytes(range(16 * 12))) == 12 * BLOCK // 8
    finally:
        worker.close()


# ---- engines


def world(server, **options):
    common = {"remote_url": server.url, "chunk_size": CHUNK, "max_local_cpu_size": 0.01, "lookup_timeout": 2.0}
    # Other tests have stored the same prompts.
    subject = Subject(LMCacheConnector, LMCACHE_MP, options=common | {"model_id": secrets.token_hex(4)} | options)
    return World(subject, ("kv_both", "kv_both"))


def half_of(one, engine):
    return one.engines[engine].workers[0].connector._half


def ask(one, engine, prompt):
    """Seconds, and tokens of the prompt that were not computed; the world compares every byte."""
    began, number = time.monotonic(), one.add(engine, prompt, 2)
    one.run(number)
    return time.monotonic() - began, one.cached(number)


def used(one):
    return one.engines[1].connector._scheduler._half._client.up


def test_a_prompt_is_computed_without_waiting_again_and_again_while_the_server_is_frozen(own):
    with world(own) as one:
        ask(one, 0, Prompt(40))
        assert half_of(one, 0)._saver.drain(soon())
        assert ask(one, 1, Prompt(40))[1] == 39
        own.freeze()
        seconds = []
        for family in range(10, 15):
            took, cached = ask(one, 1, Prompt(40, family))
            seconds.append(took)
            assert cached == 0
        assert seconds[0] < 4.0
        assert max(seconds[1:]) < 1.0, f"it was waited for again: {seconds}"
        own.thaw()
        wait_until(lambda: used(one))
        one.engines[1].reset()
        assert ask(one, 1, Prompt(40))[1] == 39


def test_a_server_that_is_killed_and_started_again_gives_hits_within_ten_seconds(own):
    with world(own) as one:
        ask(one, 0, Prompt(40))
        assert half_of(one, 0)._saver.drain(soon())
        own.kill()
        took, cached = ask(one, 1, Prompt(40))
        assert cached == 0
        assert took < 4.0
        own.start()
        began, family = time.monotonic(), 20
        while True:
            family += 1
            ask(one, 0, Prompt(40, family))
            half_of(one, 0)._saver.drain(soon())
            if ask(one, 1, Prompt(40, family))[1] == 39:
                break
            assert time.monotonic() - began < 10.0, "no hit within 10 s"
            time.sleep(0.1)
