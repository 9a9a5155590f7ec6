"""The worker half: serves offered blocks to other workers, and loads theirs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from kvsdk.connector.counters import Counters
from kvsdk.connector.interface import BlockIds, ConsumerWorker, Context, ProducerWorker
from kvsdk.connector.tasks import LoadTask
from kvsdk.connectors.pynccl.fetching import Fetcher
from kvsdk.connectors.pynccl.protocol import SLOTS, STAGING_BYTES, Source, bind_address, chunk_blocks
from kvsdk.connectors.pynccl.serving import Digester, Offers, Streams, WorkerServer
from kvsdk.kernels import BlockStore
from kvsdk.layout import CacheLayout
from kvsdk.pipe import Pipe, PipeHost, choose, join, prepare_process

logger = logging.getLogger("kvsdk.pynccl")


class PyNcclWorker(ProducerWorker, ConsumerWorker):
    """Sends the blocks of its server's offers and loads other servers' into its KV cache."""

    def __init__(self, context: Context):
        super().__init__(context)
        self._offers = Offers()
        self._server: WorkerServer | None = None
        self._digester: Digester | None = None
        self._fetchers: dict[str, Fetcher] = {}
        self._store: BlockStore | None = None
        self._counters = Counters()

    def register(self, kv_caches: dict[str, torch.Tensor], layout: CacheLayout) -> None:
        options = self.context.options
        self._layout, self._store = layout, BlockStore(kv_caches, layout, max_sms=options.max_sms)
        self._device = self._store.device
        self._streams = Streams(self._device)
        self._kinds = self.pipe_kinds()
        prepare_process(self._device.type)
        self._staging_bytes = options.staging_bytes or STAGING_BYTES[self._device.type]
        self._slot_bytes = self._store.staging_bytes(chunk_blocks(self._staging_bytes, layout.block_bytes))
        logger.info("moves KV blocks over %s (%s)", " or ".join(self._kinds), self._device)
        if options.produces:
            if options.verify:
                self._digester = Digester(self._store, self._offers, self._streams)
            self._server = WorkerServer(
                self._store,
                self._offers,
                kinds=self._kinds,
                make_host=self.make_host,
                bind_ip=bind_address(options.kv_ip),
                staging_bytes=self._staging_bytes,
                streams=self._streams,
                verify=options.verify,
                counters=self._counters,
            )

    def pipe_kinds(self) -> tuple[str, ...]:
        """Of the pairs that this worker makes, the best one first."""
        return choose(self.context.options.pipe, self._device.type)

    def make_host(self, kind: str) -> PipeHost:
        """The producer's end of a new pair."""
        options = self.context.options
        return PipeHost(
            kind,
            bind_address(options.kv_ip),
            self._device,
            max_ctas=options.nccl_max_ctas,
            num_slots=SLOTS,
            slot_bytes=self._slot_bytes,
        )

    def join(self, invite: dict[str, Any], bind_ip: str, deadline: float, wanted: Callable[[], None]) -> Pipe:
        """The consumer's end of a pair."""
        slots = {"num_slots": SLOTS, "slot_bytes": self._slot_bytes}
        return join(invite, self._device, bind_ip, deadline, **slots, wanted=wanted)

    def handshake(self) -> dict[str, Any]:
        return {
            "address": self._server.address if self._server is not None else "",
            "layout": self._layout.fingerprint(),
            "pipes": list(self._kinds),
        }

    # ---- producer

    def kept(self, hold_id: str, blocks: BlockIds) -> None:
        offer = self._offers.add(hold_id, blocks[0])
        if self._digester is not None:
            self._digester.add(offer, 0, blocks[0], None)

    def grew(self, hold_id: str, first_block: int, blocks: BlockIds, num_blocks: int, fence: Any) -> None:
        offer = self._offers.grow(hold_id, blocks[0], num_blocks, fence)
        if self._digester is not None:
            self._digester.add(offer, first_block, blocks[0], fence)

    def let_go(self, hold_id: str) -> None:
        self._offers.end(hold_id)

    # ---- consumer

    def load(self, task: LoadTask) -> None:
        source: Source = task.source
        address = source.addresses[self.context.rank]
        fetcher = self._fetchers.get(address)
        if fetcher is None or not fetcher.load(task):
            assert self._store is not None
            self._fetchers = {known: one for known, one in self._fetchers.items() if not one.ended}
            fetcher = self._fetchers[address] = Fetcher(
                address,
                self._store,
                kinds=self._kinds,
                join=self.join,
                staging_bytes=self._staging_bytes,
                streams=self._streams,
                verify=self.context.options.verify,
                counters=self._counters,
            )
            fetcher.load(task)

    # ---- both

    def take_counters(self) -> dict[str, float]:
        return self._counters.take()

    def close(self) -> None:
        deadline = time.monotonic() + self.context.options.close_timeout
        self._offers.close()
        for fetcher in self._fetchers.values():
            fetcher.stop()
        if self._digester is not None:
            self._digester.stop()
        if self._server is not None:
            self._server.close(self.context.options.close_timeout)
        if self._digester is not None:
            self._digester.join(deadline)
        for fetcher in self._fetchers.values():
            fetcher.join(deadline)
