"""Plans say where each byte goes: carried out byte by byte they are a copy element by element, whatever the layouts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.caches import KINDS, make_cache

from kvsdk.errors import MismatchError
from kvsdk.layout import byte_runs, layout_of, plan_copy, staging_layout

HEADS_AND_TOKENS = ["NHD", "HND", "one buffer", "BLHNC", "BHLNC"]
MLA = ["MLA 3-D", "MLA 4-D"]


@st.composite
def two_layouts(draw):
    """Two caches of the same content, in layouts of their own."""
    kinds = draw(st.sampled_from([HEADS_AND_TOKENS, HEADS_AND_TOKENS, MLA]))
    shape = {
        "layers": draw(st.integers(1, 3)),
        "heads": draw(st.integers(1, 4)) if kinds is not MLA else 1,
        "content": draw(st.integers(1, 9)),
    }
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]))
    tokens = draw(st.sampled_from([1, 2, 6, 8, 12]))
    two = []
    for seed, kind in enumerate([draw(st.sampled_from(kinds)), draw(st.sampled_from(kinds))]):
        ratio = draw(st.sampled_from([r for r in (1, 2, 3, 4, 6) if tokens % r == 0]))
        if kind in ("one buffer", "BLHNC", "BHLNC"):
            ratio = 1
        two.append((kind, ratio, seed))
    # Pages of several sizes where both sides have a tensor for each layer.
    apart = all(kind in ("NHD", "HND", *MLA) for kind, *_ in two)
    sizes = draw(st.sampled_from([(1,), (1, 3)])) if apart else (1,)
    return [
        make_cache(
            kind, dtype, blocks=draw(st.integers(1, 7)), tokens=tokens // ratio, ratio=ratio, sizes=sizes, seed=seed,
            **shape,
        )
        for kind, ratio, seed in two
    ]  # fmt: skip


def draw_ids(data, src, dst):
    n = data.draw(st.integers(0, dst.num_blocks))
    src_ids = data.draw(st.lists(st.integers(0, src.num_blocks - 1), min_size=n, max_size=n))
    dst_ids = data.draw(st.permutations(range(dst.num_blocks)))[:n]
    return np.array(src_ids, np.int32), np.array(dst_ids, np.int32)


def memory(cache, layer):
    """A layer's memory from block 0 on."""
    at, *_ = cache.views[layer]
    return cache.storages[at].numpy()[cache.layout().layers[layer].storage_offset :]


def expected_after(src, dst, src_ids, dst_ids):
    """What `dst` holds, layer by layer, after a copy element by element."""
    contents = [dst.content(i) for i in range(len(dst.views))]
    for i, content in enumerate(contents):
        content[dst_ids] = src.content(i)[src_ids]
    return contents


@settings(max_examples=150, deadline=None)
@given(two_layouts(), st.data())
def test_a_plan_is_a_copy_element_by_element(pair, data):
    src, dst = pair
    src_ids, dst_ids = draw_ids(data, src, dst)
    expected = expected_after(src, dst, src_ids, dst_ids)
    plan = plan_copy(src.layout(), dst.layout())
    for i, layer in enumerate(plan.layers):
        assert layer.block_bytes == plan.src.layers[i].block_bytes
        assert (np.diff(layer.src_offsets) > 0).all()
        for a, b in zip(src_ids, dst_ids, strict=True):
            for s, d in zip(layer.src_offsets, layer.dst_offsets, strict=True):
                s, d = s + int(a) * layer.src_stride, d + int(b) * layer.dst_stride
                memory(dst, i)[d : d + layer.nbytes] = memory(src, i)[s : s + layer.nbytes]
    for i, content in enumerate(expected):
        np.testing.assert_array_equal(dst.content(i), content)


@settings(max_examples=150, deadline=None)
@given(two_layouts(), st.data())
def test_byte_runs_are_the_same_copy_and_none_could_be_joined(pair, data):
    src, dst = pair
    src_ids, dst_ids = draw_ids(data, src, dst)
    expected = expected_after(src, dst, src_ids, dst_ids)
    layers = byte_runs(plan_copy(src.layout(), dst.layout()), src_ids, dst_ids)
    for i, (from_, to, nbytes) in enumerate(layers):
        assert from_.dtype == to.dtype == nbytes.dtype == np.int64
        ends = set(zip((from_ + nbytes).tolist(), (to + nbytes).tolist(), strict=True))
        assert not ends & set(zip(from_.tolist(), to.tolist(), strict=True))
        for s, d, n in zip(from_, to, nbytes, strict=True):
            memory(dst, i)[d : d + n] = memory(src, i)[s : s + n]
    for i, content in enumerate(expected):
        np.testing.assert_array_equal(dst.content(i), content)


