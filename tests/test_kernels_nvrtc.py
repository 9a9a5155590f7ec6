"""`csrc/blocks.cu` compiles without a GPU, what was compiled is kept, and what is missing is named.

What this cannot show: that a driver takes the machine code; see tests/gpu/test_kernels_cuda.py.
"""

import ctypes
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support.caches import make_cache

from kvsdk.errors import ConfigError, KVError
from kvsdk.kernels import BlockStore, cuda, nvrtc, store

ROOT = Path(__file__).parent.parent
SMALL = 'extern "C" __global__ void small(int* x) { *x = VALUE; }'
KERNELS = [
    *(f"{name}_{grain}" for name in ("copy_blocks", "copy_digest_blocks", "digest_blocks") for grain in (1, 4, 8, 16)),
    "copy_digest_listed",
    "finish_digests",
]


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvsdk"


@pytest.fixture
def compilations(monkeypatch):
    """The kinds of GPU that were compiled for."""
    compiled, compile_for = [], nvrtc.compile_for

    def counting(arch, *args):
        compiled.append(arch)
        return compile_for(arch, *args)

    monkeypatch.setattr(nvrtc, "compile_for", counting)
    return compiled


def small(arch="sm_90", text=SMALL, value=1):
    return nvrtc.cached(arch, text, [f"-DVALUE={value}"])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_source_compiles(arch):
    cubin = nvrtc.compile_for(arch, nvrtc.source(), cuda.OPTIONS)
    assert cubin.startswith(b"\x7fELF")
    for name in KERNELS:
        assert f".text.{name}\0".encode() in cubin, name


def frames(threads):
    """Bytes that each kernel keeps in memory for want of registers, as the assembler tells it."""
    bindings = nvrtc._nvrtc()
    _, program = nvrtc.call(bindings.nvrtcCreateProgram, nvrtc.source().encode(), b"blocks.cu", 0, [], [])
    every = nvrtc._all_options("sm_90", [f"-DTHREADS={threads}", *cuda.OPTIONS[1:], "--ptxas-options=-v"])
    nvrtc.call(bindings.nvrtcCompileProgram, program, len(every), [option.encode() for option in every])
    _, size = nvrtc.call(bindings.nvrtcGetProgramLogSize, program)
    log = b" " * size
    nvrtc.call(bindings.nvrtcGetProgramLog, program, log)
    nvrtc.call(bindings.nvrtcDestroyProgram, program)
    return [int(number) for number in re.findall(rb"(\d+) bytes stack frame", log)]


def test_no_kernel_runs_out_of_registers():
    """A thread block of 512 threads has 128 registers a thread."""
    assert frames(cuda.THREADS) == [0] * len(KERNELS)
    assert any(frames(1024)), "the assembler does not tell"


def test_a_structure_that_the_host_lays_out_otherwise_does_not_compile():
    for i in range(2, 5):
        options = list(cuda.OPTIONS)
        options[i] = options[i].rstrip("0123456789") + "4"
        with pytest.raises(ConfigError, match="is laid out otherwise by the host"):
            nvrtc.compile_for("sm_90", nvrtc.source(), options)


def test_an_error_in_the_source_is_told_with_the_compilers_words():
    with pytest.raises(ConfigError, match=r"cannot compile csrc/blocks.cu for sm_90: .*VALUE. is undefined"):
        nvrtc.compile_for("sm_90", SMALL, [])


def test_a_gpu_that_nvrtc_does_not_know_is_named():
    with pytest.raises(ConfigError, match=r"NVRTC \d+\.\d+ cannot compile .* for sm_42"):
        small("sm_42")


def test_a_second_process_compiles_nothing(cache_folder, compilations):
    first = small()
    assert small() == first
    assert compilations == ["sm_90"]
    assert [path.suffix for path in cache_folder.iterdir()] == [".cubin"]


def test_whatever_decides_the_machine_code_names_its_file(cache_folder, compilations, monkeypatch):
    small()
    small(arch="sm_80")
    small(value=2)
    small(text=SMALL + "\n")
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 99))
    small()
    assert len(compilations) == len(list(cache_folder.iterdir())) == 5


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:40] + b"?" + data[41:]]
)
def test_a_damaged_file_is_compiled_again(cache_folder, compilations, caplog, damage):
    cubin = small()
    (path,) = cache_folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert small() == small() == cubin
    assert len(compilations) == 2
    assert [record.message for record in caplog.records if "damaged" in record.message] == [
        f"{path} is damaged; compiling again"
    ]


