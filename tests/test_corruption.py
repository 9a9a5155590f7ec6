"""Whatever happens to a block on its way is found, and a wrong block is never written: corruptions on purpose, seeded.

Most go through the store alone; some hundreds through two worker halves and a pipe.
On GPUs the kernels do the same work: tests/test_kernels_on_host.py runs them on a CPU, tests/gpu on a GPU.
"""

import itertools
import logging
import time

import numpy as np
import pytest
import torch
from support.caches import KINDS, make_cache
from support.worker_halves import begin_load, ended, worker_half

from kvsdk.connector.tasks import TaskState
from kvsdk.connectors.pynccl import PyNcclWorker, serving
from kvsdk.kernels import BlockStore
from kvsdk.pipe import shm_pipe, window

POOL, BLOCKS = 120, 100


class Transfer:
    """A message of `BLOCKS` blocks between the stores of two caches, and what came of it."""

    def __init__(self, kind, seed, content=8):
        sizes = (1,) if kind in ("one buffer", "BLHNC", "BHLNC") else (1, 3)
        caches = [make_cache(kind, torch.uint8, blocks=POOL, content=content, seed=s, sizes=sizes) for s in (1, 2)]
        self.target, self.rng = caches[1], np.random.default_rng(seed)
        self.source = source = caches[0].store()
        self.store = self.target.store()
        self.positions = np.arange(BLOCKS) + self.rng.integers(1000)
        self.into = self.rng.permutation(POOL)[:BLOCKS].astype(np.int32)
        self.ids, digests = self.rng.permutation(POOL)[:BLOCKS].astype(np.int32), source.new_digests(BLOCKS)
        source.digest_in_place(self.ids, self.positions, digests)
        self.expected = digests.numpy().view(np.uint64).copy()
        self.staging = source.staging(BLOCKS)
        source.gather(self.ids, self.staging)
        sizes = [BLOCKS * layer.block_bytes for layer in source.layout.layers]
        self.layers = [part.numpy().reshape(BLOCKS, -1) for part in self.staging.split(sizes)]

    def found(self, spoilt):
        """Demands that the blocks `spoilt`, indices, are told to be wrong and stay out, and all others are written; and
        that they are told where they lie so in the source's cache and are read there."""
        before = [self.target.blocks(i) for i in range(len(self.layers))]
        wrong = self.store.new_wrong(BLOCKS)
        self.store.scatter_verified(self.into, self.positions, self.staging, self.expected, wrong)
        assert np.flatnonzero(wrong.numpy()).tolist() == sorted(spoilt)
        right = np.setdiff1d(np.arange(BLOCKS), spoilt)
        for i, (blocks, layer) in enumerate(zip(before, self.layers, strict=True)):
            blocks[self.into[right]] = layer[right]
            np.testing.assert_array_equal(self.target.blocks(i), blocks)
        self.source.scatter(self.ids, self.staging)
        peer = self.store.peer(self.source.layout, self.source.addresses, self.source)
        wrong.fill_(2)
        self.store.pull(self.store.choose(peer, self.ids, self.positions, self.expected), self.into, wrong=wrong)
        assert np.flatnonzero(wrong.numpy()).tolist() == sorted(spoilt)
        for i, layer in enumerate(self.layers):
            np.testing.assert_array_equal(self.target.blocks(i)[self.into], layer)

    def any_layer(self):
        return self.layers[self.rng.integers(len(self.layers))]


def test_ten_thousand_flipped_bits_are_found_one_to_a_block():
    count = 0
    for seed in range(111):
        transfer = Transfer(KINDS[seed % len(KINDS)], seed, content=int(8 + seed % 3))
        spoilt = transfer.rng.permutation(BLOCKS)[: BLOCKS - 9]
        for block in spoilt:
            layer = transfer.any_layer()
            layer[block, transfer.rng.integers(layer.shape[1])] ^= 1 << transfer.rng.integers(8)
        transfer.found(spoilt)
        count += len(spoilt)
    assert count > 10_000


def swapped(transfer, a, b):
    for layer in transfer.layers:
        layer[[a, b]] = layer[[b, a]]


def exchanged_layers(transfer, a, b):
    first, last = transfer.layers[0], transfer.layers[-1]
    size = min(first.shape[1], last.shape[1])
    for block in (a, b):
        first[block, :size], last[block, :size] = last[block, :size].copy(), first[block, :size].copy()


