"""The conformance suite. An author's whole test file is a connector, its capabilities and one import:

    import shelf
    from kvsdk.testing import Capabilities
    from kvsdk.testing.suite import *

    connector = shelf.ShelfConnector
    capabilities = Capabilities(saves=True, finds_by_prompt=True, partial_tail=True, restores=True)

Four more names are optional: `options`, its `kv_connector_extra_config`, or a function of a `kvsdk.testing.Place` that
returns it; `ready(engines)`, which waits until they have found each other; `damage(place)`, which damages what the
connector has stored, for the tests of `verifies`; and `processes = True`, which runs each engine in a process of its
own. `kvsdk.testing.Subject` says more about each.

The star import brings the `Test...` classes; the `Base...` classes beneath them are not collected until an author
subclasses one, to change or leave out a test by name.

**Tiers.** Classes marked `required` must pass for every connector that loads and that keeps or saves, as far as its
capabilities say; those marked `optional` test what a connector need not be able to do, and are skipped with the
capability's sentence unless it is declared. A test that needs the messages in its hands (`Network`) is skipped for
connectors that have their own.

**When required tests are added.** Only in minor releases, never in a patch: a test file that is green stays green
within a minor release. A new required test is first an optional one for one minor release, and the changelog names it.

Tests that fail print the history that led there as a test that can be pasted. A seed decides about prompts and
histories; it is printed, and with the environment variable `KVSDK_SEED` set to it a run repeats. Each run takes new
seeds, but for one that Hypothesis takes for continuous integration (the environment variable `CI`): a change is judged
there by the same histories each time.
"""

from __future__ import annotations

import functools
import os
import random
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
from hypothesis import settings

from kvsdk.testing.capabilities import Capabilities
from kvsdk.testing.world import BOTH, ENGINE, HANDOVER, STEP_SECONDS, Prompt, Subject, World

BLOCK = ENGINE["block_size"]


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    """The connector under test, from the names of the test's module."""
    return Subject.of(request.module)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Decides about prompts and histories.

    The environment variable `KVSDK_SEED` sets it. Otherwise it is a new one each time, or one of the test's own that
    does not change where Hypothesis has `derandomize` set, as on CI.
    """
    if given := os.environ.get("KVSDK_SEED"):
        value = int(given)
    elif settings.default.derandomize:
        _, _, within_module = request.node.nodeid.partition("::")
        value = zlib.crc32(f"{request.module.__name__}::{within_module}".encode()) >> 1
    else:
        value = random.randrange(1 << 31)
    print(f"KVSDK_SEED={value}")
    return value


_MEANS = {
    "by_hand": "the connector's class does not say `by_hand = True`: its messages do not go through a "
    "`kvsdk.testing.Network`, where a test could lose, double or damage them",
    "damage": "the test module has no `damage(place)`, which would damage what the connector has stored",
}


def needs(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Skip a test unless the subject declares these capabilities; `by_hand` and `damage` are the subject's."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def gated(self: Any, subject: Subject, *args: Any, **more: Any) -> None:
            for name in names:
                if name in _MEANS:
                    if not getattr(subject, name):
                        pytest.skip(_MEANS[name])
                elif not getattr(subject.capabilities, name):
                    pytest.skip(f"{name} is not declared: {Capabilities.sentences()[name]}")
            test(self, subject, *args, **more)

        return gated

    return decorate


def required(cls: type) -> type:
    cls.tier = "required"  # type: ignore[attr-defined]
    return cls


def optional(cls: type) -> type:
    cls.tier = "optional"  # type: ignore[attr-defined]
    return cls


def prefill(world: World, prompt: Prompt) -> int:
    """Have engine 0 compute a prompt, until others can load it; returns the request's number."""
    number = world.add(0, prompt)
    world.run(number)
    if not world.subject.capabilities.keeps:
        world.settle()
    return number


def decode(world: World, prompt: Prompt, after: int | None = None, *, engine: int = 1, max_tokens: int = 4) -> int:
    """Have another engine answer a prompt; returns the request's number. `after` is the prefill's."""
    by_prompt = world.subject.capabilities.finds_by_prompt
    number = world.add(engine, prompt, max_tokens, after=None if by_prompt else after)
    world.run(number)
    return number


def check_loaded(world: World, number: int, tokens: int) -> None:
    """At least the whole blocks of `tokens` were not computed; with `partial_tail`, all but the last token."""
    length = world.sent[number].prompt.length
    whole = min(tokens, length - 1)
    least = whole if world.subject.capabilities.partial_tail else whole // BLOCK * BLOCK
    assert world.cached(number) >= least, (
        f"{world.cached(number)} of {tokens} tokens were loaded for a prompt of {length}; {world.explain(number)}"
    )
    for end in ("loads_expired", "saves_expired", "loads_failed", "saves_failed"):
        assert not world.stats(end), f"{world.stats(end):.0f} {end.replace('_', ' ')} although nothing went wrong"


