"""Random KV between the worker halves of two `PyNcclConnector`s, a process each, without vLLM and without a model.

On one GPU both ends share it, and memory is read in place alone: NCCL refuses a device twice.
`KVSDK_TEST_DEVICES=cpu,cpu` runs it on CPUs, with what they have, which shows nothing about GPUs.
"""

import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).parents[2]
LAYERS, HEADS, TOKENS, CONTENT = 4, 8, 16, 256  # 64 KiB a block and layer at 2 bytes
FOUND = torch.cuda.device_count()
DEVICES = os.environ.get("KVSDK_TEST_DEVICES", "cuda:0,cuda:1" if FOUND > 1 else "cuda:0,cuda:0").split(",")


class End:
    """One server's worker half. Every public method is a command and returns a dict."""

    def __init__(self, device):
        sys.path.insert(0, str(REPOSITORY))
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.zeros(1, device=self.device)
        self.half = None

    def serve(self, role, pool, dtype, layout, seed, **options):
        """A new worker half around a random KV cache."""
        from kvsdk.config import parse_options
        from kvsdk.connector.interface import CacheGeometry, Context
        from kvsdk.connectors.pynccl import PyNcclWorker
        from kvsdk.layout import layout_of

        self.caches = self._random(pool, dtype, layout, seed)
        cache_layout = layout_of(self.caches, num_blocks=pool, block_size=TOKENS)
        config = {"kv_connector": "PyNcclConnector", "kv_role": role, "kv_connector_extra_config": options}
        context = Context(
            options=parse_options(config),
            engine_id="test",
            rank=0,
            world_size=1,
            model={},
            cache=CacheGeometry(TOKENS, pool, cache_layout.block_bytes),
        )
        self.half = PyNcclWorker(context)
        self.half.register(self.caches, cache_layout)
        return self.half.handshake() | {"layout": ""}

    def keep(self, hold, pool, blocks, seed):
        self.half.kept(hold, (self._ids(pool, blocks, seed),))
        return {}

    def keep_many(self, count, **what):
        """Offers `0`, `1` and so on, digested and told of before this returns."""
        for i in range(count):
            self.keep(hold=f"{i}", **what)
        time.sleep(1.0)
        return {}

    def load(self, address, hold, pool, blocks, seed, first=0, timeout=60.0):
        """Load an offer's blocks from its `first` on, into blocks of a random choice."""
        from kvsdk.connector.tasks import LoadOrder, LoadTask
        from kvsdk.connectors.pynccl.protocol import Source

        ids = self._ids(pool, blocks, seed)
        order = LoadOrder(1, "r", (ids[first:],), first, blocks * TOKENS, Source((address,), hold), timeout)
        fence = None
        if self.device.type == "cuda":
            fence = torch.cuda.Event()
            fence.record()
        began = time.monotonic()
        task = LoadTask(order, began + timeout, fence)
        self.half.load(task)
        while not task.ended and time.monotonic() < began + timeout:
            time.sleep(50e-6)
        seconds = time.monotonic() - began
        failed = np.flatnonzero(np.isin(ids, task.failed_blocks)).tolist()
        return {"state": task.state.value, "error": str(task.error), "seconds": seconds, "wrong": failed}

    def spoil(self, how, pool, blocks, seed, count, at):
        """Change `count` blocks of an offer, in memory that was digested. A second `flip` or `swap` undoes the first.

        Returns which, as indices into the offer.
        """
        rng = np.random.default_rng(at)
        indices = rng.permutation(blocks)[:count]
        ids = torch.from_numpy(self._ids(pool, blocks, seed)[indices].astype(np.int64)).to(self.device)
        layers = [cache.view(torch.uint8).view(pool, -1) for cache in self.caches.values()]
        size = layers[0].shape[1]
        if how == "flip":
            of, at, bit = (torch.from_numpy(rng.integers(0, n, count)) for n in (LAYERS, size, 8))
            for i, layer in enumerate(layers):
                mine = (of == i).to(self.device)
                place = ids[mine], at.to(self.device)[mine]
                layer[place] ^= (1 << bit).to(torch.uint8).to(self.device)[mine]
        elif how == "swap":
            for layer in layers:
                layer[ids] = layer[ids.view(-1, 2).flip(1).flatten()]
        elif how == "shift":
            layer = layers[rng.integers(LAYERS)]
            layer[ids] = layer[ids].roll(1, dims=1)
        else:
            noise = torch.randint(0, 256, (count, size), dtype=torch.uint8, device=self.device)
            layers[rng.integers(LAYERS)][ids] = noise
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return {"spoilt": sorted(indices.tolist())}

    def load_on_and_on(self, seconds, ahead, **what):
        """Loads one after the other: first the offers that were made ahead, then the same one; stops at the first that
        fails."""
        print(json.dumps({"started": True}), flush=True)
        began, states, bad = time.monotonic(), [], 0
        holds = itertools.chain(map(str, range(ahead)), itertools.repeat(what.pop("hold")))
        while time.monotonic() < began + seconds and "failed" not in states:
            got = self.load(hold=next(holds), **what, timeout=10.0)
            states.append(got["state"])
            bad += self.half.take_counters().get("corrupt_blocks", 0)
        return {"done": states.count("done"), "lost": states.count("failed"), "bad": bad}

    def works(self):
        """Whether the device still computes."""
        x = torch.randn(512, 512, device=self.device)
        return {"works": bool(torch.isfinite((x @ x).sum()).item())}

    def equal(self, pool, blocks, seeds, theirs, ours, dtype, layout, first=0):
        """Whether this cache is its own random one, with the other's blocks where they were loaded and nowhere else."""
        source, target = self._ids(pool, blocks, theirs)[first:], self._ids(pool, blocks, ours)[first:]
        expected = self._random(pool, dtype, layout, seeds[1])
        other = self._random(pool, dtype, layout, seeds[0])
        at, of = (torch.from_numpy(ids.astype(np.int64)).to(self.device) for ids in (target, source))
        same = []
        for name, cache in self.caches.items():
            expected[name].view(torch.uint8)[at] = other[name].view(torch.uint8)[of]
            same.append(torch.equal(expected[name].view(torch.uint8), cache.view(torch.uint8)))
        return {"equal": all(same)}

    def let_go(self, hold):
        self.half.let_go(hold)
        return {}

    def counters(self):
        return self.half.take_counters()

    def memory(self):
        if self.device.type != "cuda":
            return {"used": 0}
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return {"used": torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]}

    def close(self):
        began = time.monotonic()
        self.half.close()
        self.half.close()
        return {"seconds": time.monotonic() - began}

    def _ids(self, pool, blocks, seed):
        return np.random.default_rng(seed).permutation(pool)[:blocks].astype(np.int32)

    def _random(self, pool, dtype, layout, seed):
        """The same on both ends, whose devices are of one kind."""
        generator = torch.Generator(self.device).manual_seed(seed)
        dtype = getattr(torch, dtype)
        shape = (pool, HEADS, TOKENS, CONTENT) if layout == "HND" else (pool, TOKENS, HEADS, CONTENT)
        words = (*shape[:-1], CONTENT * dtype.itemsize // 4)
        bits = {"dtype": torch.int32, "device": self.device, "generator": generator}
        base = [torch.randint(-(2**31), 2**31, words, **bits).view(dtype) for _ in range(LAYERS)]
        return {f"layers.{i}": t.transpose(1, 2) if layout == "NHD" else t for i, t in enumerate(base)}


def serve(device):
    end = End(device)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply = getattr(end, command.pop("do"))(**command)
        except Exception:  # noqa: BLE001 - the test fails with it
            reply = {"failed": traceback.format_exc()}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
    sys.exit()


# The tests

import pytest  # noqa: E402 - an end does not need it
from support.ends import Worker  # noqa: E402
from support.processes import MAY_NOT_READ  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif("cpu" not in DEVICES and not FOUND, reason="needs a CUDA device")]
POOL = 600
SIBLINGS = pytest.param("peer", marks=pytest.mark.skipif(bool(MAY_NOT_READ), reason=MAY_NOT_READ))
KINDS = [SIBLINGS, "shm", "gloo"] if DEVICES[0] == "cpu" else ["peer", "nccl"] if DEVICES[0] != DEVICES[1] else ["peer"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def ends():
    """Starts ends; all that the module starts are stopped at its end."""
    started = []

    def start(*indices):
        new = []
        for i in indices:
            visible = {} if DEVICES[i] == "cpu" else {"CUDA_VISIBLE_DEVICES": DEVICES[i].partition(":")[2]}
            new.append(Worker(__file__, "cpu" if DEVICES[i] == "cpu" else "cuda:0", visible))
        started.extend(new)
        for worker in new:
            assert worker.reply() == {"ready": True}
        return new

    yield start
    for worker in started:
        worker.stop()


@pytest.fixture(scope="module")
def pair(ends):
    return ends(0, 1)


def two(pair, dtype="bfloat16", layout="HND", **options):
    """Worker halves on both; returns the producer's handshake."""
    a, b = pair
    cache = {"pool": POOL, "dtype": dtype, "layout": layout}
    told = a("serve", role="kv_producer", seed=1, **cache, **options)
    b("serve", role="kv_consumer", seed=2, **cache, **options)
    return told


def same(b, blocks, dtype="bfloat16", layout="HND", first=0):
    return b(
        "equal", pool=POOL, blocks=blocks, seeds=[1, 2], theirs=3, ours=4, dtype=dtype, layout=layout, first=first
    )["equal"]


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize(("dtype", "layout"), [("bfloat16", "HND"), ("float16", "NHD"), ("float8_e4m3fn", "NHD")])
def test_offered_blocks_arrive_byte_for_byte(pair, kind, dtype, layout, verify, capsys):
    a, b = pair
    # Staging memory for a few blocks, so that reads are many messages and several rows.
    options = {"verify": verify, "pipe": kind, "staging_bytes": 3 * 2 * LAYERS * 65536}
    told = two(pair, dtype, layout, **options)
    for blocks in (1, 7, 64, 511):
        for first in (0, blocks // 2):
            b("serve", role="kv_consumer", seed=2, pool=POOL, dtype=dtype, layout=layout, **options)
            hold = f"{blocks}-{first}"
            a("keep", hold=hold, pool=POOL, blocks=blocks, seed=3)
            got = b("load", address=told["address"], hold=hold, pool=POOL, blocks=blocks, seed=4, first=first)
            assert got["state"] == "done", got
            assert same(b, blocks, dtype, layout, first)
            a("let_go", hold=hold)
            assert b("close")["seconds"] < 10
    with capsys.disabled():
        print(f"\n{kind} {dtype} {layout} verify={verify}: {blocks - first} blocks in {got['seconds'] * 1e3:.1f} ms")
    a("close")


def test_a_read_of_what_was_let_go_fails_and_the_next_one_works(pair, kind):
    a, b = pair
    told = two(pair, pipe=kind)
    a("keep", hold="x", pool=POOL, blocks=20, seed=3)
    a("let_go", hold="x")
    got = b("load", address=told["address"], hold="x", pool=POOL, blocks=20, seed=4)
    assert got["state"] == "failed" and got["wrong"] == list(range(20))
    a("keep", hold="y", pool=POOL, blocks=20, seed=3)
    assert b("load", address=told["address"], hold="y", pool=POOL, blocks=20, seed=4)["state"] == "done"
    assert same(b, 20)
    a("close")
    b("close")


def test_a_producer_that_is_killed_costs_its_load_and_no_more(ends, kind):
    victim, b = ends(0, 1)
    told = two((victim, b), pipe=kind)
    victim("keep", hold="x", pool=POOL, blocks=500, seed=3)
    assert b("load", address=told["address"], hold="x", pool=POOL, blocks=500, seed=4)["state"] == "done"
    victim("keep_many", count=3, pool=POOL, blocks=500, seed=3)
    victim.stop()
    # What was told of before may still be read where the producer's memory is mapped: then it is right.
    got = b("load", address=told["address"], hold="0", pool=POOL, blocks=500, seed=4, timeout=10.0)
    assert got["seconds"] < 15 and (got["state"] == "failed" or same(b, 500))
    got = b("load", address=told["address"], hold="y", pool=POOL, blocks=500, seed=4, timeout=10.0)
    assert got["state"] == "failed" and got["seconds"] < 15
    assert b("works")["works"]
    (fresh,) = ends(0)
    told = fresh("serve", role="kv_producer", seed=1, pool=POOL, dtype="bfloat16", layout="HND", pipe=kind)
    fresh("keep", hold="x", pool=POOL, blocks=500, seed=3)
    assert b("load", address=told["address"], hold="x", pool=POOL, blocks=500, seed=4)["state"] == "done"
    assert same(b, 500)
    b("close")
    fresh("close")


def test_ten_thousand_flipped_bits_are_found_and_no_other_block_is_refused(pair, kind):
    a, b = pair
    told, offer = two(pair, pipe=kind), {"pool": POOL, "blocks": 500, "seed": 3}
    a("keep", hold="x", **offer)
    load = {"address": told["address"], "hold": "x", "pool": POOL, "blocks": 500, "seed": 4}
    assert b("load", **load)["state"] == "done"
    found = 0
    a("keep_many", count=20, **offer)
    for i in range(40):
        # Half of them are offers that the consumer was told of before they were damaged.
        load["hold"] = "x" if i % 2 else f"{i // 2}"
        spoilt = a("spoil", how="flip", count=250, at=i, **offer)["spoilt"]
        got = b("load", **load)
        assert got["state"] == "failed" and got["wrong"] == spoilt
        found += len(spoilt)
        a("spoil", how="flip", count=250, at=i, **offer)
    assert b("load", **load | {"hold": "x"})["state"] == "done"
    assert same(b, 500)
    assert found == 10_000 == b("counters")["corrupt_blocks"]
    a("close")
    b("close")


@pytest.mark.parametrize("how", ["swap", "shift", "stale"])
def test_blocks_that_are_not_what_was_digested_are_found(pair, kind, how):
    a, b = pair
    told, offer = two(pair, pipe=kind), {"pool": POOL, "blocks": 500, "seed": 3}
    load = {"address": told["address"], "pool": POOL, "blocks": 500, "seed": 4}
    for i in range(10):
        a("keep", hold=f"{i}", **offer)
        assert b("load", hold=f"{i}", **load)["state"] == "done"
        spoilt = a("spoil", how=how, count=50, at=100 + i, **offer)["spoilt"]
        got = b("load", hold=f"{i}", **load)
        assert got["state"] == "failed" and got["wrong"] == spoilt
        a("let_go", hold=f"{i}")
    a("close")
    b("close")


AHEAD = {True: 20 if DEVICES[0] == "cpu" else 2000, False: 0}
"""Offers that a consumer knows before the kill: seconds of reads that need no word of the producer's."""


@pytest.mark.parametrize("ahead", [True, False], ids=["told ahead", "asked"])
@pytest.mark.parametrize("victim", ["producer", "consumer"])
def test_a_kill_in_the_middle_of_reads_leaves_the_other_one_working(ends, kind, victim, ahead):
    """The survivor's CUDA context lives, and its next pair works."""
    a, b = ends(0, 1)
    told = two((a, b), pipe=kind)
    a("keep", hold="x", pool=POOL, blocks=500, seed=3)
    load = {"address": told["address"], "hold": "x", "pool": POOL, "blocks": 500, "seed": 4}
    assert b("load", **load)["state"] == "done"
    a("keep_many", count=AHEAD[ahead], pool=POOL, blocks=500, seed=3)
    b.start("load_on_and_on", ahead=AHEAD[ahead], seconds=3.0, **load)
    assert b.reply() == {"started": True}
    time.sleep(0.2 if ahead else 1.0)
    if victim == "producer":
        a.stop()
        outcome = b.reply()
        assert outcome["done"] > 0 and outcome["bad"] == 0, outcome
        assert outcome["lost"] > 0, "the kill came too late to be noticed"
        (a,) = ends(0)
        told = a("serve", role="kv_producer", seed=1, pool=POOL, dtype="bfloat16", layout="HND", pipe=kind)
        assert b("works")["works"]
    else:
        b.stop()
        (b,) = ends(1)
        b("serve", role="kv_consumer", seed=2, pool=POOL, dtype="bfloat16", layout="HND", pipe=kind)
        assert a("works")["works"]
    a("keep", hold="y", pool=POOL, blocks=500, seed=3)
    got = b("load", address=told["address"], hold="y", pool=POOL, blocks=500, seed=4)
    assert got["state"] == "done", got
    assert same(b, 500)
    a("close")
    b("close")
