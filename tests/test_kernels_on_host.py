"""`csrc/blocks.cu` itself, compiled for this CPU and driven by the same host code as on a GPU: PyTorch's copies and
NumPy's digests, bit for bit.

What this cannot show: that a GPU's driver takes the launches, races, and speed; see tests/gpu/test_kernels_cuda.py.
"""

import contextlib
import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.caches import DTYPES, KINDS, make_cache

from kvsdk.kernels import BlockStore, cuda, nvrtc

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no g++")
HEADER = Path(__file__).parent / "support" / "cuda_on_host.h"
ASM = re.compile(r'asm volatile\("(ld|st)\.[^"]*?(v2\.)?[us](\d+) [^"]*" ?: ?:?([^;]*)\);')


def on_host(text):
    """The source with its inline PTX turned into calls of the header's functions."""

    def call(match):
        kind, vector, bits, operands = match[1], match[2], int(match[3]), match[4]
        names = re.findall(r'"=?[lr]"\(([^()]*(?:\[\d\])?)\)', operands)
        address, words = (names[-1], names[:-1]) if kind == "ld" else (names[0], names[1:])
        grain = bits // 8 * (2 if vector else 1)
        return f"ptx_{'load' if kind == 'ld' else 'store'}({', '.join([address, str(grain), *words])});"

    text, count = ASM.subn(call, text)
    assert count == 8 and "asm" not in text, "the source's PTX is not what this test knows"
    return text


class HostLauncher:
    """Runs kernels at once, in this thread."""

    def __init__(self, folder):
        text = on_host(nvrtc.source())
        names = re.findall(r"KERNELS\((\d+)\)", text)
        kernels = [
            f"{kind}_{grain}" for kind in ("copy_blocks", "copy_digest_blocks", "digest_blocks") for grain in names
        ]
        structs = {name: "Copy" for name in kernels} | {"copy_digest_listed": "Listed", "finish_digests": "Finish"}
        runs = "".join(
            f"static {struct} args_{name};\n"
            f'extern "C" void run_{name}(unsigned grid, unsigned threads, const void* args) {{'
            f"args_{name} = *static_cast<const {struct}*>(args);"
            f"run_grid(grid, threads, [] {{ {name}(args_{name}); }}); }}\n"
            for name, struct in structs.items()
        )
        (folder / "blocks.cpp").write_text(f'#include "{HEADER}"\n{text}\n{runs}')
        subprocess.run(
            [COMPILER, "-O1", "-std=c++17", "-shared", "-fPIC", "-w", *cuda.OPTIONS, "-o", "blocks.so", "blocks.cpp"],
            cwd=folder,
            check=True,
        )
        self.library = ctypes.CDLL(str(folder / "blocks.so"))
        self.launched = []

    def launch(self, name, grid, threads, args, stream):
        self.launched.append(name)
        getattr(self.library, f"run_{name}")(grid, threads, ctypes.byref(args))

    def upload(self, device_address, host_address, nbytes, stream):
        ctypes.memmove(device_address, host_address, nbytes)


class Event:
    def record(self): ...

    def query(self):
        return True


class HostScratch(cuda.Scratch):
    def new_pinned(self, size):
        return torch.empty(size, dtype=torch.uint8), Event()


class HostBlocks(cuda.CudaBlocks):
    @contextlib.contextmanager
    def _on_stream(self):
        yield self._scratches.setdefault(0, HostScratch(self._device)), 0


class HostStore(BlockStore):
    """A store on CPU tensors whose work the kernels do."""

    launcher: HostLauncher

    def _make_blocks(self, kv_caches):
        return HostBlocks(self.addresses, self.layout, self.device, self.max_sms, self.launcher)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    HostStore.launcher = HostLauncher(tmp_path_factory.mktemp("blocks"))
    return HostStore.launcher


def stores(cache, max_sms=2):
    """The same cache by PyTorch, and a copy of it by the kernels."""
    other = cache.clone()
    return (
        cache,
        BlockStore(cache.tensors, cache.layout()),
        other,
        HostStore(other.tensors, other.layout(), max_sms=max_sms),
    )


