"""Blocks come out of the cache and go back byte for byte, whatever the layout; digests find what changed."""

import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.caches import DTYPES, KINDS, make_cache

from kvsdk.errors import MismatchError
from kvsdk.kernels import BlockStore, splitmix64, torch_blocks
from kvsdk.kernels.digest import WordMixer
from kvsdk.layout import layout_of

M64 = (1 << 64) - 1

caches = st.builds(
    make_cache,
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    blocks=st.integers(1, 9),
    layers=st.integers(1, 4),
    heads=st.integers(1, 3),
    tokens=st.integers(2, 5),
    content=st.integers(2, 9),
    seed=st.integers(0, 1000),
)


def ids_of(cache, data, unique=False):
    ids = data.draw(st.lists(st.integers(0, cache.num_blocks - 1), max_size=9, unique=unique))
    return np.array(ids, dtype=np.int32)


@settings(max_examples=80, deadline=None)
@given(caches, st.data())
def test_gather_is_the_naive_copy(cache, data):
    store, ids = cache.store(), ids_of(cache, data)
    staging = store.staging(len(ids) + 2)
    store.gather(ids, staging)
    np.testing.assert_array_equal(staging[: store.staging_bytes(len(ids))].numpy(), cache.naive_gather(ids))


@settings(max_examples=80, deadline=None)
@given(caches, st.data())
def test_scatter_writes_the_blocks_and_nothing_else(cache, data):
    store, ids = cache.store(), ids_of(cache, data, unique=True)
    before = [cache.blocks(i) for i in range(len(cache.views))]
    staging = torch.randint(0, 256, (store.staging_bytes(len(ids)),), dtype=torch.uint8)
    select = None
    if data.draw(st.booleans()):
        select = np.array(data.draw(st.permutations(range(len(ids)))), dtype=np.int64)[: data.draw(st.integers(0, 9))]
    store.scatter(ids, staging, select)
    chosen = np.arange(len(ids)) if select is None else select
    start = 0
    for i, expected in enumerate(before):
        staged = staging.numpy()[start : start + len(ids) * expected.shape[1]].reshape(len(ids), expected.shape[1])
        start += staged.size
        expected[ids[chosen]] = staged[chosen]
        np.testing.assert_array_equal(cache.blocks(i), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_travel_between_two_caches_of_one_layout(kind, dtype):
    ours, theirs = make_cache(kind, dtype, seed=1), make_cache(kind, dtype, seed=2)
    a, b = ours.store(), theirs.store()
    staging = a.staging(3)
    source, target = np.array([5, 0, 2], np.int32), np.array([1, 3, 4], np.int32)
    a.gather(source, staging)
    b.scatter(target, staging)
    for i in range(3):
        np.testing.assert_array_equal(ours.blocks(i)[source], theirs.blocks(i)[target])


def test_blocks_travel_between_layouts_that_hold_the_same_bytes():
    ours, theirs = make_cache("one buffer", torch.uint8, seed=1), make_cache("BHLNC", torch.uint8, seed=2)
    staging = ours.store().staging(1)
    ours.store().gather(np.array([4], np.int32), staging)
    theirs.store().scatter(np.array([2], np.int32), staging)
    for i in range(3):
        np.testing.assert_array_equal(ours.blocks(i)[4], theirs.blocks(i)[2])


def test_tensors_of_inference_mode_can_be_written_outside_it():
    with torch.inference_mode():
        cache = make_cache("NHD", torch.uint8)
        store = cache.store()
        staging = store.staging(1)
    store.gather(np.array([0], np.int32), staging)
    store.scatter(np.array([1], np.int32), staging)
    assert (cache.blocks(0)[0] == cache.blocks(0)[1]).all()


def test_a_staging_buffer_is_bytes_on_the_stores_device():
    store = make_cache("HND").store()
    staging = store.staging(5)
    assert staging.dtype == torch.uint8
    assert staging.dim() == 1
    assert staging.device == store.device
    assert staging.numel() == store.staging_bytes(5) == 5 * store.layout.block_bytes


@pytest.mark.parametrize("ids", [[-1], [6], [0, 6], [0, -1]])
def test_ids_out_of_range_are_refused(ids):
    store = make_cache("HND").store()
    for call in (store.gather, store.scatter):
        with pytest.raises(ValueError, match="block ids must be from 0 to 5"):
            call(np.array(ids, np.int32), store.staging(2))


def test_ids_of_another_type_are_refused():
    store = make_cache("HND").store()
    for ids in (np.array([0]), [0], np.array([[0]], np.int32), np.array([0.0])):
        with pytest.raises(ValueError, match="1-D int32"):
            store.gather(ids, store.staging(1))


def test_a_block_is_written_once():
    store = make_cache("HND").store()
    with pytest.raises(ValueError, match="twice"):
        store.scatter(np.array([1, 2, 1], np.int32), store.staging(3))


@pytest.mark.parametrize("select", [[2], [-1], [0, 0], [0.5]])
def test_a_selection_out_of_range_is_refused(select):
    store = make_cache("HND").store()
    with pytest.raises(ValueError, match="select must"):
        store.scatter(np.array([1, 2], np.int32), store.staging(2), np.array(select))


def test_a_staging_buffer_that_does_not_fit_is_refused():
    store = make_cache("HND").store()
    ids = np.array([0, 1], np.int32)
    wide = torch.zeros(2 * store.staging_bytes(2), dtype=torch.uint8)
    for staging in (store.staging(1), wide[::2], wide.view(torch.int32), wide.view(2, -1)):
        for call in (store.gather, store.scatter):
            with pytest.raises(ValueError, match="staging must be"):
                call(ids, staging)


def digest(store, data, positions=None):
    n = len(data) // store.layout.block_bytes
    positions = np.arange(n) if positions is None else np.asarray(positions)
    return store.digest(torch.from_numpy(np.ascontiguousarray(data)), n, positions.astype(np.int64))


def random_staging(store, blocks, seed=0):
    return np.random.default_rng(seed).integers(0, 256, store.staging_bytes(blocks), dtype=np.uint8)


def layer_parts(store, data):
    """The staged bytes as one `(blocks, bytes)` view a layer."""
    n, start, parts = len(data) // store.layout.block_bytes, 0, []
    for layer in store.layout.layers:
        parts.append(data[start : start + n * layer.block_bytes].reshape(n, layer.block_bytes))
        start += n * layer.block_bytes
    return parts


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) & M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def digest_by_the_book(parts, block, position):
    """`mix64-v2` written out with Python's integers, so that the algorithm's name keeps its meaning."""
    total = 0
    for layer, part in enumerate(parts):
        row = part[block].tobytes()
        row += bytes(-len(row) % 8)
        s = sum(int.from_bytes(row[4 * i : 4 * i + 4], "little") * (mix(i) | 1) for i in range(len(row) // 4))
        seed = mix((layer * 0x9E3779B97F4A7C15 + 0xD6E8FEB86659FD93 + mix(position)) & M64)
        total += mix((s & M64) ^ seed)
    return total & M64


@settings(max_examples=40, deadline=None)
@given(caches, st.integers(0, 4), st.integers(0, 2**40))
def test_a_digest_is_mix64_v2(cache, blocks, first):
    store = cache.store()
    data = random_staging(store, blocks)
    expected = [digest_by_the_book(layer_parts(store, data), b, first + b) for b in range(blocks)]
    got = digest(store, data, first + np.arange(blocks))
    assert got.dtype == np.uint64
    assert [int(d) for d in got] == expected


def by_torch(mixer):
    return lambda rows: mixer.by_torch(rows).numpy().view(np.uint64)


@pytest.mark.parametrize("kind", KINDS)
def test_what_digests_on_gpus_computes_the_same_on_a_cpu(kind, monkeypatch):
    monkeypatch.setattr("kvsdk.kernels.digest._CUDA_PIECE", 24)
    for content in (9, 16):
        store = make_cache(kind, torch.uint8, content=content).store()
        data = random_staging(store, 5)
        expected = digest(store, data)
        monkeypatch.setattr(store._blocks.mixer, "row_sums", by_torch(store._blocks.mixer))
        assert digest(store, data).tolist() == expected.tolist()


def exact_product(rows, digits):
    return (rows.to(torch.int64) @ digits.to(torch.int64)).to(torch.int32)


def saturating_product(rows, digits):
    """As CPUs without VNNI do it: sums of two neighbouring products end at 16 bits."""
    products = rows.to(torch.int64)[:, :, None] * digits.to(torch.int64)[None]
    return products.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1).sum(1).to(torch.int32)


def no_product(rows, digits):
    raise RuntimeError("not implemented")


def extreme_rows(nbytes):
    """Random bytes, and the largest bytes alone, which make the largest sums."""
    rows = np.random.default_rng(3).integers(0, 256, (20, nbytes), dtype=np.uint8)
    rows[16:] = 255
    return torch.from_numpy(rows)


@pytest.mark.parametrize("nbytes", [1, 4, 7, 60, 1000, 65536, 65536 + 20])
def test_a_matrix_product_of_bytes_gives_the_same_sums(monkeypatch, nbytes):
    monkeypatch.setattr(torch, "_int_mm", exact_product)
    monkeypatch.setattr(WordMixer, "_matmul_pays", lambda self, nbytes: True)
    mixer, rows = WordMixer(nbytes, torch.device("cpu")), extreme_rows(nbytes)
    assert mixer.row_sums(rows).tolist() == mixer.by_numpy(rows).tolist() == mixer.by_matmul(rows).tolist()


@pytest.mark.parametrize("nbytes", [1000, 65536, 65536 + 20])
def test_what_this_cpu_digests_with_is_exact(nbytes):
    mixer, rows = WordMixer(nbytes, torch.device("cpu")), extreme_rows(nbytes)
    assert mixer.row_sums(rows).tolist() == mixer.by_numpy(rows).tolist()


@pytest.mark.parametrize("product", [saturating_product, no_product])
def test_a_product_that_is_not_exact_or_not_there_is_not_used(monkeypatch, product):
    monkeypatch.setattr(torch, "_int_mm", product)
    monkeypatch.setattr("kvsdk.kernels.digest._fastest_of", lambda times, digest, rows: digest.__name__ == "by_numpy")
    mixer, rows = WordMixer(256, torch.device("cpu")), extreme_rows(256)
    assert mixer.row_sums(rows).tolist() == mixer.by_numpy(rows).tolist()
    monkeypatch.setattr(torch, "_int_mm", exact_product)
    assert WordMixer(256, torch.device("cpu"))._digits is not None, "it would have been used"


def test_digesting_leaves_the_number_of_threads_as_it_was():
    store = make_cache("HND", torch.float32, blocks=40, layers=2).store()
    before = torch.get_num_threads()
    digest(store, random_staging(store, 40))
    assert torch.get_num_threads() == before


def test_splitmix64_is_the_published_generator():
    assert int(splitmix64(np.zeros(1, np.uint64))[0]) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("piece", [1, 7, 64, 100, 1000])
def test_large_blocks_are_digested_in_pieces_that_add_up(monkeypatch, piece):
    monkeypatch.setattr("kvsdk.kernels.digest._CPU_PIECE", piece)
    store = make_cache("HND", torch.float32, blocks=1, layers=2, heads=3, tokens=4, content=10).store()
    assert store.layout.layers[0].block_bytes // 8 == 60
    data = random_staging(store, 2)
    parts = layer_parts(store, data)
    assert [int(d) for d in digest(store, data)] == [digest_by_the_book(parts, b, b) for b in range(2)]


@settings(max_examples=80, deadline=None)
@given(caches, st.data())
def test_any_flipped_bit_is_found_in_its_block_alone(cache, data):
    store = cache.store()
    staged = random_staging(store, 3)
    before = digest(store, staged)
    parts = layer_parts(store, staged)
    part = parts[data.draw(st.integers(0, len(parts) - 1))]
    block, byte = data.draw(st.integers(0, 2)), data.draw(st.integers(0, part.shape[1] - 1))
    part[block, byte] ^= 1 << data.draw(st.integers(0, 7))
    assert [i for i in range(3) if digest(store, staged)[i] != before[i]] == [block]


def test_every_single_bit_and_every_pair_of_top_bits_is_found():
    store = make_cache("HND", torch.uint8, layers=1, heads=1, tokens=4, content=16).store()
    data = random_staging(store, 1)
    before = digest(store, data)[0]
    for bit in range(8 * len(data)):
        flipped = data.copy()
        flipped[bit // 8] ^= 1 << (bit % 8)
        assert digest(store, flipped)[0] != before
    tops = range(7, len(data), 8)
    for a in tops:
        for b in tops:
            flipped = data.copy()
            flipped[a] ^= 0x80
            flipped[b] ^= 0x80
            assert (digest(store, flipped)[0] == before) == (a == b)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 15), st.integers(1, (1 << 32) - 1))
