"""vLLM's offloading connectors with copies that a CPU can do, and a connector that subclasses vLLM's base directly.

`OffloadingConnector` and `SimpleCPUOffloadConnector` copy by CUDA streams. What decides what is copied when, and which
blocks may be used again, is in their scheduler halves, which run here unchanged. Only the copies are replaced: each
reads and writes all of its bytes at the latest moment at which it may, after a random number of polls.
"""

from __future__ import annotations

import dataclasses
import random
import types
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.kv_transfer.kv_connector.v1.simple_cpu_offload_connector import SimpleCPUOffloadConnector
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.request import RequestStatus
from vllm.v1.simple_kv_offload import worker as simple_worker
from vllm.v1.simple_kv_offload.worker import SimpleCPUOffloadWorker

MOST_POLLS = 4


class LateCopy:
    """A copy that happens when it is polled for the last time, or waited for."""

    def __init__(self, copy: Callable[[], None], rng: random.Random):
        self._copy: Callable[[], None] | None = copy
        self._polls = rng.randint(0, MOST_POLLS)

    def query(self) -> bool:
        self._polls -= 1
        if self._polls < 0:
            self.synchronize()
        return self._copy is None

    def synchronize(self) -> None:
        if self._copy is not None:
            self._copy()
            self._copy = None