def again(world: World, prompt: Prompt, before: int) -> int:
    """The number of a prefill of this prompt that nobody has asked for: `before`, or a new one where a lookup names it
    and may have used it up."""
    return before if world.subject.capabilities.finds_by_prompt else prefill(world, prompt)


def begin_load(world: World, prompt: Prompt, after: int) -> int:
    """Have engine 1 load a prompt, up to where the messages of the load are under way; returns the request's number.

    From here on messages are delivered by hand.
    """
    world.deliver_at_once = False
    number = world.add(1, prompt, 4, after=None if world.subject.capabilities.finds_by_prompt else after)
    for _ in range(10):
        world.step(1)
        if world.loading(number):
            return number
        world.message("deliver_all")
    raise AssertionError("no load began")


def prompts(seed: int, count: int, longest: int = 40) -> list[Prompt]:
    rng = random.Random(seed)
    return [
        Prompt(rng.randint(2, longest), rng.randint(1, 3), rng.choice([0, 0, BLOCK, 10]), rng.choice([None, None, "a"]))
        for _ in range(count)
    ]


def _deliveries(world: World, fault: str, which: int) -> Callable[[], None]:
    """Delivers the next two messages at each call; `fault` happens to the `which`-th of all."""
    seen = 0

    def deliver_two() -> None:
        nonlocal seen
        for _ in range(2):
            if world.network.pending:
                if seen == which:
                    world.message(fault)
                seen += 1
                world.message("deliver")

    return deliver_two


@required
class BaseAnswers:
    """Whatever is loaded, the answers are those of one server alone, and nothing is left behind."""

    @pytest.mark.parametrize("length", [2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 10 * BLOCK + 2])
    def test_a_prompt_is_loaded_whole(self, subject: Subject, seed: int, length: int) -> None:
        with World(subject) as world:
            prompt = Prompt(length, family=1 + seed % 9)
            check_loaded(world, decode(world, prompt, prefill(world, prompt)), length)

    def test_a_prompt_of_one_token_is_answered(self, subject: Subject, seed: int) -> None:
        with World(subject) as world:
            prompt = Prompt(1, family=1 + seed % 9)
            decode(world, prompt, prefill(world, prompt))

    @pytest.mark.parametrize("runner", [1, 2])
    @pytest.mark.parametrize("in_flight", [1, 2])
    def test_many_at_once(self, subject: Subject, seed: int, in_flight: int, runner: int) -> None:
        many(subject, seed, async_scheduling=in_flight == 2, model_runner=runner)

    @pytest.mark.parametrize("runner", [1, 2])
    @pytest.mark.parametrize("in_flight", [1, 2])
    def test_pools_so_small_that_vllm_preempts(self, subject: Subject, seed: int, in_flight: int, runner: int) -> None:
        many(subject, seed, num_blocks=18, async_scheduling=in_flight == 2, model_runner=runner)

    def test_without_vllms_own_prefix_cache(self, subject: Subject, seed: int) -> None:
        many(subject, seed, prefix_caching=False)


def many(subject: Subject, seed: int, **engine: Any) -> None:
    """A dozen prompts with shared beginnings, prefilled on one engine and decoded on another, several at a time."""
    with World(subject, **engine) as world:
        for batch in (prompts(seed, 6), prompts(seed + 1, 6)):
            first = [world.add(0, prompt) for prompt in batch]
            world.run(*first)
            by_prompt = subject.capabilities.finds_by_prompt
            second = [
                world.add(1, prompt, 12, after=None if by_prompt else number)
                for number, prompt in zip(first, batch, strict=True)
            ]
            world.run(*second)