def test_any_change_within_a_word_is_found(word, change):
    store = make_cache("HND", torch.uint8, layers=1, heads=1, tokens=4, content=16).store()
    data = random_staging(store, 1)
    before = digest(store, data)[0]
    data.view(np.uint32)[word : word + 1] += np.uint32(change)
    assert digest(store, data)[0] != before


def test_swapped_blocks_are_found():
    store = make_cache("HND").store()
    data = random_staging(store, 2)
    before = digest(store, data)
    for part in layer_parts(store, data):
        part[[0, 1]] = part[[1, 0]]
    assert not set(before.tolist()) & set(digest(store, data).tolist())


def test_equal_data_at_another_position_has_another_digest():
    store = make_cache("HND").store()
    same = np.tile(random_staging(store, 1)[: store.layout.layers[0].block_bytes], 2 * len(store.layout.layers))
    first, second = digest(store, same, [7, 8])
    assert first != second
    assert digest(store, same, [8, 7]).tolist() == [second, first]


def test_exchanged_layers_are_found():
    store = make_cache("HND").store()
    data = random_staging(store, 2)
    before = digest(store, data)
    parts = layer_parts(store, data)
    parts[0][:], parts[2][:] = parts[2].copy(), parts[0].copy()
    assert (digest(store, data) != before).all()