def build(kind, dtype, blocks, layers, heads, tokens, content, seed):
    cache = make_cache(
        kind, dtype, blocks=blocks, layers=layers, heads=heads, tokens=tokens, content=content, seed=seed
    )
    # Another layout of the same content.
    ratio, other = cache.ratio, {"NHD": "HND", "HND": "NHD", "MLA 3-D": "MLA 4-D", "BHLNC": "NHD"}.get(kind, kind)
    if ratio > 1:
        other, ratio, tokens = "HND", 1, tokens * ratio
    peer = make_cache(
        other, dtype, blocks=7, layers=layers, heads=heads, tokens=tokens, content=content, seed=seed + 1, ratio=ratio
    )
    return cache, peer


pairs = st.builds(
    build,
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    blocks=st.integers(1, 9),
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.sampled_from([2, 3, 16]),
    content=st.sampled_from([2, 3, 8, 9, 16, 64, 300]),
    seed=st.integers(0, 1000),
)


def draw_ids(data, count, size, unique=False):
    if unique:
        return np.array(data.draw(st.permutations(range(count)))[:size], dtype=np.int32)
    return np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=size, max_size=size)), dtype=np.int32)


@settings(max_examples=100, deadline=None)
@given(pairs, st.data())
def test_every_operation_is_that_of_a_cpu_bit_for_bit(launcher, pair, data):
    cache, _ = pair
    ours, torch_store, theirs, kernel_store = stores(cache, max_sms=data.draw(st.sampled_from([1, 2, 7])))
    n = data.draw(st.integers(0, cache.num_blocks))
    ids, unique = draw_ids(data, cache.num_blocks, n), draw_ids(data, cache.num_blocks, n, unique=True)
    positions = data.draw(st.integers(0, 2**40)) + np.arange(n)
    results = []
    for store in (torch_store, kernel_store):
        staging, digests = store.staging(n + 1).fill_(7), store.new_digests(n)
        store.gather_digest(ids, positions, staging, digests)
        in_place, wrong = store.new_digests(n), store.new_wrong(n)
        store.digest_in_place(ids, positions, in_place)
        assert digests.tolist() == in_place.tolist()
        assert store.digest(staging, n, positions).view(np.int64).tolist() == digests.tolist()
        plain = store.staging(n + 1).fill_(7)
        store.gather(ids, plain)
        assert torch.equal(plain, staging)
        expected = digests.numpy().view(np.uint64).copy()
        expected[::2] ^= np.uint64(1 << 63)
        store.scatter_verified(unique, positions, staging, expected, wrong)
        assert wrong.tolist() == [1 - i % 2 for i in range(n)]
        store.scatter(unique, staging, np.arange(n)[::-1][: n // 2])
        results.append((staging.tolist(), digests.tolist()))
    assert results[0] == results[1]
    assert ours.same_bytes(theirs)


@settings(max_examples=60, deadline=None)
@given(pairs, st.data())
def test_blocks_of_a_peer_arrive_and_are_digested_as_on_a_cpu(launcher, pair, data):
    cache, peer = pair
    ours, torch_store, theirs, kernel_store = stores(cache)
    n = data.draw(st.integers(0, cache.num_blocks))
    src_ids, dst_ids = draw_ids(data, 7, n), draw_ids(data, cache.num_blocks, n, unique=True)
    positions = np.arange(n)
    told = torch_store.new_digests(n)
    peer_store = peer.store()
    peer_store.digest_in_place(src_ids, positions, told)
    expected = told.numpy().view(np.uint64).copy()
    expected[1::3] += np.uint64(1)
    for store in (torch_store, kernel_store):
        wrong, digests = store.new_wrong(n), store.new_digests(n)
        there = store.peer(peer_store.layout, peer_store.addresses, peer)
        chosen = store.choose(there, src_ids, positions, expected)
        for part in (slice(0, n // 2), slice(n // 2, n)):
            store.pull(chosen, dst_ids[part], first=part.start, wrong=wrong[part], digests=digests[part])
        assert digests.tolist() == told.tolist()
        assert wrong.tolist() == [int(i % 3 == 1) for i in range(n)]
    assert ours.same_bytes(theirs)
    for i in range(len(cache.views)):
        np.testing.assert_array_equal(ours.content(i)[dst_ids], peer.content(i)[src_ids])


@pytest.mark.parametrize(("content", "grain"), [(8, 16), (4, 8), (2, 4), (1, 1)])
def test_the_widest_loads_that_fit_are_taken(launcher, content, grain):
    cache = make_cache("HND", torch.float16, blocks=3, layers=1, heads=1, tokens=1, content=content)
    *_, store = stores(cache)
    launcher.launched.clear()
    store.gather(np.array([1], np.int32), store.staging(1))
    assert launcher.launched == [f"copy_blocks_{grain}"]


def test_pages_of_several_chunks_are_copied_whole(launcher):
    for content in (4096, 4100, 8200):  # 64 KiB and more a page, not all multiples of a chunk
        cache = make_cache("NHD", torch.float16, blocks=5, layers=2, heads=1, tokens=8, content=content)
        _, torch_store, _, kernel_store = stores(cache, max_sms=1)
        ids, positions = np.array([3, 1, 4], np.int32), np.array([8, 9, 10])
        results = []
        for store in (torch_store, kernel_store):
            staging, digests = store.staging(3), store.new_digests(3)
            store.gather_digest(ids, positions, staging, digests)
            results.append((staging, digests))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_large_operation_has_whole_chunks_as_units_and_a_small_one_quarters(launcher, monkeypatch):
    splits = []
    monkeypatch.setattr(launcher, "launch", lambda name, grid, threads, args, stream: splits.append((args.split, grid)))
    cache = make_cache("HND", torch.float16, blocks=200, layers=1, heads=1, tokens=8, content=2048)
    *_, store = stores(cache, max_sms=2)
    for n in (1, 40, 200):
        store.gather(np.arange(n, dtype=np.int32), store.staging(n))
    assert splits == [(2, 1), (1, 2), (0, 2)]


def test_scratch_memory_is_used_again(launcher):
    cache = make_cache("HND", blocks=9)
    *_, store = stores(cache)
    staging, digests = store.staging(9), store.new_digests(9)

    def addresses():
        store.gather_digest(np.arange(9, dtype=np.int32), np.arange(9), staging, digests)
        scratch = store._blocks._scratches[0]
        pinned = [memory.data_ptr() for memory, _ in scratch._pinned]
        return [scratch._arguments.data_ptr(), scratch._sums.data_ptr(), *pinned]

    assert addresses() == addresses() == addresses()


def test_scratch_memory_that_the_device_still_reads_is_left_alone(launcher, monkeypatch):
    cache = make_cache("HND", blocks=9)
    *_, store = stores(cache)
    monkeypatch.setattr(Event, "query", lambda event: False)
    for _ in range(3):
        store.gather(np.arange(9, dtype=np.int32), store.staging(9))
    pinned = [memory.data_ptr() for memory, _ in store._blocks._scratches[0]._pinned]
    assert len(set(pinned)) == 3


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("C1 = 0xBF58476D1CE4E5B9", "C1 = 0xBF58476D1CE4E5BB"),
        ("C2 = 0x94D049BB133111EB", "C2 = 0x94D049BB133111ED"),
        ("GOLDEN = 0x9E3779B97F4A7C15", "GOLDEN = 0x9E3779B97F4A7C17"),
        ("LAYER_SEED = 0xD6E8FEB86659FD93", "LAYER_SEED = 0xD6E8FEB86659FD95"),
    ],
)
@pytest.mark.slow
def test_another_constant_is_another_digest(tmp_path, monkeypatch, before, after):
    text = nvrtc.source()
    assert before in text
    monkeypatch.setattr(nvrtc, "source", lambda: text.replace(before, after))
    monkeypatch.setattr(HostStore, "launcher", HostLauncher(tmp_path), raising=False)
    _, torch_store, _, kernel_store = stores(make_cache("HND"))
    results = [torch_store.new_digests(2), kernel_store.new_digests(2)]
    for store, digests in zip((torch_store, kernel_store), results, strict=True):
        store.digest_in_place(np.array([0, 1], np.int32), np.array([0, 1]), digests)
    assert (results[0] != results[1]).all()
