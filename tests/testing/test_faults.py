"""Faults on purpose do what they say, come again with the same seed, and a connector under them answers rightly."""

from __future__ import annotations

import collections
import random
import threading
import time
from typing import ClassVar

import numpy as np
import pytest
import torch

from kvsdk.buffer import BufferFull, LookupBuffer, Pending, RemoteClaim, prefix_keys
from kvsdk.connector import Connector, ConsumerScheduler, ConsumerWorker, Hit, ProducerScheduler, ProducerWorker
from kvsdk.connectors.pynccl import PyNcclConnector
from kvsdk.demo.servers import free_port
from kvsdk.errors import ConfigError, DeadlineExceeded, KVError, PeerGone, PipeClosed, ProtocolError
from kvsdk.kernels import BlockStore, torch_blocks
from kvsdk.pipe import in_process_pair
from kvsdk.testing.contracts import check_lookup_buffer, check_pipe
from kvsdk.testing.faults import FAULTS, FaultPlan, FaultyBuffer, FaultyClient, FaultyPipe, with_faults
from kvsdk.transfer_params import announce_params

SOON, LONG = 0.05, 20.0


def within(seconds):
    return time.monotonic() + seconds


# Plans


def test_the_same_seed_brings_the_same_faults_and_another_seed_others():
    def drawn(seed):
        plan = FaultPlan(seed, drop=0.3, delay=0.3)
        one, other = plan.source("one"), plan.source("other")
        # How calls of the two interleave does not matter.
        order = random.Random(time.monotonic_ns()).sample([one, other] * 50, 100)
        got = collections.defaultdict(list)
        for source in order:
            got[source.name].append(source.draw("drop", "delay"))
        return dict(got)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(1)["one#1"] != drawn(1)["other#1"]


def test_rates_are_shares_of_calls_and_what_was_injected_is_counted():
    plan = FaultPlan(drop=0.2, corrupt=0.1)
    source = plan.source("x")
    drawn = collections.Counter(source.draw(*FAULTS) for _ in range(5000))
    assert 800 < drawn["drop"] < 1200
    assert 350 < drawn["corrupt"] < 650
    assert plan.injected == {"drop": drawn["drop"], "corrupt": drawn["corrupt"]}
    assert drawn[None] == 5000 - drawn["drop"] - drawn["corrupt"]
    assert not any(source.draw("delay", "death") for _ in range(100)), "a fault that is not among the possible ones"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "starts only with the option 'faults'"),
        ({}, "starts only with the option 'faults'"),
        (0.1, "starts only with the option 'faults'"),
        ({"corupt": 0.1}, "'corupt' is not a fault; the nearest is 'corrupt'"),
        ({"drop": 1.5}, "add up to 1.5"),
        ({"drop": 0.6, "delay": 0.6}, "add up to 1.2"),
        ({"drop": -0.1}, "drop=-0.1"),
        ({"drop": "often"}, "drop='often'"),
        ({"drop": True}, "drop=True"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"max_delay": float("inf")}, "max_delay=inf"),
    ],
    ids=str,
)
def test_a_plan_that_is_not_one_is_refused_by_name(given, says):
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")) as error:
        FaultPlan.from_options(given)
    assert "\n" not in str(error.value)


# Pipes


def faulty_pair(capacity=4, sends=None, receives=None):
    """An end that sends and one that receives, with these faults."""
    a, b = in_process_pair(capacity)
    return FaultyPipe(a, sends or FaultPlan()), FaultyPipe(b, receives or FaultPlan())


def tensor(value, n=8):
    return torch.full((n,), value, dtype=torch.uint8)


def received(pipe, n=8, seconds=LONG):
    got = torch.zeros(n, dtype=torch.uint8)
    pipe.recv(got, within(seconds))
    return got.tolist()


def clogged():
    a, b = faulty_pair(1)
    a.send(tensor(0), within(LONG))
    return a, b


@pytest.mark.parametrize("plan", [FaultPlan(), FaultPlan(delay=0.5, late=0.5, max_delay=0.005)], ids=str)
def test_a_pipe_without_faults_or_with_delays_keeps_every_promise(plan):
    check_pipe(lambda: faulty_pair(1, plan, plan), clogged)