def shifted_by_a_byte(transfer, a, b):
    for block in (a, b):
        layer = transfer.any_layer()
        layer[block] = np.roll(layer[block], 1)


def cut_short(transfer, a, b):
    for block in (a, b):
        layer = transfer.any_layer()
        layer[block, transfer.rng.integers(layer.shape[1]) :] ^= 0xFF


def stale(transfer, a, b):
    """Of an earlier generation in one layer: other bytes, right place."""
    for block in (a, b):
        layer = transfer.any_layer()
        layer[block] = transfer.rng.integers(0, 256, layer.shape[1])


def signs_of_two_numbers(transfer, a, b):
    """The top bits of two words, which a sum of products modulo 2^64 is weakest at."""
    for block in (a, b):
        layer = transfer.any_layer()
        tops = np.arange(7, layer.shape[1], 8)
        layer[block, transfer.rng.permutation(tops)[:2]] ^= 0x80


def every_sign(transfer, a, b):
    for block in (a, b):
        transfer.any_layer()[block, 1::2] ^= 0x80


@pytest.mark.parametrize(
    "how", [swapped, exchanged_layers, shifted_by_a_byte, cut_short, stale, signs_of_two_numbers, every_sign]
)
def test_two_blocks_that_are(how):
    for seed in range(60):
        transfer = Transfer(KINDS[seed % len(KINDS)], seed)
        spoilt = transfer.rng.permutation(BLOCKS)[:40]
        for a, b in spoilt.reshape(-1, 2):
            how(transfer, a, b)
        transfer.found(spoilt)


def test_blocks_at_other_positions_of_the_prompt_are_found():
    for seed in range(30):
        transfer = Transfer(KINDS[seed % len(KINDS)], seed)
        transfer.positions += transfer.rng.integers(1, 1 << 30)
        transfer.found(np.arange(BLOCKS))


# Through two worker halves


LOADED = 12


class SpoilingWorker(PyNcclWorker):
    """`spoil` changes each message that arrives, on the pipe's side of everything that checks it."""

    spoil = None

    def join(self, invite, bind_ip, deadline, wanted):
        pipe = super().join(invite, bind_ip, deadline, wanted)
        receive = pipe.recv_row

        def recv_row(sizes, drain, deadline):
            def spoilt(i, part):
                if self.spoil is not None:
                    self.spoil(part)
                return drain(i, part)

            receive(sizes, spoilt, deadline)

        pipe.recv_row = recv_row
        return pipe


class Pair:
    """A producer's worker half and a consumer's, over a real pipe."""

    def __init__(self, kind):
        self.source, self.target = (make_cache("HND", blocks=64, content=64, seed=seed) for seed in (1, 2))
        # Three messages of four blocks make up a load.
        options = {"pipe": kind, "staging_bytes": 3 * 4 * self.source.layout().block_bytes}
        self.halves = [
            worker_half("kv_producer", self.source, **options),
            worker_half("kv_consumer", self.target, SpoilingWorker, **options),
        ]

    def load(self, hold, into):
        return ended(begin_load(*self.halves, hold, into))

    def close(self):
        for half in self.halves:
            half.close()


@pytest.fixture(params=["shm", "gloo"])
def pair(request, no_thread_left):
    pair = Pair(request.param)
    yield pair
    pair.close()


