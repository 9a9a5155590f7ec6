"""Random KV between two GPUs over NCCL, and what a dead peer does to the survivor.

Each end is a process of its own, as in service: this file, run as a script, takes commands as JSON lines. In one
variant both processes see all GPUs, in the other each sees only its own. What this cannot prove: anything about a
model, or about NCCL between hosts.
"""

import hashlib
import json
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).parents[2]
LAYERS, HEADS, TOKENS, CONTENT = 4, 8, 16, 256  # 64 KiB a block and layer at 2 bytes


# One end of a pair, in its own process


class End:
    """What the script does for each command; every public method is one and returns a dict."""

    def __init__(self, device: str, max_ctas: int):
        sys.path.insert(0, str(REPOSITORY))
        from kvsdk import pipe

        self.pipe_module = pipe
        pipe.prepare_process("cuda")
        self.device = torch.device(device)
        torch.cuda.set_device(self.device)
        torch.zeros(1, device=self.device)
        self.max_ctas = max_ctas
        self.pipe = None
        self.host = None

    def prepare(self, max_ctas=0):
        self.host = self.pipe_module.PipeHost("nccl", "127.0.0.1", self.device, max_ctas=max_ctas)
        return {"invite": self.host.prepare()}

    def accept(self, invite):
        self.pipe = self.host.accept(invite, time.monotonic() + 60)
        return {"kind": self.pipe.kind}

    def join(self, invite):
        self.pipe = self.pipe_module.join(invite, self.device, "127.0.0.1", time.monotonic() + 60)
        return {"kind": self.pipe.kind}

    def close(self):
        self.pipe.close(time.monotonic() + 10)
        self.pipe.close(time.monotonic() + 10)
        return {}

    def broken(self, seconds):
        end = time.monotonic() + seconds
        while not self.pipe.broken and time.monotonic() < end:
            time.sleep(0.01)
        return {"broken": self.pipe.broken}

    def memory(self):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return {"used": torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]}

    def move(self, way, dtype, layout, blocks, seed):
        """Sends blocks of a random cache, or receives them into another one and compares them with the first."""
        from kvsdk.kernels import BlockStore
        from kvsdk.layout import layout_of

        pool = blocks + 33
        positions = np.arange(blocks, dtype=np.int64)
        source, target = (np.random.default_rng(seed + i).permutation(pool)[:blocks].astype(np.int32) for i in (1, 2))
        base = self._random_cache(dtype, layout, pool, seed if way == "send" else seed + 1)
        caches = {f"layers.{i}": t.transpose(1, 2) if layout == "NHD" else t for i, t in enumerate(base)}
        store = BlockStore(caches, layout_of(caches, num_blocks=pool, block_size=TOKENS))
        staging = store.staging(blocks)
        if way == "send":
            store.gather(source, staging)
            digests = store.digest(staging, blocks, positions)
            start = time.monotonic()
            self.pipe.send(staging, start + 30)
            seconds = time.monotonic() - start
            equal = True
        else:
            before = [t.clone() for t in base]
            start = time.monotonic()
            self.pipe.recv(staging, start + 30)
            seconds = time.monotonic() - start
            digests = store.digest(staging, blocks, positions)
            store.scatter(target, staging)
            ids = [torch.from_numpy(i.astype(np.int64)).to(self.device) for i in (source, target)]
            for mine, theirs in zip(before, self._random_cache(dtype, layout, pool, seed), strict=True):
                mine.view(torch.uint8)[ids[1]] = theirs.view(torch.uint8)[ids[0]]
            equal = all(
                torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(base, before, strict=True)
            )
        digest = hashlib.sha256(digests.tobytes()).hexdigest()
        return {"digest": digest, "equal": equal, "bytes": staging.numel(), "seconds": seconds}

    def digests(self, blocks, seed):
        """Whether the GPU's digests are the CPU's."""
        from kvsdk.kernels import BlockStore
        from kvsdk.layout import layout_of

        base = self._random_cache("bfloat16", "HND", blocks, seed)
        ids, positions = np.arange(blocks, dtype=np.int32), np.arange(blocks, dtype=np.int64)
        results = []
        for device in (self.device, "cpu"):
            caches = {f"layers.{i}": t.to(device) for i, t in enumerate(base)}
            store = BlockStore(caches, layout_of(caches, num_blocks=blocks, block_size=TOKENS))
            staging = store.staging(blocks)
            store.gather(ids, staging)
            results.append(store.digest(staging, blocks, positions))
        return {"equal": bool((results[0] == results[1]).all())}

    def _random_cache(self, dtype, layout, pool, seed):
        """One contiguous tensor a layer; the same on both ends, whose GPUs are of one kind."""
        generator = torch.Generator(self.device).manual_seed(seed)
        dtype = getattr(torch, dtype)
        shape = (pool, HEADS, TOKENS, CONTENT) if layout == "HND" else (pool, TOKENS, HEADS, CONTENT)
        words = (*shape[:-1], CONTENT * dtype.itemsize // 4)
        return [
            torch.randint(-(2**31), 2**31, words, dtype=torch.int32, device=self.device, generator=generator).view(
                dtype
            )
            for _ in range(LAYERS)
        ]

    def time(self, way, nbytes, rounds):
        tensor = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        call = self.pipe.send if way == "send" else self.pipe.recv
        call(tensor, time.monotonic() + 30)
        start = time.monotonic()
        for _ in range(rounds):
            call(tensor, time.monotonic() + 30)
        return {"seconds": (time.monotonic() - start) / rounds}

    def once(self, way, nbytes, seconds):
        tensor = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        return self._error_of(lambda: getattr(self.pipe, way)(tensor, time.monotonic() + seconds))

    def endless(self, way, nbytes, seconds):
        """Sends or receives until an error; each call has `seconds`."""
        tensor = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        print(json.dumps({"started": True}), flush=True)

        def run():
            while True:
                getattr(self.pipe, way)(tensor, time.monotonic() + seconds)

        return self._error_of(run)

    def abort_while_receiving(self):
        tensor = torch.zeros(8, dtype=torch.uint8, device=self.device)
        threading.Timer(0.5, self.pipe.abort).start()
        return self._error_of(lambda: self.pipe.recv(tensor, time.monotonic() + 30))

    def busy(self):
        tensor = torch.zeros(8, dtype=torch.uint8, device=self.device)
        waiting = threading.Thread(target=lambda: self.once("recv", 8, 2))
        waiting.start()
        time.sleep(0.3)
        outcome = self._error_of(lambda: self.pipe.send(tensor, time.monotonic() + 30))
        waiting.join()
        return outcome

    def context_works(self):
        a = torch.randn(512, 512, device=self.device)
        return {"works": bool(torch.isfinite((a @ a).sum()).item())}

    def _error_of(self, call):
        start = time.monotonic()
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the test judges it
            return {"error": type(error).__name__, "text": str(error), "seconds": time.monotonic() - start}
        return {"error": None, "seconds": time.monotonic() - start}


def serve(device):
    end = End(device, 0)
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

DEVICES = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICES < 2, reason=f"needs 2 CUDA devices, and {DEVICES} are here"),
]