@required
class BaseMatching:
    """What is found for a prompt is this prompt's, and the answer stands."""

    def test_another_salt_is_another_prompt(self, subject: Subject, seed: int) -> None:
        with World(subject) as world:
            family = 1 + seed % 9
            first = prefill(world, Prompt(22, family, salt="one"))
            other = decode(world, Prompt(22, family, salt="two"), first)
            assert world.cached(other) == 0, "KV of one salt was loaded for another"
            prompt = Prompt(22, family, salt="one")
            check_loaded(world, decode(world, prompt, again(world, prompt, first)), 22)

    def test_another_prompt_loads_nothing(self, subject: Subject, seed: int) -> None:
        with World(subject) as world:
            family = 1 + seed % 9
            other = decode(world, Prompt(30, family + 1), prefill(world, Prompt(30, family)))
            assert world.cached(other) == 0, "KV of one prompt was loaded for another"

    @needs("shared_prefixes")
    def test_a_shared_beginning_and_no_more_is_loaded(self, subject: Subject, seed: int) -> None:
        with World(subject) as world:
            family = 1 + seed % 9
            first = prefill(world, Prompt(30, family, shared=3 * BLOCK))
            other = decode(world, Prompt(30, family + 1, shared=3 * BLOCK), first)
            assert world.cached(other) <= 3 * BLOCK
            check_loaded(world, other, 3 * BLOCK)

    @pytest.mark.parametrize("more", [1, BLOCK - 1, BLOCK + 1])
    def test_a_longer_prompt_is_not_the_one_that_was_computed(self, subject: Subject, seed: int, more: int) -> None:
        for length in (BLOCK - 1, BLOCK, 3 * BLOCK, 3 * BLOCK + 2):
            with World(subject) as world:
                family = 1 + seed % 9
                prompt = Prompt(length, family)
                first = prefill(world, prompt)
                longer = decode(world, Prompt(length + more, family), first)
                assert world.cached(longer) <= length
                decode(world, prompt, again(world, prompt, first))

    def test_what_an_engine_has_itself_is_left_alone(self, subject: Subject, seed: int) -> None:
        with World(subject) as world:
            family = 1 + seed % 9
            world.run(world.add(1, Prompt(2 * BLOCK, family)))
            prompt = Prompt(9 * BLOCK + 1, family)
            check_loaded(world, decode(world, prompt, prefill(world, prompt)), 9 * BLOCK + 1)

    def test_a_request_that_waits_for_blocks_gets_the_same_answer_each_time(self, subject: Subject, seed: int) -> None:
        with World(subject, num_blocks=18) as world:
            prompt = Prompt(40, family=1 + seed % 9)
            number = prefill(world, prompt)
            world.add(1, Prompt(45, family=11), 15)
            for _ in range(4):
                world.step(1)
            answers = world.engines[1].answers.get(world.name(decode(world, prompt, number)), [])
            settled = [answer for answer in answers if answer]
            assert len(set(settled)) <= 1, f"while it waited for blocks its lookups answered {answers}"


@required
class BaseAborts:
    """A client that goes away leaves nothing behind, and nothing half computed."""

    @pytest.mark.parametrize("after", range(8))
    def test_a_request_is_aborted_after_any_step(self, subject: Subject, seed: int, after: int) -> None:
        for in_flight in (False, True):
            with World(subject, async_scheduling=in_flight) as world:
                world.deliver_at_once = after % 2 == 0
                prompt = Prompt(40, family=1 + seed % 9)
                first = world.add(0, prompt)
                for _ in range(4):
                    world.step(0)
                world.message("deliver_all")
                second = world.add(1, prompt, 6, after=None if subject.capabilities.finds_by_prompt else first)
                for _ in range(after):
                    world.step(0)
                    world.step(1)
                world.abort(second)
                world.step(1)
                world.deliver_at_once = True

    def test_an_aborted_prompt_is_never_loaded(self, subject: Subject, seed: int) -> None:
        for steps in range(1, 4):
            with World(subject) as world:
                prompt = Prompt(60, family=1 + seed % 9)
                first = world.add(0, prompt, 4)
                for _ in range(steps):
                    world.step(0)
                world.abort(first)
                for _ in range(3):
                    world.step(0)
                decode(world, prompt, first)


