"""Faults on purpose: seeded wrappers over a pipe, a lookup buffer, its client, or both halves of any connector.

A `FaultPlan` says how often what goes wrong. What a wrapper does depends on the plan's seed, on the name under which it
asked for faults and on how many calls went before, never on time or on other wrappers; so a run whose calls come in the
same order sees the same faults.

In an author's tests a plan is given to `with_faults`. In a running server it comes from an option, without which such a
connector refuses to start:

    {"kv_connector": "kvsdk.testing.faults:FaultyPyNcclConnector",
     "kv_connector_module_path": "kvsdk.vllm.connectors",
     "kv_connector_extra_config": {"faults": {"seed": 1, "corrupt": 0.01}}, ...}

These wrappers show what a connector makes of the errors and silences that they cause. They cannot show what a network,
a GPU or NCCL does in such a case.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from kvsdk.buffer import BufferFull, Claim, LookupBuffer, Pending, PendingType, PrefixKeys, RemoteClaim, UnheardType
from kvsdk.buffer.client import BufferClient
from kvsdk.buffer.lookup import Offer
from kvsdk.connector import (
    ASK_AGAIN,
    AskAgain,
    BlockIds,
    Connector,
    Consumer,
    Hit,
    LoadTask,
    Producer,
    RequestView,
    SaveTask,
)
from kvsdk.connector.interface import Keep
from kvsdk.connectors.pynccl import PyNcclConnector, PyNcclScheduler, PyNcclWorker
from kvsdk.errors import ConfigError, DeadlineExceeded, KVError, PeerGone, PipeClosed, ProtocolError, TaskEnded
from kvsdk.pipe import Pipe, PipeHost, PipeInvite
from kvsdk.pipe.base import Drain, Fill

logger = logging.getLogger("kvsdk.faults")

FAULTS: Mapping[str, str] = {
    "delay": "what was asked begins late",
    "late": "what was asked is done at once, and its answer comes late",
    "drop": "what was sent, or the answer to it, never arrives",
    "duplicate": "what was sent arrives twice",
    "reorder": "what was sent arrives after what was sent next",
    "truncate": "a part arrives",
    "corrupt": "what arrives is not what was sent",
    "out_of_memory": "the call ends in an error of memory",
    "death": "the peer is gone from here on",
}
"""Every fault and what it means. Which of them a wrapper knows stands in its docstring."""

OPTION = "faults"


class FaultPlan:
    """How often what goes wrong. Thread-safe."""

    def __init__(self, seed: int = 0, *, max_delay: float = 0.02, **rates: float):
        """
        Args:
            seed: decides which calls go wrong.
            max_delay: most seconds that a fault of `delay` or `late` takes.
            rates: for names of `FAULTS` the share of calls that it befalls, from 0 to 1; one call has one fault.

        Raises:
            ConfigError: a name is unknown, a number is out of range, or the rates add up to more than 1.
        """
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigError(f"{OPTION}: seed={seed!r} is not an integer")
        for name, rate in {"max_delay": max_delay, **rates}.items():
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not (math.isfinite(rate) and rate >= 0):
                raise ConfigError(f"{OPTION}: {name}={rate!r} is not a number of at least 0")
        for name in rates:
            if name not in FAULTS:
                nearest = difflib.get_close_matches(name, FAULTS, n=1, cutoff=0.0)[0]
                raise ConfigError(f"{OPTION}: {name!r} is not a fault; the nearest is {nearest!r}")
        if sum(rates.values()) > 1:
            raise ConfigError(f"{OPTION}: the rates add up to {sum(rates.values()):g}; keep them below 1 together")
        self.seed, self.max_delay, self.rates = seed, float(max_delay), dict(rates)
        self._lock = threading.Lock()
        self._sources: collections.Counter[str] = collections.Counter()
        self._injected: collections.Counter[str] = collections.Counter()

    @classmethod
    def every(cls, rate: float, seed: int = 0, *, max_delay: float = 0.02) -> FaultPlan:
        """A plan in which each fault befalls this share of calls."""
        return cls(seed, max_delay=max_delay, **dict.fromkeys(FAULTS, rate))

    @classmethod
    def from_options(cls, given: Any) -> FaultPlan:
        """What a server's configuration says: an object with `seed`, `max_delay` and the rates.

        Raises:
            ConfigError: it is missing, or not such an object.
        """
        if not isinstance(given, Mapping) or not given:
            raise ConfigError(
                f"this connector breaks transfers on purpose and starts only with the option {OPTION!r} in "
                f'kv_connector_extra_config, such as {{"seed": 1, "corrupt": 0.01}}; for anything else name the '
                "connector without faults"
            )
        return cls(**{str(name): value for name, value in given.items()})

    def source(self, name: str) -> Faults:
        """Where one wrapper draws its faults. A name that is asked for again is told apart by a number."""
        with self._lock:
            self._sources[name] += 1
            number = self._sources[name]
        return Faults(self, f"{name}#{number}")

    @property
    def injected(self) -> dict[str, int]:
        """How many faults of each kind there were."""
        with self._lock:
            return dict(self._injected)

    def _count(self, fault: str) -> None:
        with self._lock:
            self._injected[fault] += 1

    def __str__(self) -> str:
        return ", ".join([f"seed {self.seed}", *(f"{name} {rate:g}" for name, rate in self.rates.items())])


class Faults:
    """One wrapper's faults, in the order of its calls. Thread-safe."""

    def __init__(self, plan: FaultPlan, name: str):
        self.name = name
        self._plan = plan
        self._random = random.Random(f"{plan.seed}/{name}")
        self._lock = threading.Lock()

    def draw(self, *possible: str) -> str | None:
        """What befalls this call: one of the possible faults, or nothing."""
        with self._lock:
            left = self._random.random()
        for fault in possible:
            left -= self._plan.rates.get(fault, 0.0)
            if left < 0:
                self._plan._count(fault)
                logger.info("fault on purpose in %s: %s", self.name, fault)
                return fault
        return None

    def seconds(self) -> float:
        """How long a delay takes."""
        with self._lock:
            return self._random.uniform(0, self._plan.max_delay)

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        with self._lock:
            return self._random.randrange(n)