@settings(max_examples=60, deadline=None)
@given(two_layouts())
def test_loops_are_the_offsets(pair):
    for layer in plan_copy(*(cache.layout() for cache in pair)).layers:
        if layer.loops is None:
            continue
        offsets = np.array([[layer.src_offsets[0], layer.dst_offsets[0]]])
        for count, *steps in layer.loops:
            offsets = (offsets[:, None] + np.arange(count)[None, :, None] * np.array(steps)).reshape(-1, 2)
        assert offsets.tolist() == np.stack([layer.src_offsets, layer.dst_offsets], axis=1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_layouts_are_runs_of_whole_pages(kind):
    layout = make_cache(kind).layout()
    for layer, planned in zip(layout.layers, plan_copy(layout, layout).layers, strict=True):
        segments = list(zip(planned.src_offsets, [planned.nbytes] * len(planned.src_offsets), strict=True))
        assert segments == list(layer.segments)
        assert (planned.src_offsets == planned.dst_offsets).all()


@pytest.mark.parametrize("kind", KINDS)
def test_staging_is_packed_and_layer_major_in_the_order_of_the_cache(kind):
    cache = make_cache(kind)
    ids = np.array([4, 0, 2], np.int32)
    staged = staging_layout(cache.layout(), 3)
    buffer = np.zeros(3 * cache.layout().block_bytes, np.uint8)
    runs = byte_runs(plan_copy(cache.layout(), staged), ids, np.arange(3))
    for i, (from_, to, nbytes) in enumerate(runs):
        for s, d, n in zip(from_, to + staged.layers[i].storage_offset, nbytes, strict=True):
            buffer[d : d + n] = memory(cache, i)[s : s + n]
    np.testing.assert_array_equal(buffer, cache.naive_gather(ids))


def test_heads_first_to_tokens_first_keeps_a_heads_token_together():
    (layer,) = plan_copy(
        make_cache("HND", layers=1, heads=8, tokens=16, content=256).layout(),
        make_cache("NHD", layers=1, heads=8, tokens=16, content=256).layout(),
    ).layers
    assert layer.nbytes == 512 and len(layer.src_offsets) == 128
    assert layer.loops == ((8, 16 * 512, 512), (16, 512, 8 * 512))


def test_kernel_blocks_of_other_sizes_keep_the_smaller_ones_tokens_together():
    sixteen = make_cache("HND", layers=1, heads=2, tokens=16, ratio=4).layout()
    thirty_two = make_cache("HND", layers=1, heads=2, tokens=32, ratio=2).layout()
    for plan in (plan_copy(sixteen, thirty_two), plan_copy(thirty_two, sixteen)):
        assert plan.layers[0].nbytes == 16 * 8 * 2


def test_kernel_blocks_that_do_not_divide_each_other_have_uneven_runs():
    two, three = (make_cache("HND", layers=1, tokens=n, ratio=6 // n).layout() for n in (2, 3))
    assert plan_copy(two, three).layers[0].loops is None


def test_neighbouring_blocks_are_one_run():
    dense, apart = make_cache("HND", blocks=8, layers=2).layout(), make_cache("BLHNC", blocks=8, layers=2).layout()
    page = dense.layers[0].block_bytes
    src_ids, dst_ids = np.array([5, 2, 3, 4, 0]), np.array([7, 1, 2, 3, 6])
    for from_, to, nbytes in byte_runs(plan_copy(dense, dense), src_ids, dst_ids):
        assert to.tolist() == [page, 6 * page, 7 * page]
        assert from_.tolist() == [2 * page, 0, 5 * page]
        assert nbytes.tolist() == [3 * page, page, page]
    for _, to, nbytes in byte_runs(plan_copy(dense, apart), src_ids, dst_ids):
        assert to.tolist() == [2 * page, 4 * page, 6 * page, 12 * page, 14 * page]
        assert set(nbytes.tolist()) == {page}


def test_many_blocks_take_no_time():
    """100 layers in 20,000 blocks: a loop over blocks would take seconds."""
    tensors = {str(i): torch.empty(20_000, 1, 16, 1, dtype=torch.uint8) for i in range(100)}
    layout = layout_of(tensors, num_blocks=20_000, block_size=16)
    ids = np.random.default_rng(0).permutation(20_000)
    plan = plan_copy(layout, layout)
    assert len({id(layer) for layer in plan.layers}) == 1
    runs = byte_runs(plan, ids, ids[::-1])
    assert len({id(layer) for layer in runs}) == 1
    assert sum(int(nbytes.sum()) for *_, nbytes in runs) == 100 * 20_000 * 16


def test_a_destination_that_comes_twice_and_ids_of_two_lengths_are_refused():
    plan = plan_copy(*[make_cache("HND").layout()] * 2)
    for src_ids, dst_ids in (([1, 2], [3, 3]), ([1], [2, 3]), ([[1]], [[2]])):
        with pytest.raises(ValueError, match="dst_ids all different"):
            byte_runs(plan, np.array(src_ids), np.array(dst_ids))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"layers": 2}, "num_layers"),
        ({"tokens": 8}, "block_size"),
        ({"dtype": torch.float16}, "dtype.0"),
        ({"heads": 4}, "dims.0.H"),
        ({"content": 16}, "dims.0.C"),
        ({"sizes": (1, 2)}, "dims.1.C"),
    ],
)
def test_content_that_differs_is_named(change, field):
    ours, theirs = make_cache("HND").layout(), make_cache("NHD", **change).layout()
    with pytest.raises(MismatchError) as caught:
        plan_copy(theirs, ours)
    assert caught.value.field == field


def test_blocks_of_other_tokens_at_one_block_size_are_named():
    """A registered tensor's tokens need not be what vLLM calls the block size."""
    tensors = [torch.zeros(4, 2, n, 8) for n in (16, 32)]
    ours, theirs = (layout_of({"0": t}, num_blocks=4, block_size=16) for t in tensors)
    with pytest.raises(MismatchError, match=r"dims\.0\.N differs: ours is 16, the peer's is 32"):
        plan_copy(theirs, ours)
