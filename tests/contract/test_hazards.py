"""Moments at which a block, a claim or a thread could be lost: between two steps, between two threads, between two
owners of a block.
"""

import collections
import errno
import logging
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_lifecycle import fill
from test_pynccl import at_rest, at_rest_without_offers, buffer, client, decode, half, pair, prefill, prompt, run_all

from kvsdk.connector import Hit, Keep, ProducerScheduler, ProducerWorker
from kvsdk.connector.interface import CacheGeometry, Context, RequestView
from kvsdk.connector.lifecycle import ScheduledRequest, SchedulerLifecycle, WorkerLifecycle
from kvsdk.connector.tasks import LoadOrder, LoadTask
from kvsdk.connectors.pynccl import fetching, serving
from kvsdk.connectors.pynccl.channel import Channel
from kvsdk.connectors.pynccl.fetching import Fetcher
from kvsdk.connectors.pynccl.protocol import Source
from kvsdk.connectors.pynccl.serving import Offers
from kvsdk.connectors.pynccl.worker import PyNcclWorker
from kvsdk.demo.servers import free_port
from kvsdk.errors import ConfigError, DeadlineExceeded, KVError, PeerGone, ProtocolError, TaskEnded
from kvsdk.pipe import Pipe, PipeHost

__all__ = ["pair"]

pytestmark = pytest.mark.compat

BS = 16


def worker_half(engine):
    return engine.workers[0].connector._half


# ---- the lifecycle alone, with a pool of its own


class Pool:
    def __init__(self, num_blocks):
        self.references = np.zeros(num_blocks, int)

    def hold(self, block_ids):
        self.references[block_ids] += 1

    def give_back(self, block_ids):
        self.references[block_ids] -= 1

    def num_free(self):
        return int((self.references == 0).sum())


class KeepsAll(ProducerScheduler):
    def finished(self, request, blocks):
        return Keep((request.kv_transfer_params or {}).get("name", request.id))


class Remembers(ProducerWorker):
    def __init__(self, context):
        super().__init__(context)
        self.calls = []

    def kept(self, hold_id, blocks):
        self.calls.append(("kept", hold_id, blocks[0].tolist()))

    def let_go(self, hold_id):
        self.calls.append(("let go", hold_id))


@pytest.fixture
def lifecycle():
    context = Context(None, "engine", 0, 1, {}, CacheGeometry(BS, 32, 1024))
    one = SchedulerLifecycle(
        KeepsAll(context), context, consumer=False, producer=True, find_timeout=1.0, load_timeout=1.0
    )
    one.bind_pool(Pool(32))
    return one


def finish(lifecycle, request_id, blocks, name=None):
    tokens = np.arange(BS * len(blocks), dtype=np.int32)
    params = {"name": name} if name is not None else None
    view = RequestView(request_id, tokens, block_size=BS, kv_transfer_params=params)
    lifecycle.add(view, num_tokens=lambda: len(tokens), loadable=True)
    lifecycle.step([ScheduledRequest(request_id, (blocks,), True, 0, len(tokens))], ())
    return lifecycle.finished(request_id, (blocks,), well=True)


def test_a_hold_that_follows_another_of_its_name_within_a_step_is_the_one_that_stands(lifecycle):
    """A proxy may choose the name of a transfer and use it again. If the worker took the new hold for the old one, a
    reader of the old blocks would never hear that they are being written again."""
    worker = WorkerLifecycle(Remembers(lifecycle._context), lifecycle._context)
    finish(lifecycle, "a", [1, 2], name="same")
    worker.begin(lifecycle.step((), ()))
    lifecycle._holds.give_back("same")
    finish_between_steps = RequestView(
        "b", np.arange(32, dtype=np.int32), block_size=BS, kv_transfer_params={"name": "same"}
    )
    lifecycle.add(finish_between_steps, num_tokens=lambda: 32, loadable=True)
    lifecycle.reported((), set(), {})
    lifecycle.finished("b", ([5, 6],), well=True)
    worker.begin(lifecycle.step((), ()))
    assert worker._half.calls == [("kept", "same", [1, 2]), ("let go", "same"), ("kept", "same", [5, 6])]


def test_a_hold_that_begins_and_ends_within_a_step_ends_at_the_worker(lifecycle):
    worker = WorkerLifecycle(Remembers(lifecycle._context), lifecycle._context)
    finish(lifecycle, "a", [1, 2])
    lifecycle._holds.give_back("a")
    worker.begin(lifecycle.step((), ()))
    assert worker._half.calls == [("kept", "a", [1, 2]), ("let go", "a")]
    assert not lifecycle._pool.references.any()