def _out_of_memory(where: str) -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(f"fault on purpose in {where}: out of memory")


class FaultyPipe(Pipe):
    """Another pipe with faults, all of them, in both directions. It owns the other pipe.

    Without a fault it is as good as the other: it keeps every promise of `Pipe`. With `drop`, `duplicate` or `reorder`
    the two ends are a tensor apart afterwards, as they would be over an unreliable network; `truncate` sends the first
    half, or leaves the second half of what is received as it was; `death` aborts the other pipe. Messages of a row keep
    their places: `drop` and `duplicate` leave what lay in the slot before, and nothing is reordered.
    """

    def __init__(self, pipe: Pipe, plan: FaultPlan, name: str = "pipe"):
        super().__init__(pipe.num_slots, pipe.slot_bytes)
        self._pipe = pipe
        self._ways = {way: plan.source(f"{name}.{way}") for way in ("send", "recv")}
        self._duplicates = plan.rates.get("duplicate", 0) > 0
        self._woken = threading.Event()
        self._held: torch.Tensor | None = None  # sent before the next one, and to arrive after it
        self._early: torch.Tensor | None = None  # received before the one that was asked for
        self._last: torch.Tensor | None = None

    @property
    def kind(self) -> str:
        return self._pipe.kind

    @property
    def broken(self) -> bool:
        return super().broken or self._pipe.broken

    def close(self, deadline: float) -> None:
        self._woken.set()
        # Not by way of an abort, which would drop what was sent.
        self._pipe.close(deadline)
        self._fail(PipeClosed("the pipe was closed"))
        self._wait_idle(deadline)

    def _check(self, tensor: torch.Tensor) -> None:
        self._pipe._check(tensor)

    def _break(self) -> None:
        self._woken.set()
        self._pipe.abort()

    def _send(self, data: torch.Tensor, deadline: float) -> None:
        possible = [name for name in FAULTS if name != "reorder" or self._held is None]
        fault = self._ways["send"].draw(*possible)
        with self._same_failure():
            self._before(fault, "send", deadline)
            if fault == "reorder":
                self._held = data.clone()
                return
            if fault == "truncate":
                data = data[: data.numel() // 2]
            elif fault == "corrupt":
                data = self._corrupted(data.clone(), "send")
            for _ in range({"drop": 0, "duplicate": 2}.get(fault or "", 1)):
                self._pipe.send(data, deadline)
            if self._held is not None:
                held, self._held = self._held, None
                self._pipe.send(held, deadline)
            if fault == "late":
                self._pause("send", deadline)

    def _recv(self, data: torch.Tensor, deadline: float) -> None:
        can_repeat = self._last is not None and self._last.numel() == data.numel()
        possible = [name for name in FAULTS if name != "duplicate" or can_repeat]
        fault = self._ways["recv"].draw(*possible)
        with self._same_failure():
            self._before(fault, "recv", deadline)
            if fault == "duplicate" and self._last is not None:
                data.copy_(self._last)
                return
            if fault == "drop":
                self._next(data, deadline)
            elif fault == "reorder":
                self._next(data, deadline)
                self._early, early = None, data.clone()
                self._pipe.recv(data, deadline)
                self._early = early
            if fault == "truncate":
                cut = data[data.numel() // 2 :]
                kept = cut.clone()
                self._next(data, deadline)
                cut.copy_(kept)
            elif fault != "reorder":
                self._next(data, deadline)
            if fault == "corrupt":
                self._corrupted(data, "recv")
            if fault == "late":
                self._pause("recv", deadline)
            if self._duplicates:
                self._last = data.clone()

    def _send_row(self, sizes: list[int], fill: Fill, deadline: float) -> None:
        def faulty(i: int, part: torch.Tensor) -> None:
            with self._in_row("send", part, deadline):
                fill(i, part)

        with self._same_failure():
            self._pipe.send_row(sizes, faulty, deadline)

    def _recv_row(self, sizes: list[int], drain: Drain, deadline: float) -> None:
        def faulty(i: int, part: torch.Tensor) -> Callable[[], None] | None:
            with self._in_row("recv", part, deadline):
                pass
            return drain(i, part)

        with self._same_failure():
            self._pipe.recv_row(sizes, faulty, deadline)

    @contextlib.contextmanager
    def _in_row(self, way: str, part: torch.Tensor, deadline: float) -> Iterator[None]:
        """A fault of one message of a row: its bytes, filled inside, are then those that lay there before, or half."""
        fault = self._ways[way].draw(*(name for name in FAULTS if name != "reorder"))
        self._before(fault, way, deadline)
        before = torch.zeros_like(part) if way == "recv" else part.clone()
        yield
        if fault in ("drop", "duplicate"):
            part.copy_(before)
        elif fault == "truncate":
            half = part.numel() // 2
            part[half:] = before[half:]
        elif fault == "corrupt":
            self._corrupted(part, way)
        elif fault == "late":
            self._pause(way, deadline)

    def _before(self, fault: str | None, way: str, deadline: float) -> None:
        if fault == "delay":
            self._pause(way, deadline)
        elif fault == "out_of_memory":
            raise _out_of_memory(self._ways[way].name)
        elif fault == "death":
            raise PeerGone("fault on purpose: the peer died")

    def _next(self, data: torch.Tensor, deadline: float) -> None:
        early, self._early = self._early, None
        if early is None:
            self._pipe.recv(data, deadline)
        elif early.numel() != data.numel():
            raise ProtocolError(f"the peer sent {early.numel()} bytes where {data.numel()} were expected")
        else:
            data.copy_(early)

    def _corrupted(self, data: torch.Tensor, way: str) -> torch.Tensor:
        if data.numel():
            data[self._ways[way].below(data.numel())] ^= 1 << self._ways[way].below(8)
        return data

    def _pause(self, way: str, deadline: float) -> None:
        self._woken.wait(min(self._ways[way].seconds(), max(0.0, deadline - time.monotonic())))
        self._raise_if_broken()

    @contextlib.contextmanager
    def _same_failure(self) -> Iterator[None]:
        """What broke the other pipe breaks this one."""
        try:
            yield
        except (DeadlineExceeded, PeerGone, PipeClosed, ProtocolError) as error:
            raise self._fail(error)  # noqa: B904 - it is the same error, or the first one


class FaultyPipeHost:
    """A `PipeHost` whose pipes are `FaultyPipe`s."""

    def __init__(self, host: PipeHost, plan: FaultPlan, name: str = "pipe"):
        self._host, self._plan, self._name = host, plan, name

    def prepare(self) -> PipeInvite:
        return self._host.prepare()

    def accept(self, invite: PipeInvite, deadline: float, wanted: Callable[[], None] = lambda: None) -> Pipe:
        return FaultyPipe(self._host.accept(invite, deadline, wanted), self._plan, self._name)

    def discard(self, invite: PipeInvite) -> None:
        self._host.discard(invite)

    def close(self) -> None:
        self._host.close()


class FaultyBuffer:
    """A lookup buffer whose consumers are far away. What is not named here is the other buffer's own.

    Lookups and claims: `delay`, `late`, `drop` (the claim is granted and its answer lost, so that its lease ends it),
    `duplicate` (asked twice), `truncate` (fewer blocks), `corrupt` (a transfer id that there is not). `insert`:
    `out_of_memory` (`BufferFull`). `renew` and `release`: `drop`, and `duplicate` for `release`.
    """

    def __init__(self, buffer: LookupBuffer, plan: FaultPlan, name: str = "buffer"):
        self._buffer = buffer
        self._faults = plan.source(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name)

    def insert(self, keys: PrefixKeys, block_ids: np.ndarray, transfer_id: str | None = None) -> Offer:
        if self._faults.draw("out_of_memory"):
            raise BufferFull(len(block_ids) * self._buffer.block_bytes, self._buffer.limit_bytes)
        return self._buffer.insert(keys, block_ids, transfer_id)

    def drop_select(self, keys: PrefixKeys) -> Claim | None:
        return self._ask(lambda: self._buffer.drop_select(keys), keys)

    def select(self, keys: PrefixKeys, min_tokens: int = 0) -> Claim | None:
        return self._ask(lambda: self._buffer.select(keys, min_tokens), keys, min_tokens)

    def find(self, keys: PrefixKeys, min_tokens: int = 0) -> Claim | None:
        return self._ask(lambda: self._buffer.find(keys, min_tokens), keys, min_tokens)

    def claim(self, transfer_id: str, keys: PrefixKeys | None, min_tokens: int = 0) -> Claim | None:
        return self._ask(lambda: self._buffer.claim(transfer_id, keys, min_tokens), keys, min_tokens)

    def renew(self, claim_ids: Iterable[str]) -> list[str]:
        return [] if self._faults.draw("drop") else self._buffer.renew(claim_ids)

    def release(self, claim_id: str, used: bool) -> bool:
        fault = self._faults.draw("drop", "duplicate")
        if fault == "drop":
            return False
        alive = self._buffer.release(claim_id, used)
        if fault == "duplicate":
            self._buffer.release(claim_id, used)
        return alive

    def _ask(self, ask: Callable[[], Claim | None], keys: PrefixKeys | None, min_tokens: int = 0) -> Claim | None:
        fault = self._faults.draw("delay", "late", "drop", "duplicate", "truncate", "corrupt")
        if fault == "delay":
            time.sleep(self._faults.seconds())
        if fault == "duplicate":
            ask()
        claim = ask()
        if fault == "late":
            time.sleep(self._faults.seconds())
        if claim is None or fault == "drop":
            return None
        if fault == "truncate" and keys is not None:
            return _shorter(claim, keys.block_size, min_tokens)
        return dataclasses.replace(claim, transfer_id=claim.transfer_id[::-1] + "?") if fault == "corrupt" else claim


def _shorter(claim: Any, block_size: int, min_tokens: int) -> Any:
    """The same claim on a block less, unless that leaves no more than `min_tokens`."""
    fewer = (claim.num_tokens - 1) // block_size * block_size
    return dataclasses.replace(claim, num_tokens=fewer) if fewer > min_tokens else claim


class FaultyClient:
    """A `BufferClient` with a bad line. What is not named here is the other client's own.

    Lookups: `delay` and `late` (pending for longer), `drop` (no answer), `duplicate` (asked twice), `out_of_memory`,
    `truncate` (fewer blocks), `corrupt` (a transfer id that there is not), `death` (the claim is lost at once).
    `release`: `late`, `drop` (the producer hears that it was not used), `duplicate`.
    """

    def __init__(
        self,
        client: BufferClient,
        plan: FaultPlan,
        name: str = "client",
        clock: Callable[[], float] = time.monotonic,
    ):
        self._client, self._clock = client, clock
        self._faults = plan.source(name)
        self._max_delay = plan.max_delay
        self._lock = threading.Lock()
        self._pending_until: dict[str, float] = {}
        self._dropped: set[str] = set()
        self._sizes: dict[str, tuple[int, int]] = {}  # block size and tokens that are there, by ticket
        self._answers: dict[str, RemoteClaim] = {}
        self._dead: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def find(self, ticket: str, keys: PrefixKeys, min_tokens: int = 0) -> None:
        self._start(ticket, keys, min_tokens, lambda: self._client.find(ticket, keys, min_tokens))

    def find_by_id(
        self, ticket: str, address: str, transfer_id: str, keys: PrefixKeys | None, min_tokens: int = 0
    ) -> None:
        self._start(
            ticket,
            keys,
            min_tokens,
            lambda: self._client.find_by_id(ticket, address, transfer_id, keys, min_tokens),
        )

    def poll(self, ticket: str) -> PendingType | RemoteClaim | UnheardType | None:
        with self._lock:
            if self._clock() < self._pending_until.get(ticket, -math.inf):
                return Pending
            if ticket in self._answers:
                claim = self._answers[ticket]
                self._forget(ticket)
                return claim
            answer = None if ticket in self._dropped else self._client.poll(ticket)
            if answer is Pending:
                return Pending
            block_size, min_tokens = self._sizes.get(ticket, (0, 0))
            if isinstance(answer, RemoteClaim):
                fault = self._faults.draw("late", "truncate", "corrupt", "death")
                if fault == "late":
                    self._answers[ticket] = answer
                    self._pending_until[ticket] = self._clock() + self._faults.seconds()
                    return Pending
                if fault == "truncate" and block_size:
                    answer = _shorter(answer, block_size, min_tokens)
                elif fault == "corrupt":
                    answer = dataclasses.replace(answer, transfer_id=answer.transfer_id[::-1] + "?")
                elif fault == "death":
                    self._dead.add(answer.claim_id)
            self._forget(ticket)
            return answer

    def cancel(self, ticket: str) -> None:
        with self._lock:
            answer = self._answers.get(ticket)
            self._forget(ticket)
        if answer is not None:
            self._client.release(answer, used=False)
        self._client.cancel(ticket)

    def release(self, claim: RemoteClaim, used: bool) -> None:
        fault = self._faults.draw("late", "drop", "duplicate")
        self._dead.discard(claim.claim_id)
        if fault == "late":
            timer = threading.Timer(self._faults.seconds(), self._client.release, (claim, used))
            timer.daemon = True
            timer.start()
            return
        self._client.release(claim, used and fault != "drop")
        if fault == "duplicate":
            self._client.release(claim, used)

    def lost(self, claim: RemoteClaim) -> bool:
        return claim.claim_id in self._dead or self._client.lost(claim)

    def _start(self, ticket: str, keys: PrefixKeys | None, min_tokens: int, ask: Callable[[], None]) -> None:
        fault = self._faults.draw("delay", "drop", "duplicate", "out_of_memory")
        if fault == "out_of_memory":
            raise _out_of_memory(self._faults.name)
        with self._lock:
            self._forget(ticket)
            self._sizes[ticket] = (keys.block_size if keys is not None else 0, min_tokens)
            if fault == "delay":
                self._pending_until[ticket] = self._clock() + self._faults.seconds()
            elif fault == "drop":
                self._dropped.add(ticket)
                self._pending_until[ticket] = self._clock() + self._max_delay
                return
        for _ in range(2 if fault == "duplicate" else 1):
            ask()

    def _forget(self, ticket: str) -> None:
        self._dropped.discard(ticket)
        for known in (self._pending_until, self._sizes, self._answers):
            known.pop(ticket, None)


class _FaultyHalf:
    """What both faulty halves share: a mixin before the half that it breaks. Its names must not be an author's, so
    those of the mixins begin with two underscores.

    Attributes:
        fault_plan: this half's plan.
        fault_source: where it draws its faults.
    """

    fault_plan_given: ClassVar[FaultPlan | None]

    def __init__(self, context: Any):
        given = self.fault_plan_given
        self.fault_plan = FaultPlan.from_options(context.options.extra.get(OPTION)) if given is None else given
        self.fault_source = self.fault_plan.source(f"{type(self).__name__}.{context.rank}")
        logger.warning("%s: faults on purpose: %s", type(self).__name__, self.fault_plan)
        super().__init__(context)


class _FaultyScheduler(_FaultyHalf):
    """`find`: `delay`, `drop`, `out_of_memory`. `granted`: `out_of_memory`. `finished`, `announced` and `save_from`:
    `drop`, `out_of_memory`.
    """

    def __init__(self, context: Any):
        super().__init__(context)
        self.__delayed: dict[str, float] = {}  # when a request that was not asked about yet may be
        self.__asked: set[str] = set()

    def find(self, request: RequestView, num_local_tokens: int) -> Hit | AskAgain | None:
        clock: Callable[[], float] = self.context.clock
        if request.id not in self.__asked and request.id not in self.__delayed:
            fault = self.fault_source.draw("delay", "drop", "out_of_memory")
            if fault == "out_of_memory":
                raise _out_of_memory(self.fault_source.name)
            if fault == "drop":
                return None
            self.__delayed[request.id] = clock() + (self.fault_source.seconds() if fault == "delay" else 0.0)
        if clock() < self.__delayed.get(request.id, -math.inf):
            return ASK_AGAIN
        self.__delayed.pop(request.id, None)
        self.__asked.add(request.id)
        return super().find(request, num_local_tokens)

    def granted(self, request: RequestView, hit: Hit, num_tokens: int) -> Any:
        if self.fault_source.draw("out_of_memory"):
            raise _out_of_memory(self.fault_source.name)
        return super().granted(request, hit, num_tokens)

    def load_ended(self, request: RequestView, hit: Hit, ok: bool) -> None:
        self.__asked.discard(request.id)
        super().load_ended(request, hit, ok)

    def forget(self, request: RequestView) -> None:
        self.__delayed.pop(request.id, None)
        if request.id in self.__asked:
            self.__asked.discard(request.id)
            super().forget(request)

    def finished(self, request: RequestView, blocks: BlockIds) -> Keep | None:
        return None if self.__dropped() else super().finished(request, blocks)

    def announced(self, request: RequestView) -> str | None:
        return None if self.__dropped() else super().announced(request)

    def save_from(self, request: RequestView) -> int | None:
        return None if self.__dropped() else super().save_from(request)

    def __dropped(self) -> bool:
        fault = self.fault_source.draw("drop", "out_of_memory")
        if fault == "out_of_memory":
            raise _out_of_memory(self.fault_source.name)
        return fault == "drop"


class _FaultyWorker(_FaultyHalf):
    """`load`: `drop` (it never begins), `late` (its end is told late), `truncate` (the last block did not arrive),
    `out_of_memory`. `save`: the same but for `truncate`. `kept` and the first `grew` of a hold: `drop`.
    """

    def __init__(self, context: Any):
        super().__init__(context)
        self.__unheard: set[str] = set()

    def load(self, task: LoadTask) -> None:
        fault = self.fault_source.draw("drop", "late", "truncate", "out_of_memory")
        if fault == "truncate":
            last = np.array([len(task.blocks[0]) - 1])
            task.done = lambda: task.fail(KVError("fault on purpose: the last block did not arrive"), last)
        if self.__begins(task, fault):
            super().load(task)

    def save(self, task: SaveTask) -> None:
        if self.__begins(task, self.fault_source.draw("drop", "late", "out_of_memory")):
            super().save(task)

    def __begins(self, task: LoadTask | SaveTask, fault: str | None) -> bool:
        if fault == "out_of_memory":
            raise _out_of_memory(self.fault_source.name)
        if fault == "late":
            done, seconds = task.done, self.fault_source.seconds()

            def end() -> None:
                try:
                    done()
                except TaskEnded as ended:
                    logger.info("%s before it was told late that it was done", ended)

            def done_late() -> None:
                timer = threading.Timer(seconds, end)
                timer.daemon = True
                timer.start()

            task.done = done_late
        return fault != "drop"

    def kept(self, hold_id: str, blocks: BlockIds) -> None:
        if self.fault_source.draw("drop"):
            self.__unheard.add(hold_id)
        else:
            super().kept(hold_id, blocks)

    def grew(self, hold_id: str, first_block: int, blocks: BlockIds, num_blocks: int, fence: Any) -> None:
        if first_block == 0 and self.fault_source.draw("drop"):
            self.__unheard.add(hold_id)
        if hold_id not in self.__unheard:
            super().grew(hold_id, first_block, blocks, num_blocks, fence)

    def let_go(self, hold_id: str) -> None:
        if hold_id in self.__unheard:
            self.__unheard.discard(hold_id)
        else:
            super().let_go(hold_id)


class _FaultyLookups:
    """The lookup buffer and its client of a `PyNcclScheduler`."""

    def __init__(self, context: Any):
        super().__init__(context)
        if self._buffer is not None:
            self._buffer: Any = FaultyBuffer(self._buffer, self.fault_plan)

    def start(self, workers: list[dict[str, Any]]) -> None:
        super().start(workers)
        if self._client is not None:
            self._client: Any = FaultyClient(self._client, self.fault_plan, clock=self.context.clock)


class _FaultyPairs:
    """The pipes of a `PyNcclWorker`. What it reads in place has no faults but those of its two halves, so it does that
    only if the option `pipe` says so."""

    def pipe_kinds(self) -> tuple[str, ...]:
        kinds = super().pipe_kinds()
        return tuple(kind for kind in kinds if kind != "peer") or kinds

    def make_host(self, kind: str) -> FaultyPipeHost:
        return FaultyPipeHost(super().make_host(kind), self.fault_plan)

    def join(self, invite: dict[str, Any], bind_ip: str, deadline: float, wanted: Callable[[], None]) -> Pipe:
        return FaultyPipe(super().join(invite, bind_ip, deadline, wanted), self.fault_plan)


def with_faults(
    connector: type[Connector] | type[Consumer] | type[Producer], plan: FaultPlan | None = None
) -> type[Any]:
    """The same connector with faults in both halves, and of a `PyNcclConnector` in its pipes and lookups, too.

    Args:
        connector: names the two halves.
        plan: shared by everything in this process. Without one each half reads it from the option `faults`, and refuses
            to start if there is none.

    Returns:
        A subclass; its halves have the attribute `fault_plan`.
    """
    scheduler, worker = connector.scheduler_half, connector.worker_half
    lookups = (_FaultyLookups,) if issubclass(scheduler, PyNcclScheduler) else ()
    pairs = (_FaultyPairs,) if issubclass(worker, PyNcclWorker) else ()
    halves = {
        "scheduler_half": _faulty(scheduler, (*lookups, _FaultyScheduler), plan),
        "worker_half": _faulty(worker, (*pairs, _FaultyWorker), plan),
        "option_names": connector.option_names | ({OPTION} if plan is None else set()),
        "__doc__": f"{connector.__name__} with faults on purpose.",
        "__module__": __name__,
    }
    return type(f"Faulty{connector.__name__}", (connector,), halves)


def _faulty(half: type[Any], mixins: tuple[type[Any], ...], plan: FaultPlan | None) -> type[Any]:
    return type(f"Faulty{half.__name__}", (*mixins, half), {"fault_plan_given": plan, "__module__": __name__})


FaultyPyNcclConnector = with_faults(PyNcclConnector)