@required
class BaseBlocks:
    """Blocks that others read stay as they are; blocks that nobody reads go back."""

    @needs("keeps", "leases")
    def test_kept_blocks_go_back_when_the_lease_is_over(self, subject: Subject, seed: int) -> None:
        with World(subject, options={"lease": 480.0} if subject.ours else None) as world:
            free = world.engines[0].num_free_blocks
            prefill(world, Prompt(40, family=1 + seed % 9))
            world.step(0)
            assert world.engines[0].num_free_blocks < free, "nothing is kept"
            world.advance(481.0)
            for _ in range(100):
                world.step(0)
                if world.engines[0].num_free_blocks == free:
                    break
                time.sleep(0 if world.by_hand else 0.01)
            assert world.engines[0].num_free_blocks == free, "a lease of 480 s is over and blocks are not back"

    @needs("keeps")
    def test_kept_blocks_go_back_once_they_were_read(self, subject: Subject, seed: int) -> None:
        with World(subject, options={"lease": 480.0} if subject.ours else None) as world:
            free = world.engines[0].num_free_blocks
            prompt = Prompt(40, family=1 + seed % 9)
            check_loaded(world, decode(world, prompt, prefill(world, prompt)), 40)
            deadline = time.monotonic() + 5.0
            while world.engines[0].num_free_blocks < free:
                assert time.monotonic() < deadline, (
                    f"{free - world.engines[0].num_free_blocks} blocks are kept although a consumer has them, long "
                    "before their lease ends"
                )
                world.step(1)
                world.step(0)

    @needs("keeps", "yields")
    def test_unread_blocks_yield_to_new_requests(self, subject: Subject, seed: int) -> None:
        with World(subject, num_blocks=24) as world:
            for i in range(6):
                number = world.add(0, Prompt(40, family=1 + (seed + i) % 97))
                world.run(number, patience=3.0)

    @needs("keeps", "yields", "by_hand")
    def test_blocks_that_are_being_read_do_not_yield(self, subject: Subject, seed: int) -> None:
        with World(subject, num_blocks=24) as world:
            prompt = Prompt(60, family=1 + seed % 9)
            number = prefill(world, prompt)
            reader = begin_load(world, prompt, number)
            world.add(0, Prompt(60, family=20))
            for _ in range(6):
                world.step(0)
            world.deliver_at_once = True
            world.run(reader)
            check_loaded(world, reader, 60)

    @needs("by_hand")
    def test_blocks_stay_until_they_were_read(self, subject: Subject, seed: int) -> None:
        with World(subject, num_blocks=24, prefix_caching=False) as world:
            prompt = Prompt(40, family=1 + seed % 9)
            world.deliver_at_once = False
            first = world.add(0, prompt)
            for _ in range(6):
                world.step(0)
            if subject.capabilities.keeps:
                world.add(1, prompt, 2, after=None if subject.capabilities.finds_by_prompt else first)
            for i in range(4):
                world.add(0, Prompt(40, family=20 + i), 2)
            for i in range(60):
                world.step(0)
                if i > 20 and i % 3 == 0:
                    world.step(1)
                    world.message("deliver")
            world.deliver_at_once = True
            world.settle()
            decode(world, prompt, first)

    @needs("keeps", "leases", "by_hand")
    def test_what_is_read_after_the_lease_does_not_count(self, subject: Subject, seed: int) -> None:
        with World(subject, num_blocks=18, options={"load_timeout": 90.0} if subject.ours else None) as world:
            prompt = Prompt(40, family=1 + seed % 9)
            reader = begin_load(world, prompt, prefill(world, prompt))
            world.advance(31.0)
            for i in range(4):
                world.add(0, Prompt(40, family=20 + i), 2)
            for _ in range(20):
                world.step(0)
            world.deliver_at_once = True
            world.run(reader)

    def test_a_reset_forgets_and_harms_nobody(self, subject: Subject, seed: int) -> None:
        with World(subject) as world:
            prompt = Prompt(30, family=1 + seed % 9)
            number = prefill(world, prompt)
            world.reset(0)
            again = decode(world, prompt, number)
            world.reset(1)
            assert world.ended(again)


@required
class BaseFailures:
    """What does not arrive, or arrives damaged, costs time and never a token."""

    @needs("lossy", "by_hand")
    @pytest.mark.parametrize("which", range(8))
    def test_a_lost_message(self, subject: Subject, seed: int, which: int) -> None:
        self._one_message(subject, seed, "drop", which)

    @needs("lossy", "by_hand")
    @pytest.mark.parametrize("which", range(8))
    def test_a_message_that_comes_twice(self, subject: Subject, seed: int, which: int) -> None:
        self._one_message(subject, seed, "duplicate", which)

    @needs("verifies", "damage")
    @pytest.mark.parametrize("length", [2, 3 * BLOCK, 30])
    def test_damaged_kv_is_computed_instead(self, subject: Subject, seed: int, length: int) -> None:
        assert subject.damage is not None
        with World(subject) as world:
            prompt = Prompt(length, family=1 + seed % 9)
            number = prefill(world, prompt)
            subject.damage(world.place(1))
            second = decode(world, prompt, number)
            whole = length - 1 if subject.capabilities.partial_tail else (length - 1) // BLOCK * BLOCK
            assert world.cached(second) < max(whole, 1), "all KV was loaded: `damage` damaged none, or nobody looked"
            if subject.capabilities.block_errors and length > 2 * BLOCK:
                assert world.cached(second) >= BLOCK, "the last block was damaged, and the first ones failed as well"
            other = Prompt(30, family=11)
            third = decode(world, other, prefill(world, other))
            assert world.cached(third) >= 29 // BLOCK * BLOCK, f"nothing loads any more; {world.explain(third)}"

    @needs("verifies", "by_hand")
    @pytest.mark.parametrize("which", range(8))
    def test_a_damaged_message(self, subject: Subject, seed: int, which: int) -> None:
        self._one_message(subject, seed, "corrupt", which)

    def _one_message(self, subject: Subject, seed: int, fault: str, which: int) -> None:
        """Something happens to the `which`-th message; all others arrive."""
        with World(subject) as world:
            world.deliver_at_once = False
            prompt = Prompt(30, family=1 + seed % 9)
            deliver_two = _deliveries(world, fault, which)

            def pump(number: int) -> None:
                for _ in range(12):
                    world.step(world.sent[number].engine)
                    deliver_two()

            first = world.add(0, prompt)
            pump(first)
            second = world.add(1, prompt, 4, after=None if subject.capabilities.finds_by_prompt else first)
            pump(second)
            world.deliver_at_once = True

    @needs("lossy", "by_hand")
    @pytest.mark.parametrize("held", range(5))
    def test_an_answer_that_comes_too_late_is_left_alone(self, subject: Subject, seed: int, held: int) -> None:
        """A message is held back until every deadline is over and the blocks belong to others, and then arrives."""
        with World(subject, num_blocks=18) as world:
            world.deliver_at_once = False
            prompt = Prompt(40, family=1 + seed % 9)
            first = world.add(0, prompt)
            for _ in range(8):
                world.step(0)
                world.message("deliver_all")
            second = world.add(1, prompt, 2, after=None if subject.capabilities.finds_by_prompt else first)
            for _ in range(held):
                world.step(1)
                world.step(0)
                world.message("deliver")
            late, world.network.pending = world.network.pending, []
            for _ in range(8):
                world.advance(11.0)
                for _ in range(3):
                    world.step(1)
                    world.step(0)
            world.run(second)
            other = world.add(1, Prompt(44, family=30), 3)
            world.step(1)
            world.network.pending += late
            world.message("deliver_all")
            world.step(1)
            world.deliver_at_once = True
            world.run(other)

    @needs("lossy", "block_errors", "by_hand")
    def test_under_the_policy_fail_a_lost_load_is_an_error(self, subject: Subject, seed: int) -> None:
        with World(subject, policy="fail") as world:
            prompt = Prompt(30, family=1 + seed % 9)
            number = prefill(world, prompt)
            world.deliver_at_once = False
            second = world.add(1, prompt, 4, after=None if subject.capabilities.finds_by_prompt else number)
            for _ in range(20):
                world.step(1)
                world.step(0)
                if any(message.kv is not None for message in world.network.pending):
                    break
                world.message("deliver")
            world.message("drop")
            world.deliver_at_once = True
            world.run(second)
            assert world.reason(second) == "error" and not world.answer(second)


