"""What a connector author subclasses.

A connector has two halves because vLLM runs them in different processes: the scheduler half decides what is loaded and
kept, the worker half (one for each tensor-parallel rank) moves bytes. The lifecycle of requests and blocks around both
is `kvsdk.connector.lifecycle`; an author never sees vLLM's scheduler output, forward context or step metadata.

Threads: vLLM calls every method here from one thread of the process, which in the worker is the thread that runs the
model. None may wait for a peer, a disk or a network. Work that does goes to a thread of the author's own, which ends
the task it was given. What vLLM calls before the server answers its first request may wait, with a deadline: the
constructors, `register`, `handshake` and `start`.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from kvsdk.buffer.keys import PrefixKeys, as_tokens, prefix_keys

if TYPE_CHECKING:
    import torch

    from kvsdk.config import Options
    from kvsdk.connector.tasks import LoadTask, SaveTask
    from kvsdk.layout import CacheLayout

logger = logging.getLogger("kvsdk.connector")

BlockIds = tuple[np.ndarray, ...]
"""Block ids of one request: a tuple with one 1-D int32 array for each KV cache group, in prompt order."""


class AskAgain(enum.Enum):
    """Answer of `ConsumerScheduler.find` while it does not know yet; vLLM asks again in its next step."""

    ASK_AGAIN = "ask again"


ASK_AGAIN: Literal[AskAgain.ASK_AGAIN] = AskAgain.ASK_AGAIN
"""`AskAgain.ASK_AGAIN`, by a shorter name."""


@dataclasses.dataclass(frozen=True)
class CacheGeometry:
    """Sizes of one worker's KV cache.

    Attributes:
        block_size: tokens in a block.
        num_blocks: blocks in the pool; block 0 is vLLM's null block and never holds KV.
        block_bytes: bytes of one block over all layers of one worker.
        num_groups: KV cache groups.
        max_num_batched_tokens: most tokens that one step computes.
    """

    block_size: int
    num_blocks: int
    block_bytes: int
    num_groups: int = 1
    max_num_batched_tokens: int = 8192


@dataclasses.dataclass(frozen=True)
class Context:
    """What a half knows of the server it runs in.

    Attributes:
        options: the checked configuration, a `kvsdk.config.Options`; the options that an author's connector declares
            in `option_names` are in the dict `options.extra`, as they were given.
        engine_id: vLLM's id of this server's engine; vLLM makes up one for each start unless the operator sets it.
        rank: tensor-parallel rank of this worker; 0 in the scheduler half.
        world_size: number of workers.
        model: plain values that must be equal on two servers for their KV to mean the same, beside the layout: `id`,
            the option `model_id` or else the last part of the model's path or repository name; `revision`; `dtype`;
            `quantization` or None; `kv_cache_dtype`; and `config`, a dict of the sizes that shape attention's keys and
            values. A connector cannot see weights: two checkpoints of one shape differ by `id` alone.
        cache: sizes of one worker's KV cache.
        model_path: the model as vLLM was told of it: a repository's name, or a local path with its links resolved. Two
            checkpoints may have one `id`; a store that outlives its servers must not mix them up.
        clock: seconds, like `time.monotonic`; every deadline is on this clock.
    """

    options: Options
    engine_id: str
    rank: int
    world_size: int
    model: Mapping[str, Any]
    cache: CacheGeometry
    model_path: str = ""
    clock: Callable[[], float] = time.monotonic


class RequestView:
    """A request as a connector sees it.

    Attributes:
        id: vLLM's request id. It differs between servers for the same prompt: never a key.
        block_size: tokens of a block in vLLM's cache, and of each of the prompt's `keys`.
        kv_transfer_params: what the client or a proxy sent along, or None; untrusted.
        root: bytes that separate caches (salt, LoRA, multimodal content), mixed into every key.
    """

    def __init__(
        self,
        id: str,
        prompt: np.ndarray | Sequence[int],
        *,
        block_size: int,
        root: bytes = b"",
        kv_transfer_params: Mapping[str, Any] | None = None,
    ):
        self.id, self.block_size, self.root = id, block_size, root
        self._prompt, self._num_tokens = prompt, len(prompt)
        self.kv_transfer_params = kv_transfer_params
        self._keys: Future[PrefixKeys] | None = None
        self._waited_for = False

    @property
    def prompt(self) -> np.ndarray:
        """int32 array (P,), the prompt's token ids. The first to ask converts them, in 20 µs for 1,000 tokens
        (`kvsdk.buffer.keys.as_tokens`): `keys` do, in the background."""
        if not isinstance(self._prompt, np.ndarray):
            self._prompt = as_tokens(self._prompt, self._num_tokens, self._pause)
        return self._prompt

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self._num_tokens

    @property
    def num_prompt_blocks(self) -> int:
        """Blocks that hold the prompt, the partial tail counted as one."""
        return -(-self._num_tokens // self.block_size)

    def compute_keys(self, executor: Executor) -> None:
        """Have `keys` computed in the background."""
        self._keys = executor.submit(self._computed_keys)

    @property
    def keys_ready(self) -> bool:
        """Whether `keys` answers at once; they are computed in the background when the request arrives."""
        return self._keys is None or self._keys.done()

    @property
    def keys(self) -> PrefixKeys:
        """The prompt's prefix keys; waits (microseconds a block) when `keys_ready` is false. Any thread may ask.

        Raises:
            TimeoutError: they have not been computed within 10 s.
        """
        if self._keys is None:
            self._waited_for = True
            computed: Future[PrefixKeys] = Future()
            computed.set_result(self._computed_keys())
            self._keys = computed
        self._waited_for = True
        return self._keys.result(10.0)

    def _computed_keys(self) -> PrefixKeys:
        return prefix_keys(self.prompt, self.block_size, self.root, self._pause)

    def _pause(self) -> None:
        """Lets the thread that runs the model have its turn, unless somebody waits. A pause of 0 would be over before
        another thread has woken."""
        if not self._waited_for:
            time.sleep(2e-5)


@dataclasses.dataclass(frozen=True)
class Hit:
    """How much of a prompt can be loaded.

    Attributes:
        num_tokens: tokens from the start of the prompt, local ones included: a multiple of the block size, or the whole
            prompt.
        source: anything that pickles; each worker gets it as `LoadTask.source`, unless `ConsumerScheduler.granted`
            returns another.
    """

    num_tokens: int
    source: Any = None


@dataclasses.dataclass(frozen=True)
class Keep:
    """Answer of `ProducerScheduler.finished`: keep the prompt's blocks.

    Attributes:
        hold_id: names the hold; unique while it lasts. `Holds.give_back(hold_id)` ends it.
        params: plain values; becomes `kv_transfer_params` of the response.
    """

    hold_id: str
    params: Mapping[str, Any] | None = None


class Holds(ABC):
    """How a scheduler half gives kept blocks back. Safe to call from any thread."""

    @abstractmethod
    def give_back(self, hold_id: str) -> None:
        """End a hold. Unknown or ended ids are ignored: a hold ends once."""


class _Half:
    context: Context
    """What this half knows of its server; set by the constructor."""

    def __init__(self, context: Context):
        """Called once, at the start of the server. May wait, with a deadline.

        Raises:
            ConfigError: an option is missing or wrong. It ends the start, and the message is a line in the log.
        """
        self.context = context

    def close(self) -> None:
        """Stop threads and close sockets, within `options.close_timeout` seconds; called once or more, or never.

        Nothing but the connector itself sees to the time. vLLM does not close in every release and case, and never
        when it is killed.
        """


class SchedulerHalf(_Half, ABC):
    """Common to both directions, in vLLM's scheduler process."""

    def start(self, workers: list[dict[str, Any]]) -> None:
        """All workers have registered their KV caches; `workers[rank]` is what `WorkerHalf.handshake` returned there.

        Called once, before the first request. May wait, with a deadline.

        Raises:
            ConfigError: the server cannot start so, for example because a port is in use.
        """

    def reset(self) -> bool:
        """vLLM's `reset_prefix_cache(reset_connector=True)`, after new weights for example: forget what can be found.

        Returns:
            True when no `find` from now on finds KV that was computed before; False when that cannot be promised, as
            where other servers share the store. vLLM then answers that the reset failed.
        """
        return True

    def tick(self) -> None:
        """Called in every step, and before vLLM allocates blocks: the place to give back holds that ended meanwhile."""


