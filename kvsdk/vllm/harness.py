"""vLLM's own scheduler, block manager and connector factory around a stand-in for the model.

The stand-in writes bytes into the KV cache that depend on the token, its position, the layer, the rank and every token
before it, and checks every byte that attention would have read. So a block that was not loaded, loaded wrongly, or
given away too early shows as a `WrongBytes`. Any number of engines run in one process, each stepped by hand.

It proves what a scheduler can show. It says nothing about a GPU's streams, about NCCL, or about speed.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import json
import logging
import math
import pathlib
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator, copy_kv_blocks
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MLAAttentionSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvsdk.vllm.audit import Audit
from kvsdk.vllm.binding import CLOCK

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
    model = pathlib.Path(folder.name, "stand-in")  # engines of several processes compare the model's name
    model.mkdir()
    (model / "config.json").write_text(json.dumps(shape))
    return str(model)


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


def _place(config: VllmConfig, groups: list[KVCacheGroupSpec], num_blocks: int) -> KVCacheConfig:
    """Have vLLM say where the blocks of each layer lie, as its engine does at start."""
    try:
        from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups  # 0.33 on
    except ImportError:
        from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
    if hasattr(config.cache_config, "get_resolved_kv_cache_layout"):  # 0.29 on; the layout is the one of CPUs
        config.cache_config.kv_cache_layout = "LBHNC"
    page = groups[0].kv_cache_spec.page_size_bytes * len(groups[0].layer_names)
    return get_kv_cache_config_from_groups(config, groups, page * num_blocks)


def _allocate(config: KVCacheConfig, block_size: int, mla: bool) -> dict[str, torch.Tensor]:
    """Layer name to float32 tensor: one allocation for all layers from 0.29 on.

    Of shape (blocks, HEADS, block_size, CONTENT), or (blocks, block_size, HEADS * CONTENT) for latent attention, which
    has one head and tokens in a row.
    """
    shape = (config.num_blocks, HEADS, block_size, CONTENT)
    if mla:
        shape = (config.num_blocks, block_size, HEADS * CONTENT)
    caches: dict[str, torch.Tensor] = {}
    for tensor in config.kv_cache_tensors:
        memory = torch.zeros(tensor.size // 4, dtype=torch.float32)
        names = tensor.layers if hasattr(tensor, "layers") else tensor.shared_by
        for i, name in enumerate(names):
            start = (tensor.offset + i * getattr(tensor, "layer_stride", 0)) // 4
            caches[name] = memory[start : start + math.prod(shape)].view(shape)
    return caches


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep vLLM's warnings, the same for every engine, from the log: they would bury what a connector says."""
    # Not of the logger `vllm` itself: kvsdk's loggers take their level from it.
    before = {
        name: logging.getLogger(name).level for name in ("vllm.config", "vllm.distributed", "vllm.platforms", "vllm.v1")
    }
    for name in before:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


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


@dataclasses.dataclass
class _Scheduled:
    """One request's part of a step: tokens `start` to `end`; the block and slot of every token up to `end`."""

    request_id: str
    running: _Running
    start: int
    end: int
    blocks: np.ndarray
    offsets: np.ndarray


