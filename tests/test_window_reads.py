"""Reads of a producer's memory in place: what the producer tells ahead, and what becomes of it.

Two worker halves in one process, which reads its own memory as it would another's.
"""

import contextlib
import logging
import time

import numpy as np
import pytest
from support.caches import make_cache
from support.worker_halves import begin_load, ended, worker_half

from kvsdk.connector.tasks import LoadTask, TaskState
from kvsdk.connectors.pynccl import fetching, serving
from kvsdk.connectors.pynccl.channel import Channel
from kvsdk.errors import KVError, ProtocolError

POOL, BLOCKS = 64, 12


class Pair:
    """A producer's worker half and a consumer's, which are paired."""

    def __init__(self, **options):
        self.source, self.target = (make_cache("HND", blocks=POOL, content=64, seed=seed) for seed in (1, 2))
        options = {"pipe": "peer", **options}
        self.producer = worker_half("kv_producer", self.source, **options)
        self.consumer = worker_half("kv_consumer", self.target, **options)
        self.rng = np.random.default_rng(5)
        self.keep("first")
        assert self.load("first").state is TaskState.DONE
        (self.fetcher,) = self.consumer._fetchers.values()

    def keep(self, hold, count=BLOCKS):
        self.ids = self.rng.permutation(POOL)[:count].astype(np.int32)
        self.producer.kept(hold, (self.ids,))

    def knows(self, hold):
        """Whether the consumer knows all of the last offer that was kept."""
        return self.fetcher._known.get(hold, len(self.ids) - 1) is not None

    def told(self, hold):
        """Wait until it does."""
        deadline = time.monotonic() + 10
        while not self.knows(hold):
            assert time.monotonic() < deadline, "the producer has not told of its offer"
            time.sleep(1e-3)

    def load(self, hold, first=0):
        self.into = self.rng.permutation(POOL)[: len(self.ids) - first].astype(np.int32)
        for i in range(3):
            self.target.tensors[f"layers.{i}"].fill_(0)
        return ended(begin_load(self.producer, self.consumer, hold, self.into, first))

    def same(self, first=0, but=()):
        right = np.setdiff1d(np.arange(len(self.into)), but)
        for i in range(3):
            got, wanted = self.target.blocks(i)[self.into[right]], self.source.blocks(i)[self.ids[first:][right]]
            np.testing.assert_array_equal(got, wanted)

    def write_over(self, index, layer=1):
        self.source.tensors[f"layers.{layer}"][int(self.ids[index])] *= 2

    def close(self):
        self.producer.close()
        self.consumer.close()


@pytest.fixture
def pair(no_thread_left):
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture
def sent(monkeypatch):
    """Kinds of the messages that either worker sends."""
    kinds, send = [], Channel.send

    def noted(self, kind, **fields):
        kinds.append(kind)
        send(self, kind, **fields)

    monkeypatch.setattr(Channel, "send", noted)
    return kinds


@pytest.mark.parametrize("first", [0, 5])
def test_an_offer_that_was_told_of_is_read_without_a_word_before(pair, sent, first):
    pair.keep("x")
    pair.told("x")
    del sent[:]
    assert pair.load("x", first).state is TaskState.DONE
    pair.same(first)
    deadline = time.monotonic() + 5
    while sent != ["took"]:
        assert sent in ([], ["took"]) and time.monotonic() < deadline, sent
    while pair.knows("x"):
        assert time.monotonic() < deadline, "what was loaded is still remembered"
    moved = BLOCKS + BLOCKS - first
    while pair.producer._counters._values.get("sent_bytes") != moved * pair.source.layout().block_bytes:
        assert time.monotonic() < deadline, pair.producer._counters._values


def test_an_offer_that_is_digested_piece_by_piece_is_put_together(pair, sent, monkeypatch):
    monkeypatch.setitem(serving.DIGEST_BYTES, "cpu", 5 * pair.source.layout().block_bytes)
    added, add = [], pair.fetcher._known.add

    def noted(transfer_id, total, first, ids, digests):
        added.append((transfer_id, first, len(ids)))
        add(transfer_id, total, first, ids, digests)

    monkeypatch.setattr(pair.fetcher._known, "add", noted)
    pair.keep("x")
    pair.told("x")
    assert [part for part in added if part[0] == "x"] == [("x", 0, 5), ("x", 5, 5), ("x", 10, 2)]
    del sent[:]
    assert pair.load("x").state is TaskState.DONE
    pair.same()
    assert "read" not in sent


