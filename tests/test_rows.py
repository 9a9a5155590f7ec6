"""Reads of several rows between two worker halves: what ends, stops or is damaged in one of them.

On a GPU a row is written by the thread that receives it, with the load in use throughout: here the same code runs over
gloo and shared memory, which shows nothing about streams.
"""

import contextlib
import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.caches import make_cache
from support.worker_halves import begin_load, ended, worker_half

from kvsdk.connector.tasks import TaskState
from kvsdk.connectors.pynccl import fetching, protocol, serving
from kvsdk.connectors.pynccl.channel import Channel
from kvsdk.connectors.pynccl.fetching import Fetcher
from kvsdk.kernels import BlockStore
from kvsdk.pipe import Pipe

POOL, BLOCKS = 64, 12
IDS, INTO = (np.random.default_rng(seed).permutation(POOL)[:BLOCKS].astype(np.int32) for seed in (1, 2))


class Pair:
    """A producer's worker half and a consumer's; rows have two messages."""

    def __init__(self, kind, verify=True, chunks=(2, 2)):
        self.source, self.target = (make_cache("HND", blocks=POOL, content=64, seed=seed) for seed in (1, 2))
        self.producer, self.consumer = (
            worker_half(role, cache, pipe=kind, verify=verify, staging_bytes=3 * chunk * cache.layout().block_bytes)
            for role, cache, chunk in zip(
                ("kv_producer", "kv_consumer"), (self.source, self.target), chunks, strict=True
            )
        )

    def begin(self, hold, into, first=0):
        return begin_load(self.producer, self.consumer, hold, into, first)

    def load(self, hold, into, first=0):
        return ended(self.begin(hold, into, first))

    def wipe(self):
        for tensor in self.target.tensors.values():
            tensor.view(torch.uint8).fill_(0xEE)

    def written(self, ids, into, right=None):
        """Demands that these blocks, and no others, were written since `wipe`."""
        right = np.arange(len(ids)) if right is None else np.array(right, int)
        for i in range(len(self.target.tensors)):
            expected = np.full_like(self.target.blocks(i), 0xEE)
            expected[into[right]] = self.source.blocks(i)[ids[right]]
            np.testing.assert_array_equal(self.target.blocks(i), expected)


@pytest.fixture(params=["in threads", "as on a GPU"])
def how(request, monkeypatch):
    monkeypatch.setattr(protocol, "ROW_CHUNKS", 2)
    if request.param == "as on a GPU":

        @contextlib.contextmanager
        def own(self):
            yield SimpleNamespace(synchronize=lambda: None)

        monkeypatch.setattr(fetching, "ThreadPoolExecutor", lambda *args: None)
        monkeypatch.setattr(serving.Streams, "own", own)


@pytest.fixture(params=["shm", "gloo"])
def make(request, how, no_thread_left, monkeypatch):
    """Makes pairs of workers, whose pair over the pipe must last."""
    pairs, opened, send = [], [], Channel.send

    def note(self, kind, **fields):
        opened.extend([fields] * (kind == "open"))
        send(self, kind, **fields)

    monkeypatch.setattr(Channel, "send", note)

    def new(**options):
        pairs.append(Pair(request.param, **options))
        return pairs[-1]

    yield new
    for pair in pairs:
        pair.consumer.close()
        pair.producer.close()
    assert len(opened) == len(pairs)


@pytest.fixture
def late_producer(monkeypatch):
    """One that takes so long between two rows that the consumer is at its next read by then."""
    send_row = Pipe.send_row

    def then_wait(self, *args):
        send_row(self, *args)
        time.sleep(0.02)

    monkeypatch.setattr(Pipe, "send_row", then_wait)