class LateWorker(OffloadingWorker):
    """The worker half of an `OffloadingSpec`: a queue a direction, as the CUDA one has a stream a direction."""

    def __init__(self, kv_caches: Any, num_chunks: int, blocks_per_chunk: int, rng: random.Random):
        self._blocks_per_chunk, self._rng = blocks_per_chunk, rng
        self._caches = [one.tensor for one in kv_caches.tensors]
        self._chunks = [
            torch.zeros((num_chunks, blocks_per_chunk, cache.shape[1]), dtype=cache.dtype) for cache in self._caches
        ]
        self._queues: tuple[dict[int, LateCopy], dict[int, LateCopy]] = ({}, {})

    def _places(self, gpu: Any, chunks: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (first,) = gpu.block_indices
        logical = first + np.arange(len(gpu.block_ids))
        factor = self._blocks_per_chunk
        chunk = np.asarray(chunks.block_ids)[logical // factor - first // factor]
        return torch.from_numpy(np.asarray(gpu.block_ids)), torch.from_numpy(chunk), torch.from_numpy(logical % factor)

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        blocks, chunks, slots = self._places(src_spec, dst_spec)

        def copy() -> None:
            for cache, kept in zip(self._caches, self._chunks, strict=True):
                kept[chunks, slots] = cache[blocks]

        self._queues[0][job_id] = LateCopy(copy, self._rng)
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        blocks, chunks, slots = self._places(dst_spec, src_spec)

        def copy() -> None:
            for cache, kept in zip(self._caches, self._chunks, strict=True):
                cache[blocks] = kept[chunks, slots]

        self._queues[1][job_id] = LateCopy(copy, self._rng)
        return True

    def get_finished(self) -> list[TransferResult]:
        ended = []
        for queue in self._queues:
            while queue and next(iter(queue.values())).query():
                ended.append(TransferResult(next(iter(queue)), True))
                del queue[ended[-1].job_id]
        return ended

    def wait(self, job_ids: set[int]) -> None:
        for queue in self._queues:
            last = max((i for i, job_id in enumerate(queue) if job_id in job_ids), default=-1)
            for copy in list(queue.values())[: last + 1]:
                copy.synchronize()


class LateSpec(CPUOffloadingSpec):
    """vLLM's own manager of CPU blocks; give it as `spec_name`, and this module as `spec_module_path`."""

    def get_worker(self, kv_caches: Any) -> LateWorker:
        rng = random.Random(self.extra_config.get("seed", 0))
        num_chunks = self.num_chunks if hasattr(self, "num_chunks") else self.num_blocks  # 0.26: the older name
        return LateWorker(kv_caches, num_chunks, self.blocks_per_chunk, rng)


class _Stream:
    """Stands for CUDA's events and streams, which `SimpleCPUOffloadWorker` names when it saves."""

    def record(self, stream: _Stream) -> None:
        """What is computed on a CPU has been computed."""


simple_worker.torch = types.SimpleNamespace(Event=_Stream, cuda=types.SimpleNamespace(current_stream=_Stream))


class _LateBackend:
    """Stands for vLLM's thread of `cuMemcpyBatchAsync`."""

    def __init__(self, caches: list[torch.Tensor], kept: list[torch.Tensor], rng: random.Random):
        self._caches, self._kept, self._rng = caches, kept, rng

    def launch_copy(
        self,
        src_blocks: list[int],
        dst_blocks: list[int],
        is_store: bool,
        event_idx: int,
        events_list: list[Any],
        wait_event: Any = None,
    ) -> None:
        sources, targets = (self._caches, self._kept) if is_store else (self._kept, self._caches)

        def copy() -> None:
            for source, target in zip(sources, targets, strict=True):
                target[dst_blocks] = source[src_blocks]

        events_list.append((event_idx, LateCopy(copy, self._rng)))


class LateSimpleWorker(SimpleCPUOffloadWorker):
    """When copies start, are polled and flushed is vLLM's; the places of blocks and the copies are not."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        caches = [cache.view(cache.shape[0], -1) for cache in kv_caches.values()]
        block_bytes = sum(cache.shape[1] * cache.element_size() for cache in caches)
        self.num_cpu_blocks = max(1, self.cpu_capacity_bytes // block_bytes)
        kept = [torch.zeros((self.num_cpu_blocks, cache.shape[1]), dtype=cache.dtype) for cache in caches]
        rng = random.Random(self.vllm_config.kv_transfer_config.kv_connector_extra_config.get("seed", 0))
        self._backend = _LateBackend(caches, kept, rng)


class SimpleOffload(SimpleCPUOffloadConnector):
    """`SimpleCPUOffloadConnector` with copies of a CPU."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        if self.worker_handler is not None:
            capacity = self.worker_handler.cpu_capacity_bytes
            self.worker_handler = LateSimpleWorker(vllm_config, kv_cache_config, capacity)


@dataclasses.dataclass
class DirectMetadata(KVConnectorMetadata):
    """By request id: block ids, and the hash of each block's content."""

    loads: dict[str, tuple[list[int], list[bytes]]]
    saves: dict[str, tuple[list[int], list[bytes]]]


class Direct(KVConnectorBase_V1):
    """Loads asynchronously, delays the free of what it saves, and fails every `fail_every`-th load."""

    stored: ClassVar[dict[tuple[int, bytes], list[torch.Tensor]]] = {}
    hooks: ClassVar[list[str]] = []

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._synchronous = extra.get("synchronous", False)
        self._fail_every = extra.get("fail_every", 0)
        self._rng = random.Random(extra.get("seed", 0))
        self._rank, self._block_size = vllm_config.parallel_config.rank, vllm_config.cache_config.block_size
        self._orders = DirectMetadata({}, {})
        self._given_up: set[str] = set()
        self._first: dict[str, int] = {}
        self._destinations: dict[str, set[int]] = {}
        self._bad_blocks: set[int] = set()
        self._copies: tuple[dict[str, LateCopy], dict[str, LateCopy]] = ({}, {})
        self._num_loads = 0

    # ---- scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        first = last = num_computed_tokens // self._block_size
        most = (request.num_tokens - 1) // self._block_size
        while last < most and (0, request.block_hashes[last]) in self.stored:
            last += 1
        if request.request_id in self._given_up or last == first:
            return 0, False
        self._first[request.request_id] = first
        return (last - first) * self._block_size, not self._synchronous

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            (ids,) = blocks.get_block_ids()
            first = self._first[request.request_id]
            last = first + num_external_tokens // self._block_size
            self._orders.loads[request.request_id] = (ids[first:last], request.block_hashes[first:last])
            self._destinations[request.request_id] = set(ids[first:last])

    def build_connector_meta(self, scheduler_output: Any) -> DirectMetadata:
        orders, self._orders = self._orders, DirectMetadata({}, {})
        return orders

    def update_connector_output(self, connector_output: Any) -> None:
        self._given_up |= set(getattr(connector_output, "failed_recving", None) or ())
        for name in connector_output.finished_recving or ():
            if not self._destinations.pop(name, set()).isdisjoint(connector_output.invalid_block_ids):
                self._given_up.add(name)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        full = request.num_computed_tokens // self._block_size
        if not full or request.status == RequestStatus.FINISHED_ABORTED:
            return False, None
        hashes = request.block_hashes[:full]
        self._orders.saves[request.request_id] = (block_ids[: len(hashes)], hashes)
        return True, None

    # ---- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._caches = list(kv_caches.values())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.hooks.append("start_load_kv")
        orders = self._get_connector_metadata()
        for request_id, (ids, hashes) in orders.loads.items():
            self._num_loads += 1
            if self._fail_every and self._num_loads % self._fail_every == 0:
                self._given_up.add(request_id)
                self._destinations[request_id] = set(ids)
            self._copies[0][request_id] = copy = LateCopy(self._read(ids, hashes), self._rng)
            if self._synchronous:
                copy.synchronize()
                del self._copies[0][request_id]
        for request_id, (ids, hashes) in orders.saves.items():
            self._copies[1][request_id] = LateCopy(self._write(ids, hashes), self._rng)

    def _read(self, ids: list[int], hashes: list[bytes]) -> Callable[[], None]:
        def copy() -> None:
            for block_id, key in zip(ids, hashes, strict=True):
                for cache, kept in zip(self._caches, self.stored[self._rank, key], strict=True):
                    cache[block_id] = kept

        return copy

    def _write(self, ids: list[int], hashes: list[bytes]) -> Callable[[], None]:
        def copy() -> None:
            for block_id, key in zip(ids, hashes, strict=True):
                self.stored[self._rank, key] = [cache[block_id].clone() for cache in self._caches]

        return copy

    def wait_for_layer_load(self, layer_name: str) -> None:
        self.hooks.append("wait_for_layer_load")

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        self.hooks.append("save_kv_layer")

    def wait_for_save(self) -> None:
        self.hooks.append("wait_for_save")

    def _ended(self) -> tuple[set[str], set[str], set[str]]:
        """Request ids of saves, loads and failed loads."""
        loads, saves = ({name for name, copy in copies.items() if copy.query()} for copies in self._copies)
        for copies, ended in zip(self._copies, (loads, saves), strict=True):
            for name in ended:
                del copies[name]
        failed = loads & self._given_up
        self._given_up -= failed
        return saves, loads - failed, failed

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        saves, loads, failed = self._ended()
        self._bad_blocks |= set().union(*(self._destinations.pop(name) for name in failed))
        return saves, loads | failed

    def get_block_ids_with_load_errors(self) -> set[int]:
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

        saves, loads, failed = self._ended()
        return KVConnectorTransferResults(
            finished_sending=saves, finished_recving=loads | failed, failed_recving=failed
        )