def test_what_was_told_and_not_yet_heard_is_heard_before_a_read(pair, sent, monkeypatch):
    """Or an offer that is told of in parts would be read in as many."""
    monkeypatch.setitem(serving.DIGEST_BYTES, "cpu", 5 * pair.source.layout().block_bytes)
    pulled, pull, note = [], pair.fetcher._store.pull, pair.fetcher._note

    def hear_no_more(kind, fields):
        note(kind, fields)
        monkeypatch.setattr(pair.fetcher, "_idle", pair.fetcher._bell.wait)

    def noted(chosen, dst_ids, **more):
        pulled.append(len(dst_ids))
        pull(chosen, dst_ids, **more)

    monkeypatch.setattr(pair.fetcher, "_note", hear_no_more)
    monkeypatch.setattr(pair.fetcher._store, "pull", noted)
    pair.keep("x")
    deadline = time.monotonic() + 5
    while sent.count("digested") < 3 or pair.fetcher._known.get("x", 4) is None:
        assert time.monotonic() < deadline, sent
    assert not pair.knows("x")
    assert pair.load("x").state is TaskState.DONE
    pair.same()
    assert pulled == [BLOCKS]


def test_what_was_told_of_an_offer_that_is_over_gives_no_wrong_block(pair):
    pair.keep("x")
    pair.told("x")
    pair.producer.let_go("x")
    pair.write_over(3)
    task = pair.load("x")
    assert task.state is TaskState.FAILED and "has ended" in str(task.error)
    assert "corrupt_blocks" not in pair.consumer.take_counters()
    pair.keep("y")
    assert pair.load("y").state is TaskState.DONE
    pair.same()


def test_of_an_offer_that_was_told_of_and_is_damaged_the_damaged_block_fails(pair):
    pair.keep("x")
    pair.told("x")
    pair.write_over(3)
    pair.write_over(8, layer=2)
    task = pair.load("x")
    assert task.state is TaskState.FAILED
    assert sorted(task.failed_blocks.tolist()) == sorted(pair.into[[3, 8]].tolist())
    pair.same(but=[3, 8])
    assert pair.consumer.take_counters()["corrupt_blocks"] == 2


def test_offers_that_nobody_loads_are_forgotten_and_can_be_loaded_all_the_same(pair, sent, monkeypatch):
    monkeypatch.setattr(fetching, "KNOWN_BLOCKS", 3 * BLOCKS)
    kept = {}
    for i in range(5):
        pair.keep(f"{i}")
        kept[f"{i}"] = pair.ids
        pair.told(f"{i}")
    assert list(pair.fetcher._known._offers) == ["2", "3", "4"] and pair.fetcher._known._blocks == 3 * BLOCKS
    monkeypatch.setattr(fetching, "KNOWN_OFFERS", 2)
    pair.keep("5", count=1)
    pair.told("5")
    assert list(pair.fetcher._known._offers) == ["4", "5"]
    del sent[:]
    pair.ids = kept["0"]
    assert pair.load("0").state is TaskState.DONE
    pair.same()
    assert "read" in sent


@pytest.mark.parametrize("told", [True, False])
def test_a_load_that_is_given_up_when_all_has_come_harms_no_other(pair, monkeypatch, told):
    pair.keep("x")
    if told:
        pair.told("x")
    done = LoadTask.done

    def too_late(task):
        task.expire()
        done(task)

    with monkeypatch.context() as patch:
        patch.setattr(LoadTask, "done", too_late)
        if not told:
            patch.setattr(pair.fetcher._known, "get", lambda *args: None)
        assert pair.load("x").state is TaskState.EXPIRED
    for hold in ("y", "z"):
        pair.keep(hold)
        pair.told(hold)
        assert pair.load(hold).state is TaskState.DONE
        pair.same()