def test_exchanged_words_are_found():
    store = make_cache("HND", layers=1).store()
    data = random_staging(store, 1)
    before = digest(store, data)
    words = data.view(np.uint64)
    words[[0, 3]] = words[[3, 0]]
    assert digest(store, data) != before


def test_a_digest_is_the_same_on_both_sides_of_a_transfer():
    ours, theirs = make_cache("one buffer", seed=1), make_cache("BHLNC", seed=2)
    a, b = ours.store(), theirs.store()
    staging, positions = a.staging(3), np.array([3, 4, 5])
    a.gather(np.array([1, 5, 2], np.int32), staging)
    sent = a.digest(staging, 3, positions)
    b.scatter(np.array([0, 1, 4], np.int32), staging)
    again = b.staging(3)
    b.gather(np.array([0, 1, 4], np.int32), again)
    assert (b.digest(again, 3, positions) == sent).all()


def test_positions_that_do_not_fit_are_refused():
    store = make_cache("HND").store()
    for positions in (np.arange(3), np.arange(2, dtype=np.int32), np.zeros((2, 1), np.int64)):
        with pytest.raises(ValueError, match="positions must be int64"):
            store.digest(store.staging(2), 2, positions)


def test_layers_on_two_devices_are_refused():
    caches = {"a": torch.zeros(2, 4, 8), "b": torch.zeros(2, 4, 8)}
    layout = layout_of(caches, num_blocks=2, block_size=4)
    caches["b"] = caches["b"].to("meta")
    with pytest.raises(ValueError, match="one device"):
        BlockStore(caches, layout)