def both(a, b, do, **arguments):
    """One command that is the first end's to send and the second's to receive."""
    a.start(do, way="send", **arguments)
    b.start(do, way="recv", **arguments)
    return a.reply(), b.reply()


def connect(a, b, max_ctas=0):
    invite = a("prepare", max_ctas=max_ctas)["invite"]
    a.start("accept", invite=invite)
    b.start("join", invite=invite)
    assert a.reply() == b.reply() == {"kind": "nccl"}


def close(a, b):
    a("close")
    b("close")


@pytest.fixture(scope="module")
def workers():
    """Starts ends; all that a test module starts are stopped at its end."""
    started = []

    def start(*indices, own_gpu_only=False):
        new = []
        for index in indices:
            visible = {"CUDA_VISIBLE_DEVICES": str(index)} if own_gpu_only else {}
            new.append(Worker(__file__, "cuda:0" if own_gpu_only else f"cuda:{index}", visible))
        started.extend(new)
        for worker in new:
            assert worker.reply() == {"ready": True}
        return new

    yield start
    for worker in started:
        worker.stop()


@pytest.fixture(scope="module", params=["all GPUs visible", "own GPU only"])
def ends(request, workers):
    return workers(0, 1, own_gpu_only=request.param == "own GPU only")


@pytest.fixture
def pair(ends):
    connect(*ends)
    yield ends
    close(*ends)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_random_kv_arrives_byte_for_byte_in_both_directions(pair, dtype, layout, capsys):
    a, b = pair
    for blocks in (1, 7, 256, 4096):
        for sender, receiver in ((a, b), (b, a)):
            sent, got = both(sender, receiver, "move", dtype=dtype, layout=layout, blocks=blocks, seed=blocks)
            assert got["equal"]
            assert sent["digest"] == got["digest"]
    with capsys.disabled():
        print(f"\n{dtype} {layout}: {sent['bytes'] >> 20} MiB in {sent['seconds'] * 1e3:.1f} ms")


