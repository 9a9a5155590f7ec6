"""Loads and saves: objects with a deadline that end exactly once."""

from __future__ import annotations

import dataclasses
import enum
import threading
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from kvsdk.connector.interface import BlockIds
from kvsdk.errors import KVError, TaskEnded


class TaskState(enum.Enum):
    """How a task stands: `OPEN` until it ends, then one of the others for good."""

    OPEN = "open"
    DONE = "done"
    FAILED = "failed"
    EXPIRED = "expired"


@dataclasses.dataclass(frozen=True)
class LoadOrder:
    """What the scheduler half tells each worker of a load; travels pickled in vLLM's step metadata.

    Attributes:
        load_id: unique in this server.
        blocks: blocks to fill, one int32 array a KV cache group.
        first_block: index, in the prompt, of the first of them.
        num_tokens: tokens from the start of the prompt that are there after the load.
        source: from `ConsumerScheduler.granted`.
        timeout: seconds from the order's arrival at the worker.
        error: set when `granted` raised; the workers fail the load.
    """

    load_id: int
    request_id: str
    blocks: BlockIds
    first_block: int
    num_tokens: int
    source: Any
    timeout: float
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class SaveOrder:
    """What the scheduler half tells each worker of a save: `keys[i]` names block `blocks[0][i]`, 16 bytes each."""

    save_id: int
    request_id: str
    blocks: BlockIds
    first_block: int
    num_tokens: int
    num_prompt_tokens: int
    keys: bytes
    timeout: float


class _Task:
    """Ends once. `using()` guards the KV cache: after the end nothing may touch the task's blocks."""

    deadline: float
    """On `context.clock`: when it has passed, the task expires; `load_timeout` after it arrived in this worker."""
    fence: Any
    """On a GPU, a `torch.cuda.Event` behind all that the thread which runs the model had given to the GPU before this
    task; wait for it (`fence.synchronize()`, or `stream.wait_event(fence)`) before the blocks are read or written.
    None on a CPU."""
    error: BaseException | None
    """Why it failed or expired; None until then, and for good when it is done."""

    def __init__(self, order: Any, deadline: float, fence: Any = None):
        self.order, self.deadline = order, deadline
        self.fence = fence
        self.error = None
        self._state = TaskState.OPEN
        self._lock = threading.Lock()

    @property
    def request_id(self) -> str:
        """vLLM's id of the request, for log lines; never a key."""
        return self.order.request_id

    @property
    def blocks(self) -> BlockIds:
        """Block ids in this worker's KV cache, one int32 array a KV cache group."""
        return self.order.blocks

    @property
    def first_block(self) -> int:
        """Index, in blocks of the prompt, of `blocks[0][0]`."""
        return self.order.first_block

    @property
    def num_tokens(self) -> int:
        """Tokens from the start of the prompt to the end of the last block's content."""
        return self.order.num_tokens

    @property
    def state(self) -> TaskState:
        """Whether it has ended, and how."""
        return self._state

    @property
    def ended(self) -> bool:
        """Whether it is done, failed or expired. May change at any moment outside `using()`."""
        return self._state is not TaskState.OPEN

    def using(self) -> AbstractContextManager[None]:
        """Guards a read or write of the task's blocks: the task cannot end inside, so vLLM cannot reuse them meanwhile.

        Keep it short (a copy, not a wait for a peer): while it lasts the task cannot expire either. Where a wait cannot
        be kept out, as where a GPU writes what has yet to come, bound it by the deadline. Do not end the task within
        it: `done` and `fail` would wait for themselves.

        Raises:
            TaskEnded: the task has ended; leave its blocks alone.
        """
        return _Using(self)

    def _end(self, state: TaskState, error: BaseException | None = None) -> bool:
        with self._lock:
            if self.ended:
                return False
            self.error = error
            self._state = state
            return True

    def done(self) -> None:
        """Everything was moved.

        Raises:
            TaskEnded: the task has ended before.
        """
        if not self._end(TaskState.DONE):
            raise TaskEnded(f"{type(self).__name__} of request {self.request_id} is {self._state.value}")

    def expire(self, error: BaseException | None = None) -> bool:
        """End the task from outside: its deadline passed, or nobody wants it any more. False when it had ended, or is
        in use now.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self.ended:
                return False
            self.error, self._state = error, TaskState.EXPIRED
            return True
        finally:
            self._lock.release()


class _Using:
    """`_Task.using`. A class, since a generator would cost a short load more than the copy does."""

    __slots__ = ("_task",)

    def __init__(self, task: _Task):
        self._task = task

    def __enter__(self) -> None:
        task = self._task
        task._lock.acquire()
        if task._state is not TaskState.OPEN:
            task._lock.release()
            raise TaskEnded(f"{type(task).__name__} of request {task.request_id} is {task._state.value}")

    def __exit__(self, *exc_info: object) -> None:
        self._task._lock.release()


class LoadTask(_Task):
    """Fill `blocks` with KV from `source`."""

    order: LoadOrder
    failed_blocks: np.ndarray
    """int32 array: block ids that `fail` named; empty until then."""

    def __init__(self, order: LoadOrder, deadline: float, fence: Any = None):
        super().__init__(order, deadline, fence)
        self.failed_blocks = np.empty(0, np.int32)

    @property
    def source(self) -> Any:
        """What `ConsumerScheduler.granted` returned: the hit's `source`, unless that method is overridden.

        Not to be changed: with one worker it may be the scheduler half's own object.
        """
        return self.order.source

    def fail(self, error: BaseException, failed: np.ndarray | None = None) -> None:
        """Some blocks did not arrive.

        Args:
            error: why; it is logged.
            failed: int array of indices into each group's `blocks` that are not valid; all of them unless given.

        Raises:
            TaskEnded: the task has ended before.
            ValueError: `failed` is empty.
        """
        every = np.concatenate(self.blocks)
        chosen = every if failed is None else np.concatenate([ids[failed] for ids in self.blocks])
        if failed is not None and not len(chosen):
            raise ValueError("a failed load names at least one block, or leaves `failed` out")
        with self._lock:
            if self.ended:
                raise TaskEnded(f"LoadTask of request {self.request_id} is {self._state.value}")
            self.failed_blocks, self.error, self._state = chosen, error, TaskState.FAILED

    @property
    def invalid_blocks(self) -> np.ndarray:
        """int32 array: ids of blocks whose content must not be used; what the lifecycle tells vLLM."""
        return np.concatenate(self.blocks) if self._state is TaskState.EXPIRED else self.failed_blocks


class SaveTask(_Task):
    """Copy `blocks` out of the KV cache; `keys[i]` names the i-th."""

    order: SaveOrder

    @property
    def keys(self) -> bytes:
        """16 bytes a block; the last one is the prompt's tail key when the last block is partial."""
        return self.order.keys

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the whole prompt; all from the first one that is to be saved on come, in this task or others."""
        return self.order.num_prompt_tokens

    def fail(self, error: BaseException) -> None:
        """The blocks were not saved.

        Raises:
            TaskEnded: the task has ended before.
        """
        if not self._end(TaskState.FAILED, error):
            raise TaskEnded(f"SaveTask of request {self.request_id} is {self._state.value}")


class Cancelled(KVError):
    """vLLM no longer wants a load: its request was aborted."""