# ---- fused operations, in place and from a peer


def told(digests):
    return digests.numpy().view(np.uint64)


@settings(max_examples=60, deadline=None)
@given(caches, st.data())
def test_digests_in_place_and_on_the_way_are_those_of_a_staging_buffer(cache, data):
    store, ids = cache.store(), ids_of(cache, data)
    n, positions = len(ids), data.draw(st.integers(0, 2**40)) + np.arange(len(ids))
    plain, staging = store.staging(n), store.staging(n)
    on_the_way, in_place = store.new_digests(n), store.new_digests(n)
    store.gather(ids, plain)
    store.gather_digest(ids, positions, staging, on_the_way)
    store.digest_in_place(ids, positions, in_place)
    assert torch.equal(plain, staging)
    assert told(on_the_way).tolist() == told(in_place).tolist() == store.digest(plain, n, positions).tolist()


@settings(max_examples=60, deadline=None)
@given(caches, st.data())
def test_staged_blocks_are_written_if_their_digests_are_right(cache, data):
    store, ids = cache.store(), ids_of(cache, data, unique=True)
    n, positions = len(ids), np.arange(len(ids))
    staging = torch.from_numpy(random_staging(store, n))
    expected = store.digest(staging, n, positions)
    corrupt = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=bool)
    after = [cache.blocks(i) for i in range(len(cache.views))]
    parts = layer_parts(store, staging.numpy())
    for block in np.flatnonzero(corrupt):
        part = parts[data.draw(st.integers(0, len(parts) - 1))]
        part[block, data.draw(st.integers(0, part.shape[1] - 1))] ^= 1 << data.draw(st.integers(0, 7))
    for blocks, part in zip(after, parts, strict=True):
        blocks[ids[~corrupt]] = part[~corrupt]
    wrong = store.new_wrong(n).fill_(9)
    store.scatter_verified(ids, positions, staging, expected, wrong)
    assert wrong.tolist() == corrupt.astype(int).tolist()
    for i, blocks in enumerate(after):
        np.testing.assert_array_equal(cache.blocks(i), blocks)


