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
        {"version": 99},
        {"num_blocks": 0},
        {"num_blocks": True},
        {"num_blocks": 1 << 40},
        {"strides": []},
        {"strides": "x"},
        {"layers": []},
        {"layers": [[0, -1]] * 4},
        {"layers": [[0]] * 4},
        {"layers": [[0, 1.5]] * 4},
        {"strides": [[1 << 50, 1, 0, 0]] * 4},
        {"strides": [[0, 1, 0, 0]] * 4},
        {"strides": [[4096, 0, 0, 0]] * 4},
        {"strides": [[4096, 7, 0, 1]] * 4},
        {"layers": [[0, 1 << 64]] * 4},
        {"process": 0},
        {"process": -1},
        {"process": "another"},
        {"proof": None},
        {"proof": [0]},
        {"proof": [-1, bytes(16)]},
        {"proof": [0, bytes(15)]},
        {"proof": [0, "x" * 16]},
    ],
    ids=str,
)
def test_a_malformed_window_is_refused(change):
    cache = make_cache("HND", layers=4)
    with pytest.raises(ProtocolError, match=r"window"):
        open_window(opened(cache) | change, cache.layout(), CPU)


@pytest.mark.parametrize("window", [None, 3, [], {}, {"version": 1}], ids=str)
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
        ({"proof": [8, bytes(16)]}, "cannot be read: process .* has no memory there"),
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
    window = opened(cache)
    window["proof"] = [window["proof"][0], bytes(16)]
    with pytest.raises(WindowUnavailable, match="another PID namespace"):
        open_window(window, cache.layout(), CPU)


def test_a_window_is_plain_values():
    import msgpack

    window = opened(make_cache("HND"))
    assert msgpack.unpackb(msgpack.packb(window)) == window
    assert copy.deepcopy(window) == window
