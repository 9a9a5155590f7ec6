"""Who may write and read each block of an engine's KV cache, checked after every step of `kvsdk.vllm.harness.Engine`.

The stand-in model sees wrong bytes when it reads them. This sees what nobody has read yet: a block written by a
connector that was not granted it, a block freed while a request uses it, a report about a request that waits for none,
a call that waits.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvsdk.vllm.harness import Engine, Worker

SLOW_CALL, LONGEST_CALL = 0.5, 10.0
"""Seconds that a call of a connector by vLLM may take: none may wait, but a busy machine may pause any thread, so that
it takes three slow calls of one method, or one very long one, to be sure."""

_WATCHED = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished",
    "has_pending_push_work",
    "handle_preemptions",
    "bind_connector_metadata",
    "start_load_kv",
    "wait_for_layer_load",
    "save_kv_layer",
    "wait_for_save",
    "get_finished",
    "get_block_ids_with_load_errors",
    "build_connector_worker_meta",
)


class Violation(AssertionError):
    """A connector broke a promise that vLLM or another request relies on."""


@dataclasses.dataclass
class _Grant:
    """Blocks that a connector may write for one request, on one rank; and which of them it has written."""

    blocks: np.ndarray
    synchronous: bool
    written: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.written = np.zeros(len(self.blocks), bool)


class Audit:
    """Follows one engine. Made by `Engine(audit=True)`; every check raises `Violation`.

    Attributes:
        loading: ids of requests whose asynchronous load is under way.
        answers: tokens that the connector said could be loaded, each time it was asked, by request id.
        written: blocks that the connector changed for loads so far, over all ranks; a block counts once a load.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._pool = engine.scheduler.kv_cache_manager.block_pool
        self._tables = [
            manager.req_to_blocks for manager in engine.scheduler.kv_cache_manager.coordinator.single_type_managers
        ]
        self._matches: dict[str, tuple[int, int, bool]] = {}
        self._grants: list[dict[str, _Grant]] = [{} for _ in engine.workers]
        self.loading: set[str] = set()
        self.answers: dict[str, list[int]] = {}
        self.written = 0
        self._delayed: set[str] = set()
        self._snapshots = [[words.copy() for words in worker.words] for worker in engine.workers]
        for connector in (engine.connector, *(worker.connector for worker in engine.workers)):
            self._watch(connector)
        for worker in engine.workers:
            self._watch_writes(worker)

    # ---- what is called

    def _watch(self, connector: Any) -> None:
        after: dict[str, Callable[..., None]] = {}
        if connector is self._engine.connector:
            after = {
                "get_num_new_matched_tokens": self._matched,
                "update_state_after_alloc": self._allocated,
                "request_finished": self._finished,
            }
        for name in _WATCHED:
            method = getattr(connector, name, None)
            if callable(method):
                setattr(connector, name, self._watched(method, after.get(name)))

    def _watched(self, method: Callable[..., Any], after: Callable[..., None] | None) -> Callable[..., Any]:
        slow = [0]

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            answer = method(*args, **kwargs)
            seconds = time.monotonic() - began
            slow[0] += seconds > SLOW_CALL
            if seconds > LONGEST_CALL or slow[0] >= 3:
                raise Violation(f"{method.__name__} took {seconds:.1f} s: no call of a connector may wait")
            if after is not None:
                # By name, since releases differ in what they pass by position.
                bound = inspect.signature(method).bind(*args, **kwargs).arguments
                after(answer, *bound.values())
            return answer

        return call

    def _matched(self, answer: tuple[int | None, bool], request: Request, num_local: int) -> None:
        count, asynchronous = answer
        if count is None:
            return
        if count < 0 or num_local + count > request.num_tokens:
            raise Violation(
                f"request {request.request_id}: matched {count} tokens past {num_local} of {request.num_tokens}"
            )
        self._matches[request.request_id] = (num_local, count, asynchronous)
        self.answers.setdefault(request.request_id, []).append(count)

    def _allocated(self, _: None, request: Request, blocks: Any, num_external: int) -> None:
        if not num_external:
            return
        num_local, _, asynchronous = self._matches[request.request_id]
        size = self._engine.block_size
        first, last = num_local // size, -(-(num_local + num_external) // size)
        granted = np.concatenate([np.asarray(ids[first:last], np.int64) for ids in blocks.get_block_ids()])
        for grants in self._grants:
            grants[request.request_id] = _Grant(granted, not asynchronous)
        if asynchronous:
            self.loading.add(request.request_id)

    def _finished(self, answer: tuple[bool, Any], request: Request, *_: Any) -> None:
        if answer[0]:
            if request.request_id in self.loading:
                raise Violation(
                    f"request {request.request_id} ended while it loads, and its free is delayed: vLLM holds its "
                    "blocks itself, and would free them twice"
                )
            self._delayed.add(request.request_id)

    # ---- what is written

    def _watch_writes(self, worker: Worker) -> None:
        write = worker._write

        def watched(layer: int, one: Any) -> None:
            blocks = np.unique(one.blocks[one.start :])
            write(layer, one)
            self._snapshots[worker.rank][layer][blocks] = worker.words[layer][blocks]

        worker._write = watched  # type: ignore[method-assign]

    def accept(self, worker: Worker, blocks: Iterable[int]) -> None:
        """What is in these blocks now was put there on purpose."""
        chosen = np.asarray(list(blocks), np.int64)
        for snapshot, words in zip(self._snapshots[worker.rank], worker.words, strict=True):
            snapshot[chosen] = words[chosen]

    def check_writes(self, worker: Worker) -> None:
        """Only blocks granted to an open load have changed since the last look."""
        snapshots, grants = self._snapshots[worker.rank], self._grants[worker.rank]
        changed = np.zeros(len(worker.words[0]), bool)
        for snapshot, words in zip(snapshots, worker.words, strict=True):
            changed |= (words != snapshot).any(axis=(1, 2, 3))
        if not changed.any():
            return
        allowed = np.zeros_like(changed)
        for grant in grants.values():
            allowed[grant.blocks] = True
        wrong = np.flatnonzero(changed & ~allowed)
        if len(wrong):
            raise Violation(
                f"rank {worker.rank}: the connector wrote block {wrong[0]}, which no open load was granted: "
                f"{self._owner(int(wrong[0]))}"
            )
        for grant in grants.values():
            # A pipe that is caught while it writes a block changes it again afterwards: it is one block all the same.
            new = changed[grant.blocks] & ~grant.written
            grant.written |= new
            self.written += int(np.count_nonzero(new))
        self.accept(worker, np.flatnonzero(changed).tolist())

    def _owner(self, block_id: int) -> str:
        if block_id == 0:
            return "it is vLLM's null block"
        block = self._pool.blocks[block_id]
        users = [
            request_id
            for table in self._tables
            for request_id, blocks in table.items()
            if any(one.block_id == block_id for one in blocks)
        ]
        if users:
            return f"it belongs to request {', '.join(users)}"
        if block.ref_cnt:
            return "it is held for a consumer"
        return "it is free, and cached" if block.block_hash is not None else "it is free"

    # ---- what is reported

    def executed(self, worker: Worker, report: KVConnectorOutput) -> None:
        """A worker carried out a step; loads that it reports as ended have no right to their blocks any longer."""
        self.check_writes(worker)
        grants = self._grants[worker.rank]
        ended = set(report.finished_recving or ()) | set(getattr(report, "failed_recving", None) or ())
        unknown = ended - grants.keys()
        if unknown:
            raise Violation(f"rank {worker.rank} reports the load of {sorted(unknown)}: no such load is open there")
        for request_id in [*ended, *(name for name, grant in grants.items() if grant.synchronous)]:
            grants.pop(request_id, None)

    def reported(self, report: KVConnectorOutput | None) -> None:
        """What all workers together report of a step."""
        if report is None:
            return
        self.loading -= set(report.finished_recving or ()) | set(getattr(report, "failed_recving", None) or ())
        unknown = set(report.finished_sending or ()) - self._delayed
        if unknown:
            raise Violation(f"a free is reported that nobody waits for: {sorted(unknown)}")
        self._delayed -= set(report.finished_sending or ())

    # ---- what is owned

    def check_pool(self) -> None:
        """Every block has as many references as it has owners, and lies in the free list if it has none."""
        references = np.fromiter((block.ref_cnt for block in self._pool.blocks), np.int64, len(self._pool.blocks))
        used = np.zeros_like(references)
        for table in self._tables:
            for blocks in table.values():
                np.add.at(used, [block.block_id for block in blocks], 1)
        references[0] = used[0] = 0  # the null block
        if (references < used).any():
            block = int(np.flatnonzero(references < used)[0])
            raise Violation(f"block {block} was freed while it is in use: {self._owner(block)}")
        lifecycle = getattr(self._engine.connector, "_scheduler", None)
        held = int(np.count_nonzero(references > used))
        if lifecycle is not None and lifecycle.num_held_blocks > held:
            raise Violation(f"{lifecycle.num_held_blocks} blocks are held and {held} are referenced: freed twice")
        free = self._pool.get_num_free_blocks()
        if free != np.count_nonzero(references == 0) - 1:
            raise Violation(f"{free} blocks are free, {np.count_nonzero(references == 0) - 1} have no reference")

    def check_at_rest(self) -> None:
        """Nothing is open any more."""
        for worker in self._engine.workers:
            self.check_writes(worker)
        if self.loading:
            raise Violation(f"loads were never reported as ended: {sorted(self.loading)}")
        if self._delayed:
            raise Violation(f"frees were delayed and never reported: {sorted(self._delayed)}")
        for worker in self._engine.workers:
            lifecycle = getattr(worker.connector, "_worker", None)
            if lifecycle is not None and lifecycle.num_open:
                raise Violation(f"rank {worker.rank}: {lifecycle.num_open} tasks never ended")
