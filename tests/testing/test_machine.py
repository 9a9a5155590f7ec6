"""The state machine and the world it runs in: what they promise themselves."""

import time

import pytest
from broken import NATIVE, DropsTheTail, FreesTwice, IgnoresTheSalt, NativeStore, NeverFrees, ShiftsByOneLayer

from kvsdk.errors import ConfigError
from kvsdk.testing import Capabilities, Network, Prompt, Subject, World, capabilities_table, check_histories, replay
from kvsdk.testing.capabilities import DECLARED, IN_PROCESS_HANDOVER, IN_PROCESS_STORE
from kvsdk.testing.in_process import HandOverConnector, StoreConnector

HAND_OVER = Subject(HandOverConnector, IN_PROCESS_HANDOVER)
STORE = Subject(StoreConnector, IN_PROCESS_STORE)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "connector", [DropsTheTail, FreesTwice, IgnoresTheSalt, NeverFrees, ShiftsByOneLayer], ids=lambda one: one.__name__
)
def test_it_finds_what_is_broken(connector, seed):
    capabilities = NATIVE if issubclass(connector, NativeStore) else IN_PROCESS_HANDOVER
    with pytest.raises(AssertionError):
        check_histories(Subject(connector, capabilities), seed=seed, shrink=False)


def test_a_failure_carries_its_shortest_history_which_can_be_played_again():
    subject = Subject(IgnoresTheSalt, NATIVE)
    with pytest.raises(AssertionError) as found:
        check_histories(subject, seed=1, steps=10)
    (note,) = [note for note in found.value.__notes__ if "def test_" in note]
    source = note.replace(f"Subject({subject.name!r}, ...)", "subject")
    assert source != note
    told = {"subject": subject}
    exec(source, told)  # what is pasted is what runs
    assert source.count("'add'") == 2, "two requests are enough to show it"
    with pytest.raises(type(found.value)):
        told["test_this_history"]()


def test_the_same_seed_tries_the_same_histories():
    assert check_histories(HAND_OVER, seed=5, examples=8) == check_histories(HAND_OVER, seed=5, examples=8)


def test_it_is_quick():
    began = time.process_time()
    operations = check_histories(STORE, seed=4, examples=20)
    assert operations / (time.process_time() - began) > 50


@pytest.mark.slow
@pytest.mark.parametrize("subject", [HAND_OVER, STORE, Subject(NativeStore, NATIVE)], ids=lambda one: one.name)
def test_many_more_histories(subject):
    check_histories(subject, examples=1500, steps=80)


def test_a_lease_of_minutes_takes_no_time():
    began = time.process_time()
    with World(HAND_OVER, options={"lease": 480.0}) as world:
        world.run(world.add(0, Prompt(40)))
        world.step(0)
        held = world.engines[0].num_free_blocks
        world.advance(479.0)
        world.step(0)
        assert world.engines[0].num_free_blocks == held
        world.advance(2.0)
        world.step(0)
        world.step(0)
        assert world.engines[0].num_free_blocks > held
    assert time.process_time() - began < 5


def test_a_history_is_played_again():
    replay(
        HAND_OVER,
        [
            ("add", 0, Prompt(30), 1),
            ("run", 0),
            ("step", 0),
            ("add", 1, Prompt(30), 3),
            ("message", "drop next"),
            ("restart", 0),
            ("run", 1),
        ],
        num_blocks=24,
    )


def test_kv_is_read_and_written_around_the_connector():
    with World(STORE, ["kv_both"]) as world:
        number = world.add(0, Prompt(8))
        world.run(number)
        engine = world.engines[0]
        before = engine.peek([1, 2])
        engine.poke([1], before[:, 1:])
        assert (engine.peek([1]) == before[:, 1:]).all()
        engine.poke([1, 2], before)


def test_a_block_that_nobody_granted_is_seen():
    from kvsdk.vllm.audit import Violation

    world = World(STORE)
    try:
        world.add(0, Prompt(8))
        world.engines[0].workers[0].words[0][5, 0, 0, 0] += 1
        with pytest.raises(Violation, match=r"block 5.*no open load"):
            world.step(0)
    finally:
        world.close()


def test_a_network_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match="network="):
        Network.named("no such")


def test_every_capability_has_a_sentence_and_a_row():
    table = capabilities_table()
    for name, sentence in Capabilities.sentences().items():
        assert sentence.endswith(".") and f"`{name}`: {sentence}" in table
    assert len(table.splitlines()) == 2 + len(Capabilities.sentences())
    assert all(name.rpartition(":")[2] in table for name in DECLARED)