def test_what_is_dropped_does_not_arrive():
    a, b = faulty_pair(sends=FaultPlan(drop=1))
    a.send(tensor(1), within(LONG))
    with pytest.raises(DeadlineExceeded):
        received(b, seconds=SOON)
    a, b = faulty_pair(receives=FaultPlan(drop=1))
    for value in (1, 2):
        a.send(tensor(value), within(LONG))
    assert received(b) == [2] * 8


def test_what_is_duplicated_arrives_twice():
    a, b = faulty_pair(sends=FaultPlan(duplicate=1))
    a.send(tensor(1), within(LONG))
    assert [received(b) for _ in range(2)] == [[1] * 8] * 2
    a, b = faulty_pair(receives=FaultPlan(duplicate=1))
    a.send(tensor(1), within(LONG))
    assert [received(b) for _ in range(2)] == [[1] * 8] * 2


def test_what_is_reordered_arrives_after_the_next():
    a, b = faulty_pair(sends=FaultPlan(reorder=1))
    held = tensor(1)
    a.send(held, within(LONG))
    held.fill_(9)
    a.send(tensor(2), within(LONG))
    assert [received(b) for _ in range(2)] == [[2] * 8, [1] * 8]
    plan = FaultPlan(reorder=0.5, seed=3)
    a, b = faulty_pair(20, receives=plan)
    for value in range(20):
        a.send(tensor(value), within(LONG))
    values = [received(b)[0] for _ in range(19)]
    assert plan.injected["reorder"] > 3
    assert values != sorted(values) and len(set(values)) == 19


def test_what_is_truncated_arrives_in_part_and_is_found():
    a, b = faulty_pair(sends=FaultPlan(truncate=1))
    a.send(tensor(1), within(LONG))
    with pytest.raises(ProtocolError):
        received(b)
    a, b = faulty_pair(receives=FaultPlan(truncate=1))
    a.send(tensor(1), within(LONG))
    assert received(b) == [1] * 4 + [0] * 4


@pytest.mark.parametrize("way", ["sends", "receives"])
def test_what_is_corrupted_differs_in_one_bit_there_and_not_here(way):
    a, b = faulty_pair(**{way: FaultPlan(corrupt=1)})
    sent = tensor(1)
    a.send(sent, within(LONG))
    changed = [bin(value ^ 1).count("1") for value in received(b)]
    assert sorted(changed) == [0] * 7 + [1]
    assert sent.tolist() == [1] * 8


def test_out_of_memory_is_an_error_that_leaves_the_pipe_as_it_was():
    a, b = faulty_pair(sends=FaultPlan(out_of_memory=1), receives=FaultPlan(out_of_memory=1))
    for call in (a.send, b.recv):
        with pytest.raises(torch.OutOfMemoryError):
            call(tensor(1), within(LONG))
    assert not a.broken and not b.broken


def test_a_death_is_seen_by_both_and_lasts():
    a, b = faulty_pair(sends=FaultPlan(death=1))
    for _ in range(2):
        with pytest.raises(PeerGone):
            a.send(tensor(1), within(LONG))
        with pytest.raises(PeerGone):
            received(b)
    assert a.broken and b.broken


@pytest.mark.parametrize("fault", ["delay", "late"])
def test_a_delay_ends_with_the_deadline_and_with_the_pipe(fault):
    a, b = faulty_pair(sends=FaultPlan(**{fault: 1}, max_delay=1000, seed=1))
    began = time.monotonic()
    if fault == "delay":
        with pytest.raises(DeadlineExceeded):
            a.send(tensor(1), within(SOON))
    else:
        a.send(tensor(1), within(SOON))
        assert received(b) == [1] * 8
    assert SOON <= time.monotonic() - began < 5
    a, b = faulty_pair(sends=FaultPlan(**{fault: 1}, max_delay=1000, seed=1))
    threading.Timer(SOON, a.abort).start()
    with pytest.raises(PipeClosed):
        a.send(tensor(1), within(LONG))
    assert time.monotonic() - began < 10


# The lookup buffer and its client


def keys_of(*tokens):
    return prefix_keys(np.array(tokens, dtype=np.int32), 4)


def ids(*values):
    return np.array(values, dtype=np.int32)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def buffer_with(clock=time.monotonic, **rates):
    inner = LookupBuffer(limit_bytes=100, block_bytes=1, lease=30.0, clock=clock)
    return FaultyBuffer(inner, FaultPlan(**rates))


