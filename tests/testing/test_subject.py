"""What a test module may name, how a connector's class is found, and what a failure says."""

import sys
import types
from types import SimpleNamespace

import pytest
from hypothesis import settings

from kvsdk.connector import Connector
from kvsdk.errors import ConfigError
from kvsdk.testing import FaultPlan, Prompt, Subject, World, suite, with_faults
from kvsdk.testing.capabilities import IN_PROCESS_HANDOVER, IN_PROCESS_STORE
from kvsdk.testing.in_process import HandOverConnector, HandOverWorker, StoreConnector, StoreScheduler, StoreWorker


def module_of(name, **names):
    module = types.ModuleType(name)
    module.connector, module.capabilities = StoreConnector, IN_PROCESS_STORE
    vars(module).update(names)
    return module


def hand_over(subject):
    prompt = Prompt(30)
    with World(subject) as world:
        world.run(world.add(0, prompt))
        world.settle()
        number = world.add(1, prompt)
        world.run(number)
        return world.cached(number)


def test_a_test_module_says_what_is_tested():
    damage = lambda place: None  # noqa: E731
    subject = Subject.of(module_of("test_x", options={"lease": 3.0}, damage=damage))
    assert subject == Subject(StoreConnector, IN_PROCESS_STORE, options={"lease": 3.0}, damage=damage, module="test_x")


def test_a_test_module_without_a_connector_is_refused():
    module = module_of("test_x")
    del module.connector
    with pytest.raises(AttributeError, match="connector"):
        Subject.of(module)


def test_a_class_made_in_a_function_is_found():
    class Mine(StoreConnector):
        pass

    assert hand_over(Subject(Mine, IN_PROCESS_STORE)) == 29


def test_a_class_of_the_main_module_is_found():
    mine = type("Mine", (StoreConnector,), {"__module__": "__main__"})
    assert hand_over(Subject(mine, IN_PROCESS_STORE)) == 29


def test_an_authors_connector_with_faults_is_found():
    faulty = with_faults(StoreConnector, FaultPlan())
    assert hand_over(Subject(faulty, IN_PROCESS_STORE)) == 29


def test_such_classes_cannot_be_in_processes_of_their_own():
    class Mine(Connector):
        scheduler_half, worker_half = StoreScheduler, StoreWorker

    with pytest.raises(ConfigError, match="in no module"):
        Subject(Mine, IN_PROCESS_STORE, processes=True)


def test_no_options_are_fine():
    assert hand_over(Subject(StoreConnector, IN_PROCESS_STORE, options=None)) == 29


def test_a_failed_assertion_carries_its_history_which_can_be_played_again(monkeypatch):
    monkeypatch.setitem(sys.modules, "test_x", module_of("test_x"))

    def test():
        with World(Subject.of(sys.modules["test_x"]), num_blocks=24) as world:
            world.run(world.add(0, Prompt(30)))
            raise AssertionError("something else")

    with pytest.raises(AssertionError) as failed:
        test()
    (note,) = failed.value.__notes__
    assert "num_blocks=24" in note
    told = {}
    exec(note, told)  # what is pasted is what runs
    told["test_this_history"]()


class NeverLoads(HandOverWorker):
    def load(self, task):
        pass


class NeverLoadsConnector(HandOverConnector):
    worker_half = NeverLoads


def test_a_failure_says_what_was_answered_and_counted():
    subject = Subject(NeverLoadsConnector, IN_PROCESS_HANDOVER)
    with pytest.raises(AssertionError, match=r"0 of 30 tokens .* answered \[30, 0\] .*1 loads_expired"):
        suite.BaseAnswers().test_a_prompt_is_loaded_whole(subject, 1, 30)


def test_what_is_declared_and_not_tested_is_named():
    subject = Subject("PyNcclConnector", IN_PROCESS_HANDOVER)
    with pytest.raises(pytest.skip.Exception, match=r"(?s)not tested: lossy .*yields .*verifies .*block_errors "):
        suite.BaseDeclared().test_what_is_declared_is_tested(subject)


def test_of_a_connector_in_a_tests_hands_everything_is_tested():
    suite.BaseDeclared().test_what_is_declared_is_tested(Subject(HandOverConnector, IN_PROCESS_HANDOVER))


def seed_of(request):
    return suite.seed.__wrapped__(request)


def test_a_seed_can_be_given(request, monkeypatch):
    monkeypatch.setenv("KVSDK_SEED", "77")
    assert seed_of(request) == 77


@pytest.mark.parametrize("derandomize", [False, True])
def test_seeds_are_new_each_time_but_on_ci_where_each_test_keeps_its_own(request, monkeypatch, derandomize):
    monkeypatch.delenv("KVSDK_SEED", raising=False)
    other = SimpleNamespace(module=request.module, node=SimpleNamespace(nodeid="a.py::Test::another"))
    default = settings.default
    settings.register_profile("seeds", derandomize=derandomize)
    settings.load_profile("seeds")
    try:
        seeds = {seed_of(request) for _ in range(5)}
        assert len(seeds) == (1 if derandomize else 5)
        assert seed_of(other) not in seeds
        assert max(seeds) < 1 << 31
    finally:
        settings.register_profile("default before", default)
        settings.load_profile("default before")