class Worker:
    """One tensor-parallel rank: a KV cache, a worker-role connector, and the stand-in model.

    Attributes:
        kv_caches: layer name to float32 tensor, as vLLM registers them; see `_allocate`.
        connector: vLLM's worker-role connector.
    """

    def __init__(
        self,
        config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        rank: int,
        runner: int,
        salt_of: Callable[[str], int],
        mla: bool,
    ):
        self.rank, self._runner, self._salt_of, self._config = rank, runner, salt_of, config
        self._block_size = config.cache_config.block_size
        config.parallel_config.rank = rank
        self.connector = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, kv_cache_config)
        self.kv_caches = _allocate(kv_cache_config, self._block_size, mla)
        # (layers, blocks, heads, tokens, content) int32 views of the same memory
        self.words = [cache.numpy().view(np.int32) for cache in self.kv_caches.values()]
        if mla:
            tiles = (-1, self._block_size, HEADS, CONTENT)
            self.words = [words.reshape(tiles).swapaxes(1, 2) for words in self.words]
        self.connector.register_kv_caches(self.kv_caches)
        self.connector.set_host_xfer_buffer_ops(copy_kv_blocks)
        self._layers = {name: types.SimpleNamespace(kv_cache=cache) for name, cache in self.kv_caches.items()}
        self._requests: dict[str, _Running] = {}

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """One step, with the connector's hooks in the order in which this release of vLLM calls them."""
        connector, metadata = self.connector, output.kv_connector_metadata
        assert metadata is not None
        batch = self._batch(output)
        connector.handle_preemptions(metadata)
        connector.bind_connector_metadata(metadata)
        # 0.29 on: only loads that this step's attention reads go before the forward.
        after_forward = hasattr(output, "has_sync_kv_loads") and not output.has_sync_kv_loads
        attention = self._attention(batch)
        with self._forward_context(attention) as context:
            if not after_forward:
                connector.start_load_kv(context, **self._load_keywords(output, batch))
            sampled = self._forward(batch, attention)
            if after_forward and self._runner == 1:
                connector.start_load_kv(context)
        if self._runner == 2:
            if hasattr(KVConnectorBase_V1, "finish_forward"):
                connector.finish_forward()
            if after_forward:
                with self._forward_context(None) as context:  # the second runner has left the forward by then
                    connector.start_load_kv(context, **self._load_keywords(output, batch))
        if batch or hasattr(KVConnectorBase_V1, "get_mem_pool_context"):  # 0.31 on: in empty steps, too
            connector.wait_for_save()
        report = self._report(output.finished_req_ids)
        connector.clear_connector_metadata()
        if not batch:
            # A copy: the aggregator writes into what it is given, and vLLM has one empty output for all.
            return copy.copy(ModelRunnerOutput.with_kv_conn_output_only(report))
        ids = list(sampled)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=[sampled[request_id] for request_id in ids],
            kv_connector_output=report,
        )

    def _report(self, finished_req_ids: set[str]) -> KVConnectorOutput:
        connector, report = self.connector, KVConnectorOutput()
        if hasattr(KVConnectorBase_V1, "get_transfer_results"):
            results = connector.get_transfer_results(finished_req_ids)
            report.finished_sending = results.finished_sending or None
            report.finished_recving = results.finished_recving or None
            report.failed_recving = results.failed_recving
        else:
            report.finished_sending, report.finished_recving = connector.get_finished(finished_req_ids)
        report.invalid_block_ids = connector.get_block_ids_with_load_errors()
        report.kv_connector_stats = connector.get_kv_connector_stats()
        report.kv_cache_events = connector.get_kv_connector_kv_cache_events()
        report.kv_connector_worker_meta = connector.build_connector_worker_meta()
        return report

    def _batch(self, output: SchedulerOutput) -> list[_Scheduled]:
        """What this step computes, after the block tables were brought up to date."""
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
        batch = []
        for request_id, count in output.num_scheduled_tokens.items():
            running, start = self._requests[request_id], computed[request_id]
            if start < 0:
                raise WrongBytes(f"request {request_id} is to be computed from position {start} on")
            self._extend(request_id, running)
            batch.append(_Scheduled(request_id, running, start, start + count, *self._slots(running, start + count)))
        return batch

    def _attention(self, batch: list[_Scheduled]) -> dict[str, types.SimpleNamespace] | None:
        """What vLLM's attention backends are told, by layer, as far as connectors look at it; None in an empty step."""
        if not batch:
            return None
        slots = [one.blocks[one.start :] * self._block_size + one.offsets[one.start :] for one in batch]
        told = types.SimpleNamespace(
            slot_mapping=torch.from_numpy(np.concatenate(slots)),
            num_actual_tokens=sum(one.end - one.start for one in batch),
        )
        return dict.fromkeys(self.kv_caches, told)

    @contextlib.contextmanager
    def _forward_context(self, attention: dict[str, types.SimpleNamespace] | None) -> Iterator[Any]:
        slots = {name: told.slot_mapping for name, told in attention.items()} if attention else None
        context = create_forward_context(attention, self._config, slot_mapping=slots)
        context.no_compile_layers = self._layers
        with override_forward_context(context):
            yield context

    def _load_keywords(self, output: SchedulerOutput, batch: list[_Scheduled]) -> dict[str, Any]:
        """What the second runner adds to `start_load_kv` from 0.30 on."""
        if self._runner == 1 or not batch or not hasattr(KVConnectorBase_V1, "finish_forward"):
            return {}
        return dict(
            scheduler_output=output,
            request_state_indices=torch.arange(len(batch), dtype=torch.int32),
            request_ids=[one.request_id for one in batch],
            num_tokens=sum(one.end - one.start for one in batch),
        )

    def _forward(
        self, batch: list[_Scheduled], attention: dict[str, types.SimpleNamespace] | None
    ) -> dict[str, list[int]]:
        # vLLM's usual backends write a layer's new KV before the connector is asked to wait for that layer, and attend
        # after: a late load must leave alone what this step computed.
        for layer, (name, cache) in enumerate(self.kv_caches.items()):
            for one in batch:
                self._write(layer, one)
            if attention is not None:
                self.connector.wait_for_layer_load(name)
            for one in batch:
                self._check(layer, one)
            if attention is not None:
                self.connector.save_kv_layer(name, cache, attention[name])
        sampled: dict[str, list[int]] = {}
        for one in batch:
            running = one.running
            sampled[one.request_id] = []
            if one.end >= len(running.tokens):
                token = next_token(running.states[one.end - 1])
                running.tokens = [*running.tokens[: one.end], token]
                sampled[one.request_id] = [token]
        return sampled

    def _extend(self, request_id: str, running: _Running) -> None:
        missing = running.tokens[len(running.states) :]
        if missing:
            running.states += chain(missing, self._salt_of(request_id), running.states[-1] if running.states else 0)

    def _slots(self, running: _Running, end: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(end)
        table = np.asarray(running.tables[0], np.int64)
        return table[positions // self._block_size], positions % self._block_size

    def _check(self, layer: int, one: _Scheduled) -> None:
        seen = self.words[layer][one.blocks, :, one.offsets, :]
        wanted = content(one.running.states[: one.end], layer, self.rank)
        if not np.array_equal(seen, wanted):
            position = int(np.flatnonzero((seen != wanted).any(axis=(1, 2)))[0])
            raise WrongBytes(
                f"rank {self.rank}, request {one.request_id}: wrong KV at position {position} of {one.end} "
                f"(block {one.blocks[position]}, slot {one.offsets[position]}, layer {layer})"
            )

    def _write(self, layer: int, one: _Scheduled) -> None:
        self.words[layer][one.blocks[one.start :], :, one.offsets[one.start :], :] = content(
            one.running.states[one.start : one.end], layer, self.rank
        )


class Engine:
    """One vLLM engine: the real scheduler, `world_size` stand-in workers, stepped by `step`.

    Args:
        kv_transfer_config: fields of vLLM's `KVTransferConfig`.
        num_blocks: blocks in the pool, the null block included.
        async_scheduling: vLLM's `AsyncScheduler` with two steps in flight, CUDA's default.
        model_runner: 1 or 2: how a resumed request is presented to workers.
        mla: the KV cache is shaped as for latent attention.
        clock: the time of the connectors made through `kvsdk.vllm.binding`, in seconds.
        audit: check after every step who may write and read each block; see `kvsdk.vllm.audit`.

    Attributes:
        outputs: tokens answered so far, by request id.
        finish_reasons: why a request ended, by request id.
        params: `kv_transfer_params` of the response, by request id.
        hits: tokens that a request did not compute when it was first scheduled, and its prompt's length.
        between: called in every step after the scheduler has decided and before the workers carry it out: what comes
            from another thread or process may arrive there.
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
        mla: bool = False,
        clock: Callable[[], float] = time.monotonic,
        audit: bool = False,
    ):
        self._restart = functools.partial(
            Engine,
            kv_transfer_config,
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            layers=layers,
            world_size=world_size,
            async_scheduling=async_scheduling,
            model_runner=model_runner,
            prefix_caching=prefix_caching,
            mla=mla,
            clock=clock,
            audit=audit,
        )
        scheduler_values = dict(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            async_scheduling=async_scheduling,
        )
        with _quiet():
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
        spec = (
            MLAAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=HEADS * CONTENT, dtype=torch.float32)
            if mla
            else FullAttentionSpec(
                block_size=block_size, num_kv_heads=HEADS, head_size=CONTENT // 2, dtype=torch.float32
            )
        )
        names = [f"model.layers.{i}.self_attn.attn" for i in range(layers)]
        self.kv_cache_config = _place(self.config, [KVCacheGroupSpec(names, spec)], num_blocks)
        self._salts: dict[str, int] = {}
        salt_of = lambda request_id: self._salts.get(request_id, 0)  # noqa: E731
        before = CLOCK.set(clock)
        try:
            with _quiet():
                self._connect(salt_of, world_size, model_runner, async_scheduling, mla)
        finally:
            CLOCK.reset(before)
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
        self.between: Callable[[], None] | None = None
        self.audit = Audit(self) if audit else None

    def _connect(
        self, salt_of: Callable[[str], int], world_size: int, model_runner: int, async_scheduling: bool, mla: bool
    ) -> None:
        """The parts that make connectors, in vLLM's order."""
        self.workers = [
            Worker(self.config, self.kv_cache_config, rank, model_runner, salt_of, mla) for rank in range(world_size)
        ]
        self.config.parallel_config.rank = 0
        values = dict(
            vllm_config=self.config,
            kv_cache_config=self.kv_cache_config,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=self.block_size,
            hash_block_size=self.block_size,
            log_stats=True,
        )
        kind = AsyncScheduler if async_scheduling else Scheduler
        self.scheduler = kind(**_accepted(Scheduler.__init__, values))
        self.scheduler.use_v2_model_runner = model_runner == 2
        self.connector = self.scheduler.connector

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

    @staticmethod
    def expected(prompt: Sequence[int], max_tokens: int, salt: str | None = None) -> list[int]:
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
            if self.between is not None:
                self.between()
            self._in_flight.append((output, self._execute(output)))
            if len(self._in_flight) < self._depth and output.total_num_scheduled_tokens:
                return True
        self._update()
        return True

    def _execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        if self.audit is not None:
            self.audit.check_pool()
        outputs = [self._execute_on(worker, self._sent(output)) for worker in self.workers]
        combined = self._aggregator.aggregate(outputs, 0) if len(outputs) > 1 else outputs[0]
        assert combined is not None
        report = combined.kv_connector_output
        if report is not None and report.kv_connector_stats is not None:
            self._count(report.kv_connector_stats.data)
        if self.audit is not None:
            self.audit.reported(report)
        return combined

    def _execute_on(self, worker: Worker, output: SchedulerOutput) -> ModelRunnerOutput:
        if self.audit is None:
            return worker.execute(output)
        self.audit.check_writes(worker)
        executed = worker.execute(output)
        self.audit.executed(worker, executed.kv_connector_output or KVConnectorOutput())
        return executed

    def _sent(self, output: SchedulerOutput) -> SchedulerOutput:
        """As one of several workers gets it: with metadata of its own, since vLLM pickles it for them."""
        if len(self.workers) == 1:
            return output
        return dataclasses.replace(output, kv_connector_metadata=copy.deepcopy(output.kv_connector_metadata))

    def _count(self, stats: Mapping[str, Any]) -> None:
        """Add up what is a number; `MultiConnector` has the statistics of each of its connectors in its own."""
        for name, value in stats.items():
            if isinstance(value, KVConnectorStats):
                self._count(value.data)
            elif isinstance(value, int | float):
                self.stats[name] += value

    def _update(self) -> None:
        scheduler_output, model_output = self._in_flight.popleft()
        for client in self.scheduler.update_from_output(scheduler_output, model_output).values():
            for one in client.outputs:
                self.outputs[one.request_id] += one.new_token_ids
                if one.finish_reason is not None:
                    self.finish_reasons[one.request_id] = str(one.finish_reason)
                    self.params[one.request_id] = one.kv_transfer_params
        if self.audit is not None:
            self.audit.check_pool()

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
    def num_computed_tokens(self) -> int:
        """Over all requests that have not left the scheduler."""
        return sum(request.num_computed_tokens for request in self.scheduler.requests.values())

    @property
    def loading(self) -> frozenset[str]:
        """Ids of requests whose asynchronous load is under way; known with an audit."""
        return frozenset(self.audit.loading if self.audit is not None else ())

    @property
    def answers(self) -> dict[str, list[int]]:
        """Tokens that the connector said could be loaded, each time it was asked for a request; known with an audit."""
        return self.audit.answers if self.audit is not None else {}

    @property
    def written(self) -> int:
        """Blocks that the connector changed for loads so far, over all ranks; known with an audit."""
        return self.audit.written if self.audit is not None else 0

    @property
    def unfinished(self) -> list[str]:
        return [id for id, request in self.scheduler.requests.items() if not request.is_finished()]

    def check_at_rest(self) -> None:
        """Every request has ended, the pool has its size again and nothing is open."""
        assert not self.scheduler.requests, f"requests remain: {list(self.scheduler.requests)}"
        assert self.num_free_blocks == self._free_at_start, (
            f"{self._free_at_start - self.num_free_blocks} blocks are not back"
        )

        if self.audit is not None:
            self.audit.check_pool()
            self.audit.check_at_rest()

    @property
    def at_rest(self) -> bool:
        """Whether the engine has nothing to do and holds nothing back."""
        return not self.scheduler.has_requests() and not self._in_flight

    def peek(self, block_ids: Sequence[int], rank: int = 0) -> np.ndarray:
        """What lies in these blocks, read around the connector: int32 (layers, blocks, HEADS, block_size, CONTENT)."""
        return np.stack([words[list(block_ids)] for words in self.workers[rank].words])

    def poke(self, block_ids: Sequence[int], words: np.ndarray, rank: int = 0) -> None:
        """Write what `peek` returned, or something else of its shape, around the connector."""
        for mine, new in zip(self.workers[rank].words, words, strict=True):
            mine[list(block_ids)] = new
        if self.audit is not None:
            self.audit.accept(self.workers[rank], block_ids)

    # ---- the end

    def reset(self) -> bool:
        """vLLM's `reset_prefix_cache`, the connector's part included."""
        with _quiet():
            return bool(self.scheduler.reset_prefix_cache(reset_connector=True))

    def kill(self) -> None:
        """The engine dies where it stands: with requests, loads and holds open. As near as one process comes to it:
        threads and sockets are closed, and nobody is told."""
        self.close()

    def restart(self) -> Engine:
        """Another engine of the same configuration, which knows nothing; this one must have been killed or closed."""
        return self._restart()

    def close(self) -> None:
        """Shut the connectors down, as vLLM does when it ends in good order. Twice is fine."""
        self.connector.shutdown()
        for worker in self.workers:
            worker.connector.shutdown()