class Announces(KeepsAll):
    """Everything, under the name in the parameters; gives nothing up."""

    def __init__(self, context):
        super().__init__(context)
        self.broken = []

    def announced(self, request):
        return request.kv_transfer_params["name"]

    def broken_off(self, request, hold_id):
        self.broken.append((request.id, hold_id))


@pytest.fixture
def announcing(lifecycle):
    half = Announces(lifecycle._context)
    one = SchedulerLifecycle(
        half, lifecycle._context, consumer=False, producer=True, find_timeout=1.0, load_timeout=1.0
    )
    one.bind_pool(Pool(32))
    return one, half


def arrive(lifecycle, request_id, num_tokens, name):
    tokens = np.arange(num_tokens, dtype=np.int32)
    view = RequestView(request_id, tokens, block_size=BS, kv_transfer_params={"name": name})
    lifecycle.add(view, num_tokens=lambda: num_tokens, loadable=True)


def test_an_announced_hold_that_has_ended_does_not_grow_into_another_of_its_name(announcing):
    """A proxy may announce a transfer id again while the first prompt is still computed, for nobody by then."""
    lifecycle, half = announcing
    arrive(lifecycle, "a", 64, "same")
    grown = lifecycle.step([ScheduledRequest("a", ([1, 2],), True, 0, 32)], ()).grown
    assert [(one.first_block, one.blocks[0].tolist(), one.num_blocks) for one in grown] == [(0, [1, 2], 4)]
    lifecycle._holds.give_back("same")
    lifecycle.reported((), set(), {})
    arrive(lifecycle, "b", 64, "same")
    both = [ScheduledRequest("b", ([5, 6],), True, 0, 32), ScheduledRequest("a", ([3, 4],), False, 32, 32)]
    orders = lifecycle.step(both, ())
    assert orders.holds == [("same", None)]
    assert [one.blocks[0].tolist() for one in orders.grown] == [[5, 6]]
    lifecycle.finished("a", ([1, 2, 3, 4],), well=False)
    assert not half.broken, "what b announced was broken off for a"
    lifecycle.finished("b", ([5, 6],), well=False)
    assert half.broken == [("b", "same")] and not lifecycle._pool.references.any()


def test_a_prompt_does_not_wait_for_blocks_that_its_own_hold_has(announcing):
    """Without a prefix cache, a preempted prompt is computed in other blocks than those that are held of it. While it
    runs it counts as one that needs its blocks; but not these."""
    lifecycle, half = announcing
    pool = lifecycle._pool
    arrive(lifecycle, "a", 64, "a")
    lifecycle.step([ScheduledRequest("a", ([1, 2, 3, 4],), True, 0, 64)], ())
    pool.references[9:] = pool.references[0] = 1  # others have these
    lifecycle.step((), ["a"])
    assert pool.num_free() == 4 and not half.broken, "there was room: the hold may stay"
    pool.references[5:9] += 1
    lifecycle.step([ScheduledRequest("a", ([5, 6, 7, 8],), True, 0, 64)], ())
    assert half.broken == [("a", "a")]
    assert pool.num_free() == 4


def test_a_hold_of_a_prompts_own_blocks_is_no_room_for_it(announcing):
    lifecycle, half = announcing
    pool = lifecycle._pool
    arrive(lifecycle, "a", 64, "a")
    pool.references[:] = 1
    pool.references[1:5] = 0
    lifecycle.step([ScheduledRequest("a", ([1, 2, 3, 4],), True, 0, 64)], ())
    assert not half.broken and pool.num_free() == 0


def test_what_finished_does_not_keep_under_its_name_is_broken_off(announcing):
    lifecycle, half = announcing
    half.finished = lambda request, blocks: None
    arrive(lifecycle, "a", 32, "a")
    lifecycle.step([ScheduledRequest("a", ([1, 2],), True, 0, 32)], ())
    assert lifecycle.finished("a", ([1, 2],), well=True) is None
    assert half.broken == [("a", "a")] and not lifecycle._pool.references.any()


def test_blocks_that_left_a_sliding_window_are_not_kept(lifecycle):
    """Their places in the block table hold vLLM's null block."""
    assert finish(lifecycle, "a", [0, 0, 3]) is None
    assert lifecycle.num_held_blocks == 0 and not lifecycle._pool.references.any()


def test_an_author_who_uses_the_name_of_a_hold_twice_costs_the_request_not_the_engine(lifecycle, caplog):
    finish(lifecycle, "a", [1, 2], name="same")
    assert finish(lifecycle, "b", [3, 4], name="same") is None
    assert "same" in caplog.text
    assert lifecycle.num_held_blocks == 2


