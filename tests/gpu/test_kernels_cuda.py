"""Every kernel on a GPU against a CPU, bit for bit; one GPU.

What this cannot show: memory of another GPU, by CUDA IPC or NVLink; the peer here is a second cache on the same GPU.
"""

import logging
import threading

import numpy as np
import pytest
import torch
from support.caches import KINDS, make_cache

from kvsdk.errors import ConfigError
from kvsdk.kernels import BlockStore, store
from kvsdk.layout import layout_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DEVICE = "cuda:0"
DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def both(cache, **kwargs):
    """A cache and its store on the CPU, and the same on the GPU."""
    there = cache.to(DEVICE)
    accelerated = BlockStore(there.tensors, there.layout(), **kwargs)
    assert accelerated.accelerated, "the kernels did not load; see the log"
    return cache, cache.store(), there, accelerated


def told(digests):
    torch.cuda.synchronize()
    return digests.cpu().numpy().view(np.uint64)


def check_everything(cache, blocks, seed=0, max_sms=64):
    """Each operation of `BlockStore`, on the CPU and on the GPU, over the same random ids."""
    ours, cpu, theirs, gpu = both(cache, max_sms=max_sms)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, cache.num_blocks, blocks).astype(np.int32)
    unique = rng.permutation(cache.num_blocks)[:blocks].astype(np.int32)
    positions = rng.integers(0, 2**40, blocks)
    flips = rng.integers(0, 2, blocks).astype(np.uint64) << np.uint64(63)
    results = []
    for each in (cpu, gpu):
        staging, wrong = each.staging(blocks + 1).fill_(7), each.new_wrong(blocks)
        digests, in_place = each.new_digests(blocks), each.new_digests(blocks)
        each.gather_digest(ids, positions, staging, digests)
        each.digest_in_place(ids, positions, in_place)
        waited = each.digest(staging, blocks, positions)
        assert told(digests).tolist() == told(in_place).tolist() == waited.tolist()
        plain = each.staging(blocks + 1).fill_(7)
        each.gather(ids, plain)
        assert torch.equal(plain, staging)
        each.scatter_verified(unique, positions, staging, waited ^ flips, wrong)
        torch.cuda.synchronize()
        assert wrong.tolist() == (flips != 0).astype(int).tolist()
        each.scatter(unique, staging, np.arange(blocks)[::3])
        results.append((staging.cpu(), waited.tolist()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert ours.same_bytes(theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_and_type(kind, dtype):
    check_everything(make_cache(kind, dtype, blocks=40, heads=8, tokens=16, content=128), 33)


@pytest.mark.parametrize("content", [1, 2, 3, 6, 12, 100, 2049, 8200])
def test_odd_sizes(content):
    for kind in ("NHD", "HND", "BHLNC"):
        check_everything(make_cache(kind, torch.float8_e4m3fn, blocks=12, heads=3, tokens=5, content=content), 9)


@pytest.mark.parametrize("page", [4, 16, 32, 64, 128, 512, 2048])
def test_page_sizes(page):
    check_everything(make_cache("HND", blocks=20, heads=1, tokens=16, content=page * 32), 17, seed=page)


@pytest.mark.parametrize("blocks", [1, 2, 15, 16, 17, 255, 1024, 4096])
def test_numbers_of_blocks(blocks):
    check_everything(make_cache("NHD", blocks=blocks + 5, heads=2, tokens=16, content=64), blocks, seed=blocks)


@pytest.mark.parametrize("max_sms", [1, 7, 132, 1000])
def test_numbers_of_sms(max_sms):
    check_everything(make_cache("NHD", blocks=50, heads=8, tokens=16, content=256), 41, max_sms=max_sms)


def test_no_blocks():
    check_everything(make_cache("NHD"), 0)


def test_pages_of_several_sizes():
    check_everything(make_cache("HND", blocks=30, layers=5, tokens=16, content=72, sizes=(1, 4, 7)), 23)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("HND", "NHD"), ("NHD", "HND"), ("HND", "HND"), ("BLHNC", "one buffer"), ("MLA 3-D", "MLA 4-D"), ("BHLNC", "NHD")],
)
@pytest.mark.parametrize("content", [3, 4, 12, 256])
def test_pulls_from_a_peer(theirs, ours, content):
    make = {"heads": 8, "tokens": 16, "content": content, "layers": 4}
    peer, cache = make_cache(theirs, blocks=60, seed=1, **make), make_cache(ours, blocks=50, seed=2, **make)
    there, (_, _, mine, gpu) = peer.to(DEVICE), both(cache)
    other = BlockStore(there.tensors, there.layout())
    rng = np.random.default_rng(content)
    src_ids = rng.integers(0, 60, 37).astype(np.int32)
    dst_ids = rng.permutation(50)[:37].astype(np.int32)
    positions, expected = np.arange(37), peer.store().new_digests(37)
    peer.store().digest_in_place(src_ids, positions, expected)
    wanted = told(expected) + (np.arange(37) % 5 == 0).astype(np.uint64)
    wrong, digests = gpu.new_wrong(37), gpu.new_digests(37)
    chosen = gpu.choose(gpu.peer(other.layout, other.addresses, there), src_ids, positions, wanted)
    for part in (slice(0, 14), slice(14, 37)):
        gpu.pull(chosen, dst_ids[part], first=part.start, wrong=wrong[part], digests=digests[part])
        torch.cuda.synchronize()
    assert told(digests).tolist() == told(expected).tolist()
    assert wrong.tolist() == [int(i % 5 == 0) for i in range(37)]
    pulled = mine.to("cpu")
    for i in range(4):
        blocks = cache.content(i)
        blocks[dst_ids] = peer.content(i)[src_ids]
        np.testing.assert_array_equal(pulled.content(i), blocks)


def test_results_on_the_device_are_those_in_pinned_memory():
    _, _, _, gpu = both(make_cache("NHD", blocks=20))
    ids, positions = np.arange(9, dtype=np.int32), np.arange(9)
    pinned, there = gpu.new_digests(9), torch.empty(9, dtype=torch.int64, device=DEVICE)
    gpu.digest_in_place(ids, positions, pinned)
    gpu.digest_in_place(ids, positions, there)
    assert told(pinned).tolist() == told(there).tolist()
    with pytest.raises(ValueError, match="or in pinned memory"):
        gpu.digest_in_place(ids, positions, torch.empty(9, dtype=torch.int64))


def test_ten_thousand_flipped_bits_are_found():
    """A bit of any byte of any layer, in one of 200 blocks at a time."""
    blocks, rounds = 200, 50
    cache = make_cache("NHD", blocks=blocks, layers=8, heads=4, tokens=16, content=64).to(DEVICE)
    gpu = BlockStore(cache.tensors, cache.layout())
    ids, positions = np.arange(blocks, dtype=np.int32), np.arange(blocks)
    staging, clean, wrong = gpu.staging(blocks), gpu.new_digests(blocks), gpu.new_wrong(blocks)
    gpu.gather_digest(ids, positions, staging, clean)
    expected = told(clean).copy()
    sizes = np.array([layer.block_bytes for layer in gpu.layout.layers])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]) * blocks
    rng, found = np.random.default_rng(2026), 0
    for _ in range(rounds):
        layers = rng.integers(0, len(sizes), blocks)
        at = starts[layers] + np.arange(blocks) * sizes[layers] + rng.integers(0, sizes[layers])
        at = torch.from_numpy(at).to(DEVICE)
        bits = torch.from_numpy((1 << rng.integers(0, 8, blocks)).astype(np.uint8)).to(DEVICE)
        changed = staging.clone()
        changed[at] ^= bits
        gpu.scatter_verified(ids, positions, changed, expected, wrong)
        torch.cuda.synchronize()
        found += int(wrong.sum())
    assert found == blocks * rounds == 10_000
    gpu.scatter_verified(ids, positions, staging, expected, wrong)
    torch.cuda.synchronize()
    assert not wrong.any()