class ConsumerScheduler(SchedulerHalf):
    """Decides what is loaded."""

    @abstractmethod
    def find(self, request: RequestView, num_local_tokens: int) -> Hit | AskAgain | None:
        """How much of the prompt can be loaded, given that vLLM has the first `num_local_tokens` itself.

        Called once a step while the request waits, until it is granted or the answer is `None` or a hit of no more than
        `num_local_tokens`: answer at once, the same each time unless the KV is gone (then `None`).

        Returns:
            A `Hit`; `None` when there is nothing, which is final for this request; or `ASK_AGAIN`, which is taken for
            `None` when `lookup_timeout` and one second have passed since the first call.
        """

    def granted(self, request: RequestView, hit: Hit, num_tokens: int) -> Any:
        """vLLM allocated blocks for tokens up to `num_tokens`, which is at most the hit's.

        Returns:
            The `LoadTask.source` for the workers; it must pickle. The hit's own unless overridden.
        """
        return hit.source

    def load_ended(self, request: RequestView, hit: Hit, ok: bool) -> None:
        """All workers ended a granted load; `ok` when every block arrived. Comes once for each `granted`."""

    def forget(self, request: RequestView) -> None:
        """The request will not load: `find` answered `None`, it was aborted, vLLM has the blocks itself, or time is up.

        Comes once for each request that `find` was asked about, unless `granted` did.
        """