PAIRS = [("HND", "NHD"), ("BHLNC", "one buffer"), ("MLA 3-D", "MLA 4-D"), ("NHD", "NHD"), ("BLHNC", "BHLNC")]


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
@pytest.mark.parametrize("content", [8, 9])
def test_blocks_are_pulled_from_a_peer_in_whatever_layout(theirs, ours, content):
    peer, cache = (make_cache(kind, content=content, seed=i) for i, kind in enumerate((theirs, ours)))
    peer_store, store = peer.store(), cache.store()
    src_ids, dst_ids, positions = np.array([5, 0, 5], np.int32), np.array([2, 4, 1], np.int32), np.arange(7, 10)
    before = [cache.content(i) for i in range(3)]
    expected = peer_store.new_digests(3)
    peer_store.digest_in_place(src_ids, positions, expected)
    told(expected)[1] ^= np.uint64(1)
    wrong, digests = store.new_wrong(3), store.new_digests(3)
    there = store.peer(peer_store.layout, peer_store.addresses, peer)
    store.pull(store.choose(there, src_ids, positions, told(expected)), dst_ids, wrong=wrong, digests=digests)
    assert wrong.tolist() == [0, 1, 0]
    assert (digests == expected).tolist() == [True, False, True]
    for i, blocks in enumerate(before):
        blocks[dst_ids] = peer.content(i)[src_ids]
        np.testing.assert_array_equal(cache.content(i), blocks)


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
@pytest.mark.parametrize(("theirs", "ours"), [("HND", "HND"), ("NHD", "HND"), ("one buffer", "NHD"), ("HND", "BHLNC")])
@pytest.mark.parametrize("sizes", [(1,), (1, 3)])
def test_blocks_are_pulled_piece_by_piece(monkeypatch, theirs, ours, sizes, rows):
    """Pieces that end within a layer, at its end and in the next one; by two threads, into blocks of their own."""
    one = any(kind in ("one buffer", "BHLNC") for kind in (theirs, ours))
    peer, cache = (
        make_cache(kind, layers=4, blocks=30, sizes=(1,) if one else sizes, seed=i)
        for i, kind in enumerate((theirs, ours))
    )
    monkeypatch.setattr(torch_blocks, "PIECE_BYTES", rows * min(layer.block_bytes for layer in peer.layout().layers))
    peer_store, store, rng = peer.store(), cache.store(), np.random.default_rng(rows)
    src_ids, dst_ids = (rng.permutation(30)[:23].astype(np.int32) for _ in range(2))
    expected = peer_store.new_digests(23)
    peer_store.digest_in_place(src_ids, np.arange(23), expected)
    told(expected)[11] ^= np.uint64(1)
    wrong, digests = store.new_wrong(23), store.new_digests(23)
    there = store.peer(peer_store.layout, peer_store.addresses, peer)
    chosen = store.choose(there, src_ids, np.arange(23), told(expected))
    before = [cache.content(i) for i in range(4)]

    def pull(part):
        store.pull(chosen, dst_ids[part], first=part.start, wrong=wrong[part], digests=digests[part])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(pull, [slice(0, 9), slice(9, 23)]))
    assert np.flatnonzero(wrong).tolist() == [11]
    assert np.flatnonzero(digests != expected).tolist() == [11]
    for i, blocks in enumerate(before):
        blocks[dst_ids] = peer.content(i)[src_ids]
        np.testing.assert_array_equal(cache.content(i), blocks)


