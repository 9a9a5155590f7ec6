"""Contract tests: vLLM's real scheduler and block manager, no compiled code. `make compat` runs them on other releases'
sources.
"""

import pathlib
import sys

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import scripted


@pytest.fixture
def script():
    yield scripted.reset()
    scripted.StoreWorker.delay_saves = False
    scripted.StoreWorker.waiting.clear()


@pytest.fixture
def engine(request):
    """Makes engines; closes them at the end."""
    from kvsdk.vllm.harness import Engine

    made = []

    def make(connector="ScriptedConnector", role="kv_both", policy="recompute", extra=None, **kwargs):
        config = {
            "kv_connector": f"scripted:{connector}"
            if ":" not in connector and connector != "PyNcclConnector"
            else connector,
            "kv_connector_module_path": "kvsdk.vllm.connectors",
            "kv_role": role,
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": extra or {},
        }
        made.append(Engine(config, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()