@required
class BaseEnding:
    """Closing is bounded, twice is fine, and no thread is left."""

    def test_closing_twice_is_fine_and_bounded(self, subject: Subject, seed: int) -> None:
        before = set(threading.enumerate())
        world = World(subject, options={"close_timeout": 0.3} if subject.ours else None)
        try:
            prompt = Prompt(30, family=1 + seed % 9)
            decode(world, prompt, prefill(world, prompt))
            began = time.monotonic()
            for engine in world.engines:
                engine.close()
            seconds = time.monotonic() - began
            assert seconds < 3.0, f"closing took {seconds:.1f} s"
        finally:
            world.close()
        deadline = time.monotonic() + 3.0
        while left := [one.name for one in set(threading.enumerate()) - before if one.is_alive()]:
            assert time.monotonic() < deadline, f"threads are left: {left}"
            time.sleep(0.01)

    def test_closing_in_the_middle_of_everything(self, subject: Subject, seed: int) -> None:
        world = World(subject)
        try:
            world.deliver_at_once = False
            for prompt in prompts(seed, 4):
                world.add(0, prompt)
                world.step(0)
                world.add(1, prompt, 3)
                world.step(1)
                world.message("deliver_all")
            began = time.monotonic()
        finally:
            world.close()
        assert time.monotonic() - began < 15.0


@required
class BaseHistories:
    """The state machine: see `kvsdk.testing.machine`."""

    examples: int | None = None
    """Histories to try; by default `EXAMPLES`, and fewer for connectors whose threads need real time."""

    def test_random_histories(self, subject: Subject, seed: int) -> None:
        from kvsdk.testing.machine import EXAMPLES, check_histories

        default = EXAMPLES if subject.by_hand else EXAMPLES // 20
        # Threads do not take the same turns twice: shrinking would look for what may not come again.
        check_histories(subject, seed=seed, examples=self.examples or default, shrink=subject.by_hand)


@optional
class BaseParams:
    """A proxy passes `kv_transfer_params` on."""

    @needs("finds_by_params", "keeps")
    def test_a_transfer_is_found_by_its_params(self, subject: Subject, seed: int) -> None:
        with World(subject) as world:
            prompt = Prompt(30, family=1 + seed % 9)
            number = prefill(world, prompt)
            assert world.engines[0].params[world.name(number)], "the response has no kv_transfer_params"
            second = world.add(1, prompt, 4, after=number)
            world.run(second)
            check_loaded(world, second, 30)


@optional
class BaseTensorParallel:
    """Two ranks on each side."""

    @needs("tensor_parallel")
    def test_two_ranks(self, subject: Subject, seed: int) -> None:
        with World(subject, world_size=2) as world:
            prompt = Prompt(30, family=1 + seed % 9)
            check_loaded(world, decode(world, prompt, prefill(world, prompt)), 30)
        many(subject, seed, world_size=2, async_scheduling=True)


@optional
class BaseLatentAttention:
    """One tensor a layer without heads."""

    @needs("mla")
    def test_a_cache_of_latent_attention(self, subject: Subject, seed: int) -> None:
        with World(subject, mla=True) as world:
            prompt = Prompt(30, family=1 + seed % 9)
            check_loaded(world, decode(world, prompt, prefill(world, prompt)), 30)
        many(subject, seed, mla=True)