TEN = tuple(range(10))


def test_a_buffer_without_faults_keeps_every_promise():
    check_lookup_buffer(lambda **how: FaultyBuffer(LookupBuffer(**how), FaultPlan()))


def test_a_lost_answer_leaves_a_claim_that_its_lease_ends():
    clock = Clock()
    buffer = buffer_with(clock, drop=1)
    buffer.insert(keys_of(*TEN), ids(1, 2, 3))
    assert buffer.find(keys_of(*TEN)) is None
    assert buffer.num_claims == 1
    assert buffer.renew(["x"]) == []
    clock.now += 30
    assert buffer.expire() == 1
    assert [offer.reason for offer in buffer.take_ended()] == ["expired"]
    assert buffer.bytes_held == 0


def test_claims_come_shorter_under_another_name_or_twice():
    for rates, wanted in (
        ({"truncate": 1}, (8, "t", 1)),
        ({"corrupt": 1}, (10, "t?", 1)),
        ({"duplicate": 1}, (10, "t", 2)),
    ):
        buffer = buffer_with(**rates)
        buffer.insert(keys_of(*TEN), ids(1, 2, 3), "t")
        claim = buffer.find(keys_of(*TEN))
        assert (claim.num_tokens, claim.transfer_id, buffer.num_claims) == wanted


def test_no_memory_for_an_offer_is_a_full_buffer():
    with pytest.raises(BufferFull):
        buffer_with(out_of_memory=1).insert(keys_of(*TEN), ids(1, 2, 3))


