"""A Hypothesis state machine over engines with the connector under test.

It adds requests with shared prefixes, steps any engine, aborts, lets time pass, kills and restarts engines, resets
caches, and, where a test holds the messages (`Subject.by_hand`), delivers, drops, duplicates, postpones and corrupts
them. Small pools make vLLM preempt; small steps make it compute prompts in chunks. After every step the audit of
`kvsdk.vllm.audit` and the answers are checked; at the end everything must come to rest. A failure carries its shortest
history as a test that can be pasted.
"""

from __future__ import annotations

from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from kvsdk.testing.world import BOTH, HANDOVER, Prompt, Subject, World

EXAMPLES = 120
"""Histories that `check_histories` tries unless told otherwise."""

STEPS = 40
"""Most operations in one of them."""

_some = st.integers(0, 7)


class ConnectorMachine(RuleBasedStateMachine):
    """Histories of one connector; `machine_of` makes a subclass for it."""

    subject: Subject
    world: World | None = None
    count = 0
    failed = False

    @initialize(
        third=st.booleans(),
        num_blocks=st.sampled_from([16, 24, 64]),
        asynchronous=st.booleans(),
        runner=st.sampled_from([1, 2]),
        ranks=st.sampled_from([1, 1, 1, 2]),
        prefix_caching=st.sampled_from([True, True, True, False]),
    )
    def start(
        self, third: bool, num_blocks: int, asynchronous: bool, runner: int, ranks: int, prefix_caching: bool
    ) -> None:
        can = self.subject.capabilities
        roles = HANDOVER if can.keeps else BOTH
        if third and can.dynamic_peers:
            roles = (*roles, roles[1])
        engine: dict[str, Any] = {"num_blocks": num_blocks, "async_scheduling": asynchronous, "model_runner": runner}
        if ranks > 1 and can.tensor_parallel:
            engine["world_size"] = ranks
        if not prefix_caching:
            engine["prefix_caching"] = False
        if can.early_announcement and self.subject.ours and not self.subject.by_hand:
            # A load may wait for a prompt that is computed only once another one's blocks are back; in real time.
            engine["options"] = {"load_timeout": 5.0}
        self.world = World(self.subject, roles, **engine)
        self.world.deliver_at_once = not self.subject.by_hand

    def _do(self, operation: str, *args: Any, **more: Any) -> Any:
        assert self.world is not None
        type(self).count += 1
        self.failed = True
        answer = getattr(self.world, operation)(*args, **more)
        self.failed = False
        return answer

    def _engine(self, number: int) -> int:
        assert self.world is not None
        return number % len(self.world.engines)

    # ---- requests

    @rule(
        engine=_some,
        length=st.integers(1, 40),
        family=st.integers(1, 3),
        shared=st.sampled_from([0, 0, 4, 6, 12]),
        salt=st.sampled_from([None, None, None, "pepper"]),
        max_tokens=st.integers(1, 8),
    )
    def add(self, engine: int, length: int, family: int, shared: int, salt: str | None, max_tokens: int) -> None:
        self._do("add", self._engine(engine), Prompt(length, family, shared, salt), max_tokens)

    @rule(length=st.integers(2, 40), family=st.integers(1, 3), shared=st.sampled_from([0, 4, 12]))
    def prefill(self, length: int, family: int, shared: int) -> None:
        """A prompt is computed by the first engine, until others can load it."""
        self._do("run", self._do("add", 0, Prompt(length, family, shared)))
        self._do("step", 0)
        self._do("message", "deliver_all")

    @precondition(lambda self: self.world is not None and self.world.sent)
    @rule(engine=_some, which=_some, more=st.sampled_from([0, 0, 1, 5]), by_params=st.booleans())
    def hand_over(self, engine: int, which: int, more: int, by_params: bool) -> None:
        """A prompt that was sent before, to another engine or the same, perhaps a little longer."""
        assert self.world is not None
        number = -1 - which % len(self.world.sent)
        number += len(self.world.sent)
        prompt = self.world.sent[number].prompt
        prompt = Prompt(prompt.length + more, prompt.family, prompt.shared, prompt.salt)
        can = self.subject.capabilities
        params = can.finds_by_params and (by_params or not can.finds_by_prompt) and not more
        after = number if params and self.world.ended(number) else None
        consumers = [i for i, role in enumerate(self.world.roles) if role != "kv_producer"]
        self._do("add", consumers[engine % len(consumers)], prompt, 3, after=after)

    @precondition(lambda self: self.subject.capabilities.early_announcement)
    @rule(
        engines=st.sampled_from([(0, 1), (0, 1), (0, 2), (0, 1), (None, 1), (0, None)]),
        length=st.integers(1, 48),
        family=st.integers(1, 3),
        shared=st.sampled_from([0, 0, 4, 12]),
        salt=st.sampled_from([None, None, None, "pepper"]),
        max_tokens=st.integers(1, 8),
        prefill_tokens=st.sampled_from([1, 1, 1, 5]),
        transfer=st.sampled_from([None, None, None, None, "one", "two"]),
        rounds=st.sampled_from([0, 0, 1, 2, 3]),
    )
    def announce(
        self,
        engines: tuple[int | None, ...],
        length: int,
        family: int,
        shared: int,
        salt: str | None,
        max_tokens: int,
        prefill_tokens: int,
        transfer: str | None,
        rounds: int,
    ) -> None:
        """A prompt is sent to a producer and to a consumer at once, or to one of them alone; perhaps with a transfer id
        that was used before. Then both do some of it.
        """
        assert self.world is not None
        producer, consumer = engines = tuple(
            None if one is None else min(one, len(self.world.engines) - 1) for one in engines
        )
        prompt = Prompt(length, family, shared, salt)
        self._do("announce", producer, consumer, prompt, max_tokens, prefill_tokens=prefill_tokens, transfer=transfer)
        for _ in range(rounds):
            for engine in engines:
                if engine is not None:
                    self._do("step", engine)
            if self.subject.by_hand:
                self._do("message", "deliver_all")

    @precondition(lambda self: self.world is not None and self.world.sent)
    @rule(which=_some)
    def abort(self, which: int) -> None:
        assert self.world is not None
        self._do("abort", len(self.world.sent) - 1 - which % len(self.world.sent))

    # ---- time and engines

    @rule(engine=_some, times=st.integers(1, 6), gap=st.sampled_from([0, 0, 0, 1, 2]))
    def step(self, engine: int, times: int, gap: int) -> None:
        for _ in range(times):
            self._do("step", self._engine(engine), gap)

    @rule(times=st.integers(1, 6))
    def step_all(self, times: int) -> None:
        assert self.world is not None
        for _ in range(times):
            for engine in range(len(self.world.engines)):
                self._do("step", engine)
            if self.subject.by_hand:
                self._do("message", "deliver_all")

    @rule(seconds=st.sampled_from([0.02, 0.02, 0.5, 2.0, 11.0, 31.0, 480.0]))
    def advance(self, seconds: float) -> None:
        self._do("advance", seconds)

    @precondition(lambda self: self.subject.capabilities.survives_restart)
    @rule(engine=_some, really=st.sampled_from([False, False, True]))
    def restart(self, engine: int, really: bool) -> None:
        if really:
            self._do("restart", self._engine(engine))

    @rule(engine=_some)
    def reset(self, engine: int) -> None:
        self._do("reset", self._engine(engine))

    # ---- messages

    @precondition(lambda self: self.world is not None and self.world.network.pending)
    @rule(what=st.sampled_from(["deliver", "deliver", "deliver_all", "drop", "duplicate", "postpone"]), index=_some)
    def message(self, what: str, index: int) -> None:
        if what in ("drop", "duplicate") and not self.subject.capabilities.lossy:
            what = "deliver"
        self._do("message", what, index)

    @precondition(
        lambda self: self.world is not None and self.world.network.pending and self.subject.capabilities.verifies
    )
    @rule(index=_some)
    def corrupt(self, index: int) -> None:
        self._do("message", "corrupt", index)

    @precondition(lambda self: self.subject.by_hand and self.subject.capabilities.lossy)
    @rule(what=st.sampled_from(["drop next", "duplicate next", "corrupt next"]))
    def next_blocks(self, what: str) -> None:
        if what == "corrupt next" and not self.subject.capabilities.verifies:
            what = "drop next"
        self._do("message", what)

    def teardown(self) -> None:
        if self.world is None:
            return
        try:
            if not self.failed:
                self.world.deliver_at_once = True
                self.world.settle()
        finally:
            self.world.close()


def machine_of(subject: Subject) -> type[ConnectorMachine]:
    """The state machine of a connector. `.TestCase` is a `unittest.TestCase` for those who want one."""
    return type(f"MachineOf{subject.name.rpartition(':')[2]}", (ConnectorMachine,), {"subject": subject})


def check_histories(
    subject: Subject,
    *,
    seed: int | None = None,
    examples: int = EXAMPLES,
    steps: int = STEPS,
    shrink: bool = True,
) -> int:
    """Try histories until one breaks a promise.

    Args:
        seed: the same one tries the same histories, for a connector without threads.
        shrink: look for the shortest history that fails.

    Returns:
        How many operations were carried out.

    Raises:
        AssertionError: and whatever else a connector did; with the history as a note.
    """
    machine = machine_of(subject)
    if seed is not None:
        machine = hypothesis.seed(seed)(machine)
    phases = [hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])]
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
    )
    run_state_machine_as_test(machine, settings=settings)
    return machine.count