def test_swapped_shifted_cut_and_exchanged_blocks_are_found():
    blocks = 64
    cache = make_cache("HND", blocks=blocks, layers=4, heads=2, tokens=16, content=64).to(DEVICE)
    gpu = BlockStore(cache.tensors, cache.layout())
    ids, positions = np.arange(blocks, dtype=np.int32), np.arange(blocks)
    digests = gpu.new_digests(blocks)
    gpu.digest_in_place(ids, positions, digests)
    expected = told(digests).copy()

    def all_wrong(ids, positions):
        other = gpu.new_digests(blocks)
        gpu.digest_in_place(ids, positions, other)
        return bool((told(other) != expected).all())

    assert all_wrong(np.roll(ids, 1), positions), "shifted blocks"
    assert all_wrong(ids.reshape(-1, 2)[:, ::-1].ravel().copy(), positions), "swapped blocks"
    assert all_wrong(ids, positions + 1), "shifted positions"
    names = list(cache.tensors)
    exchanged = {**cache.tensors, names[0]: cache.tensors[names[1]], names[1]: cache.tensors[names[0]]}
    other = BlockStore(exchanged, layout_of(exchanged, num_blocks=blocks, block_size=16))
    digests = other.new_digests(blocks)
    other.digest_in_place(ids, positions, digests)
    assert (told(digests) != expected).all(), "exchanged layers"
    for tensor in cache.tensors.values():
        tensor[..., -1, :] = 0
    assert all_wrong(ids, positions), "cut blocks"


