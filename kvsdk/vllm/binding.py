"""Binds a `kvsdk.connector.Connector` to vLLM, 0.26.0 to 0.33.0.

Everything that differs between vLLM's releases is here, found by asking what is there, never by comparing versions.
What vLLM calls, when, and in which release is written down in `docs/vllm.md`.
"""

from __future__ import annotations

import functools
import json
import logging
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.v1.request import RequestStatus

from kvsdk.buffer.keys import separator
from kvsdk.config import Options, parse_options
from kvsdk.connector.interface import CacheGeometry, Connector, Context, RequestView
from kvsdk.connector.lifecycle import Orders, ScheduledRequest, SchedulerLifecycle, WorkerLifecycle
from kvsdk.errors import ConfigError
from kvsdk.layout import layout_of
from kvsdk.vllm.stats import KVSDKPromMetrics, KVSDKStats
from kvsdk.vllm.wake import Alarm, set_alarm

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("kvsdk.vllm")

CLOCK: ContextVar[Callable[[], float]] = ContextVar("kvsdk_clock", default=time.monotonic)
"""The clock of connectors made from now on: a test's, so that a lease of minutes takes milliseconds."""


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Orders of one step, from the scheduler process to the workers."""

    orders: Orders = field(default_factory=Orders)


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """What one worker tells the scheduler process once its KV cache is registered.

    Attributes:
        connector: whose it is: vLLM's MultiConnector gives one connector's to all of them.
    """

    connector: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """Saves that ended in a step: how many workers ended each, by save id."""

    ended_saves: dict[int, int] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        assert isinstance(other, WorkerReport)
        total = dict(self.ended_saves)
        for save_id, count in other.ended_saves.items():
            total[save_id] = total.get(save_id, 0) + count
        return WorkerReport(total)


class _Pool:
    """vLLM's block pool as the lifecycle sees it."""

    def __init__(self, pool: BlockPool):
        self._pool = pool

    def _blocks(self, block_ids: np.ndarray) -> Sequence[Any]:
        if not len(block_ids):
            return ()
        chosen = operator.itemgetter(*block_ids.tolist())(self._pool.blocks)
        return chosen if len(block_ids) > 1 else (chosen,)

    def hold(self, block_ids: np.ndarray) -> None:
        self._pool.touch(self._blocks(block_ids))

    def give_back(self, block_ids: np.ndarray) -> None:
        self._pool.free_blocks(self._blocks(block_ids))

    def num_free(self) -> int:
        return self._pool.get_num_free_blocks()


def _model_identity(vllm_config: VllmConfig, options: Options) -> dict[str, Any]:
    """What two servers must agree on for their KV to mean the same, beyond the layout of its bytes.

    The fields are those that shape attention's keys and values. Not a hash of the whole file: releases of transformers
    write different defaults for the same model. A connector cannot see weights; `model_id` stands for them.
    """
    model, hf = vllm_config.model_config, vllm_config.model_config.hf_text_config
    shape = {
        name: getattr(hf, name, None)
        for name in (
            "model_type",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
            "kv_lora_rank",
            "qk_rope_head_dim",
            "qk_nope_head_dim",
            "v_head_dim",
            "sliding_window",
            "rms_norm_eps",
        )
    }
    rope = getattr(hf, "rope_parameters", None) or {}
    shape["rope"] = json.dumps({"theta": getattr(hf, "rope_theta", None), **rope}, sort_keys=True, default=str)
    quantization = getattr(model, "quantization", None)
    return {
        "id": options.model_id or PurePath(str(model.model)).name,
        "revision": getattr(model, "revision", None),
        "config": shape,
        "dtype": str(model.dtype),
        "quantization": str(quantization) if quantization else None,
        "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
    }


def _model_path(vllm_config: VllmConfig) -> str:
    path = str(vllm_config.model_config.model)
    return str(Path(path).resolve()) if Path(path).exists() else path