def test_a_flipped_bit_on_a_real_pipe_costs_its_block_and_no_other(pair):
    rng, (producer, consumer) = np.random.default_rng(3), pair.halves
    into, ids = rng.permutation(64)[:LOADED].astype(np.int32), rng.permutation(64)[:LOADED].astype(np.int32)
    producer.kept("x", (ids,))
    assert pair.load("x", into).state is TaskState.DONE
    parts_of_block = [layer.block_bytes for layer in consumer._layout.layers]
    for _ in range(150):
        message, block, layer = rng.integers(3), rng.integers(4), rng.integers(len(parts_of_block))
        bit, came = rng.integers(8 * parts_of_block[layer]), []
        at = int(4 * sum(parts_of_block[:layer]) + block * parts_of_block[layer] + bit // 8)

        def flip(part, message=message, at=at, bit=bit, came=came):
            came.append(part.numel())
            if len(came) == message + 1:
                part[at] ^= 1 << int(bit % 8)

        for i in range(3):
            pair.target.tensors[f"layers.{i}"].view(torch.uint8).fill_(0xEE)
        consumer.spoil = flip
        task = pair.load("x", into)
        assert task.state is TaskState.FAILED and len(came) == 3
        spoilt = 4 * message + block
        assert task.failed_blocks.tolist() == [into[spoilt]]
        right = np.delete(np.arange(LOADED), spoilt)
        for i in range(3):
            expected = np.full_like(pair.target.blocks(i), 0xEE)
            expected[into[right]] = pair.source.blocks(i)[ids[right]]
            np.testing.assert_array_equal(pair.target.blocks(i), expected)
    assert consumer.take_counters()["corrupt_blocks"] == 150


def test_what_is_written_over_an_offers_blocks_is_found(pair):
    """No promise is broken but the producer's: to leave the blocks of an offer alone while it stands."""
    rng, (producer, _) = np.random.default_rng(4), pair.halves
    into, ids = rng.permutation(64)[:LOADED].astype(np.int32), rng.permutation(64)[:LOADED].astype(np.int32)
    for i in range(50):
        producer.kept(str(i), (ids,))
        assert pair.load(str(i), into).state is TaskState.DONE
        stale, layer = rng.integers(LOADED), rng.integers(3)
        pair.source.tensors[f"layers.{layer}"][int(ids[stale])] *= 2
        task = pair.load(str(i), into)
        assert task.state is TaskState.FAILED and task.failed_blocks.tolist() == [into[stale]]
        producer.let_go(str(i))


def test_a_read_needs_no_more_digests_than_its_own(pair, monkeypatch):
    """Of a long offer whose later blocks are not digested yet, the first ones can be read."""
    producer, _ = pair.halves
    monkeypatch.setitem(serving.DIGEST_BYTES, "cpu", LOADED * producer._store.staging_bytes(1))
    digest, let_on = BlockStore.digest_in_place, []

    def first_alone(self, block_ids, positions, digests):
        while positions[0] > 0 and not let_on:
            time.sleep(1e-3)
        digest(self, block_ids, positions, digests)

    monkeypatch.setattr(BlockStore, "digest_in_place", first_alone)
    producer.kept("x", (np.arange(3 * LOADED, dtype=np.int32),))
    into = np.arange(3 * LOADED, dtype=np.int32)
    assert pair.load("x", into[:LOADED]).state is TaskState.DONE
    let_on.append(True)
    assert pair.load("x", into).state is TaskState.DONE


def test_blocks_that_cannot_be_digested_are_not_read_and_the_next_offer_is(pair, monkeypatch, caplog):
    producer, _ = pair.halves
    with monkeypatch.context() as patch:

        def fail(*args):
            raise MemoryError("on purpose")

        patch.setattr(BlockStore, "digest_in_place", fail)
        producer.kept("x", (np.arange(LOADED, dtype=np.int32),))
        task = pair.load("x", np.arange(LOADED, dtype=np.int32))
        assert task.state is TaskState.FAILED and "could not be digested: MemoryError" in str(task.error)
    assert any(record.exc_info for record in caplog.records)
    producer.kept("y", (np.arange(LOADED, dtype=np.int32),))
    assert pair.load("y", np.arange(LOADED, dtype=np.int32)).state is TaskState.DONE


def test_where_memory_cannot_be_shared_gloo_serves_and_the_log_says_why(monkeypatch, caplog, no_thread_left):
    pair, hosts = Pair("auto"), itertools.count()
    try:
        producer, consumer = pair.halves
        assert consumer.handshake()["pipes"] == ["peer", "shm", "gloo"]
        for module in (window, shm_pipe):
            monkeypatch.setattr(module, "this_host", lambda: f"boot {next(hosts)}")
        producer.kept("x", (np.arange(LOADED, dtype=np.int32),))
        with caplog.at_level(logging.INFO):
            assert pair.load("x", np.arange(LOADED, dtype=np.int32)).state is TaskState.DONE
        said = [record.getMessage() for record in caplog.records]
        for taken, left in (("shm", "peer"), ("gloo", "shm")):
            assert any(f"is read over {taken}, not over {left}: it is on another host" in line for line in said)
        assert [record for record in caplog.records if record.levelno > logging.INFO] == []
        deadline = time.monotonic() + 5
        while producer._server.num_pairs > 1:
            assert time.monotonic() < deadline, "the producer still waits for the pair that was given up"
            time.sleep(0.01)
    finally:
        pair.close()
