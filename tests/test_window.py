"""Windows on CPUs: what is laid open, and that what comes over the network is not trusted."""

import copy

import numpy as np
import pytest
import torch
from support.caches import KINDS, make_cache

from kvsdk.errors import ProtocolError, WindowUnavailable
from kvsdk.pipe import lay_open, open_window

CPU = torch.device("cpu")


def opened(cache):
    return lay_open(cache.layout(), cache.store().addresses, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_read_in_place(kind):
    theirs, ours = make_cache(kind, blocks=20, seed=1), make_cache(kind, blocks=9, seed=2)
    window = open_window(opened(theirs), ours.layout(), CPU)
    store = ours.store()
    peer = store.peer(window.layout, window.addresses, window)
    src, dst = np.array([3, 19, 0], np.int32), np.array([8, 1, 4], np.int32)
    store.pull(store.choose(peer, src), dst)
    np.testing.assert_array_equal(ours.naive_gather(dst), theirs.naive_gather(src))
    window.close()
    window.close()


@pytest.mark.parametrize(
    "change",
    [
        {"num_blocks": 0},
        {"num_blocks": True},
        {"num_blocks": 1 << 40},
        {"strides": []},
        {"strides": "x"},
        {"strides": [[1 << 50, 1, 0, 0]] * 4},
        {"strides": [[0, 1, 0, 0]] * 4},
        {"strides": [[4096, 0, 0, 0]] * 4},
        {"strides": [[4096, 7, 0, 1]] * 4},
        {"process": 0},
        {"process": -1},
        {"process": "another"},
        {"table": None},
        {"table": -1},
        {"table": 1 << 64},
        {"nonce": None},
        {"nonce": bytes(15)},
        {"nonce": "x" * 16},
    ],
    ids=str,
)
def test_a_malformed_window_is_refused(change):
    cache = make_cache("HND", layers=4)
    with pytest.raises(ProtocolError, match=r"window"):
        open_window(opened(cache) | change, cache.layout(), CPU)


@pytest.mark.parametrize("window", [None, 3, [], {"version": 2}], ids=str)
def test_what_is_no_window_is_refused(window):
    with pytest.raises(ProtocolError, match="window"):
        open_window(window, make_cache("HND").layout(), CPU)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kind": "cuda-ipc"}, "lays its memory open by 'cuda-ipc'"),
        ({"kind": None}, "lays its memory open by None"),
        ({"host": "another"}, "on another host"),
        ({"process": 1 << 30}, f"cannot be read: process {1 << 30} is gone"),
        ({"table": 8}, "cannot be read: process .* has no memory there"),
        ({"num_blocks": 1 << 30}, "has something else there"),
        ({"version": 99}, "of version 99, not 2"),
        ({"version": None}, "of version None"),
    ],
    ids=str,
)
def test_a_window_that_cannot_be_opened_here_says_why(change, why):
    cache = make_cache("HND")
    with pytest.raises(WindowUnavailable, match=why):
        open_window(opened(cache) | change, cache.layout(), CPU)


def test_another_process_of_the_producers_number_is_noticed():
    """As in another PID namespace: what was to be there is not."""
    cache = make_cache("HND")
    with pytest.raises(WindowUnavailable, match="another PID namespace"):
        open_window(opened(cache) | {"nonce": bytes(16)}, cache.layout(), CPU)


def test_where_the_cache_lies_is_not_for_a_message_to_say():
    cache, other = make_cache("HND", seed=1), make_cache("HND", seed=2)
    window = opened(cache)
    changed = open_window(window | {"layers": [[0, int(a)] for a in other.store().addresses]}, cache.layout(), CPU)
    np.testing.assert_array_equal(changed.addresses, cache.store().addresses)
    further = [[2 * block_stride, *rest] for block_stride, *rest in window["strides"]]
    with pytest.raises(WindowUnavailable, match="has something else there"):
        open_window(window | {"strides": further}, cache.layout(), CPU)
    assert not {int(a) for a in cache.store().addresses} & {x for x in window.values() if type(x) is int}


def test_a_window_is_plain_values():
    import msgpack

    window = opened(make_cache("HND"))
    assert msgpack.unpackb(msgpack.packb(window)) == window
    assert copy.deepcopy(window) == window
