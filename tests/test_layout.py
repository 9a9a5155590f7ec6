"""Where a block's bytes lie: what `layout_of` reads off vLLM's tensors, and what it refuses."""

import pytest
import torch

from kvsdk.errors import ConfigError, MismatchError
from kvsdk.layout import check_same, layout_of

H, N, C = 2, 16, 128


def one(tensor, num_blocks=8, block_size=N):
    return layout_of({"model.layers.0.attn": tensor}, num_blocks=num_blocks, block_size=block_size)


def fingerprint_of(tensor, **kwargs):
    return one(tensor, **kwargs).fingerprint()


def hnd(blocks=8, dtype=torch.bfloat16):
    return torch.zeros(blocks, H, N, C, dtype=dtype)


def nhd(blocks=8, dtype=torch.bfloat16):
    return torch.zeros(blocks, N, H, C, dtype=dtype).transpose(1, 2)


def all_layers_in_a_page(order):
    """Views of 3 layers on one buffer whose blocks hold all layers."""
    if order == "BLHNC":
        return [torch.zeros(8, 3, H, N, C)[:, i] for i in range(3)]
    return [torch.zeros(8, H, 3, N, C)[:, :, i] for i in range(3)]


def test_hnd_is_one_dense_run():
    layer = one(hnd()).layers[0]
    assert (layer.order, layer.dims) == ("HNC", (H, N, C))
    assert layer.block_bytes == layer.block_stride == H * N * C * 2
    assert layer.segments == ((0, H * N * C * 2),)
    assert layer.dtype == "bfloat16"


def test_nhd_has_the_shape_of_hnd_and_another_order():
    layer = one(nhd()).layers[0]
    assert nhd().shape == hnd().shape
    assert (layer.order, layer.dims) == ("NHC", (N, H, C))
    assert layer.segments == ((0, H * N * C * 2),)


def test_mla_in_three_and_four_dims_is_the_same_bytes():
    three = torch.zeros(8, 64, 576)
    # vLLM's own strides: the dim of size 1 has the stride of the dim after it.
    four = torch.zeros(8 * 64 * 576).as_strided((8, 1, 64, 576), (36864, 576, 576, 1))
    assert one(three).layers[0].order == "NC"
    check_same(fingerprint_of(three), fingerprint_of(four))


def test_one_head_has_no_order_of_heads():
    arbitrary = torch.zeros(8 * N * C).as_strided((8, 1, N, C), (N * C, 7, C, 1))
    check_same(fingerprint_of(torch.zeros(8, 1, N, C)), fingerprint_of(arbitrary))


def test_a_page_of_all_layers_has_a_stride_wider_than_a_block():
    layer = one(all_layers_in_a_page("BLHNC")[1]).layers[0]
    assert layer.block_stride == 3 * layer.block_bytes
    assert layer.segments == ((0, layer.block_bytes),)
    assert layer.storage_offset == layer.block_bytes


def test_layers_between_heads_cut_a_block_into_one_segment_a_head():
    layer = one(all_layers_in_a_page("BHLNC")[1]).layers[0]
    run = N * C * 4
    assert layer.segments == ((0, run), (3 * run, run))
    assert layer.block_bytes == 2 * run
    assert layer.order == "HNC"


def test_kernel_blocks_join_into_blocks():
    layer = one(hnd(blocks=16), num_blocks=8).layers[0]
    assert (layer.order, layer.dims) == ("RHNC", (2, H, N, C))
    assert layer.block_bytes == 2 * H * N * C * 2


def test_kernel_blocks_whose_tokens_follow_each_other_are_the_same_bytes_as_one_block():
    split = fingerprint_of(nhd(blocks=16), num_blocks=8, block_size=2 * N)
    whole = fingerprint_of(torch.zeros(8, 2 * N, H, C, dtype=torch.bfloat16).transpose(1, 2), block_size=2 * N)
    check_same(split, whole)


def test_kernel_blocks_of_another_size_differ():
    a = fingerprint_of(torch.zeros(16, H, 32, C), num_blocks=8, block_size=64)
    b = fingerprint_of(torch.zeros(32, H, 16, C), num_blocks=8, block_size=64)
    with pytest.raises(MismatchError) as caught:
        check_same(a, b)
    assert caught.value.field == "dims.0.0"


def test_a_pool_of_one_block_is_read():
    assert one(hnd(blocks=1), num_blocks=1).layers[0].block_bytes == H * N * C * 2


def test_state_space_models_are_refused_by_name():
    for state in ([torch.zeros(8, 4), torch.zeros(8, 2)], torch.zeros(8, 1, 1, 4096, dtype=torch.int8)):
        with pytest.raises(ConfigError, match=r"'model\.layers\.0\.attn'.*state-space models are not supported"):
            one(state)


def test_no_layers_is_an_error():
    with pytest.raises(ConfigError, match="no KV caches"):
        layout_of({}, num_blocks=8, block_size=N)


def test_other_backends_and_numbers_of_layers_are_named():
    a = layout_of({"0": hnd()}, num_blocks=8, block_size=N, backend="A").fingerprint()
    b = layout_of({"0": hnd()}, num_blocks=8, block_size=N, backend="B").fingerprint()
    two = layout_of({"0": hnd(), "1": hnd()}, num_blocks=8, block_size=N, backend="A").fingerprint()
    with pytest.raises(MismatchError, match=r"^layout\.backend differs: ours is 'A', the peer's is 'B'"):
        check_same(a, b, "layout")
    with pytest.raises(MismatchError, match=r"^layout\.num_layers differs: ours is 1, the peer's is 2"):
        check_same(a, two, "layout")


@pytest.mark.parametrize(
    ("ours", "theirs", "field"),
    [
        ({"a": 1, "b": 2}, {"b": 3}, "a"),
        ({"b": 2, "a": 1}, {"a": 0, "b": 0}, "b"),
        ({"a": 1}, {"a": 1, "z": 2}, "z"),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, "a.b.c"),
        ({"a": {"b": 1}}, {"a": 1}, "a"),
        ({"a": [1, 2]}, {"a": [1, 2, 3]}, "a.length"),
        ({"a": [1, 2]}, {"a": [1, 3]}, "a.1"),
        ({"a": 1}, {"a": True}, "a"),
        ({"a": None}, {}, "a"),
    ],
)
def test_check_same_names_the_dotted_field_in_our_order(ours, theirs, field):
    with pytest.raises(MismatchError) as caught:
        check_same(ours, theirs)
    assert caught.value.field == field
