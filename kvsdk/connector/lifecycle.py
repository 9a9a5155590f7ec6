"""The lifecycle of requests and blocks around a connector's two halves, written once for every connector and vLLM
release.

`SchedulerLifecycle` runs in vLLM's scheduler process, `WorkerLifecycle` in each worker; each step, `Orders` travel from
the one to the others, and finished loads and saves travel back. Nothing here imports vLLM: `kvsdk.vllm.binding`
translates.

All methods are called from the thread that vLLM calls a connector from, except where they say otherwise.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from kvsdk.buffer.keys import KEY_BYTES
from kvsdk.connector.counters import Counters
from kvsdk.connector.interface import (
    AskAgain,
    BlockIds,
    ConsumerScheduler,
    ConsumerWorker,
    Context,
    Hit,
    Holds,
    ProducerScheduler,
    ProducerWorker,
    RequestView,
    SchedulerHalf,
    WorkerHalf,
)
from kvsdk.connector.tasks import Cancelled, LoadOrder, LoadTask, SaveOrder, SaveTask, TaskState
from kvsdk.errors import DeadlineExceeded, KVError, TaskEnded
from kvsdk.transfer_params import classify

logger = logging.getLogger("kvsdk.lifecycle")


@dataclasses.dataclass(frozen=True)
class Growth:
    """Blocks that join the hold of an announced prompt.

    Attributes:
        first_block: index of the first of them in the prompt.
        num_blocks: of the whole prompt.
    """

    hold_id: str
    first_block: int
    blocks: BlockIds
    num_blocks: int


@dataclasses.dataclass
class Orders:
    """What the scheduler process tells the workers in one step.

    Attributes:
        holds: holds that began, with their blocks, and that ended, with `None`, in the order in which they did: one may
            end and another of the same name begin within a step.
        grown: what joins holds of announced prompts when this step has computed it.
    """

    loads: list[LoadOrder] = dataclasses.field(default_factory=list)
    saves: list[SaveOrder] = dataclasses.field(default_factory=list)
    holds: list[tuple[str, BlockIds | None]] = dataclasses.field(default_factory=list)
    grown: list[Growth] = dataclasses.field(default_factory=list)
    cancelled: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class ScheduledRequest:
    """One request of a step.

    Attributes:
        blocks: new block ids, one list a KV cache group; `None` when none are new.
        replace: `blocks` is the whole table (a new or resumed request) rather than what is appended.
        num_computed: tokens computed before this step.
        num_scheduled: tokens that this step computes.
    """

    id: str
    blocks: Sequence[Sequence[int]] | None
    replace: bool
    num_computed: int
    num_scheduled: int


class BlockPool(Protocol):
    """vLLM's block pool, as far as holds need it."""

    def hold(self, block_ids: np.ndarray) -> None:
        """Add a reference to each block."""

    def give_back(self, block_ids: np.ndarray) -> None:
        """Drop a reference to each block."""

    def num_free(self) -> int:
        """Blocks that vLLM can allocate now."""


class _Stage(enum.Enum):
    NEW = enum.auto()  # find() has not decided
    FOUND = enum.auto()  # find() gave a hit; vLLM has not allocated
    LOADING = enum.auto()  # granted
    SETTLED = enum.auto()  # loaded, failed, declined: nothing more is loaded for this request


@dataclasses.dataclass
class _Tracked:
    view: RequestView
    num_tokens: Callable[[], int]
    loadable: bool
    stage: _Stage = _Stage.NEW
    hit: Hit | None = None
    num_local: int = 0  # tokens that vLLM had itself when it was told of the hit
    find_deadline: float | None = None
    found_at: float | None = None
    load: LoadOrder | None = None
    aborted: bool = False
    table: list[list[int]] = dataclasses.field(default_factory=list)
    num_computed: int = 0
    running: bool = False
    save_from: int | None = None
    saved_blocks: int = 0
    failed: bool = False
    one_token: bool = False  # it ends with its first token, so that nothing follows its prompt in the cache
    announced: bool = False  # the producer was asked whether to announce it
    hold_id: str | None = None  # of the hold that grows
    grown: int = 0  # blocks of the prompt in it

    def failed_in(self, invalid_blocks: set[int]) -> bool:
        """Whether one of the load's blocks is among these, now or in an earlier step."""
        if invalid_blocks and self.load is not None and not self.failed:
            self.failed = any(not invalid_blocks.isdisjoint(ids.tolist()) for ids in self.load.blocks)
        return self.failed