def test_whatever_goes_wrong_the_ledger_returns_to_zero():
    clock, chance = Clock(), random.Random(5)
    plan = FaultPlan.every(0.1, max_delay=0)
    buffer = FaultyBuffer(LookupBuffer(limit_bytes=20, block_bytes=1, lease=30.0, clock=clock), plan)
    inserted, taken, claims = 0, 0, []
    for _ in range(500):
        keys = keys_of(*chance.choices((0, 1), k=chance.randint(2, 17)))
        try:
            buffer.insert(keys, ids(*chance.sample(range(30), -(-keys.num_tokens // 4))))
            inserted += 1
        except BufferFull:
            clock.now += 10
        claims += filter(None, [buffer.find(keys), buffer.select(keys)])
        if claims:
            buffer.release(claims.pop(chance.randrange(len(claims))).claim_id, chance.random() < 0.5)
        taken += len(buffer.take_ended())
    for _ in range(2):
        clock.now += 30
        buffer.expire()
    assert taken + len(buffer.take_ended()) == inserted > 100
    assert (buffer.bytes_held, buffer.num_claims) == (0, 0)
    assert {"drop", "duplicate", "truncate", "corrupt", "out_of_memory"} <= plan.injected.keys()


class StubClient:
    """Answers every lookup at once."""

    def __init__(self):
        self.calls = []

    def find(self, ticket, keys, min_tokens=0):
        self.calls.append(("find", ticket))

    def poll(self, ticket):
        return RemoteClaim("c", "t", 10, 1, True, "host:1", "engine", {})

    def cancel(self, ticket):
        self.calls.append(("cancel", ticket))

    def release(self, claim, used):
        self.calls.append(("release", used))

    def lost(self, claim):
        return False


def client_with(**rates):
    inner, clock = StubClient(), Clock()
    return FaultyClient(inner, FaultPlan(**rates), clock=clock), inner, clock


def test_a_lookup_that_is_dropped_has_no_answer_after_a_while():
    client, inner, clock = client_with(drop=1, max_delay=5)
    client.find("a", keys_of(*TEN))
    assert client.poll("a") is Pending
    clock.now += 5
    assert client.poll("a") is None
    assert inner.calls == []


def test_an_answer_may_come_late_shorter_under_another_name_or_be_lost_at_once():
    client, _, clock = client_with(late=1, max_delay=5)
    client.find("a", keys_of(*TEN))
    assert client.poll("a") is Pending
    clock.now += 5
    assert client.poll("a").num_tokens == 10
    for rates, wanted in (
        ({"truncate": 1}, (8, "t", False)),
        ({"corrupt": 1}, (10, "t?", False)),
        ({"death": 1}, (10, "t", True)),
    ):
        client, _, _ = client_with(**rates)
        client.find("a", keys_of(*TEN))
        claim = client.poll("a")
        assert (claim.num_tokens, claim.transfer_id, client.lost(claim)) == wanted


def test_a_late_answer_that_nobody_waits_for_is_released():
    client, inner, _ = client_with(late=1, max_delay=5)
    client.find("a", keys_of(*TEN))
    assert client.poll("a") is Pending
    client.cancel("a")
    assert inner.calls == [("find", "a"), ("release", False), ("cancel", "a")]


def test_releases_may_come_late_twice_or_as_not_used():
    for rates, wanted in (
        ({"drop": 1}, [("release", False)]),
        ({"duplicate": 1}, [("release", True)] * 2),
        ({"late": 1}, [("release", True)]),
    ):
        client, inner, _ = client_with(**rates, max_delay=0.01)
        client.release(inner.poll("a"), used=True)
        limit = within(LONG)
        while inner.calls != wanted:
            assert time.monotonic() < limit, inner.calls
            time.sleep(0.001)


# Connectors, between vLLM's real schedulers


SAVED: dict[tuple[int, bytes], torch.Tensor] = {}


class ShelfScheduler(ProducerScheduler, ConsumerScheduler):
    open_lookups: ClassVar[set[str]] = set()

    def find(self, request, num_local_tokens):
        self.open_lookups.add(request.id)
        keys = request.keys.blocks + request.keys.tail
        found = 0
        while found < len(keys) // 16 and (0, keys[16 * found : 16 * found + 16]) in SAVED:
            found += 1
        return Hit(min(found * request.block_size, request.num_prompt_tokens), keys) if found else None

    def load_ended(self, request, hit, ok):
        self.open_lookups.remove(request.id)

    def forget(self, request):
        self.open_lookups.remove(request.id)

    def save_from(self, request):
        return 0


class ShelfWorker(ProducerWorker, ConsumerWorker):
    def register(self, kv_caches, layout):
        self.store = BlockStore(kv_caches, layout)

    def load(self, task):
        (block_ids,) = task.blocks
        for i in range(len(block_ids)):
            key = task.source[16 * (task.first_block + i) :][:16]
            with task.using():
                self.store.scatter(block_ids[i : i + 1], SAVED[self.context.rank, key])
        task.done()

    def save(self, task):
        (block_ids,) = task.blocks
        for i in range(len(block_ids)):
            staging = self.store.staging(1)
            with task.using():
                self.store.gather(block_ids[i : i + 1], staging)
            SAVED[self.context.rank, task.keys[16 * i :][:16]] = staging
        task.done()


class Shelf(Connector):
    scheduler_half = ShelfScheduler
    worker_half = ShelfWorker


PLAN = FaultPlan.every(0.05, seed=2, max_delay=0.005)
FaultyShelf = with_faults(Shelf, PLAN)


@pytest.fixture
def engine():
    Engine = pytest.importorskip("kvsdk.vllm.harness", reason="vLLM is not installed").Engine
    made = []

    def make(connector, role="kv_both", extra=None):
        config = {
            "kv_connector": connector,
            "kv_connector_module_path": "kvsdk.vllm.connectors",
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra or {},
        }
        made.append(Engine(config))
        return made[-1]

    yield make
    for one in made:
        one.close()


def prompt(n, seed):
    return np.random.default_rng(seed).integers(1, 900, n).tolist()


def run_all(*engines, until, seconds):
    deadline = within(seconds)
    while not until():
        for one in engines:
            one.step()
        time.sleep(0.0005)
        assert time.monotonic() < deadline, [list(one.scheduler.requests) for one in engines]


def at_rest(*engines):
    run_all(
        *engines,
        until=lambda: not any(one.scheduler.has_requests() or one._in_flight for one in engines),
        seconds=20,
    )
    for one in engines:
        one.check_at_rest()


def test_a_connector_of_an_authors_own_answers_rightly_under_faults(engine):
    SAVED.clear()
    one, two = (engine("test_faults:FaultyShelf", extra={"load_timeout": 0.2}) for _ in range(2))
    for i in range(60):
        tokens = prompt(20 + i % 40, i // 2)
        for target in (one, two):
            target.add(f"r{i}", tokens, max_tokens=3)
            run_all(target, until=lambda target=target, i=i: f"r{i}" in target.finish_reasons, seconds=20)
            assert target.outputs[f"r{i}"] == target.expected(tokens, 3)
    at_rest(one, two)
    assert not ShelfScheduler.open_lookups, "lookups that were neither loaded nor forgotten"
    assert sum(two.hits[f"r{i}"][0] > 0 for i in range(60)) > 20, "hardly anything was loaded"
    assert {"drop", "late", "truncate", "out_of_memory", "delay"} <= PLAN.injected.keys()


@pytest.fixture
def bad_reads(monkeypatch):
    """One read in ten of another process's memory fails, or comes late and damaged."""
    rng, read = random.Random(4), torch_blocks.read_process

    def read_process(pid, places, nbytes, into):
        fault = rng.choice(["gone", "unmapped", "late", *[None] * 27])
        if fault == "gone":
            raise PeerGone(f"process {pid} is gone, on purpose")
        if fault == "unmapped":
            raise KVError(f"process {pid} has no memory there any more, on purpose")
        read(pid, places, nbytes, into)
        if fault == "late":
            time.sleep(0.01)
            into[rng.randrange(into.numel())] ^= 4

    monkeypatch.setattr(torch_blocks, "read_process", read_process)


@pytest.mark.parametrize("kind", ["auto", "peer"])
def test_pynccl_answers_rightly_under_every_fault_and_comes_to_rest(engine, bad_reads, kind):
    plan = {"seed": 4, "max_delay": 0.005, **dict.fromkeys(FAULTS, 0.05)}
    port = free_port()
    extra = {"kv_port": port, "lease": 1.0, "load_timeout": 0.3, "lookup_timeout": 0.5, "announce_wait": 0.3}
    extra |= {"faults": plan, "pipe": kind}
    extra["staging_bytes"] = 4096  # four blocks, so that most loads are several tensors
    connector = "kvsdk.testing.faults:FaultyPyNcclConnector"
    p = engine(connector, "kv_producer", extra)
    d = engine(connector, "kv_consumer", extra)
    assert d.connector._scheduler._half._client.wait_ready(5.0)
    prompts = {f"r{i}": prompt(10 + 7 * i % 90, i) for i in range(60)}
    for i, (name, tokens) in enumerate(prompts.items()):
        early = announce_params(f"transfer-{name}", "127.0.0.1", port) if i % 3 == 0 else (None, None)
        p.add(name, tokens, max_tokens=1, params=early[0])
        if early[0] is None:
            run_all(p, d, until=lambda name=name: name in p.finish_reasons, seconds=20)
        d.add(name, tokens, max_tokens=4, params=early[1])
        run_all(p, d, until=lambda name=name: name in d.finish_reasons, seconds=20)
        assert d.outputs[name] == d.expected(tokens, 4)
    at_rest(p, d)
    halves = [one.connector._scheduler._half for one in (p, d)] + [one.workers[0].connector._half for one in (p, d)]
    injected = collections.Counter()
    for half in halves:
        injected.update(half.fault_plan.injected)
    assert len(injected) >= (7 if kind == "auto" else 5), injected
    assert halves[0]._buffer.blocks_held == halves[0]._buffer.num_claims == 0
    assert d.stats["loads_done"] and d.stats["loads_failed"], d.stats


def test_a_connector_with_faults_starts_only_with_the_option(engine):
    with pytest.raises(ConfigError, match="starts only with the option 'faults'"):
        engine("kvsdk.testing.faults:FaultyPyNcclConnector", "kv_consumer", {"kv_port": free_port()})


def test_a_connector_without_faults_refuses_the_option(engine):
    for connector in ("kvsdk.connectors.pynccl:PyNcclConnector", "test_faults:FaultyShelf"):
        with pytest.raises(ConfigError, match="unknown option 'faults'"):
            engine(connector, "kv_consumer", {"faults": {"drop": 0.1}})


def test_with_faults_leaves_the_connector_as_it_was():
    faulty = with_faults(PyNcclConnector, FaultPlan())
    assert issubclass(faulty, PyNcclConnector)
    assert PyNcclConnector.option_names == frozenset()
    assert issubclass(faulty.scheduler_half, PyNcclConnector.scheduler_half)
    assert issubclass(faulty.worker_half, PyNcclConnector.worker_half)