def test_a_gpu_and_a_cpu_compute_the_same_digests(ends):
    assert ends[0]("digests", blocks=300, seed=3)["equal"]


def test_other_sizes_end_in_an_error_on_both_ends(pair):
    a, b = pair
    a.start("once", way="send", nbytes=8, seconds=10)
    b.start("once", way="recv", nbytes=16, seconds=10)
    errors = [a.reply()["error"], b.reply()["error"]]
    assert "ProtocolError" in errors
    assert set(errors) <= {"ProtocolError", "PeerGone"}


def test_a_wait_for_a_peer_ends_at_its_deadline(pair):
    for way in ("recv", "send"):
        outcome = pair[0]("once", way=way, nbytes=8, seconds=1)
        assert outcome["error"] == "DeadlineExceeded"
        assert outcome["seconds"] < 4
    assert pair[1]("once", way="recv", nbytes=8, seconds=10)["error"] == "PeerGone"


def test_abort_wakes_both_ends(pair):
    a, b = pair
    b.start("once", way="recv", nbytes=8, seconds=30)
    assert a("abort_while_receiving")["error"] == "PipeClosed"
    outcome = b.reply()
    assert outcome["error"] == "PeerGone"
    assert outcome["seconds"] < 10


def test_a_second_thread_is_refused(pair):
    assert pair[0]("busy")["error"] == "PipeBusy"


def test_an_idle_end_learns_that_its_peer_closed(pair):
    pair[1]("close")
    assert pair[0]("broken", seconds=10)["broken"]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("way", ["send", "recv"])
def test_a_peer_lost_in_mid_transfer_ends_in_an_error_and_the_next_pair_works(workers, survivor, way, kill):
    (victim,) = workers(1)
    connect(survivor, victim)
    deadline = 3
    survivor.start("endless", way=way, nbytes=1 << 30, seconds=deadline)
    victim.start("endless", way="recv" if way == "send" else "send", nbytes=1 << 30, seconds=30)
    assert survivor.reply() == victim.reply() == {"started": True}
    time.sleep(1.5)
    victim.process.send_signal(kill)
    lost = time.monotonic()
    outcome = survivor.reply(30)
    assert time.monotonic() - lost < deadline + 4
    assert outcome["error"] == ("PeerGone" if kill == signal.SIGKILL else "DeadlineExceeded"), outcome
    victim.stop()
    assert survivor("context_works")["works"]
    survivor("close")
    (fresh,) = workers(1)
    connect(survivor, fresh)
    for sender, receiver in ((survivor, fresh), (fresh, survivor)):
        sent, got = both(sender, receiver, "move", dtype="bfloat16", layout="NHD", blocks=64, seed=5)
        assert got["equal"]
        assert sent["digest"] == got["digest"]
    close(survivor, fresh)
    fresh.stop()


@pytest.fixture(scope="module")
def survivor(workers):
    return workers(0)[0]


def test_memory_that_a_pair_holds_is_bounded_and_given_back(workers, capsys):
    a, b = workers(0, 1)
    connect(a, b)  # loads NCCL's kernels, once a process
    both(a, b, "time", nbytes=1 << 20, rounds=1)
    close(a, b)
    for max_ctas in (4, 8, 16, 0):
        idle = a("memory")["used"], b("memory")["used"]
        connect(a, b, max_ctas)
        big, _ = both(a, b, "time", nbytes=256 << 20, rounds=5)
        both(b, a, "time", nbytes=256 << 20, rounds=1)
        small, _ = both(a, b, "time", nbytes=1 << 20, rounds=50)
        held = [worker("memory")["used"] - before for worker, before in zip((a, b), idle, strict=True)]
        close(a, b)
        left = [worker("memory")["used"] - before for worker, before in zip((a, b), idle, strict=True)]
        with capsys.disabled():
            print(
                f"\nmax_ctas {max_ctas or 'default'}: {held[0] >> 20} and {held[1] >> 20} MiB a pair, "
                f"{left[0] >> 20} and {left[1] >> 20} MiB left after close; "
                f"256 MiB at {0.268435456 / big['seconds']:.0f} GB/s, 1 MiB in {small['seconds'] * 1e6:.0f} us"
            )
        assert max(held) < 1 << 30
        assert max(left) < 64 << 20
