"""vLLM's own scheduler, block manager and connector factory around a stand-in for the model.

The stand-in writes bytes into the KV cache that depend on the token, its position, the layer, the rank and every token
before it, and checks every byte that attention would have read. So a block that was not loaded, loaded wrongly, or
given away too early shows as a `WrongBytes`. Any number of engines run in one process, each stepped by hand.

It proves what a scheduler can show. It says nothing about a GPU's streams, about NCCL, or about speed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import itertools
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

VOCABULARY = 997
HEADS, CONTENT = 2, 4  # per token and layer: a (HEADS, CONTENT) tile of float32

_MASK = (1 << 64) - 1


class WrongBytes(AssertionError):
    """The stand-in model read KV that it had not been meant to read: not computed, not loaded, or overwritten."""


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def chain(tokens: Sequence[int], salt: int = 0, start: int = 0) -> list[int]:
    """One 64-bit number a token, which depends on every token up to it."""
    state, out = start or _mix(salt), []
    for token in tokens:
        state = _mix(state ^ (token + 1))
        out.append(state)
    return out


def next_token(state: int) -> int:
    """The stand-in's greedy answer to a context whose last number is `state`."""
    return state % VOCABULARY


def content(states: Sequence[int], layer: int, rank: int) -> np.ndarray:
    """int32 array (tokens, HEADS, CONTENT): the KV that the stand-in writes for tokens with these chain numbers."""
    base = np.asarray(states, np.uint64)[:, None] + np.uint64(1 + layer * 1000003 + rank * 7919)
    words = (base * np.arange(3, 3 + 2 * HEADS * CONTENT, 2, dtype=np.uint64)) >> np.uint64(17)
    return words.astype(np.uint32).view(np.int32).reshape(len(states), HEADS, CONTENT)


@functools.cache
def _model_folder() -> str:
    folder = tempfile.TemporaryDirectory(prefix="kvsdk-harness-")
    _keep.append(folder)
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 1024,
        "max_position_embeddings": 65536,
        "torch_dtype": "float32",
    }
    pathlib.Path(folder.name, "config.json").write_text(json.dumps(shape))
    return folder.name


_keep: list[Any] = []


@functools.cache
def _model_config(max_model_len: int) -> ModelConfig:
    return ModelConfig(
        model=_model_folder(),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=max_model_len,
        enforce_eager=True,
    )


