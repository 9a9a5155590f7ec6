"""An author's package, built and installed beside an installed kvsdk, passes its own tests; no source tree is near."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

# A wheel is built, and a whole suite runs in it: over a minute.
pytestmark = pytest.mark.slow

pytest.importorskip("vllm", reason="vLLM is not installed")

ROOT = pathlib.Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples/my_connector"

# A plugin of the inner pytest: what was imported, when its tests have run.
ONLY_INSTALLED = """
import pathlib
import sys

HERE = pathlib.Path(__file__).parent


def pytest_sessionfinish(session):
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    ours = {name: file for name, file in files.items() if name.partition(".")[0] in ("kvsdk", "my_connector") and file}
    print("imported from elsewhere:", [file for file in ours.values() if HERE not in pathlib.Path(file).parents])
    print("imported:", len(ours))
"""

ASK_VLLM = """
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.plugins import load_general_plugins

load_general_plugins()
config = KVTransferConfig(kv_connector="FileConnector", kv_role="kv_both")
print("found:", KVConnectorFactory.get_connector_class(config).connector.__module__)
"""


def run(*command, cwd, **env):
    """What a command printed; fails with all of it unless the command succeeds within its time."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with kvsdk, from its wheel, and the example, and nothing else."""
    work = tmp_path_factory.mktemp("author")
    sources, target = work / "sources", work / "installed"
    ignore = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "kvsdk", sources / "kvsdk/kvsdk", ignore=ignore)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, sources / "kvsdk")
    shutil.copytree(EXAMPLE, sources / "my_connector", ignore=ignore)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    run(*pip, "wheel", *offline, "--wheel-dir", str(work), str(sources / "kvsdk"), cwd=work)
    (wheel,) = work.glob("kvsdk-*.whl")
    run(*pip, "install", *offline, "--target", str(target), str(wheel), str(sources / "my_connector"), cwd=work)
    shutil.rmtree(sources)
    return target


def test_the_examples_tests_pass_with_the_installed_wheel(installed, tmp_path):
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(EXAMPLE / "pyproject.toml", tmp_path)
    (installed / "only_installed.py").write_text(ONLY_INSTALLED)
    command = [sys.executable, "-P", "-m", "pytest", "-p", "only_installed", "-p", "no:cacheprovider", "-q", "tests"]
    said = run(*command, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "imported from elsewhere: []" in said, said
    assert int(said.rpartition("imported: ")[2].split()[0]) > 20
    assert " passed" in said and " failed" not in said and "xfailed" not in said, said


def test_vllm_finds_the_installed_connector_by_its_entry_point(installed, tmp_path):
    assert "found: my_connector" in run(sys.executable, "-P", "-c", ASK_VLLM, cwd=tmp_path, PYTHONPATH=str(installed))
