"""An engine that only holds blocks for others rests, and looks again when it should."""

import pathlib
import queue
import sys
import threading
import time
import types

import numpy as np
import pytest

from kvsdk.demo.servers import free_port
from kvsdk.vllm import wake

pytestmark = pytest.mark.compat


def offer(engine):
    engine.add("a", np.arange(1, 101).tolist(), max_tokens=1)
    engine.run(until=lambda: "a" in engine.finish_reasons)


def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def engine_process(monkeypatch):
    """Stands for vLLM's engine process, whose constructor makes the scheduler: `EngineCoreProc(make)` calls `make`."""

    class EngineCoreProc:
        def __init__(self, make, with_queue=True):
            if with_queue:
                self.input_queue = queue.Queue()
            self.made = make()

    core = types.SimpleNamespace(
        EngineCoreProc=EngineCoreProc, EngineCoreRequestType=types.SimpleNamespace(WAKEUP="wake")
    )
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.core", core)
    monkeypatch.setattr(wake, "INTERVAL", 0.05)
    return EngineCoreProc


def producer(engine, lease):
    return lambda: engine("PyNcclConnector", role="kv_producer", extra={"kv_port": free_port(), "lease": lease})


def test_an_engine_rests_while_blocks_are_held_and_gives_them_back_once_woken(engine, engine_process):
    core = engine_process(producer(engine, lease=0.5))
    p = core.made
    offer(p)
    p.run(max_steps=5)
    assert not p.scheduler.has_requests() and p.connector._scheduler.num_held_blocks == 7
    until(lambda: p.scheduler.has_requests())
    p.run(max_steps=5)
    p.check_at_rest()
    assert p.connector._scheduler.num_held_blocks == 0


def test_it_is_woken_while_blocks_are_held_and_not_after(engine, engine_process):
    core = engine_process(producer(engine, lease=0.3))
    time.sleep(0.2)
    assert core.input_queue.empty()
    offer(core.made)
    core.made.run(max_steps=5)
    assert core.input_queue.get(timeout=5.0) == ("wake", None)
    until(lambda: core.made.scheduler.has_requests())
    core.made.run(max_steps=5)
    time.sleep(0.1)
    while not core.input_queue.empty():
        core.input_queue.get()
    time.sleep(0.2)
    assert core.input_queue.empty()


@pytest.mark.parametrize("where", ["no engine", "no queue"])
def test_where_nothing_can_wake_it_the_engine_steps_while_blocks_are_held(engine, engine_process, where):
    make = producer(engine, lease=0.5)
    p = make() if where == "no engine" else engine_process(make, with_queue=False).made
    offer(p)
    for _ in range(20):
        assert p.step()
    p.run(pause=0.01)
    p.check_at_rest()


def test_held_blocks_go_to_a_new_request_although_nobody_woke_the_engine(engine, engine_process):
    core = engine_process(
        lambda: engine("PyNcclConnector", role="kv_producer", extra={"kv_port": free_port()}, num_blocks=10)
    )
    p = core.made
    offer(p)
    p.run(max_steps=5)
    p.add("b", np.arange(101, 201).tolist(), max_tokens=1)
    p.run(until=lambda: "b" in p.finish_reasons, max_steps=10)
    assert p.outputs["b"] == p.expected(np.arange(101, 201).tolist(), 1)


def test_the_alarm_ends_with_the_connector(engine, engine_process):
    core = engine_process(producer(engine, lease=30))
    alive = lambda: "kvsdk-alarm" in [thread.name for thread in threading.enumerate()]  # noqa: E731
    assert alive()
    core.made.close()
    core.made.close()
    assert not alive()


def test_what_vllm_offers_to_be_woken_by():
    """The names above are those of this release."""
    core = pytest.importorskip("vllm.v1.engine.core", reason="the engine needs more than vLLM's Python sources")
    assert "self.input_queue = queue.Queue" in pathlib.Path(core.__file__).read_text()
    assert core.EngineCoreProc and core.EngineCoreRequestType.WAKEUP