def test_a_folder_that_cannot_be_written_costs_time_and_a_warning(tmp_path, monkeypatch, compilations, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert small() == small()
    assert len(compilations) == 2
    assert "compiled kernels cannot be kept in" in caplog.text


def test_a_file_that_cannot_be_read_costs_time_and_a_warning(cache_folder, compilations, caplog):
    small()
    (path,) = cache_folder.iterdir()
    path.unlink()
    path.mkdir()
    assert small().startswith(b"\x7fELF")
    assert len(compilations) == 2
    assert f"{path} cannot be read" in caplog.text
    assert [left.name for left in cache_folder.iterdir()] == [path.name], "a temporary file was left behind"


def test_a_user_without_a_home_costs_time_and_a_warning(monkeypatch, compilations, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(nvrtc.Path, "home", no_home)
    assert small() == small()
    assert len(compilations) == 2
    assert "set XDG_CACHE_HOME" in caplog.text


def test_missing_bindings_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ConfigError, match=r"cuda\.bindings is not installed .*; pip install cuda-bindings"):
        nvrtc.version()


def test_a_missing_nvrtc_is_named(monkeypatch):
    from cuda.bindings import nvrtc as bindings

    def no_library():
        raise RuntimeError("libnvrtc.so.13 was not found")

    monkeypatch.setattr(bindings, "nvrtcVersion", no_library)
    with pytest.raises(ConfigError, match=r"NVRTC is not installed \(libnvrtc.*; pip install nvidia-cuda-nvrtc"):
        nvrtc.version()


def test_a_store_without_the_kernels_says_so_once_and_uses_pytorch(monkeypatch, caplog):
    def no_kernels(*args):
        raise ConfigError("NVRTC is not installed")

    monkeypatch.setattr(store, "CudaBlocks", no_kernels)
    cache = make_cache("HND")
    made = BlockStore(cache.tensors, cache.layout())
    made.device = torch.device("cuda")
    with caplog.at_level(logging.INFO, "kvsdk.kernels"):
        blocks = made._make_blocks(cache.tensors)
    assert isinstance(blocks, store.TorchBlocks)
    assert len(caplog.records) == 1
    assert caplog.records[0].message.startswith("blocks are moved by PyTorch, which is slower")
    assert caplog.records[0].message.endswith(": NVRTC is not installed")


# ---- the driver, in words: what it is told, and what becomes of its errors


class Driver:
    """Stands in for `cuda.bindings.driver`."""

    def __init__(self):
        self.calls, self.error = [], None

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, args))
            if name == "cuLaunchKernel":
                pointers = ctypes.cast(args[9], ctypes.POINTER(ctypes.c_void_p))
                self.launched = nvrtc.ctypes.cast(pointers[0], ctypes.POINTER(cuda._Finish)).contents.num_blocks
            if self.error == name:
                return SimpleStatus(2, "CUDA_ERROR_OUT_OF_MEMORY"), None
            return SimpleStatus(0, "CUDA_SUCCESS"), f"{name}'s"

        call.__name__ = name
        return call


class SimpleStatus(int):
    def __new__(cls, value, name):
        status = super().__new__(cls, value)
        status.name = name
        return status


@pytest.fixture
def driver(monkeypatch, cache_folder):
    driver = Driver()
    real = nvrtc.load
    monkeypatch.setattr(nvrtc, "load", lambda name: driver if name == "driver" else real(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return driver


def test_a_launch_passes_its_structure_by_value_in_pytorchs_context(driver):
    module = nvrtc.Module(torch.device("cuda", 3), SMALL, ["-DVALUE=1"])
    assert ("cuDeviceGet", (3,)) in driver.calls
    assert ("cuDevicePrimaryCtxRetain", ("cuDeviceGet's",)) in driver.calls
    for _ in range(2):
        driver.calls.clear()
        module.launch("small", 7, 512, cuda._Finish(num_blocks=5), 99)
        launch = driver.calls[-1][1]
        assert driver.calls[0] == ("cuCtxSetCurrent", ("cuDevicePrimaryCtxRetain's",))
        assert launch[:9] == ("cuModuleGetFunction's", 7, 1, 1, 512, 1, 1, 0, 99)
        assert driver.launched == 5
    assert "cuModuleGetFunction" not in [name for name, _ in driver.calls], "a function is looked up once"


def test_machine_code_that_the_driver_refuses_is_a_config_error(driver):
    driver.error = "cuModuleLoadData"
    with pytest.raises(ConfigError, match="cannot be loaded on cuda:0: cuModuleLoadData failed: CUDA_ERROR_OUT_OF"):
        nvrtc.Module(torch.device("cuda", 0), SMALL, ["-DVALUE=1"])


def test_a_launch_that_fails_is_a_kv_error(driver):
    module = nvrtc.Module(torch.device("cuda", 0), SMALL, ["-DVALUE=1"])
    driver.error = "cuLaunchKernel"
    with pytest.raises(KVError, match="cuLaunchKernel failed: CUDA_ERROR_OUT_OF_MEMORY"):
        module.launch("small", 1, 32, cuda._Finish(), 0)


# ---- where the source lies


def test_the_source_of_a_tree_is_in_csrc():
    assert nvrtc.source() == (ROOT / "csrc/blocks.cu").read_text()


def test_a_wheel_has_the_source_and_finds_it(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    for name in ("kvsdk", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, tmp_path / "tree"], check=True, env=environment, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith("csrc")]
        archive.extractall(tmp_path / "installed")
    command = [sys.executable, "-P", "-c", "from kvsdk.kernels import nvrtc; print(nvrtc.__file__, nvrtc.source())"]
    environment["PYTHONPATH"] = str(tmp_path / "installed")
    said = subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=60).stdout
    assert said.startswith(str(tmp_path / "installed")) and (ROOT / "csrc/blocks.cu").read_text() in said


def test_an_installation_without_the_source_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "__file__", str(tmp_path / "kvsdk/kernels/nvrtc.py"))
    with pytest.raises(ConfigError, match=r"csrc/blocks\.cu is missing .*; install kvsdk again"):
        nvrtc.source()


def test_the_hosts_table_of_layers_is_packed():
    assert cuda._LAYER.itemsize == sum(cuda._LAYER[name].itemsize for name in cuda._LAYER.names)
    assert [cuda._LAYER.fields[name][1] for name in cuda._LAYER.names] == np.cumsum([0, 8, 8, 4, 4, 4]).tolist()