@optional
class BasePeers:
    """Servers come and go."""

    @needs("dynamic_peers")
    def test_two_consumers(self, subject: Subject, seed: int) -> None:
        roles = (*HANDOVER, "kv_consumer") if subject.capabilities.keeps else (*BOTH, "kv_both")
        with World(subject, roles) as world:
            for i in range(4):
                prompt = Prompt(30, family=1 + (seed + i) % 97)
                check_loaded(world, decode(world, prompt, prefill(world, prompt), engine=1 + i % 2), 30)

    @needs("survives_restart")
    def test_a_producer_that_died_is_replaced(self, subject: Subject, seed: int) -> None:
        with World(subject) as world:
            family = 1 + seed % 9
            prompt = Prompt(30, family)
            decode(world, prompt, prefill(world, prompt))
            world.add(0, Prompt(40, family + 20))
            world.step(0)
            world.restart(0)
            self._until_loaded(world, family + 40)

    @needs("survives_restart")
    def test_a_consumer_that_died_is_replaced(self, subject: Subject, seed: int) -> None:
        with World(subject) as world:
            family = 1 + seed % 9
            prompt = Prompt(30, family)
            number = prefill(world, prompt)
            world.add(1, prompt, 4, after=None if subject.capabilities.finds_by_prompt else number)
            world.step(1)
            world.restart(1)
            self._until_loaded(world, family + 40)

    @needs("restores")
    def test_what_was_saved_outlives_the_server(self, subject: Subject, seed: int) -> None:
        with World(subject) as world:
            prompt = Prompt(30, family=1 + seed % 9)
            prefill(world, prompt)
            world.restart(0)
            check_loaded(world, decode(world, prompt, engine=0), 30)

    def _until_loaded(self, world: World, family: int) -> None:
        """Peers may need seconds to find each other again; nobody need restart for it."""
        deadline = time.monotonic() + (0.0 if world.by_hand else 20.0)
        while True:
            family += 1
            prompt = Prompt(30, family)
            number = decode(world, prompt, prefill(world, prompt))
            if world.cached(number) >= 30 // BLOCK * BLOCK:
                return
            assert time.monotonic() < deadline, (
                f"nothing is loaded since the peer was replaced; {world.explain(number)}"
            )
            time.sleep(0.1)


