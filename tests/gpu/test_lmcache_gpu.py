"""LMCacheConnector on GPUs: blocks go to a server and come back byte for byte; the example on two, or on one."""

import pathlib
import re
import secrets
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.lm_server import LMServer
from support.lm_worker import BLOCK, Worker
from support.lmcache_servers import needs_lmcache

from benchmarks.lmcache_gpu import make_llama_8b_shape
from kvsdk.demo.models import make_llama_1b

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("no_thread_left"),
]

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples/disaggregated_prefill_lmcache.py"


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
        worker.save(source[first : first + 20], keys[16 * first : 16 * (first + 20)], first, of=200)
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


@needs_lmcache
@pytest.mark.timeout(1200)
def test_the_example_with_a_model_of_the_shape_of_an_8b(tmp_path):
    """Dummy weights prove no token; that every whole chunk came from the server is what this shows."""
    model = make_llama_8b_shape(tmp_path / "model")
    command = [sys.executable, str(EXAMPLE), "--model", str(model), "--load-format", "dummy", "--prompt-tokens", "4000"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1100, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = re.findall(r"^(\d+) of (\d+) prompt tokens were not computed again", ran.stdout, re.MULTILINE)
    assert [int(cached) for cached, _ in found] == [int(total) // 256 * 256 for _, total in found]
    assert len(found) == 2


@needs_lmcache
@pytest.mark.timeout(1200)
def test_the_example_with_a_model_whose_answers_depend_on_its_context(tmp_path):
    model = make_llama_1b(tmp_path / "model", device="cuda:0")
    torch.cuda.empty_cache()
    command = [sys.executable, str(EXAMPLE), "--model", str(model), "--prompt-tokens", "4000", "--compare"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1100, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "the same tokens as without a connector" in ran.stdout
