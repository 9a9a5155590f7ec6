"""Engines with a connector under test, one clock, and a history of everything that was done to them.

Each engine is vLLM's real scheduler and block manager around a stand-in for the model (`kvsdk.vllm.harness`). What a
test does goes through `World`'s operations, which check every promise afterwards and write themselves down: a failure
carries its history as a test that can be pasted.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsdk.connector import Consumer, Producer
from kvsdk.errors import ConfigError
from kvsdk.testing.capabilities import Capabilities
from kvsdk.testing.in_process import Network
from kvsdk.testing.local import importable, where
from kvsdk.transfer_params import announce_params

if TYPE_CHECKING:
    from kvsdk.testing.engine_process import EngineProcess
    from kvsdk.vllm.harness import Engine

HANDOVER = ("kv_producer", "kv_consumer")
BOTH = ("kv_both", "kv_both")

ENGINE = {"num_blocks": 64, "block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 6, "max_model_len": 256}
"""Small blocks and steps: prompts of a few dozen tokens have several blocks and are computed in chunks."""

DEADLINES = {"lease": 30.0, "lookup_timeout": 1.0, "announce_wait": 2.0, "load_timeout": 30.0}


STEP_SECONDS = 0.02
"""Seconds of the world's clock that a step of all engines takes, where no real time passes."""


class NeverEnds(AssertionError):
    """Something waits past every deadline."""


class WrongAnswer(AssertionError):
    """A request ended with other tokens than one server alone would have given."""


class Clock:
    """Seconds that pass when a test says so; on top of real ones for connectors with threads of their own.

    Attributes:
        ahead: seconds that have passed because a test said so.
    """

    def __init__(self, *, real: bool):
        self._real, self.ahead = real, 0.0 if real else 1000.0

    def __call__(self) -> float:
        return self.ahead + (time.monotonic() if self._real else 0.0)

    def advance(self, seconds: float) -> None:
        self.ahead += seconds


@dataclasses.dataclass(frozen=True)
class Place:
    """Which engine options are asked for.

    Attributes:
        index: of this engine in the world.
        role: its `kv_role`.
        roles: those of all engines, by index.
        ports: a free TCP port for each engine; a restarted engine has the same one again.
        folder: an empty folder that all engines of the world share.
    """

    index: int
    role: str
    roles: tuple[str, ...]
    ports: tuple[int, ...]
    folder: str

    @property
    def producer_ports(self) -> list[int]:
        """Ports of the other engines that produce."""
        pairs = enumerate(zip(self.ports, self.roles, strict=True))
        return [port for i, (port, role) in pairs if role != "kv_consumer" and i != self.index]


