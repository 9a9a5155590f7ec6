"""Worker halves of PyNcclConnector over KV caches of random bytes, without vLLM, and loads between them."""

from __future__ import annotations

import time

from kvsdk.config import parse_options
from kvsdk.connector.interface import CacheGeometry, Context
from kvsdk.connector.tasks import LoadOrder, LoadTask
from kvsdk.connectors.pynccl import PyNcclWorker
from kvsdk.connectors.pynccl.protocol import Source

SECONDS = 10.0
"""That a load has."""


def worker_half(role, cache, worker=PyNcclWorker, **options):
    """A new half of a server with this `kv_role`, around a cache of `support.caches`."""
    layout = cache.layout()
    config = {"kv_connector": "PyNcclConnector", "kv_role": role, "kv_connector_extra_config": options}
    geometry = CacheGeometry(cache.block_size, cache.num_blocks, layout.block_bytes)
    half = worker(Context(parse_options(config), role, 0, 1, {}, geometry))
    half.register(cache.tensors, layout)
    return half


def begin_load(producer, consumer, hold, into, first=0):
    """Have the consumer load an offer's blocks, from block `first` on, into these of its own; returns the task."""
    source = Source((producer.handshake()["address"],), hold)
    tokens = (first + len(into)) * consumer.context.cache.block_size
    task = LoadTask(LoadOrder(1, "r", (into,), first, tokens, source, SECONDS), time.monotonic() + SECONDS)
    consumer.load(task)
    return task


def ended(task):
    """Wait until it has, and return it."""
    until = time.monotonic() + SECONDS + 3
    while not task.ended:
        assert time.monotonic() < until
        time.sleep(1e-4)
    return task
