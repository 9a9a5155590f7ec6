"""LMCacheConnector's worker half on a GPU: blocks go to a server, and come back byte for byte."""

import secrets

import numpy as np
import pytest
import torch
from support.lm_server import LMServer
from support.lm_worker import BLOCK, Worker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("no_thread_left"),
]


@pytest.fixture
def worker(device="cuda"):
    with LMServer() as server:
        one = Worker(server.url, device=device, chunk_size=8 * BLOCK, page=(8, 256), layers=8, blocks=512)
        yield one
        one.close()


def test_blocks_come_back_byte_for_byte(worker):
    rng = np.random.default_rng(1)
    ids = rng.permutation(np.arange(1, 512, dtype=np.int32))
    source, target = ids[:200], ids[200:400]
    keys = secrets.token_bytes(16 * len(source))
    for first in range(0, 200, 20):  # chunks of eight blocks, computed twenty at a time
        worker.save(source[first : first + 20], keys[16 * first : 16 * (first + 20)], first)
    assert worker.stored()
    assert worker.fetch(keys) == 25
    task = worker.load(target)
    assert task.error is None
    for before, after in zip(worker.blocks(source), worker.blocks(target), strict=True):
        assert torch.equal(before, after)


def test_a_load_leaves_alone_what_vllm_has_itself(worker):
    ids = np.arange(1, 33, dtype=np.int32)
    keys = secrets.token_bytes(16 * len(ids))
    worker.save(ids, keys)
    assert worker.stored()
    assert worker.fetch(keys) == 4
    target = np.arange(101, 133, dtype=np.int32)
    before = worker.blocks(target)
    assert worker.load(target[11:], first=11).error is None
    for source, kept, after in zip(worker.blocks(ids), before, worker.blocks(target), strict=True):
        assert torch.equal(after[11:], source[11:])
        assert torch.equal(after[:11], kept[:11])


def test_what_the_model_writes_before_a_save_is_saved(worker):
    """The save comes behind a kernel that has not run yet."""
    ids = np.arange(1, 9, dtype=np.int32)
    keys = secrets.token_bytes(16 * len(ids))
    torch.cuda._sleep(200_000_000)
    for cache in worker.caches.values():
        cache[1:9] = 3.0
    worker.save(ids, keys)
    assert worker.stored()
    assert worker.fetch(keys) == 1
    target = ids + np.int32(100)
    assert worker.load(target).error is None
    for cache in worker.caches.values():
        assert bool((cache[101:109] == 3.0).all())