Options = Mapping[str, Any] | Callable[[Place], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A connector under test.

    Attributes:
        connector: a class of the author's (`kvsdk.connector.Connector` and the like), `module:Class`, a registered
            name, or a class that vLLM could load (of `KVConnectorBase_V1`).
        options: its `kv_connector_extra_config`; may depend on the engine.
        capabilities: what is declared, and therefore tested.
        ready: waits until these engines have found each other, where that takes time. With `processes`, it is called
            in each engine's process, with that engine alone.
        module: name of the test module that `of` took it from.
        processes: each engine runs in a process of its own, as servers do, rather than in the test's.
        damage: damages the last block of what the engine at this place would load next, wherever the connector keeps
            it: in its store, or on its way. Tests of `verifies` and `block_errors` need it.

    Raises:
        ConfigError: `processes` with a connector whose messages are in a test's hands, or which is in no module.
    """

    connector: str | type
    capabilities: Capabilities
    options: Options = dataclasses.field(default_factory=dict)
    ready: Callable[[Sequence[Engine]], None] | None = None
    processes: bool = False
    damage: Callable[[Place], None] | None = None
    module: str | None = None

    def __post_init__(self) -> None:
        if self.processes and self.by_hand:
            raise ConfigError(f"{self.name} sends messages through one process's memory: it cannot have `processes`")
        if self.processes and isinstance(self.connector, type) and not importable(self.connector):
            raise ConfigError(f"{self.connector} is in no module: another process cannot import it")

    @classmethod
    def of(cls, module: Any) -> Subject:
        """The connector that a test module names: see `kvsdk.testing.suite`.

        Raises:
            AttributeError: the module has no `connector` or no `capabilities`.
        """
        names = {field.name for field in dataclasses.fields(cls)} - {"module"}
        given = {name: getattr(module, name) for name in names if hasattr(module, name)}
        return cls(
            **{"connector": module.connector, "capabilities": module.capabilities} | given, module=module.__name__
        )

    @property
    def name(self) -> str:
        """What a `kv_connector` of vLLM's configuration would say."""
        if isinstance(self.connector, str):
            return self.connector
        return ":".join(where(self.connector))

    @property
    def ours(self) -> bool:
        """Whether it is bound to vLLM by kvsdk, rather than vLLM's own kind of class."""
        return isinstance(self.connector, str) or issubclass(self.connector, (Producer, Consumer))

    @property
    def by_hand(self) -> bool:
        """Whether its messages are in a test's hands, and nothing runs in threads: the class says `by_hand = True` and
        sends every message through the `kvsdk.testing.Network` that its option `network` names."""
        kind: Any = self.connector
        if isinstance(kind, str):
            module, _, name = kind.rpartition(":")
            kind = getattr(importlib.import_module(module), name) if module else None
        return getattr(kind, "by_hand", False)

    @property
    def roles(self) -> tuple[str, ...]:
        """The usual pair of engines."""
        return HANDOVER if self.capabilities.keeps else BOTH


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt in few numbers: `length` tokens, of which the first `shared` are those of every family.

    Attributes:
        salt: vLLM's cache salt.
    """

    length: int
    family: int = 1
    shared: int = 0
    salt: str | None = None

    @property
    def tokens(self) -> list[int]:
        shared = min(self.shared, self.length)
        return [*_sequence(0)[:shared], *_sequence(self.family)[: self.length - shared]]


@functools.cache
def _sequence(family: int) -> list[int]:
    return np.random.default_rng(family).integers(1, 900, 512).tolist()


@dataclasses.dataclass
class _Sent:
    engine: int
    prompt: Prompt
    max_tokens: int
    incarnation: int
    params: Mapping[str, Any] | None
    checked: bool = False


class World:
    """Engines with the connector under test.

    Args:
        roles: the engines' `kv_role`s; the subject's usual pair unless given.
        policy: vLLM's `kv_load_failure_policy`.
        options: more options for every engine's connector.
        engine: arguments of `kvsdk.vllm.harness.Engine`, over `ENGINE`.
    """

    def __init__(
        self,
        subject: Subject,
        roles: Sequence[str] | None = None,
        *,
        policy: str = "recompute",
        options: Mapping[str, Any] | None = None,
        **engine: Any,
    ):
        self.subject, self.policy = subject, policy
        self.roles = tuple(roles or subject.roles)
        self.network = Network()
        self.by_hand = subject.by_hand
        self.clock = Clock(real=not subject.by_hand)
        self.deliver_at_once = True
        self.history: list[tuple[Any, ...]] = []
        self.sent: list[_Sent] = []
        self.incarnations = [0] * len(self.roles)
        self._more, self._engine_options = dict(options or {}), engine
        self._folder = tempfile.TemporaryDirectory(prefix="kvsdk-world-", ignore_cleanup_errors=True)
        self._ports = tuple(_free_ports(len(self.roles))) if callable(subject.options) else (0,) * len(self.roles)
        self.engines: list[Engine | EngineProcess] = []
        try:
            for index in range(len(self.roles)):
                self.engines.append(self._make(index))
            self._wait_ready()
        except BaseException:
            self.close()
            raise

    def place(self, index: int) -> Place:
        """Of an engine."""
        return Place(index, self.roles[index], self.roles, self._ports, self._folder.name)

    def _make(self, index: int) -> Engine | EngineProcess:
        subject, role = self.subject, self.roles[index]
        asked = subject.options
        extra = dict(asked(self.place(index)) if callable(asked) else asked or {})
        if self.by_hand:
            extra["network"] = self.network.name
        if subject.ours:
            extra = {**DEADLINES, **extra, **self._more}
            loaded = {"kv_connector": subject.name, "kv_connector_module_path": "kvsdk.vllm.connectors"}
        else:
            extra |= self._more
            module, _, name = subject.name.partition(":")
            loaded = {"kv_connector": name, "kv_connector_module_path": module}
        config = loaded | {
            "kv_role": role,
            "kv_load_failure_policy": self.policy,
            "kv_connector_extra_config": extra,
        }
        options = {**ENGINE, **self._engine_options}
        if subject.processes:
            from kvsdk.testing.engine_process import EngineProcess

            return EngineProcess(config, ahead=self.clock.ahead, ready=subject.ready, audit=True, **options)
        from kvsdk.vllm.harness import Engine

        return Engine(config, clock=self.clock, audit=True, **options)

    def _wait_ready(self) -> None:
        if self.subject.processes:
            for one in self.engines:
                one.wait_ready()
        elif self.subject.ready is not None:
            self.subject.ready(self.engines)

    # ---- operations: each is written into the history, and followed by `check`

    @contextlib.contextmanager
    def _operation(self, *entry: Any) -> Iterator[None]:
        self.history.append(entry)
        try:
            yield
            self.check()
        except Exception as error:
            self.note(error)
            raise

    def note(self, error: Exception) -> None:
        """Add the history to an error, once."""
        if not any("def test_" in note for note in getattr(error, "__notes__", ())):
            error.add_note(self.as_test())

    def add(
        self,
        engine: int,
        prompt: Prompt | int,
        max_tokens: int = 1,
        *,
        after: int | None = None,
    ) -> int:
        """Send a request; returns its number.

        Without `after`, a request to a producer carries `{"do_remote_decode": True}`, which is what proxies send, if
        the connector `finds_by_params`; any other request carries no `kv_transfer_params`.

        Args:
            prompt: or its length.
            after: the number of a request whose answer's `kv_transfer_params` go along, as a proxy would pass them on.
        """
        prompt = Prompt(prompt) if isinstance(prompt, int) else prompt
        number = len(self.sent)
        with self._operation("add", engine, prompt, max_tokens, *([after] if after is not None else [])):
            params = None
            if after is not None:
                params = self.engines[self.sent[after].engine].params.get(self.name(after))
            elif self.subject.capabilities.finds_by_params and self.roles[engine] == "kv_producer":
                params = {"do_remote_decode": True}
            self._send(engine, prompt, max_tokens, params)
        return number

    def _send(self, engine: int, prompt: Prompt, max_tokens: int, params: Mapping[str, Any] | None) -> int:
        number = len(self.sent)
        self.sent.append(_Sent(engine, prompt, max_tokens, self.incarnations[engine], params))
        self.engines[engine].add(
            self.name(number), prompt.tokens, max_tokens=max_tokens, salt=prompt.salt, params=params
        )
        return number

    def announce(
        self,
        producer: int | None,
        consumer: int | None,
        prompt: Prompt | int,
        max_tokens: int = 1,
        *,
        prefill_tokens: int = 1,
        transfer: str | None = None,
    ) -> tuple[int, int]:
        """Send a prompt to two engines at once, with one transfer id, as a proxy that announces transfers does.

        Args:
            producer: None for a proxy whose prefill request never arrives.
            consumer: None for one whose decode request does not.
            max_tokens: of the consumer's answer.
            prefill_tokens: of the producer's.
            transfer: the transfer's id; one that was never used unless given.

        Returns:
            the two requests' numbers, -1 for one that was not sent.
        """
        prompt = Prompt(prompt) if isinstance(prompt, int) else prompt
        entry = ("announce", producer, consumer, prompt, max_tokens, prefill_tokens, transfer)
        with self._operation(*entry[: 7 if transfer else 6 if prefill_tokens != 1 else 5]):
            chosen = producer
            if chosen is None:
                chosen = next(i for i, role in enumerate(self.roles) if role != "kv_consumer" and i != consumer)
            # Where messages are in a test's hands there are no ports; but a proxy always names one.
            params = announce_params(
                transfer or f"transfer-{len(self.sent)}", "127.0.0.1", self._ports[chosen] or 1 + chosen
            )
            second = -1 if consumer is None else self._send(consumer, prompt, max_tokens, params[1])
            first = -1 if producer is None else self._send(producer, prompt, prefill_tokens, params[0])
        return first, second

    def step(self, engine: int, gap: int = 0) -> None:
        """One step of an engine.

        Args:
            gap: messages that arrive between the scheduler's decision and its execution by the workers.
        """
        with self._operation("step", engine, *([gap] if gap else [])):
            self._step(engine, gap)

    def _step(self, engine: int, gap: int = 0) -> None:
        one = self.engines[engine]
        if gap:
            one.between = lambda: [self.network.deliver() for _ in range(gap)]
        one.step()
        one.between = None
        if self.deliver_at_once:
            self.network.deliver_all()
        if not self.by_hand:
            time.sleep(0.0002)  # the connector's threads have something to do

    def abort(self, number: int) -> None:
        """A client goes away."""
        with self._operation("abort", number):
            if self._alive(number) and self.name(number) not in self._engine(number).finish_reasons:
                self._engine(number).abort(self.name(number))

    def advance(self, seconds: float) -> None:
        """Time passes."""
        with self._operation("advance", seconds):
            self._advance(seconds)

    def _advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        if self.subject.processes:
            for one in self.engines:
                one.advance(seconds)

    def restart(self, engine: int) -> None:
        """An engine dies where it stands, and another takes its place; its requests are gone."""
        with self._operation("restart", engine):
            self.engines[engine].kill()
            self.incarnations[engine] += 1
            self.engines[engine] = self._make(engine)

    def reset(self, engine: int) -> None:
        """vLLM's `reset_prefix_cache(reset_connector=True)`."""
        with self._operation("reset", engine):
            self.engines[engine].reset()

    def message(self, what: str, index: int = 0) -> None:
        """`deliver`, `drop`, `duplicate`, `postpone` or `corrupt` the message at `index`; `deliver_all`; or
        `drop next`, `duplicate next`, `corrupt next`: the next message that carries blocks."""
        with self._operation("message", what, *([index] if index else [])):
            if what == "deliver_all":
                self.network.deliver_all()
            elif what.endswith(" next"):
                self.network.armed.append(what.removesuffix(" next"))
            else:
                getattr(self.network, what)(index)

    def play(self, history: Sequence[tuple[Any, ...]]) -> None:
        """Carry out operations as `history` holds them."""
        for operation, *args in history:
            if operation == "add" and len(args) > 3:
                self.add(*args[:3], after=args[3])
            elif operation == "announce":
                self.announce(*args[:4], **dict(zip(("prefill_tokens", "transfer"), args[4:], strict=False)))
            else:
                getattr(self, operation)(*args)

    # ---- what must hold

    def name(self, number: int) -> str:
        """vLLM's request id: never the same on two engines for one prompt."""
        return f"cmpl-{number}-of-{self.sent[number].engine}"

    def _engine(self, number: int) -> Engine | EngineProcess:
        return self.engines[self.sent[number].engine]

    def _alive(self, number: int) -> bool:
        sent = self.sent[number]
        return sent.incarnation == self.incarnations[sent.engine]

    def ended(self, number: int) -> bool:
        return not self._alive(number) or self.name(number) in self._engine(number).finish_reasons

    def answer(self, number: int) -> list[int]:
        return self._engine(number).outputs[self.name(number)]

    def reason(self, number: int) -> str:
        return self._engine(number).finish_reasons[self.name(number)]

    def cached(self, number: int) -> int:
        """Tokens of the prompt that its engine did not compute: loaded, or in its own prefix cache."""
        return self._engine(number).hits[self.name(number)][0]

    def stats(self, name: str, engine: int | None = None) -> float:
        """A counter of the connector's workers, of one engine or of all."""
        chosen = self.engines if engine is None else [self.engines[engine]]
        return sum(one.stats[name] for one in chosen)

    def loading(self, number: int) -> bool:
        """Whether a load of this request is under way."""
        return self.name(number) in self._engine(number).loading

    def check(self) -> None:
        """Every request that has ended was answered as one server alone would have."""
        from kvsdk.vllm.harness import Engine

        for number, sent in enumerate(self.sent):
            if sent.checked or not self._alive(number) or not self.ended(number):
                continue
            sent.checked = True
            reason, answer = self.reason(number), self.answer(number)
            expected = Engine.expected(sent.prompt.tokens, sent.max_tokens, sent.prompt.salt)
            if reason == "error" and self.policy == "fail":
                continue
            if reason == "abort" and answer == expected[: len(answer)]:
                continue
            if reason != "length" or answer != expected:
                raise WrongAnswer(f"request {number} ended by {reason} with {answer}, not {expected}")

    def _progress(self) -> tuple[Any, ...]:
        return (
            sum(self.network.counters.values()),
            *(
                (
                    len(one.finish_reasons),
                    sum(map(len, one.outputs.values())),
                    one.num_computed_tokens,
                    one.num_free_blocks,
                )
                for one in self.engines
            ),
        )

    def run(self, *numbers: int, patience: float = 70.0) -> None:
        """Step all engines, and deliver what they say, until these requests have ended.

        Raises:
            NeverEnds: they had not, after `patience` seconds of the world's clock in which nothing moved.
        """
        with self._operation("run", *numbers):
            by_hand, self.deliver_at_once = self.deliver_at_once, True
            self._run(lambda: all(map(self.ended, numbers)), patience)
            self.deliver_at_once = by_hand

    def _run(self, until: Callable[[], bool], patience: float) -> None:
        last, still, waited, rounds = None, 0, 0.0, 0
        moved = began = time.monotonic()
        while True:
            for engine in range(len(self.engines)):
                self._step(engine)
            self.check()
            if until():
                return
            rounds += 1
            if self.by_hand:
                # Steps take time. Otherwise an engine in which vLLM preempts and resumes a request for want of blocks,
                # again and again, would never see the end of the hold that has them.
                self.clock.advance(STEP_SECONDS)
            if rounds * STEP_SECONDS > patience + 30 if self.by_hand else time.monotonic() - began > 40:
                raise NeverEnds(f"engines are busy and nothing ends: {self._waiting()}")
            now = self._progress()
            if now != last:
                last, still, waited, moved = now, 0, 0.0, time.monotonic()
                continue
            still += 1
            if self.by_hand and still > 4:
                self._advance(0.5)
                waited += 0.5
            elif not self.by_hand and all(map(self.ended, range(len(self.sent)))):
                # Nobody waits for an answer: threads have had half a second for what they still do. After a jump they
                # need real time to see what time it is; kvsdk's own look once a second.
                if time.monotonic() - moved > 0.5 + waited / 15:
                    self._advance(patience / 2)
                    waited += patience / 2
                time.sleep(0.001)
            if waited > patience:
                raise NeverEnds(f"after {patience} s of silence: {self._waiting()}")

    def _waiting(self) -> str:
        waiting = [number for number in range(len(self.sent)) if not self.ended(number)]
        taken = [f"{one.num_blocks - 1 - one.num_free_blocks} of {one.num_blocks - 1}" for one in self.engines]
        return f"requests {waiting} wait; of the engines' blocks {', '.join(taken)} are taken; {self.explain(-1)}"

    def settle(self, patience: float = 70.0) -> None:
        """Deliver everything, let every deadline pass that something waits for, and check that nothing is left.

        Raises:
            NeverEnds: a request, a block or a hold waits past every deadline.
        """
        try:
            self._run(lambda: not self.network.pending and all(one.at_rest for one in self.engines), patience)
            for one in self.engines:
                one.check_at_rest()
        except Exception as error:
            self.note(error)
            raise

    def close(self) -> None:
        """Close every engine. Twice is fine."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._folder.cleanup)
            for one in self.engines:
                stack.callback(one.close)

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: Any) -> None:
        try:
            if error is None:
                self.settle()
            elif isinstance(error, Exception):
                self.note(error)
        finally:
            self.close()

    def as_test(self) -> str:
        """The history so far as the source of a test."""
        arguments = [f"roles={self.roles!r}"]
        if self.policy != "recompute":
            arguments.append(f"policy={self.policy!r}")
        if self._more:
            arguments.append(f"options={self._more!r}")
        arguments += [f"{name}={value!r}" for name, value in self._engine_options.items()]
        lines = "".join(f"            {entry!r},\n" for entry in self.history)
        module = self.subject.module
        subject = (
            f"Subject.of({module})"
            if module
            else f"Subject({self.subject.name!r}, ...),  # with capabilities and options as here"
        )
        return (
            (f"import {module}\n\n" if module else "")
            + "from kvsdk.testing import Prompt, Subject, replay\n\n\n"
            + "def test_this_history():\n"
            + f"    replay(\n        {subject.rstrip(',')}{',' if module else ''}\n"
            + f"        [\n{lines}        ],\n        {', '.join(arguments)},\n    )\n"
        )

    def explain(self, number: int) -> str:
        """What is known about a request's loading, for the message of a test that expected more of it."""
        sent = self.sent[number]
        answers = self.engines[sent.engine].answers.get(self.name(number), [])
        counted = ", ".join(f"{value:.0f} {name}" for name, value in sorted(self._counted().items())) or "nothing"
        return (
            f"its lookups answered {answers} tokens; kv_transfer_params: {sent.params}; all engines counted {counted}"
        )

    def _counted(self) -> collections.Counter[str]:
        return sum((one.stats for one in self.engines), collections.Counter())


def replay(subject: Subject, history: Sequence[tuple[Any, ...]], **world: Any) -> None:
    """Play a history again, then let everything come to rest. Raises what it raised when it was found."""
    with World(subject, **world) as one:
        one.deliver_at_once = False
        one.play(history)
        one.deliver_at_once = True


def _free_ports(count: int) -> list[int]:
    from kvsdk.demo.servers import free_port

    return [free_port() for _ in range(count)]
