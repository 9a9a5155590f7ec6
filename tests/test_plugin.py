"""The plugin runs in every process of vLLM, also for people who do not use kvsdk: it must never break one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from kvsdk.vllm import connectors, plugin

FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A process in which nothing of kvsdk is registered yet."""
    registry = {name: loader for name, loader in KVConnectorFactory._registry.items() if name not in connectors.SHIPPED}
    monkeypatch.setattr(KVConnectorFactory, "_registry", registry)
    monkeypatch.setattr(plugin, "_registered", False)
    connectors.targets.cache_clear()
    yield registry
    connectors.targets.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes a throwaway package with entry points and puts it on Python's path."""

    def make(entry_points: str, source: str = "", *, last: bool = False) -> None:
        info = tmp_path / "throwaway-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: throwaway\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[kvsdk.connectors]\n{entry_points}\n")
        (tmp_path / "throwaway.py").write_text(source)
        # Of two packages with the same entry point, the later one on the path would win.
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)] if last else [str(tmp_path), *sys.path])
        monkeypatch.delitem(sys.modules, "throwaway", raising=False)
        connectors.targets.cache_clear()

    yield make
    sys.modules.pop("throwaway", None)


SOURCE = """
from kvsdk.connector import Connector, ConsumerScheduler, ConsumerWorker

class Scheduler(ConsumerScheduler):
    def find(self, request, num_local_tokens):
        return None

class Worker(ConsumerWorker):
    def load(self, task):
        task.done()

class Mine(Connector):
    scheduler_half, worker_half = Scheduler, Worker

class NotAConnector:
    pass
"""


# ---- register()


def test_every_known_name_is_registered(fresh):
    before = set(fresh)
    plugin.register()
    assert set(fresh) - before == set(connectors.targets()) >= {"PyNcclConnector"}


def test_registering_again_does_nothing(fresh, caplog):
    plugin.register()
    before = dict(fresh)
    plugin.register()
    assert fresh == before
    assert not caplog.records


def test_a_name_that_vllm_has_stays_vllms_and_costs_that_name_alone(fresh, install, caplog):
    install("Mine = throwaway:Mine", SOURCE)
    fresh["PyNcclConnector"] = theirs = object()
    plugin.register()
    assert fresh["PyNcclConnector"] is theirs
    assert "Mine" in fresh
    (record,) = caplog.records
    assert "PyNcclConnector is not registered" in record.message
    assert "kv_connector_module_path=kvsdk.vllm.connectors" in record.message


def test_without_vllm_there_is_one_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, FACTORY, None)
    plugin.register()
    (record,) = caplog.records
    assert "kvsdk's connectors are not available: ModuleNotFoundError" in record.message


def test_a_factory_that_has_changed_costs_a_warning(fresh, monkeypatch, caplog):
    monkeypatch.delattr(KVConnectorFactory, "register_connector")
    plugin.register()
    assert "PyNcclConnector is not registered" in caplog.text


@pytest.mark.parametrize(
    "broken", ["Broken = no_such_module:Nope", "Broken = throwaway", "Broken = throwaway:Nope", "Broken = :"]
)
def test_a_broken_entry_point_of_another_package_breaks_only_itself(fresh, install, caplog, broken):
    install(broken, SOURCE)
    plugin.register()
    assert fresh["PyNcclConnector"]().__name__ == "PyNcclConnector"
    with pytest.raises((ImportError, AttributeError, ValueError)):
        fresh["Broken"]()


def test_entry_points_that_cannot_be_read_end_nothing(install, caplog):
    install("this line is no entry point")
    plugin.register()
    assert "kvsdk's connectors are not available" in caplog.text


@pytest.mark.parametrize("last", [False, True], ids=["before-kvsdk", "after-kvsdk"])
def test_another_package_cannot_take_a_name_of_kvsdk(fresh, install, last):
    install("PyNcclConnector = throwaway:Mine", SOURCE, last=last)
    plugin.register()
    assert fresh["PyNcclConnector"]().connector.__module__ == "kvsdk.connectors.pynccl"


# ---- kvsdk.vllm.connectors


def test_a_connector_of_another_package_is_found_by_its_entry_point(fresh, install):
    install("Renamed = throwaway:Mine", SOURCE)
    plugin.register()
    found = fresh["Renamed"]()
    assert found.connector.__module__ == "throwaway"
    assert found is connectors.Renamed


def test_a_connector_is_found_by_module_and_class(install):
    install("", SOURCE)
    found = getattr(connectors, "throwaway:Mine")
    assert (found.__name__, found.connector.__module__) == ("Mine", "throwaway")


def test_a_name_has_one_class(install):
    install("Mine = throwaway:Mine", SOURCE)
    assert connectors.Mine is getattr(connectors, "throwaway:Mine")


def test_an_unknown_name_lists_those_known(install):
    install("Mine = throwaway:Mine", SOURCE)
    with pytest.raises(AttributeError, match=r"'PyNcclConector'.*Mine, PyNcclConnector.*module:Class"):
        getattr(connectors, "PyNcclConector")  # noqa: B009
    assert not hasattr(connectors, "__wrapped__")


def test_a_class_that_is_no_connector_is_refused_by_name(install):
    install("", SOURCE)
    with pytest.raises(TypeError, match=r"NotAConnector.* is not a kvsdk connector: it has no scheduler_half"):
        getattr(connectors, "throwaway:NotAConnector")


# ---- as vLLM does it

CHILD = """
import json, sys, threading
import torch

initialised = []
torch.cuda._lazy_init = lambda *args: initialised.append(True)

from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

found = {"imported by the plugin": [name for name in sys.modules if name.startswith("kvsdk.connectors")]}
found["class"] = repr(KVConnectorFactory.get_connector_class_by_name("PyNcclConnector"))
found["imported by then"] = "kvsdk.connectors.pynccl" in sys.modules
found["threads"] = [thread.name for thread in threading.enumerate()]
found["cuda"] = torch.cuda.is_initialized() or bool(initialised)
print("found", json.dumps(found))
"""


def test_loading_the_class_is_light_as_the_api_server_does_it():
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD], capture_output=True, text=True, timeout=120, check=True
    )
    (line,) = [line for line in child.stdout.splitlines() if line.startswith("found ")]
    assert json.loads(line.removeprefix("found ")) == {
        "imported by the plugin": [],
        "class": "<class 'kvsdk.vllm.connectors.PyNcclConnector'>",
        "imported by then": True,
        "threads": ["MainThread"],
        "cuda": False,
    }