@optional
class BaseEarlyAnnouncement:
    """A proxy sends a prompt to both servers at once, and it comes over while it is computed."""

    WAIT = 20.0
    """Seconds that an announced transfer may take to begin; one that is over is given up long before."""

    def world(self, subject: Subject, announce_wait: float = WAIT, **engine: Any) -> World:
        options = {"announce_wait": announce_wait, "lookup_timeout": 5.0, "load_timeout": 5.0}
        return World(subject, options=options if subject.ours else None, **engine)

    @needs("early_announcement")
    @pytest.mark.parametrize("runner", [1, 2])
    @pytest.mark.parametrize("in_flight", [1, 2])
    def test_a_part_is_there_before_the_prompt_is_computed(
        self, subject: Subject, seed: int, in_flight: int, runner: int
    ) -> None:
        with self.world(subject, async_scheduling=in_flight == 2, model_runner=runner) as world:
            prompt = Prompt(5 * ENGINE["max_num_batched_tokens"] + 3, family=1 + seed % 9)
            first, second = world.announce(0, 1, prompt, 4)
            step_both(world, 2)
            until(world, lambda: world.engines[1].written > 0, "nothing comes over while the prompt is computed")
            assert not world.ended(first)
            world.run(first, second)
            check_loaded(world, second, prompt.length)

    @needs("early_announcement")
    @pytest.mark.parametrize("prefill_tokens", [1, 5])
    def test_a_prompt_is_loaded_whole(self, subject: Subject, seed: int, prefill_tokens: int) -> None:
        with self.world(subject) as world:
            for i, length in enumerate([2, BLOCK - 1, BLOCK, BLOCK + 1, 24, 25, 70]):
                prompt = Prompt(length, family=1 + (seed + i) % 97)
                first, second = world.announce(0, 1, prompt, 4, prefill_tokens=prefill_tokens)
                world.run(first, second)
                check_loaded(world, second, length)

    @needs("early_announcement")
    def test_the_decode_server_may_be_the_first_to_know(self, subject: Subject, seed: int) -> None:
        with self.world(subject) as world:
            first, second = world.announce(0, 1, Prompt(50, family=1 + seed % 9), 4)
            for _ in range(10):
                step_and_wait(world, 1)
            world.run(first, second)
            check_loaded(world, second, 50)

    @needs("early_announcement")
    def test_a_prompt_of_one_token_is_answered(self, subject: Subject, seed: int) -> None:
        with self.world(subject, announce_wait=0.5) as world:
            world.run(*world.announce(0, 1, Prompt(1, family=1 + seed % 9), 4))

    @needs("early_announcement")
    @pytest.mark.parametrize("side", ["producer", "consumer", "both"])
    def test_what_a_server_has_itself_is_left_alone(self, subject: Subject, seed: int, side: str) -> None:
        with self.world(subject) as world:
            family, shared = 1 + seed % 9, 5 * BLOCK
            start = Prompt(shared + 1, family, shared)
            for engine, name in enumerate(["producer", "consumer"]):
                if side in (name, "both"):
                    world.run(world.add(engine, start))
            before = world.engines[1].written
            prompt = Prompt(70, family + 20, shared)
            first, second = world.announce(0, 1, prompt, 4)
            world.run(first, second)
            check_loaded(world, second, prompt.length)
            moved = world.engines[1].written - before
            assert moved <= -(-prompt.length // BLOCK) - (0 if side == "producer" else shared // BLOCK), (
                f"{moved} blocks moved"
            )

    @needs("early_announcement", "tensor_parallel")
    def test_two_ranks(self, subject: Subject, seed: int) -> None:
        with self.world(subject, world_size=2, async_scheduling=True) as world:
            prompt = Prompt(70, family=1 + seed % 9)
            first, second = world.announce(0, 1, prompt, 4)
            world.run(first, second)
            check_loaded(world, second, prompt.length)

    @needs("early_announcement")
    @pytest.mark.parametrize("runner", [1, 2])
    @pytest.mark.parametrize("in_flight", [1, 2])
    def test_pools_so_small_that_vllm_preempts(self, subject: Subject, seed: int, in_flight: int, runner: int) -> None:
        self.small(subject, seed, async_scheduling=in_flight == 2, model_runner=runner)

    @needs("early_announcement")
    def test_a_preempted_prompt_is_computed_in_other_blocks(self, subject: Subject, seed: int) -> None:
        self.small(subject, seed, async_scheduling=True, prefix_caching=False)

    def small(self, subject: Subject, seed: int, **engine: Any) -> None:
        with self.world(subject, num_blocks=18, **engine) as world:
            for batch in (prompts(seed, 5), prompts(seed + 1, 5)):
                sent = [
                    world.announce(0, 1, prompt, 12, prefill_tokens=1 if i % 2 else 10)
                    for i, prompt in enumerate(batch)
                ]
                world.run(*(number for pair in sent for number in pair))

    @needs("early_announcement")
    def test_a_prefill_that_is_aborted_costs_a_computation(self, subject: Subject, seed: int) -> None:
        with self.world(subject) as world:
            for steps in range(1, 6):
                prompt = Prompt(100, family=steps + seed % 97)
                first, second = world.announce(0, 1, prompt, 4)
                step_both(world, steps)
                world.abort(first)
                self.soon(world, second)

    @needs("early_announcement")
    def test_a_decode_that_is_aborted_leaves_nothing(self, subject: Subject, seed: int) -> None:
        with self.world(subject) as world:
            for steps in range(6):
                prompt = Prompt(100, family=steps + seed % 97)
                first, second = world.announce(0, 1, prompt, 4)
                step_both(world, steps)
                world.abort(second)
                world.run(first)

    @needs("early_announcement")
    def test_a_transfer_that_was_broken_off_is_neither_found_nor_waited_for(self, subject: Subject, seed: int) -> None:
        with self.world(subject) as world:
            prompt = Prompt(100, family=1 + seed % 9)
            first, _ = world.announce(0, None, prompt, transfer="broken-off")
            world.step(0)
            world.abort(first)
            world.run(world.add(0, Prompt(9, family=30)))
            _, second = world.announce(None, 1, prompt, 4, transfer="broken-off")
            self.soon(world, second)
            answers = world.engines[1].answers.get(world.name(second), [])
            assert not any(answers), f"the prefill was aborted, and a lookup answered {answers} tokens"

    @needs("early_announcement")
    def test_a_transfer_that_never_begins_is_waited_for_and_then_computed(self, subject: Subject, seed: int) -> None:
        with self.world(subject, announce_wait=0.5) as world:
            began = world.clock()
            _, second = world.announce(None, 1, Prompt(50, family=1 + seed % 9), 4)
            world.run(second)
            seconds = world.clock() - began
            assert world.cached(second) == 0
            assert not subject.ours or 0.4 < seconds < 10, f"with announce_wait=0.5 it was waited for {seconds:.1f} s"

    @needs("early_announcement")
    def test_an_id_that_comes_again_is_another_transfer(self, subject: Subject, seed: int) -> None:
        with self.world(subject, announce_wait=1.0) as world:
            for i in range(3):
                first, second = world.announce(0, 1, Prompt(50, family=i + seed % 97), 4, transfer="again")
                world.run(first, second)

    @needs("early_announcement", "by_hand")
    @pytest.mark.parametrize("again", [False, True])
    def test_what_is_read_after_the_prefill_was_aborted_does_not_count(
        self, subject: Subject, seed: int, again: bool
    ) -> None:
        """The read comes late: the blocks have another prompt's KV, and perhaps the transfer id stands for it."""
        with self.world(subject, num_blocks=18) as world:
            family = 1 + seed % 9
            world.deliver_at_once = False
            first, second = world.announce(0, 1, Prompt(60, family), 4, prefill_tokens=8, transfer="late")
            for _ in range(4):
                world.step(0)
            for _ in range(10):
                world.step(1)
                if world.loading(second):
                    break
                world.message("deliver_all")
            assert world.loading(second)
            world.abort(first)
            world.step(0)
            if again:
                world.announce(0, None, Prompt(60, family + 20), transfer="late")
            else:
                world.add(0, Prompt(60, family + 20))
            for _ in range(6):
                world.step(0)
            world.deliver_at_once = True
            world.run(second)

    @needs("early_announcement", "lossy", "by_hand")
    @pytest.mark.parametrize("fault", ["drop", "duplicate", "corrupt", "postpone"])
    def test_one_message(self, subject: Subject, seed: int, fault: str) -> None:
        """Something happens to one message, be it the first or a later one; all others arrive."""
        if fault == "corrupt" and not subject.capabilities.verifies:
            fault = "drop"
        for which in range(10):
            with self.world(subject) as world:
                world.deliver_at_once = False
                world.announce(0, 1, Prompt(80, family=1 + seed % 9), 4)
                deliver_two = _deliveries(world, fault, which)
                for _ in range(14):
                    world.step(0)
                    world.step(1)
                    world.advance(STEP_SECONDS)
                    deliver_two()
                world.deliver_at_once = True

    def soon(self, world: World, number: int) -> None:
        """The request is answered long before anybody stops to wait for its transfer."""
        began = world.clock()
        world.run(number)
        seconds = world.clock() - began
        assert seconds < self.WAIT / 2, f"it took {seconds:.1f} s: a transfer that is over was waited for"


