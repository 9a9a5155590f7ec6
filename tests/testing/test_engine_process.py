"""Engines in processes of their own."""

import os
import threading

import pytest
from test_suite_pynccl import capabilities, connector, options, ready

from kvsdk.errors import ConfigError
from kvsdk.testing import HandOverConnector, Prompt, Subject, World, engine_process
from kvsdk.testing.capabilities import IN_PROCESS_HANDOVER
from kvsdk.testing.engine_process import EngineFailed

SUBJECT = Subject(connector, capabilities, options=options, ready=ready, processes=True)


def leave_a_thread(engines):
    threading.Thread(target=threading.Event().wait, args=(60,), name="left-behind", daemon=True).start()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_kv_goes_from_process_to_process():
    with World(SUBJECT) as world:
        pids = [engine.pid for engine in world.engines]
        assert len({os.getpid(), *pids}) == 3
        prompt = Prompt(30)
        world.run(world.add(0, prompt))
        number = world.add(1, prompt, 4)
        world.run(number)
        assert world.cached(number) == 29


def test_a_restart_ends_the_process():
    with World(SUBJECT) as world:
        before = world.engines[0].pid
        world.restart(0)
        assert not alive(before)
        assert alive(world.engines[0].pid)


def test_a_process_is_used_again_for_the_next_engine():
    with World(SUBJECT) as world:
        pids = {engine.pid for engine in world.engines}
    with World(SUBJECT) as world:
        assert {engine.pid for engine in world.engines} == pids


def test_an_error_names_what_was_raised_and_where():
    with pytest.raises(EngineFailed, match=r"ConfigError: .*kv_port") as failed:
        World(Subject("PyNcclConnector", capabilities, options={"kv_port": -1}, processes=True))
    assert any("in parse_options" in note for note in failed.value.__notes__)


def test_a_process_that_dies_is_a_failure_at_once():
    with World(SUBJECT) as world:
        victim = world.engines[1]
        os.kill(victim.pid, 9)
        with pytest.raises(EngineFailed, match="died with -9"):
            world.step(1)
        world.restart(1)


def test_threads_that_are_left_are_named(monkeypatch):
    monkeypatch.setattr(engine_process, "END_TIMEOUT", 1.0)
    subject = Subject(connector, capabilities, options=options, ready=leave_a_thread, processes=True)
    with pytest.raises(EngineFailed, match="left-behind"):
        with World(subject):
            pass


def test_a_connector_that_lives_in_one_process_cannot_have_several():
    with pytest.raises(ConfigError, match="processes"):
        Subject(HandOverConnector, IN_PROCESS_HANDOVER, processes=True)