def _refuse_unsupported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, options: Options) -> None:
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError("pipeline_parallel_size > 1 is not supported with this connector; use tensor parallelism")
    if parallel.data_parallel_size > 1:
        raise ConfigError(
            "data_parallel_size > 1 is not supported with this connector; start one server for each replica"
        )
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        raise ConfigError("sleep mode is not supported with this connector: a peer may read a KV cache that is asleep")
    # vLLM 0.26 has it, 0.32 has not.
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise ConfigError(
            "calculate_kv_scales is not supported with this connector: each server would find scales of its own, and "
            "read with them what another one has written; leave it off"
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"{name} > 1 is not supported with this connector")
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        specs = getattr(spec, "kv_cache_specs", None)
        for one in specs.values() if isinstance(specs, dict) else (spec,):
            if any("Mamba" in base.__name__ for base in type(one).__mro__):
                raise ConfigError(
                    f"state-space models are not supported: layer {group.layer_names[0]} keeps a state "
                    f"({type(one).__name__}), not KV blocks"
                )
    if len(kv_cache_config.kv_cache_groups) > 1:
        raise ConfigError(
            "models with several KV cache groups are not supported with the hybrid KV cache manager on; leave it off"
        )


def _one_line_for_all() -> bool:
    """Whether a request that vLLM finds no room for keeps those behind it from being scheduled that hold blocks.

    vLLM 0.32 schedules requests that hold blocks first; 0.26 does not (vllm#45388).
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    return not hasattr(Scheduler, "_holds_kv_blocks")


def _geometry(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> CacheGeometry:
    block_bytes = 0
    block_size = vllm_config.cache_config.block_size
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        block_size = spec.block_size
        # A spec for layers of several shapes counts all of them; the plain ones count one layer.
        layers = 1 if isinstance(getattr(spec, "kv_cache_specs", None), dict) else len(group.layer_names)
        block_bytes += spec.page_size_bytes * layers
    return CacheGeometry(
        block_size=block_size,
        num_blocks=kv_cache_config.num_blocks,
        block_bytes=block_bytes,
        num_groups=len(kv_cache_config.kv_cache_groups),
        max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
    )


class BoundConnector(KVConnectorBase_V1):
    """A connector as vLLM sees it; `bind` makes a subclass for each `Connector`."""

    connector: ClassVar[type[Connector]]

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config, role, kv_cache_config)
        _log_where_vllm_logs("kvsdk", self.connector.__module__.partition(".")[0])
        try:
            self._set_up(vllm_config, role, kv_cache_config)
        except ConfigError as error:
            logger.error("%s: %s", type(self).__name__, error)
            raise

    def _set_up(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        config = self._kv_transfer_config
        self.options = options = parse_options(
            config, extra=config.kv_connector_extra_config, also=self.connector.option_names
        )
        _refuse_unsupported(vllm_config, kv_cache_config, options)
        worker = role == KVConnectorRole.WORKER
        self._context = context = Context(
            options=options,
            engine_id=str(config.engine_id),
            rank=vllm_config.parallel_config.rank if worker else 0,
            world_size=vllm_config.parallel_config.world_size,
            model=_model_identity(vllm_config, options),
            cache=_geometry(vllm_config, kv_cache_config),
            model_path=_model_path(vllm_config),
            clock=CLOCK.get(),
        )
        self._scheduler: SchedulerLifecycle | None = None
        self._worker: WorkerLifecycle | None = None
        if worker:
            self._half = self.connector.worker_half(context)
            self._worker = WorkerLifecycle(self._half, context, fence=self._fence)
            self._invalid_blocks: set[int] = set()
            self._device_type = "cpu"
        else:
            self._scheduler = SchedulerLifecycle(
                self.connector.scheduler_half(context),
                context,
                consumer=options.consumes,
                producer=options.produces,
                find_timeout=options.lookup_timeout + options.lookup_wait + 1.0,
                announce_wait=options.announce_wait,
                load_timeout=options.load_timeout,
                loaded_pass=_one_line_for_all(),
            )
            self._alarm: Alarm | None = set_alarm(lambda lifecycle=self._scheduler: lifecycle.has_holds)
            self._scheduler.asked_again = self._alarm is not None
            self._keys_pool = ThreadPoolExecutor(1, thread_name_prefix="kvsdk-keys")

    # ---- worker process

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        cache = self._context.cache
        try:
            layout = layout_of(
                kv_caches,
                num_blocks=cache.num_blocks,
                block_size=cache.block_size,
                backend=_attention_backend(self._vllm_config),
            )
            self._device_type = next(iter(kv_caches.values())).device.type
            self._half.register(kv_caches, layout)
        except ConfigError as error:
            logger.error("%s: %s", type(self).__name__, error)
            raise

    def _fence(self) -> Any:
        """A CUDA event behind all that was given to the GPU so far; loads wait for it before they write."""
        if self._device_type != "cuda":
            return None
        import torch

        event = torch.cuda.Event()
        event.record()
        return event

    def get_handshake_metadata(self) -> Handshake | None:
        data = self._half.handshake()
        return Handshake(type(self).__name__, data) if data else None

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata) and self._worker is not None
        self._worker.begin(connector_metadata.orders)

    def start_load_kv(self, *args: Any, **kwargs: Any) -> None:
        assert self._worker is not None
        self._worker.start_loads()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: none of this step's requests waits for one."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are saved whole, after the step."""

    def wait_for_save(self) -> None:
        assert self._worker is not None
        self._worker.start_saves()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        assert self._worker is not None
        finished_loads, invalid = self._worker.poll()
        self._invalid_blocks |= invalid
        return None, finished_loads or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        invalid, self._invalid_blocks = self._invalid_blocks, set()
        return invalid

    def build_connector_worker_meta(self) -> WorkerReport | None:
        assert self._worker is not None
        ended = self._worker.take_ended_saves()
        return WorkerReport(dict.fromkeys(ended, 1)) if ended else None

    def get_kv_connector_stats(self) -> KVSDKStats | None:
        if self._worker is None:
            return None
        counts = self._worker.counters.take() | self._half.take_counters()
        return KVSDKStats(data=counts) if counts else None

    # ---- scheduler process

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        assert self._scheduler is not None
        self._scheduler.bind_pool(_Pool(gpu_block_pool))

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        assert self._scheduler is not None
        workers: list[dict[str, Any]] = [{} for _ in range(self._context.world_size)]
        for rank, worker in metadata.items():
            if isinstance(worker, Handshake) and worker.connector == type(self).__name__:
                workers[rank] = worker.data
        try:
            self._scheduler.start(workers)
        except ConfigError as error:
            logger.error("%s: %s", type(self).__name__, error)
            raise

    def on_new_request(self, request: Request) -> None:
        assert self._scheduler is not None
        if (
            request.prompt_token_ids is None
            or getattr(request, "prompt_embeds", None) is not None
            or request.sampling_params is None
        ):
            return  # embeddings have no tokens to find KV by; pooling requests end without KV to hand over
        view = RequestView(
            request.request_id,
            request.prompt_token_ids,
            block_size=self._context.cache.block_size,
            root=_root(request),
            kv_transfer_params=request.kv_transfer_params,
        )
        view.compute_keys(self._keys_pool)
        loadable = not request.skip_reading_prefix_cache
        self._scheduler.add(
            view, num_tokens=lambda: request.num_tokens, loadable=loadable, one_token=request.max_tokens == 1
        )

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        return self._scheduler.matched(request.request_id, num_computed_tokens, resumed=request.num_preemptions > 0)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        self._scheduler.allocated(request.request_id, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        assert self._scheduler is not None
        orders = self._scheduler.step(_scheduled(scheduler_output), scheduler_output.preempted_req_ids or ())
        return StepMetadata(orders)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        assert self._scheduler is not None
        report = connector_output.kv_connector_worker_meta
        self._scheduler.reported(
            connector_output.finished_recving or (),
            set(connector_output.invalid_block_ids or ()),
            report.ended_saves if isinstance(report, WorkerReport) else {},
        )

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        well = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
        well = well and request.num_computed_tokens >= request.num_prompt_tokens
        return False, self._scheduler.finished(request.request_id, (block_ids,), well=well)

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.pending

    def reset_cache(self) -> bool | None:
        assert self._scheduler is not None
        return self._scheduler.reset()

    # ---- both

    def shutdown(self) -> None:
        lifecycle = self._scheduler or self._worker
        try:
            if lifecycle is not None:
                lifecycle.close()
        finally:
            if self._scheduler is not None:
                self._keys_pool.shutdown(wait=False, cancel_futures=True)
                if self._alarm is not None:
                    self._alarm.close()

    @property
    def requires_kv_delivery(self) -> bool:
        """A producer asks vLLM to recompute, rather than to end, a request preempted in its last step."""
        return bool(self.options.produces)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVSDKStats | None:
        return KVSDKStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVSDKPromMetrics:
        return KVSDKPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


@functools.cache
def bind(connector: type[Connector]) -> type[BoundConnector]:
    """The class that vLLM loads for a `Connector`, under the same name.

    Raises:
        TypeError: `connector` is not a connector, or names no halves.
    """
    for half in ("scheduler_half", "worker_half"):
        if not isinstance(getattr(connector, half, None), type):
            raise TypeError(f"{connector!r} is not a kvsdk connector: it has no {half}")
    return type(
        connector.__name__,
        (BoundConnector,),
        {"connector": connector, "__module__": "kvsdk.vllm.connectors", "__doc__": connector.__doc__},
    )


def _log_where_vllm_logs(*names: str) -> None:
    """vLLM gives handlers to its own loggers only; unless the process has set up logging itself, the lines of these
    loggers go there, too.
    """
    theirs = logging.getLogger("vllm")
    for ours in map(logging.getLogger, names):
        if not ours.hasHandlers() and theirs.handlers:
            ours.handlers = list(theirs.handlers)
            if ours.level == logging.NOTSET:
                ours.setLevel(theirs.level)


def _attention_backend(vllm_config: VllmConfig) -> str:
    """The backend's name as far as it is fixed by configuration; it decides how keys and values lie in a block."""
    from vllm.platforms import current_platform

    backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    return f"{current_platform.device_type}:{getattr(backend, 'name', backend) or 'default'}"


def _root(request: Request) -> bytes:
    lora = request.lora_request
    features = [
        (
            str(getattr(feature, "identifier", None) or getattr(feature, "mm_hash", "")),
            feature.mm_position.offset,
            feature.mm_position.length,
        )
        for feature in request.mm_features or ()
    ]
    # An adapter may be replaced by another one of its name, on this server or on others.
    adapter = None if lora is None else f"{lora.lora_name}\0{lora.lora_path}"
    return separator(cache_salt=request.cache_salt, lora=adapter, multimodal=features)


def _scheduled(output: SchedulerOutput) -> Iterator[ScheduledRequest]:
    """The requests of a step, alike for both model runners: vLLM's second one lists a resumed request as new."""
    counts = output.num_scheduled_tokens
    for new in output.scheduled_new_reqs:
        yield ScheduledRequest(new.req_id, new.block_ids, True, new.num_computed_tokens, counts.get(new.req_id, 0))
    cached = output.scheduled_cached_reqs
    entries: Iterable[tuple[str, Any, int]] = zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    )
    for request_id, blocks, num_computed in entries:
        yield ScheduledRequest(
            request_id, blocks, request_id in cached.resumed_req_ids, num_computed, counts.get(request_id, 0)
        )
