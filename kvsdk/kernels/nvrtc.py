"""Compiles `csrc/blocks.cu` by NVRTC when a process first needs it, keeps the machine code on disk, and launches it.

Needs no CUDA toolkit and no compiler: `cuda.bindings` and NVRTC come with CUDA builds of PyTorch. Compiling needs no
GPU either. What was compiled is kept in `$XDG_CACHE_HOME/kvsdk` (`~/.cache/kvsdk`), under a name that is a hash of all
that decides it; a folder that cannot be read or written costs time and nothing else.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvsdk.errors import ConfigError, KVError
from kvsdk.kernels.bindings import call, load

logger = logging.getLogger("kvsdk.kernels")

_POINTER = ctypes.c_void_p * 1


def source() -> str:
    """The CUDA source: of the installed package, or of the source tree that this module is in.

    Raises:
        ConfigError: there is none; the package was put together wrongly.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "csrc", here.parents[1] / "csrc"):
        if (folder / "blocks.cu").is_file():
            return (folder / "blocks.cu").read_text()
    raise ConfigError(f"csrc/blocks.cu is missing from the installation in {here}; install kvsdk again")


def version() -> tuple[int, int]:
    """NVRTC's version.

    Raises:
        ConfigError: `cuda.bindings` or NVRTC is not installed.
    """
    _, major, minor = call(_nvrtc().nvrtcVersion)
    return major, minor


def compile_for(arch: str, text: str, options: Sequence[str]) -> bytes:
    """Machine code (a cubin) for one kind of GPU.

    Args:
        arch: such as `sm_90`.
        text: CUDA source.
        options: more of NVRTC's options.

    Raises:
        ConfigError: `cuda.bindings` or NVRTC is not installed, or NVRTC refuses; the message has its log.
    """
    nvrtc = _nvrtc()
    _, program = call(nvrtc.nvrtcCreateProgram, text.encode(), b"blocks.cu", 0, [], [])
    try:
        every = [option.encode() for option in _all_options(arch, options)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(every), every)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            _, size = call(nvrtc.nvrtcGetProgramLogSize, program)
            log = b" " * size
            call(nvrtc.nvrtcGetProgramLog, program, log)
            reason = log.rstrip(b"\0 \n").decode(errors="replace") or status.name
            raise ConfigError(
                f"NVRTC {'.'.join(map(str, version()))} cannot compile csrc/blocks.cu for {arch}: {reason}"
            )
        _, size = call(nvrtc.nvrtcGetCUBINSize, program)
        cubin = b" " * size
        call(nvrtc.nvrtcGetCUBIN, program, cubin)
        return cubin
    finally:
        call(nvrtc.nvrtcDestroyProgram, program)


def cached(arch: str, text: str, options: Sequence[str]) -> bytes:
    """What `compile_for` returns, from disk where it lies there whole.

    Raises:
        ConfigError: as `compile_for`.
    """
    path = _cache_path(arch, text, options)
    cubin = _read(path) if path is not None else None
    if cubin is None:
        began = time.monotonic()
        cubin = compile_for(arch, text, options)
        logger.info("compiled csrc/blocks.cu for %s in %.1f s", arch, time.monotonic() - began)
        if path is not None:
            _write(path, cubin)
    return cubin


class Module:
    """Machine code loaded into the primary context of a device, the one that PyTorch uses.

    Args:
        device: a CUDA device that PyTorch has initialised.
        text: CUDA source.
        options: more of NVRTC's options.

    Raises:
        ConfigError: `cuda.bindings` or NVRTC is not installed, or there is no code for this device.
    """

    def __init__(self, device: torch.device, text: str, options: Sequence[str]):
        self._driver = load("driver")
        major, minor = torch.cuda.get_device_capability(device)
        cubin = cached(f"sm_{major}{minor}", text, options)
        index = device.index if device.index is not None else torch.cuda.current_device()
        try:
            _, handle = call(self._driver.cuDeviceGet, index)
            _, self._context = call(self._driver.cuDevicePrimaryCtxRetain, handle)
            call(self._driver.cuCtxSetCurrent, self._context)
            image = ctypes.create_string_buffer(cubin, len(cubin))
            _, self._module = call(self._driver.cuModuleLoadData, ctypes.addressof(image))
        except KVError as error:
            raise ConfigError(f"csrc/blocks.cu was compiled but cannot be loaded on {device}: {error}") from error
        self._functions: dict[str, Any] = {}

    def launch(self, name: str, grid: int, threads: int, args: ctypes.Structure, stream: int) -> None:
        """Enqueue a kernel that takes one structure by value. Safe to call from any thread.

        Args:
            name: of the kernel.
            grid: thread blocks.
            threads: of each.
            args: the structure; copied before this returns.
            stream: a CUDA stream's handle.

        Raises:
            KVError: the driver refuses, or an earlier kernel failed.
        """
        # A thread that has not called CUDA's runtime has no context yet.
        call(self._driver.cuCtxSetCurrent, self._context)
        function = self._functions.get(name)
        if function is None:
            _, function = call(self._driver.cuModuleGetFunction, self._module, name.encode())
            self._functions[name] = function
        pointers = _POINTER(ctypes.addressof(args))
        call(
            self._driver.cuLaunchKernel,
            *(function, grid, 1, 1, threads, 1, 1, 0, stream),
            ctypes.addressof(pointers),
            0,
        )

    def upload(self, device_address: int, host_address: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy from pinned memory to the device.

        Raises:
            KVError: the driver refuses, or an earlier kernel failed.
        """
        call(self._driver.cuCtxSetCurrent, self._context)
        call(self._driver.cuMemcpyHtoDAsync, device_address, host_address, nbytes, stream)


_modules: dict[tuple[int, tuple[str, ...]], Module] = {}
_modules_lock = threading.Lock()


def module_for(device: torch.device, options: Sequence[str]) -> Module:
    """The module of `csrc/blocks.cu` on a device, loaded once a process.

    Raises:
        ConfigError: as `Module` and `source`.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    with _modules_lock:
        key = (index, tuple(options))
        if key not in _modules:
            _modules[key] = Module(torch.device("cuda", index), source(), options)
        return _modules[key]


def _nvrtc() -> Any:
    nvrtc = load("nvrtc")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        raise ConfigError(f"NVRTC is not installed ({error}); pip install nvidia-cuda-nvrtc") from error
    return nvrtc


def _all_options(arch: str, options: Sequence[str]) -> list[str]:
    return [f"--gpu-architecture={arch}", "--std=c++17", *options]


def _cache_path(arch: str, text: str, options: Sequence[str]) -> Path | None:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvsdk"
    except RuntimeError as error:
        logger.warning("compiled kernels are not kept: %s; set XDG_CACHE_HOME", error)
        return None
    key = hashlib.sha256(repr((text, _all_options(arch, options), version())).encode()).hexdigest()
    return folder / f"blocks-{key[:32]}.cubin"


def _read(path: Path) -> bytes | None:
    """The machine code in a file, which begins with its own SHA-256; None if it is not there or not whole."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s cannot be read (%s); compiling again", path, error)
        return None
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        logger.warning("%s is damaged; compiling again", path)
        return None
    return data[32:]


def _write(path: Path, cubin: bytes) -> None:
    # Several processes of a server compile at the same time: each renames a whole file into place.
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(cubin).digest() + cubin)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        logger.warning("compiled kernels cannot be kept in %s (%s); every process compiles them", path.parent, error)