def ends_in(monkeypatch, pair, hold, row):
    """The offer ends while the last message of a row is gathered."""
    gathered, gather = itertools.count(), BlockStore.gather

    def then_end(self, ids, staging):
        gather(self, ids, staging)
        if next(gathered) == 2 * row + 1:
            pair.producer.let_go(hold)

    monkeypatch.setattr(BlockStore, "gather", then_end)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_an_offer_that_ends_in_a_row_costs_that_row_and_what_follows(make, late_producer, monkeypatch, row, verify):
    pair = make(verify=verify)
    pair.producer.kept("x", (IDS,))
    pair.producer.kept("y", (IDS,))
    ends_in(monkeypatch, pair, "x", row)
    task = pair.load("x", INTO)
    assert task.state is TaskState.FAILED and "ended meanwhile" in str(task.error)
    assert task.failed_blocks.tolist() == INTO[4 * row :].tolist()
    pair.wipe()
    assert pair.load("y", INTO).state is TaskState.DONE
    pair.written(IDS, INTO)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_load_that_is_given_up_in_a_row_is_written_no_more_and_the_next_one_comes(
    make, late_producer, monkeypatch, row
):
    pair = make()
    rows, receive, seen = itertools.count(), Fetcher._receive_row, []

    def given_up(self, read, *args):
        if next(rows) == row:
            assert read.task.expire()
            seen.extend(pair.target.blocks(i).copy() for i in range(3))
        receive(self, read, *args)

    monkeypatch.setattr(Fetcher, "_receive_row", given_up)
    pair.producer.kept("x", (IDS,))
    assert pair.load("x", INTO).state is TaskState.EXPIRED
    others = np.setdiff1d(np.arange(POOL), INTO)[:BLOCKS].astype(np.int32)
    assert pair.load("x", others).state is TaskState.DONE
    for i, blocks in enumerate(seen):
        np.testing.assert_array_equal(pair.target.blocks(i)[INTO], blocks[INTO])


def test_an_offer_and_a_load_that_end_in_the_same_row_leave_the_two_ends_in_step(make, late_producer, monkeypatch):
    """`stop` and `failed` cross on their way: one answer comes, not two."""
    pair = make()
    failed, send, receive = threading.Event(), Channel.send, Fetcher._receive_row

    def crossing(self, kind, **fields):
        if kind == "stop":
            failed.wait(0.5)  # on a GPU it is said before the row comes
        send(self, kind, **fields)
        if kind == "failed":
            failed.set()

    def given_up(self, read, *args):
        if read.task.source.transfer_id == "x":
            read.task.expire()
        receive(self, read, *args)

    monkeypatch.setattr(Channel, "send", crossing)
    monkeypatch.setattr(Fetcher, "_receive_row", given_up)
    pair.producer.kept("x", (IDS,))
    pair.producer.kept("y", (IDS,))
    ends_in(monkeypatch, pair, "x", 0)
    assert pair.load("x", INTO).state is TaskState.EXPIRED
    assert pair.load("y", INTO).state is TaskState.DONE


@pytest.mark.parametrize("chunks", [(2, 2), (3, 1), (1, 3)], ids=["equal", "shorter here", "shorter there"])
def test_damage_in_any_row_costs_its_blocks_and_no_others(make, monkeypatch, chunks):
    pair, rng = make(chunks=chunks), np.random.default_rng(3)
    block, layer = pair.source.layout().block_bytes, pair.source.layout().layers[0].block_bytes
    recv_row, came, spoilt = Pipe.recv_row, [], []

    def spoiling(self, sizes, drain, deadline):
        def spoil(i, part):
            for at in range(part.numel() // block):
                part[at * layer] ^= int(len(came) in spoilt)
                came.append(at)
            return drain(i, part)

        recv_row(self, sizes, spoil, deadline)

    monkeypatch.setattr(Pipe, "recv_row", spoiling)
    pair.producer.kept("x", (IDS,))
    for _ in range(30):
        first = int(rng.integers(BLOCKS // 2))
        count = BLOCKS - first
        spoilt[:], came[:] = sorted(rng.permutation(count)[: rng.integers(1, 5)].tolist()), []
        pair.wipe()
        task = pair.load("x", INTO[first:], first)
        assert task.state is TaskState.FAILED and len(came) == count
        assert sorted(task.failed_blocks.tolist()) == sorted(INTO[first:][spoilt].tolist())
        pair.written(IDS[first:], INTO[first:], np.setdiff1d(np.arange(count), spoilt))


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
def test_parts_of_several_rows_come_as_they_are_computed(make, verify):
    pair = make(verify=verify)
    for i in range(5):
        pair.wipe()
        task = pair.begin(f"{i}", INTO[1:], 1)
        for first in range(0, BLOCKS, 7):
            pair.producer.grew(f"{i}", first, (IDS[first : first + 7],), BLOCKS, None)
            time.sleep(0.005)
        assert ended(task).state is TaskState.DONE
        pair.written(IDS[1:], INTO[1:])