def test_kernel_blocks_that_cut_the_tokens_otherwise_are_pulled():
    peer, cache = (make_cache("HND", tokens=n, ratio=6 // n, seed=n) for n in (2, 3))
    store = cache.store()
    there = store.peer(peer.layout(), peer.store().addresses)
    store.pull(store.choose(there, np.array([3], np.int32)), np.array([5], np.int32))
    for i in range(3):
        np.testing.assert_array_equal(cache.content(i)[5], peer.content(i)[3])


def test_a_peer_is_read_as_it_is_now():
    cache, peer = make_cache("HND"), make_cache("HND", seed=1)
    with mmap.mmap(-1, sum(s.numel() for s in peer.storages)) as memory:
        start, addresses = ctypes.addressof(ctypes.c_char.from_buffer(memory)), []
        for storage in peer.storages:
            addresses.append(start + memory.tell())
            memory.write(storage.numpy().tobytes())
        store = cache.store()
        there = store.peer(peer.layout(), np.array(addresses, np.uint64), memory)
        for value in (1, 2):
            memory[0] = value
            store.pull(store.choose(there, np.array([0], np.int32)), np.array([3], np.int32))
            assert cache.content(0)[3].ravel()[0] == value
            assert (cache.content(0)[3].ravel()[1:] == peer.content(0)[0].ravel()[1:]).all()


def test_a_peer_of_other_content_is_refused_by_name():
    store = make_cache("HND").store()
    other = make_cache("HND", heads=4).store()
    with pytest.raises(MismatchError, match=r"^dims\.0\.H differs: ours is 2, the peer's is 4"):
        store.peer(other.layout, other.addresses)
    with pytest.raises(ValueError, match="addresses must be one for each of 3 layers"):
        store.peer(store.layout, store.addresses[:2])


def test_what_does_not_fit_is_refused_before_anything_is_written():
    cache = make_cache("HND")
    store, before, two = cache.store(), cache.clone(), np.array([0, 1], np.int32)
    staging, positions, expected = store.staging(2), np.arange(2), np.zeros(2, np.uint64)
    wrong, digests = store.new_wrong(2), store.new_digests(2)
    there = store.peer(store.layout, store.addresses)
    chosen = store.choose(there, np.array([0, 1], np.int32))
    checked = store.choose(there, np.array([0, 1], np.int32), np.arange(2), np.zeros(2, np.uint64))
    refused = [
        ("positions must be int64", lambda: store.gather_digest(two, np.arange(3), staging, digests)),
        ("digests must be a contiguous torch.int64", lambda: store.gather_digest(two, positions, staging, wrong)),
        ("digests must be", lambda: store.digest_in_place(two, positions, store.new_digests(3))),
        ("digests must be", lambda: store.digest_in_place(two, positions, store.new_digests(4)[::2])),
        ("from 0 to 5", lambda: store.digest_in_place(two + 5, positions, digests)),
        ("staging must be", lambda: store.scatter_verified(two, positions, staging[8:], expected, wrong)),
        ("expected must be uint64", lambda: store.scatter_verified(two, positions, staging, positions, wrong)),
        ("wrong must be", lambda: store.scatter_verified(two, positions, staging, expected, digests)),
        ("twice", lambda: store.scatter_verified(two * 0, positions, staging, expected, wrong)),
        ("from 0 to 5", lambda: store.pull(chosen, two + 5)),
        ("from 0 to 5", lambda: store.choose(there, two - 1)),
        ("of 2 blocks 2 cannot be copied from 1", lambda: store.pull(chosen, two, first=1)),
        ("of 2 blocks 1 cannot be copied from -1", lambda: store.pull(chosen, two[:1], first=-1)),
        ("digests need positions", lambda: store.choose(there, two, None, expected)),
        ("positions must be", lambda: store.choose(there, two, positions[:1])),
        ("expected must be", lambda: store.choose(there, two, positions, expected[:1])),
        ("wrong can only be told", lambda: store.pull(store.choose(there, two, positions), two, wrong=wrong)),
        ("digests can only be told", lambda: store.pull(chosen, two, digests=digests)),
        ("wrong has room for 1", lambda: store.pull(checked, two, wrong=wrong[:1])),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()
    assert cache.same_bytes(before)


def test_a_store_takes_an_sm_at_least():
    cache = make_cache("HND")
    with pytest.raises(ValueError, match="max_sms must be at least 1"):
        BlockStore(cache.tensors, cache.layout(), max_sms=0)