class _Ledger:
    """Blocks held, by hold id. A block that two holds share has two references in vLLM's pool and counts once here."""

    def __init__(self, pool: BlockPool):
        self._pool = pool
        self._holds: dict[str, np.ndarray] = {}

    def hold(self, hold_id: str, block_ids: np.ndarray) -> None:
        if hold_id in self._holds:
            raise ValueError(f"hold {hold_id} exists")
        self._pool.hold(block_ids)
        self._holds[hold_id] = block_ids

    def grow(self, hold_id: str, block_ids: np.ndarray) -> None:
        """Add blocks to a hold; none of them is in it."""
        self._pool.hold(block_ids)
        self._holds[hold_id] = np.concatenate([self._holds[hold_id], block_ids])

    def give_back(self, hold_id: str) -> bool:
        block_ids = self._holds.pop(hold_id, None)
        if block_ids is None:
            return False
        # The last block first: vLLM evicts in this order, and a prefix is worth more than its end.
        self._pool.give_back(block_ids[::-1])
        return True

    def holds_others(self, hold_id: str, tables: Sequence[Sequence[int]]) -> bool:
        """Whether a hold has blocks that are not in these tables."""
        return not np.isin(self._holds[hold_id], np.concatenate([np.zeros(0, np.int32), *tables])).all()

    def __contains__(self, hold_id: str) -> bool:
        return hold_id in self._holds

    @property
    def num_blocks(self) -> int:
        return len(np.unique(np.concatenate([np.zeros(0, np.int32), *self._holds.values()])))

    @property
    def num_holds(self) -> int:
        return len(self._holds)


class _Holds(Holds):
    """Collects ends of holds from any thread; the scheduler's thread carries them out."""

    def __init__(self) -> None:
        self._ended: collections.deque[str] = collections.deque()

    def give_back(self, hold_id: str) -> None:
        self._ended.append(hold_id)

    @property
    def any_ended(self) -> bool:
        return bool(self._ended)

    def take(self) -> list[str]:
        ended = []
        while self._ended:
            ended.append(self._ended.popleft())
        return ended