def _accepted(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that this release's function takes."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in names}


@dataclasses.dataclass
class _Running:
    """What a model runner remembers of a request."""

    tokens: list[int]
    states: list[int]
    tables: list[list[int]]
    num_prompt: int

    def cut(self, count: int) -> None:
        """Forget tokens past `count`: vLLM dropped what was sampled for a request that it preempted or recomputes."""
        del self.tokens[count:], self.states[count:]


class Worker:
    """One tensor-parallel rank: a KV cache, a worker-role connector, and the stand-in model.

    Attributes:
        kv_caches: layer name to float32 tensor (num_blocks, HEADS, block_size, CONTENT), as vLLM registers them.
        connector: vLLM's worker-role connector.
    """

    def __init__(
        self, config: VllmConfig, kv_cache_config: KVCacheConfig, rank: int, runner: int, salt_of: Callable[[str], int]
    ):
        self.rank, self._runner, self._salt_of = rank, runner, salt_of
        self._block_size = config.cache_config.block_size
        config.parallel_config.rank = rank
        self.connector = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, kv_cache_config)
        shape = (kv_cache_config.num_blocks, HEADS, self._block_size, CONTENT)
        layers = kv_cache_config.kv_cache_groups[0].layer_names
        self.kv_caches = {name: torch.zeros(shape, dtype=torch.float32) for name in layers}
        # (layers, blocks, heads, tokens, content) int32 views of the same memory
        self.words = [cache.numpy().view(np.int32) for cache in self.kv_caches.values()]
        self.connector.register_kv_caches(self.kv_caches)
        self._requests: dict[str, _Running] = {}

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """One step, with the connector's hooks in the order in which this release of vLLM calls them."""
        connector = self.connector
        report = KVConnectorOutput()
        metadata = output.kv_connector_metadata
        assert metadata is not None
        connector.handle_preemptions(metadata)
        connector.bind_connector_metadata(metadata)
        after_forward = hasattr(output, "has_sync_kv_loads") and not output.has_sync_kv_loads
        if not after_forward:
            connector.start_load_kv(None)
        sampled = self._forward(output)
        if after_forward:
            connector.start_load_kv(None)
        if output.total_num_scheduled_tokens or hasattr(
            connector, "get_mem_pool_context"
        ):  # 0.31 on: in empty steps, too
            connector.wait_for_save()
        if hasattr(connector, "get_transfer_results"):
            results = connector.get_transfer_results(output.finished_req_ids)
            report.finished_sending, report.finished_recving = results.finished_sending, results.finished_recving
            report.failed_recving = results.failed_recving
        else:
            report.finished_sending, report.finished_recving = connector.get_finished(output.finished_req_ids)
        report.invalid_block_ids = connector.get_block_ids_with_load_errors()
        report.kv_connector_stats = connector.get_kv_connector_stats()
        report.kv_cache_events = connector.get_kv_connector_kv_cache_events()
        report.kv_connector_worker_meta = connector.build_connector_worker_meta()
        connector.clear_connector_metadata()
        ids = list(sampled)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=[sampled[request_id] for request_id in ids],
            kv_connector_output=report,
        )

    def _forward(self, output: SchedulerOutput) -> dict[str, list[int]]:
        for request_id in output.finished_req_ids:
            self._requests.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            tokens = list(new.prefill_token_ids if self._runner == 2 else new.prompt_token_ids)
            self._requests[new.req_id] = _Running(
                tokens, [], [list(ids) for ids in new.block_ids], len(new.prompt_token_ids)
            )
        cached = output.scheduled_cached_reqs
        for request_id, blocks, num_output in zip(
            cached.req_ids, cached.new_block_ids, cached.num_output_tokens, strict=True
        ):
            running = self._requests[request_id]
            running.cut(running.num_prompt + num_output)
            if request_id in cached.resumed_req_ids:
                running.tables = [list(ids) for ids in blocks]
            elif blocks is not None:
                for ids, more in zip(running.tables, blocks, strict=True):
                    ids.extend(more)
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        sampled: dict[str, list[int]] = {}
        for request_id, count in output.num_scheduled_tokens.items():
            running, start = self._requests[request_id], computed[request_id]
            self._extend(request_id, running)
            end = start + count
            self._check(request_id, running, start)
            self._write(running, start, end)
            sampled[request_id] = []
            if end >= len(running.tokens):
                token = next_token(running.states[end - 1])
                running.tokens = [*running.tokens[:end], token]
                sampled[request_id] = [token]
        return sampled

    def _extend(self, request_id: str, running: _Running) -> None:
        missing = running.tokens[len(running.states) :]
        if missing:
            running.states += chain(missing, self._salt_of(request_id), running.states[-1] if running.states else 0)

    def _slots(self, running: _Running, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(start, end)
        table = np.asarray(running.tables[0], np.int64)
        return table[positions // self._block_size], positions % self._block_size

    def _check(self, request_id: str, running: _Running, count: int) -> None:
        if not count:
            return
        blocks, offsets = self._slots(running, 0, count)
        for layer, words in enumerate(self.words):
            seen = words[blocks, :, offsets, :]
            wanted = content(running.states[:count], layer, self.rank)
            if not np.array_equal(seen, wanted):
                position = int(np.flatnonzero((seen != wanted).any(axis=(1, 2)))[0])
                raise WrongBytes(
                    f"rank {self.rank}, request {request_id}: wrong KV at position {position} of {count} "
                    f"(block {blocks[position]}, slot {offsets[position]}, layer {layer})"
                )

    def _write(self, running: _Running, start: int, end: int) -> None:
        blocks, offsets = self._slots(running, start, end)
        for layer, words in enumerate(self.words):
            words[blocks, :, offsets, :] = content(running.states[start:end], layer, self.rank)


class Engine:
    """One vLLM engine: the real scheduler, `world_size` stand-in workers, stepped by `step`.

    Args:
        kv_transfer_config: fields of vLLM's `KVTransferConfig`.
        num_blocks: blocks in the pool, the null block included.
        async_scheduling: vLLM's `AsyncScheduler` with two steps in flight, CUDA's default.
        model_runner: 1 or 2: how a resumed request is presented to workers.
    """

    def __init__(
        self,
        kv_transfer_config: Mapping[str, Any],
        *,
        num_blocks: int = 64,
        block_size: int = 16,
        max_num_batched_tokens: int = 64,
        max_num_seqs: int = 8,
        max_model_len: int = 4096,
        layers: int = 2,
        world_size: int = 1,
        async_scheduling: bool = False,
        model_runner: int = 1,
        prefix_caching: bool = True,
    ):
        scheduler_values = dict(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            async_scheduling=async_scheduling,
        )
        self.config = VllmConfig(
            model_config=_model_config(max_model_len),
            cache_config=CacheConfig(block_size=block_size, enable_prefix_caching=prefix_caching),
            scheduler_config=SchedulerConfig(**scheduler_values),
            parallel_config=ParallelConfig(tensor_parallel_size=world_size),
            device_config=DeviceConfig("cpu"),
            kv_transfer_config=KVTransferConfig(**kv_transfer_config),
        )
        self.config.cache_config.num_gpu_blocks = num_blocks
        self.block_size, self.num_blocks = block_size, num_blocks
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=HEADS, head_size=CONTENT // 2, dtype=torch.float32)
        names = [f"model.layers.{i}.self_attn.attn" for i in range(layers)]
        self.kv_cache_config = KVCacheConfig(
            num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)]
        )
        self._salts: dict[str, int] = {}
        salt_of = lambda request_id: self._salts.get(request_id, 0)  # noqa: E731
        self.workers = [
            Worker(self.config, self.kv_cache_config, rank, model_runner, salt_of) for rank in range(world_size)
        ]
        self.config.parallel_config.rank = 0
        values = dict(
            vllm_config=self.config,
            kv_cache_config=self.kv_cache_config,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=block_size,
            hash_block_size=block_size,
            log_stats=True,
        )
        kind = AsyncScheduler if async_scheduling else Scheduler
        self.scheduler = kind(**_accepted(Scheduler.__init__, values))
        self.scheduler.use_v2_model_runner = model_runner == 2
        self.connector = self.scheduler.connector
        handshakes = {(0, worker.rank): worker.connector.get_handshake_metadata() for worker in self.workers}
        self.connector.set_xfer_handshake_metadata_pp_aware(
            {key: value for key, value in handshakes.items() if value is not None}
        )
        self._aggregator = KVOutputAggregator.from_connector(self.connector, world_size)
        hash_fn = get_hash_fn_by_name("sha256")
        init_none_hash(hash_fn)
        self._hasher = get_request_block_hasher(block_size, hash_fn)
        self._in_flight: collections.deque[tuple[SchedulerOutput, ModelRunnerOutput]] = collections.deque()
        self._depth = 2 if async_scheduling else 1
        self.outputs: dict[str, list[int]] = {}
        self.finish_reasons: dict[str, str] = {}
        self.params: dict[str, dict[str, Any] | None] = {}
        self.hits: dict[str, tuple[int, int]] = {}
        self.stats: collections.Counter[str] = collections.Counter()
        self._lengths: dict[str, int] = {}
        self._free_at_start = self.num_free_blocks

    # ---- requests

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        max_tokens: int = 1,
        params: Mapping[str, Any] | None = None,
        salt: str | None = None,
        ignore_eos: bool = True,
        **more: Any,
    ) -> Request:
        """Add a request; its answer collects in `outputs[request_id]`."""
        extra = {"kv_transfer_params": dict(params)} if params is not None else None
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos, extra_args=extra, **more
        )
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=sampling,
            pooling_params=None,
            cache_salt=salt,
            block_hasher=self._hasher,
        )
        if salt is not None:
            self._salts[request_id] = sum(salt.encode())
        self.outputs[request_id] = []
        self._lengths[request_id] = len(prompt)
        self.scheduler.add_request(request)
        return request

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.finish_reasons.setdefault(request_id, "abort")

    def expected(self, prompt: Sequence[int], max_tokens: int, salt: str | None = None) -> list[int]:
        """What the stand-in answers when nothing goes wrong."""
        tokens = list(prompt)
        states = chain(tokens, sum(salt.encode()) if salt is not None else 0)
        out: list[int] = []
        for _ in range(max_tokens):
            out.append(next_token(states[-1]))
            states += chain(out[-1:], start=states[-1])
        return out

    # ---- steps

    def step(self) -> bool:
        """One step of the engine's loop; False when it would sleep."""
        if not self.scheduler.has_requests() and not self._in_flight:
            return False
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self._note_hits(output)
            self._in_flight.append((output, self._execute(output)))
            if len(self._in_flight) < self._depth and output.total_num_scheduled_tokens:
                return True
        self._update()
        return True

    def _execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        outputs = [worker.execute(output) for worker in self.workers]
        combined = self._aggregator.aggregate(outputs, 0) if len(outputs) > 1 else outputs[0]
        assert combined is not None
        report = combined.kv_connector_output
        if report is not None and report.kv_connector_stats is not None:
            self.stats.update(report.kv_connector_stats.data)
        return combined

    def _update(self) -> None:
        scheduler_output, model_output = self._in_flight.popleft()
        for client in self.scheduler.update_from_output(scheduler_output, model_output).values():
            for one in client.outputs:
                self.outputs[one.request_id] += one.new_token_ids
                if one.finish_reason is not None:
                    self.finish_reasons[one.request_id] = str(one.finish_reason)
                    self.params[one.request_id] = one.kv_transfer_params

    def _note_hits(self, output: SchedulerOutput) -> None:
        for new in output.scheduled_new_reqs:
            self.hits.setdefault(new.req_id, (new.num_computed_tokens, self._lengths[new.req_id]))

    def run(self, *, until: Callable[[], bool] | None = None, max_steps: int = 20000, pause: float = 0.0) -> int:
        """Step until every request ended and nothing is held back (or `until`); returns the steps it took."""
        import time

        for count in itertools.count(1):
            if until is not None and until():
                return count
            if not self.step() and until is None:
                return count
            if count >= max_steps:
                raise AssertionError(f"not at rest after {max_steps} steps: {list(self.scheduler.requests)}")
            if pause:
                time.sleep(pause)
        raise AssertionError("unreachable")

    # ---- what is seen

    @property
    def num_free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def unfinished(self) -> list[str]:
        return [id for id, request in self.scheduler.requests.items() if not request.is_finished()]

    def check_at_rest(self) -> None:
        """Every request has ended and the pool has its size again."""
        assert not self.scheduler.requests, f"requests remain: {list(self.scheduler.requests)}"
        assert self.num_free_blocks == self._free_at_start, (
            f"{self._free_at_start - self.num_free_blocks} blocks are not back"
        )

    def close(self) -> None:
        self.connector.shutdown()
        for worker in self.workers:
            worker.connector.shutdown()