def test_work_is_in_the_order_of_its_stream_and_waits_for_nothing():
    cache = make_cache("NHD", blocks=64, heads=8, tokens=16, content=256).to(DEVICE)
    gpu = BlockStore(cache.tensors, cache.layout())
    ids, positions = np.arange(64, dtype=np.int32), np.arange(64)
    stream, digests, staging = torch.cuda.Stream(), gpu.new_digests(64), gpu.staging(64)
    gpu.gather_digest(ids, positions, staging, digests)
    before = told(digests).copy()
    with torch.cuda.stream(stream):
        gpu.gather_digest(ids, positions, staging, digests)  # takes memory
        stream.synchronize()
        torch.cuda._sleep(2_000_000_000)
        for storage in cache.storages:
            storage.zero_()
        gpu.gather_digest(ids, positions, staging, digests)
        assert not stream.query(), "the host waited for the stream"
    stream.synchronize()
    assert not staging.any()
    assert (digests.numpy().view(np.uint64) != before).all()


def test_nothing_is_allocated_once_the_largest_operation_has_run():
    cache = make_cache("NHD", blocks=64).to(DEVICE)
    gpu = BlockStore(cache.tensors, cache.layout())
    digests, staging, wrong = gpu.new_digests(64), gpu.staging(64), gpu.new_wrong(64)

    def use(n):
        ids, positions = np.arange(n, dtype=np.int32), np.arange(n)
        gpu.gather_digest(ids, positions, staging, digests[:n])
        torch.cuda.synchronize()
        gpu.scatter_verified(ids, positions, staging, told(digests[:n]).copy(), wrong[:n])
        torch.cuda.synchronize()

    use(64)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for n in (1, 64, 30):
        use(n)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_threads_with_streams_of_their_own_do_not_disturb_each_other():
    cache = make_cache("NHD", blocks=256, heads=8, tokens=16, content=64).to(DEVICE)
    gpu, failures = BlockStore(cache.tensors, cache.layout()), []

    def work(seed):
        try:
            rng = np.random.default_rng(seed)
            with torch.cuda.stream(torch.cuda.Stream()):
                digests, again, staging = gpu.new_digests(200), gpu.new_digests(200), gpu.staging(200)
                for _ in range(50):
                    n = int(rng.integers(1, 200))
                    ids, positions = rng.integers(0, 256, n).astype(np.int32), rng.integers(0, 1000, n)
                    gpu.gather_digest(ids, positions, staging, digests[:n])
                    gpu.digest_in_place(ids, positions, again[:n])
                    torch.cuda.current_stream().synchronize()
                    assert torch.equal(digests[:n], again[:n])
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads)


def test_without_the_kernels_pytorch_does_the_same(monkeypatch, caplog):
    def no_kernels(*args):
        raise ConfigError("NVRTC is not installed")

    monkeypatch.setattr(store.CudaBlocks, "__init__", no_kernels)
    cache = make_cache("HND", blocks=20)
    there = cache.to(DEVICE)
    with caplog.at_level(logging.WARNING, "kvsdk.kernels"):
        slow = BlockStore(there.tensors, there.layout())
    assert not slow.accelerated and "NVRTC is not installed" in caplog.text
    cpu, ids, positions, results = cache.store(), np.array([4, 19, 0], np.int32), np.arange(3), []
    for each in (cpu, slow):
        staging, digests, in_place, wrong = (
            each.staging(3), each.new_digests(3), each.new_digests(3), each.new_wrong(3)
        )  # fmt: skip
        each.gather_digest(ids, positions, staging, digests)
        each.digest_in_place(ids, positions, in_place)
        assert told(digests).tolist() == told(in_place).tolist()
        expected = told(digests) + np.array([0, 1, 0], np.uint64)
        each.scatter_verified(np.array([7, 8, 9], np.int32), positions, staging, expected, wrong)
        assert wrong.tolist() == [0, 1, 0]
        results.append(told(digests).tolist())
    assert results[0] == results[1] and cache.same_bytes(there)
    with pytest.raises(ConfigError, match="read by the kernels alone"):
        slow.peer(slow.layout, slow.addresses)