class SchedulerLifecycle:
    """Follows every request from arrival to the last of its blocks.

    Args:
        half: the connector's scheduler half.
        context: as given to the half.
        find_timeout: seconds that `find` may answer *ask again* before the request is computed here.
        announce_wait: seconds more for a request whose transfer a proxy announced.
        load_timeout: seconds for a load or a save, from its arrival at the worker.
        loaded_pass: let requests whose load has ended pass one that vLLM finds no room for. For releases in which such
            a request keeps all behind it waiting, also those that have the blocks it waits for.
    """

    def __init__(
        self,
        half: SchedulerHalf,
        context: Context,
        *,
        consumer: bool,
        producer: bool,
        find_timeout: float,
        load_timeout: float,
        announce_wait: float = 0.0,
        loaded_pass: bool = False,
    ):
        self._half, self._context = half, context
        self._consumer = half if consumer and isinstance(half, ConsumerScheduler) else None
        self._producer = half if producer and isinstance(half, ProducerScheduler) else None
        self._find_timeout, self._load_timeout, self._announce_wait = find_timeout, load_timeout, announce_wait
        self._clock = context.clock
        self._requests: dict[str, _Tracked] = {}
        self._loads: dict[str, _Tracked] = {}  # by request id, also after an abort, until the workers reported
        self._loaded_pass = loaded_pass
        self._loaded: set[str] = set()  # requests whose load has ended, until vLLM schedules them or frees their blocks
        self._without_room: set[str] = set()  # requests that vLLM was answered for and has not allocated for since
        self._num_steps = 0
        self._saves: dict[int, int] = {}  # save id -> workers that have not reported
        self._orders = Orders()
        self._ids = itertools.count(1)
        self._ledger: _Ledger | None = None
        self._pool: BlockPool | None = None
        self._holds = _Holds()
        self._growing: dict[str, _Tracked] = {}  # by hold id
        self.asked_again = False
        """Whether `pending` is asked now and then while vLLM does not step; set by who sees to that."""
        if self._producer is not None:
            self._producer.holds = self._holds

    # ---- set-up

    def bind_pool(self, pool: BlockPool) -> None:
        self._pool = pool
        self._ledger = _Ledger(pool)

    def start(self, workers: list[dict[str, Any]]) -> None:
        self._half.start(workers)

    # ---- a request's way

    def add(self, view: RequestView, *, num_tokens: Callable[[], int], loadable: bool, one_token: bool = False) -> None:
        """A request arrived. `loadable` is false for requests that must compute their prompt (prompt logprobs and the
        like); `one_token` is true for those that are to answer one token.
        """
        tracked = _Tracked(view, num_tokens, loadable and self._consumer is not None, one_token=one_token)
        if self._producer is not None:
            tracked.save_from = self._ask(self._producer.save_from, view)
            if tracked.save_from is not None:
                tracked.saved_blocks = tracked.save_from // view.block_size
        self._requests[view.id] = tracked

    def matched(self, request_id: str, num_local: int, *, resumed: bool) -> tuple[int | None, bool]:
        """vLLM's `get_num_new_matched_tokens`: how many tokens past the local ones can be loaded, and whether that is
        asynchronous.
        """
        tracked = self._requests.get(request_id)
        if tracked is None:
            return 0, False
        tracked.running = False
        self._loaded.discard(request_id)  # vLLM asks for a request that has no blocks: its load failed
        if self._loaded_pass and self._loaded and self._without_room and self._num_steps % 2:
            # Nobody takes what the one without room waits for, and what has loaded is reached. But in every other step:
            # what has loaded may find no room either, where that one has some by now.
            return None, False
        answer = self._match(tracked, num_local, resumed)
        if answer is None:
            return None, False
        again = request_id in self._without_room
        self._without_room.add(request_id)
        if self.has_holds:
            block_size = self._context.cache.block_size
            needed = -(-tracked.num_tokens() // block_size) - num_local // block_size
            # Asked before, and not allocated: vLLM also reserves for others. Then every unread hold goes.
            self._make_room(self._context.cache.num_blocks if again else needed + self._growth())
        return answer, answer > 0

    def _match(self, tracked: _Tracked, num_local: int, resumed: bool) -> int | None:
        if not tracked.loadable or self._consumer is None or tracked.stage in (_Stage.SETTLED, _Stage.LOADING):
            return 0
        view, block_size = tracked.view, self._context.cache.block_size
        # A prompt of one token must be computed whatever is loaded: vLLM would step back to zero and ask for ever.
        if resumed or view.num_prompt_tokens < 2 or num_local % block_size or num_local >= view.num_prompt_tokens:
            return self._decline(tracked)
        now = self._clock()
        if tracked.find_deadline is None:
            announced = classify(view.kv_transfer_params).announced
            tracked.find_deadline = now + self._find_timeout + (self._announce_wait if announced else 0.0)
        hit = self._ask(self._consumer.find, view, num_local)
        if isinstance(hit, AskAgain):
            if now < tracked.find_deadline:
                return None
            logger.warning("request %s: no answer in time; its prompt is computed here", view.id)
            return self._decline(tracked)
        if hit is None or hit.num_tokens <= num_local:
            return self._decline(tracked)
        if hit.num_tokens > view.num_prompt_tokens or (
            hit.num_tokens % block_size and hit.num_tokens != view.num_prompt_tokens
        ):
            logger.error(
                "%s.find answered %d tokens for a prompt of %d: neither blocks of %d nor all of it; ignored",
                type(self._consumer).__name__,
                hit.num_tokens,
                view.num_prompt_tokens,
                block_size,
            )
            return self._decline(tracked)
        if tracked.found_at is None:
            tracked.found_at = now
        # It may wait for blocks that are held for a request of another server, which waits for those that this one's
        # hit keeps held there: neither server would ever go on.
        if self.has_holds and now >= tracked.found_at + self._load_timeout:
            logger.warning("request %s: no room for its blocks beside those held for others; computed here", view.id)
            return self._decline(tracked)
        tracked.stage, tracked.hit, tracked.num_local = _Stage.FOUND, hit, num_local
        return hit.num_tokens - num_local

    def _decline(self, tracked: _Tracked) -> int:
        if tracked.stage in (_Stage.NEW, _Stage.FOUND):
            asked = tracked.find_deadline is not None
            tracked.stage, tracked.hit = _Stage.SETTLED, None
            if asked and self._consumer is not None:
                self._ask(self._consumer.forget, tracked.view)
        return 0

    def allocated(self, request_id: str, blocks: Sequence[Sequence[int]], num_external: int) -> None:
        """vLLM's `update_state_after_alloc`, with all blocks of the request, local hits first. vLLM may have shrunk
        `num_external`.
        """
        tracked = self._requests.get(request_id)
        if tracked is None:
            return
        self._without_room.discard(request_id)
        tracked.table = [list(ids) for ids in blocks]
        if tracked.stage is not _Stage.FOUND:
            return
        if not num_external:
            self._decline(tracked)
            return
        assert tracked.hit is not None and self._consumer is not None
        block_size = self._context.cache.block_size
        num_tokens = tracked.num_local + num_external
        first, last = tracked.num_local // block_size, -(-num_tokens // block_size)
        error, source = None, None
        try:
            source = self._consumer.granted(tracked.view, tracked.hit, num_tokens)
        except Exception as raised:  # vLLM waits for this load by now: it must end, so the workers fail it
            logger.exception("granting a load of request %s failed", request_id)
            error = f"{type(raised).__name__}: {raised}"
        tracked.load = LoadOrder(
            load_id=next(self._ids),
            request_id=request_id,
            blocks=tuple(np.asarray(ids[first:last], np.int32) for ids in blocks),
            first_block=first,
            num_tokens=num_tokens,
            source=source,
            timeout=self._load_timeout,
            error=error,
        )
        tracked.stage = _Stage.LOADING
        self._loads[request_id] = tracked
        self._orders.loads.append(tracked.load)

    def finished(self, request_id: str, blocks: Sequence[Sequence[int]], *, well: bool) -> dict[str, Any] | None:
        """vLLM's `request_finished`. `well` is false for aborts and errors. Returns the response's
        `kv_transfer_params`.

        Blocks that the connector keeps are referenced in the pool here, so that vLLM frees its own reference at once:
        the answer to *delay the free* is always no.
        """
        tracked = self._requests.pop(request_id, None)
        if tracked is None:
            return None
        self._loaded.discard(request_id)
        self._without_room.discard(request_id)
        if tracked.stage is _Stage.LOADING:
            # vLLM keeps these blocks until every worker has reported the load; the workers stop as soon as they hear of
            # it.
            assert tracked.load is not None
            tracked.aborted = True
            self._orders.cancelled.append(tracked.load.load_id)
            return None
        self._decline(tracked)
        view = tracked.view
        if self._producer is None or self._ledger is None:
            return None
        kept = _prompt_blocks(view, blocks) if well else None
        if kept is None:
            self._break_off(tracked)
            return None
        keep = self._ask(self._producer.finished, view, kept)
        if tracked.hold_id is not None:
            if keep is not None and keep.hold_id == tracked.hold_id:
                self._grow(tracked, kept, view.num_prompt_blocks)
                del self._growing[tracked.hold_id]
                return dict(keep.params) if keep.params is not None else None
            self._break_off(tracked)
        if keep is None:
            return None
        if keep.hold_id in self._ledger:
            logger.error(
                "%s keeps request %s as %s, a hold that exists", type(self._half).__name__, view.id, keep.hold_id
            )
            return None
        self._ledger.hold(keep.hold_id, np.concatenate(kept))
        self._orders.holds.append((keep.hold_id, kept))
        return dict(keep.params) if keep.params is not None else None

    # ---- an announced prompt

    def _announce(self, tracked: _Tracked) -> None:
        """The prompt's first step: may the producer's peers have its blocks as they are computed?"""
        assert self._producer is not None and self._ledger is not None
        tracked.announced = True
        if tracked.view.num_prompt_tokens < 2:
            return
        hold_id = self._ask(self._producer.announced, tracked.view)
        if hold_id is None:
            return
        if hold_id in self._ledger:
            logger.error("%s announces %s, a hold that exists", type(self._half).__name__, hold_id)
            return
        tracked.hold_id = hold_id
        self._growing[hold_id] = tracked
        self._ledger.hold(hold_id, np.zeros(0, np.int32))

    def _grow_in_step(self, tracked: _Tracked, entry: ScheduledRequest) -> None:
        view, block_size = tracked.view, self._context.cache.block_size
        end = min(entry.num_computed + entry.num_scheduled, view.num_prompt_tokens)
        # The answer's second token is written behind the prompt, into the same last block: then it waits for the end.
        whole = tracked.one_token and end == view.num_prompt_tokens
        num_blocks = view.num_prompt_blocks if whole else end // block_size
        blocks = tuple(np.asarray(ids[:num_blocks], np.int32) for ids in tracked.table)
        # See `_prompt_blocks`.
        if any((ids == 0).any() for ids in blocks):
            self._break_off(tracked)
        else:
            self._grow(tracked, blocks, num_blocks)

    def _grow(self, tracked: _Tracked, blocks: BlockIds, num_blocks: int) -> None:
        """Add the first `num_blocks` blocks of the prompt to its hold, but for those that are in it. After a
        preemption these are others than the request's, with the same content."""
        assert self._ledger is not None and tracked.hold_id is not None
        first = tracked.grown
        if num_blocks > first:
            new = tuple(ids[first:num_blocks] for ids in blocks)
            self._ledger.grow(tracked.hold_id, np.concatenate(new))
            self._orders.grown.append(Growth(tracked.hold_id, first, new, tracked.view.num_prompt_blocks))
            tracked.grown = num_blocks

    def _break_off(self, tracked: _Tracked) -> None:
        """An announced prompt will not be completed, or not be kept under the name that it was announced by."""
        if tracked.hold_id is not None and self._producer is not None:
            self._ask(self._producer.broken_off, tracked.view, tracked.hold_id)
            self._holds.give_back(tracked.hold_id)
            self._carry_out_ends()

    # ---- a step

    def step(self, scheduled: Iterable[ScheduledRequest], preempted: Iterable[str]) -> Orders:
        """vLLM's `build_connector_meta`: takes the step's block tables, returns what the workers are told in it."""
        self._num_steps += 1
        for request_id in preempted:
            tracked = self._requests.get(request_id)
            if tracked is not None:
                tracked.running, tracked.table, tracked.num_computed = False, [], 0
        for entry in scheduled:
            tracked = self._requests.get(entry.id)
            if tracked is None:
                continue
            tracked.running = True
            self._loaded.discard(entry.id)
            if entry.replace:
                tracked.table = [list(ids) for ids in entry.blocks or ()]
            elif entry.blocks is not None:
                for ids, new in zip(tracked.table, entry.blocks, strict=True):
                    ids.extend(new)
            if tracked.save_from is not None:
                self._save(tracked, entry)
            if self._producer is not None and not tracked.announced:
                self._announce(tracked)
            if tracked.hold_id is not None:
                self._grow_in_step(tracked, entry)
            tracked.num_computed = entry.num_computed + entry.num_scheduled
        if self.has_holds:
            self._make_room(self._growth())
        self._carry_out_ends()
        orders, self._orders = self._orders, Orders()
        return orders

    def _save(self, tracked: _Tracked, entry: ScheduledRequest) -> None:
        assert self._ledger is not None
        view, block_size = tracked.view, self._context.cache.block_size
        if entry.num_computed < tracked.num_computed:
            # Recomputed after a failed load or a preemption: what was saved past this point may not have been.
            tracked.saved_blocks = min(
                tracked.saved_blocks, max(entry.num_computed // block_size, (tracked.save_from or 0) // block_size)
            )
        end = min(entry.num_computed + entry.num_scheduled, view.num_prompt_tokens)
        last = -(-end // block_size) if end == view.num_prompt_tokens else end // block_size
        first = tracked.saved_blocks
        # Sliding-window layers: where vLLM has its null block, there is nothing to save.
        for ids in tracked.table:
            (null,) = np.nonzero(np.asarray(ids[first:last], np.int32) == 0)
            first += int(null[-1]) + 1 if len(null) else 0
        if last <= first:
            return
        blocks = tuple(np.asarray(ids[first:last], np.int32) for ids in tracked.table)
        keys = view.keys
        names = keys.blocks + keys.tail
        order = SaveOrder(
            save_id=next(self._ids),
            request_id=view.id,
            blocks=blocks,
            first_block=first,
            num_tokens=end,
            num_prompt_tokens=view.num_prompt_tokens,
            keys=names[first * KEY_BYTES : last * KEY_BYTES],
            timeout=self._load_timeout,
        )
        self._ledger.hold(f"save {order.save_id}", np.concatenate(blocks))
        self._saves[order.save_id] = self._context.world_size
        self._orders.saves.append(order)
        tracked.saved_blocks = last

    def reported(self, finished_loads: Iterable[str], invalid_blocks: set[int], ended_saves: dict[int, int]) -> None:
        """vLLM's `update_connector_output`: what the workers reported. `finished_loads` are complete over all workers;
        `ended_saves` counts workers by save id."""
        for request_id in finished_loads:
            tracked = self._loads.pop(request_id, None)
            if tracked is None or tracked.load is None or tracked.hit is None or self._consumer is None:
                continue
            tracked.stage = _Stage.SETTLED
            if not tracked.aborted:
                self._loaded.add(request_id)
            ok = not tracked.aborted and not tracked.failed_in(invalid_blocks)
            self._ask(self._consumer.load_ended, tracked.view, tracked.hit, ok)
        for tracked in self._loads.values():
            tracked.failed_in(invalid_blocks)
        for save_id, count in ended_saves.items():
            if save_id not in self._saves:
                continue
            self._saves[save_id] -= count
            if self._saves[save_id] <= 0:
                del self._saves[save_id]
                self._holds.give_back(f"save {save_id}")
        self._carry_out_ends()

    def _ask(self, method: Callable[..., Any], *args: Any) -> Any:
        """Call the author's half. An error there costs this request its transfer, never vLLM its engine."""
        try:
            return method(*args)
        except Exception:
            logger.exception("%s failed; going on without it", getattr(method, "__qualname__", method))
            return None

    # ---- room for vLLM

    @property
    def has_holds(self) -> bool:
        """Whether blocks are held. Safe to ask from any thread."""
        return self._ledger is not None and self._ledger.num_holds > 0

    def _growth(self) -> int:
        """Blocks that the requests which vLLM runs now, or is about to, may need in its next step."""
        block_size, budget = self._context.cache.block_size, self._context.cache.max_num_batched_tokens
        need = 0
        for tracked in self._requests.values():
            if tracked.running or tracked.stage is _Stage.LOADING:
                computed = tracked.num_computed if tracked.running else (tracked.load.num_tokens if tracked.load else 0)
                coming = max(1, min(tracked.num_tokens() - computed, budget)) + 1
                need += max(0, -(-(computed + coming) // block_size) - (len(tracked.table[0]) if tracked.table else 0))
        return need

    def _make_room(self, num_blocks: int) -> None:
        if self._pool is None or self._ledger is None or self._producer is None:
            return
        self._carry_out_ends()
        given_up = True
        while given_up and self.has_holds and (missing := num_blocks - self._pool.num_free()) > 0:
            # Again, as long as it helps: blocks that running requests share are not free when a hold on them ends.
            before = self._ledger.num_holds
            self._ask(self._producer.give_up, missing)
            self._carry_out_ends()
            given_up = self._ledger.num_holds < before
            if not given_up and (one := self._holds_what_it_does_not_use()) is not None:
                self._break_off(one)
                given_up = True

    def _holds_what_it_does_not_use(self) -> _Tracked | None:
        """The last request whose announced prompt holds blocks that the request itself does not have: vLLM preempted
        it, and it waits, perhaps for just these, or has got others since."""
        assert self._ledger is not None
        for tracked in reversed(self._requests.values()):
            if tracked.hold_id is not None and self._ledger.holds_others(tracked.hold_id, tracked.table):
                return tracked
        return None

    def _carry_out_ends(self) -> None:
        self._ask(self._half.tick)
        for hold_id in self._holds.take():
            if self._ledger is not None and self._ledger.give_back(hold_id):
                self._orders.holds.append((hold_id, None))
                if hold_id in self._growing:
                    # Another hold may have this name later: what this request computes from now on is not for it.
                    self._growing.pop(hold_id).hold_id = None
                # Ends reach the workers before the step, and what it computes after it.
                self._orders.grown = [growth for growth in self._orders.grown if growth.hold_id != hold_id]

    # ---- the rest

    @property
    def pending(self) -> bool:
        """Whether vLLM must step although it runs nothing: workers have not been told of something, or have saves to
        report, or holds have ended. Blocks that are merely held need no step where something makes vLLM ask again."""
        if self._saves or self._orders.holds or self._orders.grown or self._orders.cancelled:
            return True
        if self.has_holds and self.asked_again:
            self._ask(self._half.tick)
            return self._holds.any_ended
        return self.has_holds

    @property
    def num_held_blocks(self) -> int:
        return self._ledger.num_blocks if self._ledger is not None else 0

    def reset(self) -> bool:
        complete = self._half.reset()
        self._carry_out_ends()
        return complete

    def close(self) -> None:
        self._half.close()


def _prompt_blocks(view: RequestView, blocks: Sequence[Sequence[int]]) -> BlockIds | None:
    """The blocks of a computed prompt, of each KV cache group; None when they cannot be handed over."""
    num_blocks = view.num_prompt_blocks
    if view.num_prompt_tokens < 2:
        return None
    # A request preempted in its last step ends with fewer blocks than its prompt has: there is nothing to hand over.
    if any(len(ids) < num_blocks for ids in blocks):
        return None
    kept = tuple(np.asarray(ids[:num_blocks], np.int32) for ids in blocks)
    # Sliding-window layers: vLLM has freed the blocks before the window and put its null block in their place.
    return None if any((ids == 0).any() for ids in kept) else kept


class WorkerLifecycle:
    """Carries out orders in one worker and collects what ended."""

    def __init__(self, half: WorkerHalf, context: Context, *, fence: Callable[[], Any] = lambda: None):
        self._half, self._clock, self._fence = half, context.clock, fence
        self._consumer = half if isinstance(half, ConsumerWorker) else None
        self._producer = half if isinstance(half, ProducerWorker) else None
        self._new_loads: list[LoadOrder] = []
        self._new_saves: list[SaveOrder] = []
        self._growths: list[Growth] = []
        self._loads: dict[int, LoadTask] = {}
        self._saves: dict[int, SaveTask] = {}
        self._cancelled: list[int] = []
        self.counters = Counters()

    def begin(self, orders: Orders) -> None:
        """First call of a step: nothing of the step has been written to the KV cache yet."""
        # Copied: where one process holds several workers they are given the same object.
        self._new_loads += orders.loads
        self._new_saves += orders.saves
        self._growths += orders.grown
        if self._producer is not None:
            for hold_id, blocks in orders.holds:
                if blocks is None:
                    self._producer.let_go(hold_id)
                else:
                    self._producer.kept(hold_id, blocks)
        self._cancelled += orders.cancelled
        self._expire_cancelled()

    def _expire_cancelled(self) -> None:
        """A task that is in use cannot end; it is tried again in the next step."""
        waiting, self._cancelled = self._cancelled, []
        for load_id in waiting:
            task = self._loads.get(load_id)
            if task is not None and not task.expire(Cancelled(f"request {task.request_id} was aborted")):
                self._cancelled.append(load_id)

    def start_loads(self) -> None:
        loads, self._new_loads = self._new_loads, []
        for order in loads:
            task = LoadTask(order, self._clock() + order.timeout, self._fence())
            self._loads[order.load_id] = task
            self._hand_over(self._consumer.load if self._consumer is not None else None, task)

    def start_saves(self) -> None:
        """After the step's forward; vLLM up to 0.30 does not call this in empty steps, so `poll` does it again."""
        growths, self._growths = self._growths, []
        if growths and self._producer is not None:
            fence = self._fence()
            for growth in growths:
                self._producer.grew(growth.hold_id, growth.first_block, growth.blocks, growth.num_blocks, fence)
        saves, self._new_saves = self._new_saves, []
        for order in saves:
            task = SaveTask(order, self._clock() + order.timeout, self._fence())
            self._saves[order.save_id] = task
            self._hand_over(self._producer.save if self._producer is not None else None, task)

    def _hand_over(self, start: Callable[[Any], None] | None, task: LoadTask | SaveTask) -> None:
        try:
            if getattr(task.order, "error", None):
                raise KVError(task.order.error)
            if start is None:
                raise NotImplementedError(f"{type(self._half).__name__} cannot carry out {type(task).__name__}")
            start(task)
        except Exception as error:  # an author's error fails the task, not the engine
            logger.exception("%s of request %s failed to start", type(task).__name__, task.request_id)
            try:
                task.fail(error)
            except TaskEnded:
                logger.debug("task of request %s had ended before it raised", task.request_id)

    def poll(self) -> tuple[set[str], set[int]]:
        """(request ids whose load ended here, block ids that must not be used). Each load is reported once."""
        self.start_loads()
        self.start_saves()
        self._expire_cancelled()
        now = self._clock()
        finished: set[str] = set()
        invalid: set[int] = set()
        for load_id, task in list(self._loads.items()):
            if not task.ended and now >= task.deadline:
                task.expire(DeadlineExceeded(f"the load took longer than {task.order.timeout:.3g} s"))
            if not task.ended:
                continue
            del self._loads[load_id]
            finished.add(task.request_id)
            self.counters.add(f"loads_{task.state.value}")
            bad = task.invalid_blocks
            if task.state is not TaskState.DONE:
                invalid.update(bad.tolist())
                if not isinstance(task.error, Cancelled):
                    total = sum(map(len, task.blocks))
                    logger.warning(
                        "request %s: %d of %d blocks did not load: %s", task.request_id, len(bad), total, task.error
                    )
        for task in self._saves.values():
            if not task.ended and now >= task.deadline:
                task.expire(DeadlineExceeded(f"the save took longer than {task.order.timeout:.3g} s"))
        return finished, invalid

    def take_ended_saves(self) -> list[int]:
        """Save ids that ended here, each once."""
        ended = [save_id for save_id, task in self._saves.items() if task.ended]
        for save_id in ended:
            task = self._saves.pop(save_id)
            self.counters.add(f"saves_{task.state.value}")
            if task.state is not TaskState.DONE:
                logger.warning(
                    "request %s: %d blocks were not saved: %s", task.request_id, sum(map(len, task.blocks)), task.error
                )
        return ended

    @property
    def num_open(self) -> int:
        return len(self._loads) + len(self._saves)

    def close(self) -> None:
        if self._producer is not None and self._saves:
            try:
                self._producer.flush()
            except Exception:
                logger.exception("%s.flush failed; what was not saved is lost", type(self._half).__name__)
        for task in (*self._loads.values(), *self._saves.values()):
            task.expire(Cancelled("the worker closes"))
        self._half.close()