def test_a_device_without_room_for_what_is_told_costs_no_load(pair, sent, monkeypatch, caplog):
    def no_room(*args):
        raise RuntimeError("out of memory, on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(pair.fetcher._known, "_choose", no_room)
        pair.keep("x")
        deadline = time.monotonic() + 10
        while not any("has no room" in record.getMessage() for record in caplog.records):
            assert time.monotonic() < deadline
            time.sleep(1e-3)
    assert pair.load("x").state is TaskState.DONE
    pair.same()
    assert "read" in sent


def test_what_was_told_in_answer_to_a_read_is_not_told_again(pair, sent, monkeypatch):
    digest = serving.BlockStore.digest_in_place
    monkeypatch.setattr(serving.BlockStore, "digest_in_place", lambda *args: (time.sleep(0.3), digest(*args))[1])
    pair.keep("x")
    assert pair.load("x").state is TaskState.DONE, "the load did not wait for the digests"
    assert "read" in sent
    time.sleep(0.2)
    assert pair.fetcher._known.get("x", 0) is None


@pytest.fixture
def halved(monkeypatch):
    """However little it is, two threads read it."""
    monkeypatch.setattr(fetching, "HALVED_BYTES", 0)
    monkeypatch.setattr(fetching, "READERS", 2)


@pytest.mark.parametrize("count", [1, 2, 11])
def test_two_threads_read_half_of_it_each(pair, halved, count):
    pair.keep("x", count)
    pair.told("x")
    assert pair.load("x").state is TaskState.DONE
    pair.same()
    pair.keep("y", count)
    pair.told("y")
    spoilt = sorted({0, count - 1})
    for index in spoilt:
        pair.write_over(index)
    task = pair.load("y")
    assert task.state is TaskState.FAILED and sorted(task.failed_blocks) == sorted(pair.into[spoilt])
    pair.same(but=spoilt)


def test_a_load_ends_when_both_threads_have(pair, halved, monkeypatch):
    """Also where one of them fails at once: the other still writes into its blocks."""
    pulled, pull = [], pair.fetcher._pull_part

    def part(block_ids, chosen, first, part):
        if part.start == 0:
            raise KVError("on purpose")
        time.sleep(0.1)
        pull(block_ids, chosen, first, part)
        pulled.append(part)

    pair.keep("x")
    pair.told("x")
    with monkeypatch.context() as patch:
        patch.setattr(pair.fetcher, "_pull_part", part)
        assert pair.load("x").state is TaskState.FAILED
        assert pulled == [slice(BLOCKS // 2, BLOCKS)]
    pair.keep("y")
    assert pair.load("y").state is TaskState.DONE
    pair.same()


def test_between_two_parts_it_is_looked_whether_the_load_is_still_wanted(pair, monkeypatch):
    monkeypatch.setattr(fetching, "AT_ONCE_BYTES", 5 * pair.source.layout().block_bytes)
    pulled, pull = [], pair.fetcher._pull_part

    def part(block_ids, chosen, first, part):
        pull(block_ids, chosen, first, part)
        pulled.append((part.start, part.stop))

    monkeypatch.setattr(pair.fetcher, "_pull_part", part)
    pair.keep("x")
    pair.told("x")
    assert pair.load("x").state is TaskState.DONE
    pair.same()
    assert pulled == [(0, 5), (5, 10), (10, 12)]
    using = LoadTask.using

    @contextlib.contextmanager
    def once(task):
        with using(task):
            yield
        task.expire()

    pair.keep("y")
    pair.told("y")
    del pulled[:]
    monkeypatch.setattr(LoadTask, "using", once)
    assert pair.load("y").state is TaskState.EXPIRED
    assert pulled == [(0, 5)]


def test_nobody_rings_while_holding_the_lock_that_the_models_thread_takes():
    offers, held = serving.Offers(), []

    class News:
        def put(self, *args):
            held.append(offers._changed._is_owned())

    with offers.told(News()):
        offers.digested(offers.add("x", np.arange(3, dtype=np.int32)), np.zeros(3, np.uint64))
    assert held == [False]


def test_without_checks_nothing_is_told_and_every_read_is_confirmed(sent, no_thread_left):
    pair = Pair(verify=False)
    try:
        pair.keep("x")
        assert pair.load("x").state is TaskState.DONE
        pair.same()
        assert "digested" not in sent and sent.count("confirm") == sent.count("stands") == 2
    finally:
        pair.close()


def test_a_producer_that_ends_takes_what_it_told_along(pair, caplog):
    pair.keep("x")
    pair.told("x")
    with caplog.at_level(logging.INFO):
        pair.producer.close()
        deadline = time.monotonic() + 10
        while pair.knows("x"):
            assert time.monotonic() < deadline
            time.sleep(1e-3)
    assert any("the pair with" in record.getMessage() for record in caplog.records)


TOLD = {"transfer_id": "x", "total": 3, "first": 0, "ids": bytes(12), "digests": bytes(24)}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("blocks", {}),
        ("digested", {"ids": b"", "digests": b""}),
        ("digested", {"ids": bytes(11)}),
        ("digested", {"ids": bytes(11), "digests": bytes(22)}),
        ("digested", {"digests": bytes(16)}),
        ("digested", {"first": -1}),
        ("digested", {"first": 1}),
        ("digested", {"total": 2}),
        ("digested", {"ids": np.array([0, POOL, 1], "<i4").tobytes()}),
        ("digested", {"ids": np.array([0, -1, 1], "<i4").tobytes()}),
    ],
)
def test_what_no_producer_tells_is_refused(pair, kind, change):
    with pytest.raises(ProtocolError):
        pair.fetcher._note(kind, TOLD | change)
    pair.fetcher._note("digested", TOLD)


def test_more_of_an_offer_whose_beginning_is_not_known_is_nothing(pair):
    pair.fetcher._note("digested", TOLD | {"first": 2, "ids": bytes(4), "digests": bytes(8)})
    assert pair.fetcher._known.get("x", 0) is None
    pair.fetcher._note("digested", TOLD | {"ids": bytes(8), "digests": bytes(16)})
    pair.fetcher._note("digested", TOLD | {"first": 1, "ids": bytes(8), "digests": bytes(16)})
    assert pair.fetcher._known.get("x", 0).count == 2 and pair.fetcher._known.get("x", 2) is None