def test_holds_whose_blocks_a_running_request_shares_do_not_count_as_room(engine, script):
    """Giving up such a hold frees nothing, so further ones have to go, but no more than are needed."""
    one = engine(num_blocks=20, max_num_batched_tokens=256)
    held = {"shared": prompt(64), "shared too": prompt(64), "other": prompt(64, 1), "last": prompt(64, 2)}
    for name, tokens in held.items():
        script.keep.add(name)
        one.add(name, tokens, max_tokens=1)
        one.run(until=lambda name=name: name in one.finish_reasons)
    one.add("a", prompt(64) + prompt(16, 5), max_tokens=30)
    one.step()
    one.add("b", prompt(120, 7), max_tokens=2)
    one.step()
    assert [r.request_id for r in one.scheduler.running] == ["a", "b"], "b had to wait for blocks that nobody reads"
    assert list(script.holds) == ["last"]
    script.schedulers[0].give_up(99)
    one.run()
    one.check_at_rest()


def test_a_hit_that_vllm_does_not_take_is_given_up(engine, script):
    """vLLM may allocate without the external tokens; nothing is loaded then."""
    one = engine()
    script.answers["a"] = Hit(48, None)
    allocated = one.connector._scheduler.allocated
    one.connector._scheduler.allocated = lambda request_id, blocks, num_external: allocated(request_id, blocks, 0)
    one.add("a", prompt(50), max_tokens=2)
    one.step()
    assert script.named("forget") == [["a"]] and not script.named("granted") and not script.tasks


def test_an_abort_that_meets_a_write_is_not_forgotten(engine, script):
    one = engine()
    script.answers["a"] = Hit(48, None)
    one.add("a", prompt(50), max_tokens=4)
    one.run(until=lambda: script.tasks)
    with script.tasks[0].using():
        one.abort("a")
        for _ in range(3):
            one.step()
        assert not script.tasks[0].ended
    for _ in range(3):
        one.step()
    assert script.tasks[0].ended
    one.run()
    one.check_at_rest()


def test_a_write_that_began_before_the_deadline_is_waited_for(engine, script):
    one = engine()
    script.answers["a"] = Hit(48, None)
    one.add("a", prompt(50), max_tokens=4)
    one.run(until=lambda: script.tasks)
    task = script.tasks[0]
    task.deadline = 0.0
    with task.using():
        for _ in range(3):
            one.step()
        assert not task.ended, "vLLM could have given the blocks away while they were written"
        fill(one, task, prompt(50))
    for _ in range(3):
        one.step()
    with pytest.raises(TaskEnded), task.using():
        pass
    one.run()
    assert one.outputs["a"] == one.expected(prompt(50), 4)


# ---- PyNcclConnector


@pytest.mark.parametrize("in_flight", [False, True], ids=["one-step", "two-in-flight"])
@pytest.mark.parametrize("steps", range(8))
def test_an_abort_at_any_moment_leaves_nothing(pair, steps, in_flight):
    p, d = pair(async_scheduling=in_flight)
    prefill(p, "a", prompt(100))
    d.add("b", prompt(100), max_tokens=5)
    for _ in range(steps):
        p.step()
        d.step()
        time.sleep(0.002 if steps % 2 else 0.02)
    if "b" not in d.finish_reasons:
        d.abort("b")
    run_all(p, d, until=lambda: not d.scheduler.has_requests() and not d._in_flight and not client(d).num_claims)
    assert not half(d)._claims and not half(d)._lookups and not client(d).num_tickets
    at_rest_without_offers(p, d)


def test_an_answer_that_comes_after_its_request_is_given_back(pair):
    p, d = pair()
    prefill(p, "a", prompt(100))
    d.add("b", prompt(100), max_tokens=5)
    run_all(d, until=lambda: half(d)._lookups)
    d.abort("b")
    run_all(p, d, until=lambda: buffer(p).counters["claimed"] and not buffer(p).num_claims, seconds=5)
    assert buffer(p).num_offers == 1, "nobody took the offer, so it is there for others"
    assert decode(d, "c", prompt(100), others=[p]) == 99
    at_rest(p, d)


def test_two_samples_of_one_prompt_share_its_offer(pair):
    p, d = pair()
    params = prefill(p, "a", prompt(75), params={"do_remote_decode": True})
    for name in ("b0", "b1"):
        d.add(name, prompt(75), max_tokens=5, params=params)
    run_all(p, d, until=lambda: len(d.finish_reasons) == 2)
    for name in ("b0", "b1"):
        assert d.outputs[name] == d.expected(prompt(75), 5) and d.hits[name][0] == 74
    at_rest(p, d)


def test_a_prompt_comes_over_with_prefix_caching_off(pair):
    p, d = pair(prefix_caching=False)
    prefill(p, "a", prompt(75))
    assert decode(d, "b", prompt(75), others=[p]) == 74
    at_rest(p, d)