def step_both(world: World, rounds: int) -> None:
    for _ in range(rounds):
        world.step(0)
        world.step(1)


def step_and_wait(world: World, engine: int) -> None:
    """A step, and what else takes time meanwhile."""
    world.step(engine)
    if world.by_hand:
        world.advance(STEP_SECONDS)
    else:
        time.sleep(0.002)


def until(world: World, done: Callable[[], bool], otherwise: str) -> None:
    """Step the consumer, and nobody else, until something has happened."""
    deadline, rounds = time.monotonic() + 20.0, 0
    while not done():
        rounds += 1
        assert rounds < 200 if world.by_hand else time.monotonic() < deadline, f"{otherwise}; {world.explain(-1)}"
        step_and_wait(world, 1)


@optional
class BaseDeclared:
    """Says what the suite leaves open."""

    UNTESTED: ClassVar[Mapping[str, str]] = {
        "push": "the suite does not see which side begins",
        "unequal_tensor_parallel": "the suite has no test of it",
        "hybrid_groups": "the suite has no test of it",
    }

    def test_what_is_declared_is_tested(self, subject: Subject) -> None:
        can = subject.capabilities
        reasons = {name: reason for name, reason in self.UNTESTED.items() if getattr(can, name)}
        if not subject.by_hand:
            by_hand = _MEANS["by_hand"]
            reasons |= {"lossy": by_hand} if can.lossy else {}
            reasons |= {"yields": f"only half of it, that unread blocks go back: {by_hand}"} if can.yields else {}
            if subject.damage is None:
                reasons |= {name: _MEANS["damage"] for name in ("verifies", "block_errors") if getattr(can, name)}
        if reasons:
            pytest.skip("declared and not tested: " + "; ".join(f"{name} ({why})" for name, why in reasons.items()))


class TestAnswers(BaseAnswers):
    pass


class TestMatching(BaseMatching):
    pass


class TestAborts(BaseAborts):
    pass


class TestBlocks(BaseBlocks):
    pass


class TestFailures(BaseFailures):
    pass


class TestEnding(BaseEnding):
    pass


class TestHistories(BaseHistories):
    pass


class TestParams(BaseParams):
    pass


class TestTensorParallel(BaseTensorParallel):
    pass


class TestLatentAttention(BaseLatentAttention):
    pass


class TestPeers(BasePeers):
    pass


class TestEarlyAnnouncement(BaseEarlyAnnouncement):
    pass


class TestDeclared(BaseDeclared):
    pass


__all__ = [
    "TestAborts",
    "TestAnswers",
    "TestBlocks",
    "TestDeclared",
    "TestEarlyAnnouncement",
    "TestEnding",
    "TestFailures",
    "TestHistories",
    "TestLatentAttention",
    "TestMatching",
    "TestParams",
    "TestPeers",
    "TestTensorParallel",
    "seed",
    "subject",
]