class ProducerScheduler(SchedulerHalf):
    """Decides what is kept or saved."""

    holds: Holds
    """Ends holds; set by the lifecycle before `start`."""

    def finished(self, request: RequestView, blocks: BlockIds) -> Keep | None:
        """A prompt was computed and the request ended well: keep its blocks, or not (`None`, the default).

        Args:
            blocks: hold the whole prompt, its partly filled last block included, and nothing of the answer but what
                shares that block.
        """
        return None

    def announced(self, request: RequestView) -> str | None:
        """A prompt is about to be computed, in one step or many: may others have its blocks as they are computed?

        Asked once, in the first step that computes some of it.

        Returns:
            The id of a hold, to which the prompt's blocks are added from now on (`ProducerWorker.grew`); `None` (the
            default) for not before the end. `finished` answers a `Keep` with the same id if the hold is to stand; if
            it does not, or the prompt is not completed, `broken_off` comes.
        """
        return None

    def broken_off(self, request: RequestView, hold_id: str) -> None:
        """An announced prompt will not be completed: it was aborted, or vLLM needs its blocks, or `finished` did not
        keep it. The hold ends now. Does not come for a hold that was given back before.
        """

    def give_up(self, num_blocks: int) -> None:
        """vLLM needs `num_blocks` blocks now: give back holds that nobody reads, the oldest first."""

    def save_from(self, request: RequestView) -> int | None:
        """From which prompt token on blocks are saved as they are computed; `None` (the default) for not at all.

        Asked once, when the request arrives and before `find`. A token in the middle of a block stands for the whole
        block. Every block from there to the prompt's end comes to the workers as part of a `SaveTask`: those that this
        connector loaded or that vLLM had in its prefix cache as well, and some twice when the request was preempted or
        a load failed. Skip those that are saved already.
        """
        return None


class WorkerHalf(_Half, ABC):
    """Common to both directions, in each worker process."""

    def register(self, kv_caches: dict[str, torch.Tensor], layout: CacheLayout) -> None:
        """Here is the KV cache. Called once, before the first load or save. May wait, with a deadline.

        Args:
            kv_caches: layer name to vLLM's tensor.
            layout: where each block's bytes lie; `kvsdk.kernels.BlockStore` takes both.

        Raises:
            ConfigError: this KV cache cannot be moved, or what it is moved to cannot be used.
        """

    def handshake(self) -> dict[str, Any]:
        """Plain values for `SchedulerHalf.start`, such as an address. Called once, after `register`."""
        return {}

    def take_counters(self) -> dict[str, float]:
        """What was counted since the last call, by name.

        Every name is in vLLM's log line. Only those that docs/operators.md lists are at `/metrics` too, as
        `kvsdk_<name>_total`; the first six of them, which count ended loads and saves, are the lifecycle's.
        """
        return {}


class ConsumerWorker(WorkerHalf):
    """Loads blocks."""

    @abstractmethod
    def load(self, task: LoadTask) -> None:
        """Start a load and return; end the task from any thread. What this raises fails the task."""


class ProducerWorker(WorkerHalf):
    """Keeps or saves blocks."""

    def kept(self, hold_id: str, blocks: BlockIds) -> None:
        """A hold began: its blocks stay as they are until `let_go`. `hold_id` is that of `Keep`."""

    def grew(self, hold_id: str, first_block: int, blocks: BlockIds, num_blocks: int, fence: Any) -> None:
        """Blocks joined a hold that `ProducerScheduler.announced` began. The first call is the first word of the hold.

        Args:
            first_block: index of the first of them in the prompt; they follow those before without a gap.
            num_blocks: of the whole prompt.
            fence: a `torch.cuda.Event` on a GPU, which the blocks' content is ready behind, or None. See `SaveTask`.
        """

    def let_go(self, hold_id: str) -> None:
        """A hold ended: after this returns its blocks may be overwritten, and nothing read from them later counts."""

    def save(self, task: SaveTask) -> None:
        """Start a save and return; end the task from any thread. What this raises fails the task.

        The blocks stay as they are until the task has ended on every rank.
        """
        task.fail(NotImplementedError(f"{type(self).__name__} answers save_from but has no save()"))

    def flush(self) -> None:
        """vLLM closes, which ends every task right after this: copy what was handed over to `save` and is open still.

        Override it if what a server saves is to outlive it. Must return within `options.close_timeout`. Comes before
        `close`, and not at all where that does not come.
        """


class _Pair:
    scheduler_half: ClassVar[type[SchedulerHalf]]
    """The class that is made once for each server."""
    worker_half: ClassVar[type[WorkerHalf]]
    """The class that is made in each worker."""
    option_names: ClassVar[frozenset[str]] = frozenset()
    """Names in `kv_connector_extra_config` that are this connector's own; they arrive in `options.extra`, unchecked."""


class Consumer(_Pair):
    """Names the two halves of a connector that loads."""


class Producer(_Pair):
    """Names the two halves of a connector that keeps or saves."""


class Connector(Producer, Consumer):
    """A connector for both directions, as vLLM's role `kv_both` is; `kv_role` says which of them a server uses."""