def test_a_request_preempted_while_its_last_token_is_under_way_is_offered_whole(engine):
    p = engine(
        "PyNcclConnector",
        role="kv_producer",
        extra={"kv_port": free_port()},
        num_blocks=24,
        async_scheduling=True,
    )
    for i in range(6):
        p.add(f"r{i}", prompt(60, i), max_tokens=30)
    preempted = 0
    while p.unfinished:
        p.step()
        preempted += sum(r.num_preemptions for r in p.scheduler.requests.values())
    assert preempted
    for i in range(6):
        assert p.outputs[f"r{i}"] == p.expected(prompt(60, i), 30)
        assert p.params[f"r{i}"]["remote_num_tokens"] == 60
    at_rest_without_offers(p)


@pytest.mark.parametrize("kind", ["peer", "shm", "gloo"])
def test_memory_that_runs_out_while_receiving_fails_the_load(pair, monkeypatch, kind):
    p, d = pair(extra={"pipe": kind})
    prefill(p, "a", prompt(100))

    def out_of_memory(error, whole):
        def call(*args):
            if threading.current_thread().name.startswith("kvsdk-fetch"):
                raise error
            return whole(*args)

        return call

    monkeypatch.setattr(torch, "empty", out_of_memory(RuntimeError("no memory for pieces"), torch.empty))
    monkeypatch.setattr(mmap, "mmap", out_of_memory(OSError(errno.ENOMEM, "no memory to map"), mmap.mmap))
    monkeypatch.setattr(Pipe, "_new_slot", out_of_memory(MemoryError("no memory for slots"), Pipe._new_slot))
    assert decode(d, "b", prompt(100), others=[p]) == 0
    assert d.stats["loads_failed"] == 1
    at_rest(p, d)


@pytest.mark.parametrize("kind", ["peer", "shm"])
def test_a_producer_that_is_not_read_from_any_more_costs_neither_thread_nor_memory(pair, monkeypatch, kind):
    """Every start of a prefill server has a new address: what was kept for the old one would add up."""
    monkeypatch.setattr(fetching, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(fetching, "HALVED_BYTES", 0)  # so that a second thread reads
    p, d = pair(extra={"pipe": kind})
    for i in range(2):
        prefill(p, f"a{i}", prompt(100, i))
        assert decode(d, f"b{i}", prompt(100, i), others=[p]) == 99
        (fetcher,) = worker_half(d)._fetchers.values()
        fetcher._thread.join(5)
        assert not fetcher._thread.is_alive()
        assert fetcher._pipe is None and fetcher._window is None and fetcher._peer is None
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvsdk-write")]
        run_all(p, d, until=lambda: worker_half(p)._server.num_pairs == 0, seconds=5)
    at_rest(p, d)


def test_a_load_that_meets_the_end_of_an_idle_fetcher_is_carried_out(pair, monkeypatch):
    monkeypatch.setattr(fetching, "IDLE_SECONDS", 0.005)
    p, d = pair()
    for i in range(15):
        prefill(p, f"a{i}", prompt(40, i))
        assert decode(d, f"b{i}", prompt(40, i), others=[p]) == 39
    at_rest(p, d)


def test_fetchers_of_producers_that_are_gone_are_forgotten(pair, engine, monkeypatch):
    monkeypatch.setattr(fetching, "IDLE_SECONDS", 0.1)
    ports = [free_port() for _ in range(3)]
    producers = [f"127.0.0.1:{port}" for port in ports]
    ps = [engine("PyNcclConnector", role="kv_producer", extra={"kv_port": port}) for port in ports]
    d = engine("PyNcclConnector", role="kv_consumer", extra={"producers": producers})
    assert client(d).wait_ready(5.0)
    for i, p in enumerate(ps):
        prefill(p, f"a{i}", prompt(50, i))
        assert decode(d, f"b{i}", prompt(50, i), others=ps) == 49
        time.sleep(0.3)
    assert len(worker_half(d)._fetchers) == 1
    at_rest(*ps, d)


def test_a_consumer_that_gives_up_in_the_middle_is_no_error_of_the_producers(pair, monkeypatch, caplog):
    p, d = pair(extra={"pipe": "shm", "staging_bytes": 1024})
    prefill(p, "a", prompt(200))
    write = Fetcher._write

    def broken(self, *args):
        time.sleep(0.05)
        raise KVError("on purpose")

    monkeypatch.setattr(Fetcher, "_write", broken)
    with caplog.at_level(logging.INFO):
        assert decode(d, "b", prompt(200), others=[p]) == 0
        run_all(p, d, until=lambda: worker_half(p)._server.num_pairs == 0, seconds=5)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text
    monkeypatch.setattr(Fetcher, "_write", write)
    prefill(p, "a2", prompt(60, 3))
    assert decode(d, "b2", prompt(60, 3), others=[p]) == 59
    at_rest(p, d)


def test_a_read_waits_for_an_offer_that_is_not_there_yet_and_not_for_one_that_has_ended():
    offers = Offers()
    block_ids = np.arange(3, dtype=np.int32)
    threading.Timer(0.1, offers.add, ("late", block_ids)).start()
    assert offers.get("late", time.monotonic() + 5).block_ids.tolist() == [0, 1, 2]
    assert offers.get("later still", time.monotonic() + 0.05) is None
    offers.end("late")
    began = time.monotonic()
    with pytest.raises(KVError, match="late"):
        offers.get("late", began + 5)
    assert time.monotonic() - began < 1
    threading.Timer(0.1, offers.close).start()
    with pytest.raises(KVError):
        offers.get("never", began + 5)
    assert time.monotonic() - began < 2


def test_closing_with_many_threads_that_do_not_end_takes_one_timeout(engine, monkeypatch):
    release, stuck = threading.Event(), threading.Semaphore(0)

    def wait(*args):
        stuck.release()
        release.wait(20)
        raise KVError("on purpose")

    monkeypatch.setattr(Fetcher, "_open", wait)
    d = engine("PyNcclConnector", role="kv_consumer", extra={"kv_port": free_port(), "close_timeout": 1.0})
    worker = worker_half(d)
    try:
        for i in range(4):
            worker.load(_load(i, f"127.0.0.1:{free_port()}", seconds=30))
            assert stuck.acquire(timeout=5)
        began = time.monotonic()
        worker.close()
        assert 1.0 <= time.monotonic() - began < 2.0
    finally:
        release.set()


def test_closing_ends_the_wait_for_a_producer_that_does_not_answer(engine):
    d = engine("PyNcclConnector", role="kv_consumer", extra={"kv_port": free_port()})
    silent = Channel(bind_ip="127.0.0.1")
    try:
        worker_half(d).load(_load(0, silent.address, seconds=30))
        (fetcher,) = worker_half(d)._fetchers.values()
        time.sleep(0.2)
        d.close()
        fetcher._thread.join(2)
        assert not fetcher._thread.is_alive()
    finally:
        silent.close()


@pytest.mark.parametrize("kind", ["peer", "shm", "gloo"])
def test_closing_ends_the_wait_for_a_consumer_that_asked_for_a_pair_and_is_gone(engine, kind, no_thread_left):
    """It was killed before it connected, so no connection ends; an earlier version waited for it for 20 s."""
    p = engine("PyNcclConnector", role="kv_producer", extra={"kv_port": free_port(), "pipe": kind})
    stranger = Channel(address=worker_half(p)._server.address)
    try:
        stranger.send("open", pipe=kind, timeout=20.0, chunk=1)
        assert stranger.recv(time.monotonic() + 5)[0] == "invited"
    finally:
        stranger.close()
    assert worker_half(p)._server.num_pairs == 1
    p.close()


def test_a_pair_that_is_asked_for_while_the_worker_closes_does_not_stay(engine, monkeypatch, no_thread_left):
    p = engine("PyNcclConnector", role="kv_producer", extra={"kv_port": free_port(), "pipe": "gloo"})
    server = worker_half(p)._server
    preparing, closed, prepare = threading.Event(), threading.Event(), PipeHost.prepare

    def late(self):
        preparing.set()
        assert closed.wait(10)
        return prepare(self)

    monkeypatch.setattr(PipeHost, "prepare", late)
    stranger = Channel(address=server.address)
    try:
        stranger.send("open", pipe="gloo", timeout=20.0, chunk=1)
        assert preparing.wait(5)
        server.close(0.0)
        closed.set()
    finally:
        stranger.close()
    p.close()


def _load(load_id, address, seconds):
    blocks = (np.arange(1, 3, dtype=np.int32),)
    order = LoadOrder(load_id, f"r{load_id}", blocks, 0, 32, Source((address,), "transfer"), seconds)
    return LoadTask(order, time.monotonic() + seconds)


STOPPED = """
import os, sys, time
from kvsdk.connectors.pynccl.channel import Channel
channel = Channel(address=sys.argv[1])
channel.send("bye")
time.sleep(60)
"""


def test_a_peer_that_falls_silent_without_a_word_is_noticed():
    """A host that loses power closes nothing, and a pair holds memory of the GPU."""
    ours = Channel(bind_ip="127.0.0.1", heartbeat=0.2)
    child = subprocess.Popen([sys.executable, "-c", STOPPED, ours.address])
    try:
        assert ours.recv(time.monotonic() + 30)[0] == "bye"
        os.kill(child.pid, signal.SIGSTOP)
        with pytest.raises(PeerGone):
            ours.recv(time.monotonic() + 10)
    finally:
        child.kill()
        child.wait()
        ours.close()


@pytest.fixture
def channels():
    ours = Channel(bind_ip="127.0.0.1")
    theirs = Channel(address=ours.address)
    yield ours, theirs
    theirs.close()
    ours.close()


def checked(channel, until):
    deadline = time.monotonic() + 5
    while not until():
        channel.check_wanted()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_a_peer_says_while_its_pair_is_made_is_not_lost(channels):
    ours, theirs = channels
    for read_id in range(3):
        theirs.send("stop", read_id=read_id)
    checked(ours, lambda: len(ours._kept) == 3)
    theirs.send("stop", read_id=3)
    heard = []
    while len(heard) < 4:
        assert ours.poll(5)
        heard.append(ours.recv(time.monotonic() + 5)[1]["read_id"])
    assert heard == [0, 1, 2, 3]
    assert not ours.poll(0)


def test_a_peer_that_gives_its_pair_up_is_heard_behind_what_it_said(channels):
    ours, theirs = channels
    theirs.send("stop", read_id=1)
    theirs.send("bye")
    with pytest.raises(PeerGone, match="gave the pair up"):
        checked(ours, lambda: False)


def test_a_peer_that_talks_while_its_pair_is_made_is_not_kept_without_end(channels):
    ours, theirs = channels
    for read_id in range(5):
        theirs.send("stop", read_id=read_id)
    with pytest.raises(ProtocolError, match="out of turn"):
        checked(ours, lambda: False)


def test_a_stranger_cannot_open_pairs_without_end(pair, monkeypatch):
    monkeypatch.setattr(serving, "MAX_PAIRS", 2)
    p, _ = pair()
    address = worker_half(p)._server.address
    answers, channels = [], []
    for _ in range(3):
        channels.append(Channel(address=address))
        channels[-1].send("open", pipe="gloo", timeout=1.0, chunk=1)
        answers.append(channels[-1].recv(time.monotonic() + 5))
    assert [kind for kind, _ in answers] == ["invited", "invited", "refused"]
    assert "2" in answers[2][1]["reason"]
    for channel in channels:
        channel.close()
    deadline = time.monotonic() + 5
    while worker_half(p)._server.num_pairs:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("engine_id", ["prefill one", "é", "x" * 300])
def test_any_engine_id_goes_with_an_offer(engine, engine_id):
    from kvsdk.vllm.harness import Engine

    one = Engine(
        {
            "kv_connector": "PyNcclConnector",
            "kv_connector_module_path": "kvsdk.vllm.connectors",
            "kv_role": "kv_producer",
            "engine_id": engine_id,
            "kv_connector_extra_config": {"kv_port": free_port()},
        }
    )
    try:
        assert prefill(one, "a", prompt(50))["do_remote_prefill"] is True
        at_rest_without_offers(one)
    finally:
        one.close()


def test_after_a_reset_nothing_old_is_found(pair):
    p, d = pair()
    prefill(p, "a", prompt(100))
    assert p.connector.reset_cache() is not False
    p.run()
    p.check_at_rest()
    assert decode(d, "b", prompt(100), others=[p]) == 0
    # A claimed offer cannot be withdrawn, and others could still share it.
    prefill(p, "a2", prompt(60, 2))
    claim = buffer(p).find(_keys(prompt(60, 2)))
    assert p.connector.reset_cache() is False
    buffer(p).release(claim.claim_id, used=True)
    assert p.connector.reset_cache() is not False
    at_rest(p, d)


def _keys(tokens):
    from kvsdk.buffer import prefix_keys
    from kvsdk.buffer.keys import separator

    return prefix_keys(np.asarray(tokens, np.int32), BS, separator(cache_salt=None, lora=None, multimodal=[]))


@pytest.mark.parametrize("where", ["reading", "receiving", "opening", "connecting"])
def test_an_exception_in_a_thread_reaches_the_request_and_the_log(pair, monkeypatch, caplog, where):
    """On either side. The request is computed, the thread or its successor goes on."""
    owner, name = {
        "reading": (serving._Read, "answer"),
        "receiving": (Fetcher, "_fetch"),
        "opening": (PyNcclWorker, "make_host"),
        "connecting": (PyNcclWorker, "join"),
    }[where]
    whole, times = getattr(owner, name), [1]

    def broken(*args):
        if times:
            times.pop()
            raise RuntimeError("on purpose")
        return whole(*args)

    monkeypatch.setattr(owner, name, broken)
    p, d = pair(extra={"pipe": "gloo"})  # the last that there is, so nothing else is tried after it
    prefill(p, "a", prompt(100))
    with caplog.at_level(logging.WARNING):
        assert decode(d, "b", prompt(100), others=[p]) == 0
    assert not times and d.stats["loads_failed"] == 1
    assert any(record.exc_info and "on purpose" in str(record.exc_info[1]) for record in caplog.records)
    assert any("request b" in record.getMessage() for record in caplog.records)
    prefill(p, "a2", prompt(60, 3))
    assert decode(d, "b2", prompt(60, 3), others=[p]) == 59
    at_rest(p, d)


def test_messages_do_not_grow_with_layers_or_blocks(pair, monkeypatch):
    sent = collections.Counter()
    control, row = Channel.send, Pipe.send_row

    def count_control(self, kind, **fields):
        sent[kind] += 1
        control(self, kind, **fields)

    def count_data(self, sizes, fill, deadline):
        sent["tensor"] += len(sizes)
        row(self, sizes, fill, deadline)

    monkeypatch.setattr(Channel, "send", count_control)
    monkeypatch.setattr(Pipe, "send_row", count_data)
    counts = []
    for layers, tokens in ((1, 20), (7, 600)):
        p, d = pair(layers=layers, extra={"pipe": "shm"})
        prefill(p, "a", prompt(tokens))
        run_all(p, until=lambda p=p: len(worker_half(p)._offers))
        assert decode(d, "b", prompt(tokens), others=[p]) == tokens - 1
        counts.append(dict(sent))
        sent.clear()
        at_rest(p, d)
    assert counts[0] == counts[1] == {"open": 1, "read": 1, "part": 1, "row": 1, "sent": 1, "tensor": 1}


@pytest.mark.parametrize("kind", ["peer", "shm", "gloo"])
def test_two_servers_load_from_each_other_at_the_same_time(engine, kind):
    ports = [free_port(), free_port()]
    servers = [
        engine(
            "PyNcclConnector",
            role="kv_both",
            extra={"kv_port": port, "producers": [f"127.0.0.1:{other}"], "pipe": kind},
        )
        for port, other in (ports, ports[::-1])
    ]
    assert all(client(server).wait_ready(5.0) for server in servers)
    for i, server in enumerate(servers):
        prefill(server, "a", prompt(80, i))
    for i, server in enumerate(servers):
        server.add("b", prompt(80, 1 - i), max_tokens=4)
    run_all(*servers, until=lambda: all("b" in server.finish_reasons for server in servers))
    for i, server in enumerate(servers):
        assert server.outputs["b"] == server.expected(prompt(80, 1 - i), 4) and server.hits["b"][0] == 79
    at_rest_without_offers(*servers)


def test_two_servers_that_hold_what_the_other_one_waits_for_go_on_without_it(engine):
    """Each pool is full of an offer that a request of the other server has claimed, and has no room for its own."""
    ports = [free_port(), free_port()]
    servers = [
        engine(
            "PyNcclConnector",
            role="kv_both",
            extra={"kv_port": port, "producers": [f"127.0.0.1:{other}"], "load_timeout": 1.0},
            num_blocks=16,
        )
        for port, other in (ports, ports[::-1])
    ]
    assert all(client(server).wait_ready(5.0) for server in servers)
    for i, server in enumerate(servers):
        prefill(server, f"offer-{i}", prompt(190, i))
    for i, server in enumerate(servers):
        server.add(f"wait-{i}", prompt(190, 1 - i), max_tokens=4)
    run_all(*servers, until=lambda: all(f"wait-{i}" in server.finish_reasons for i, server in enumerate(servers)))
    for i, server in enumerate(servers):
        assert server.outputs[f"wait-{i}"] == server.expected(prompt(190, 1 - i), 4)
    at_rest_without_offers(*servers)


def test_a_read_of_more_blocks_than_the_offer_has_is_an_error(pair):
    p, d = pair()
    prefill(p, "a", prompt(100))
    p.step()
    block_ids = np.arange(1, 9, dtype=np.int32)  # the offer has 7
    order = LoadOrder(1, "b", (block_ids,), 0, 128, Source((worker_half(p)._server.address,), offer_id(p)), 5.0)
    task = LoadTask(order, time.monotonic() + 5)
    worker_half(d).load(task)
    run_all(p, until=lambda: task.ended, seconds=5)
    assert "7 blocks" in str(task.error) and task.invalid_blocks.tolist() == block_ids.tolist()
    assert decode(d, "c", prompt(100), others=[p]) == 99, "the pair is of no use any more"
    at_rest(p, d)


def offer_id(engine):
    (transfer_id,) = worker_half(engine)._offers._offers
    return transfer_id


def test_unequal_tensor_parallel_sizes_are_refused_by_name(pair, caplog):
    with caplog.at_level(logging.WARNING):
        p, d = pair(prefill={"world_size": 2}, wait=False)
        deadline = time.monotonic() + 5
        while not any(state.state == "refused" for state in client(d).peers().values()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "parallel.world_size" in caplog.text
    assert decode(d, "b", prompt(50)) == 0
    at_rest(p, d)


def test_a_small_load_does_not_wait_for_one_from_a_producer_that_hangs(engine):
    """Each producer has a thread of its own, and what hangs ends at its deadline."""
    port = free_port()
    p = engine("PyNcclConnector", role="kv_producer", extra={"kv_port": port})
    d = engine("PyNcclConnector", role="kv_consumer", extra={"kv_port": port})
    assert client(d).wait_ready(5.0)
    silent = Channel(bind_ip="127.0.0.1")
    try:
        stuck = _load(7, silent.address, seconds=1.0)
        worker_half(d).load(stuck)
        prefill(p, "a", prompt(50))
        assert decode(d, "b", prompt(50), others=[p]) == 49
        run_all(p, d, until=lambda: stuck.ended, seconds=5)
        assert isinstance(stuck.error, DeadlineExceeded)
    finally:
        silent.close()
    at_rest(p, d)


# ---- beside other connectors


def multi(children):
    from kvsdk.vllm.harness import Engine

    children = [
        {
            "kv_connector": name,
            "kv_connector_module_path": "kvsdk.vllm.connectors",
            "kv_role": role,
            "kv_connector_extra_config": extra,
        }
        for name, role, extra in children
    ]
    one = Engine(
        {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"connectors": children},
        }
    )
    for worker in one.workers:  # the harness adds up one connector's counters
        worker.connector.get_kv_connector_stats = lambda: None
    return one


@pytest.mark.parametrize("first", ["alone", "after a store"])
def test_it_works_in_vllms_multi_connector(script, first):
    port = free_port()
    store = [("scripted:StoreConnector", "kv_both", {})] if first == "after a store" else []
    p = multi([*store, ("PyNcclConnector", "kv_producer", {"kv_port": port})])
    d = multi([("PyNcclConnector", "kv_consumer", {"kv_port": port})])
    try:
        ours = d.connector._connectors[0]._scheduler._half
        assert ours._client.wait_ready(5.0)
        assert prefill(p, "a", prompt(75))["do_remote_prefill"] is True
        assert decode(d, "b", prompt(75), others=[p]) == 74
        run_all(p, d, until=lambda: not any(one.scheduler.has_requests() or one._in_flight for one in (p, d)))
        p.check_at_rest()
        d.check_at_rest()
    finally:
        p.close()
        d.close()


def test_two_that_both_need_a_handshake_say_so():
    """vLLM's MultiConnector passes on the first one's only."""
    other = ("PyNcclConnector", "kv_producer", {"kv_port": free_port()})
    with pytest.raises(ConfigError, match="MultiConnector"):
        multi([("scripted:GreetsConnector", "kv_both", {}), other])


def test_two_connectors_of_one_server_share_their_metrics():
    """Prometheus takes each name once in a process."""
    prometheus = pytest.importorskip("prometheus_client")
    pytest.importorskip("vllm.v1.metrics.prometheus", reason="metrics need more than vLLM's Python sources")
    from kvsdk.vllm.stats import KVSDKPromMetrics

    types = {kind: kind for kind in (prometheus.Counter, prometheus.Gauge, prometheus.Histogram)}
    config = SimpleNamespace(kv_transfer_config=SimpleNamespace())
    first, second = (KVSDKPromMetrics(config, types, ["engine"], {0: ["0"]}) for _ in range(2))
    first.observe({"loads_done": 2})
    second.observe({"loads_done": 3})
    assert prometheus.REGISTRY.get_sample_value("kvsdk_loads_done_total", {"engine": "0"}) >= 5


def test_sleep_mode_is_refused_by_name(engine, monkeypatch):
    """vLLM would take the KV cache's memory away under a peer that reads it."""
    from kvsdk.vllm import harness

    monkeypatch.setattr(harness._model_config(4096), "enable_sleep_mode", True)
    with pytest.raises(ValueError, match="sleep mode"):
        engine("PyNcclConnector", role="kv_producer", extra={"kv_port": free_port()})


def test_scales_that_are_found_while_serving_are_refused_by_name(engine, monkeypatch):
    """FP8 blocks would be read with other scales than they were written with."""
    from vllm.config import CacheConfig

    always = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(CacheConfig, "calculate_kv_scales", always, raising=False)
    with pytest.raises(ValueError, match="calculate_kv_scales"):
        engine("PyNcclConnector", role="kv_producer", extra={"kv_port": free_port()})
