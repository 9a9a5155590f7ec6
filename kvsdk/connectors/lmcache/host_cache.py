"""Host memory for chunks that were fetched or are to be stored: bounded, and pinned at the start for a GPU."""

from __future__ import annotations

import logging
import threading

import torch

from kvsdk.errors import ConfigError

logger = logging.getLogger("kvsdk.lmcache")


class HostMemory:
    """Buffers of one size. Any thread may use it.

    All of it is one piece. To pin memory takes CUDA's lock for milliseconds, which the thread that runs the model would
    wait for, so it is pinned before there is a request; by address, since PyTorch's pinned memory comes in powers of
    two. Without a GPU it is had from the operating system when it is first written to.

    Args:
        buffer_bytes: of each buffer.
        limit: buffers at a time.
        pinned: whether a GPU copies to and from them.

    Raises:
        ConfigError: there is not so much.
    """

    def __init__(self, buffer_bytes: int, limit: int, *, pinned: bool):
        self.limit = limit
        self._buffer_bytes, self._pinned = buffer_bytes, pinned
        self._free: list[torch.Tensor] = []
        self._made = 0
        self._changed = threading.Condition()
        size = limit * buffer_bytes
        try:
            with torch.inference_mode(False):
                self._memory = torch.empty(size, dtype=torch.uint8)
            if pinned:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0))
        except RuntimeError as error:
            raise ConfigError(
                f"{size / 2**30:.3g} GiB of host memory for chunks cannot be had ({error}); set a smaller "
                "max_local_cpu_size"
            ) from error

    def take(self, timeout: float = 0.0) -> torch.Tensor | None:
        """A uint8 tensor of `buffer_bytes`, not initialised; None if all are in use for `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._free or self._made < self.limit, timeout):
                return None
            if self._free:
                return self._free.pop()
            first = self._made * self._buffer_bytes
            self._made += 1
        with torch.inference_mode(False):
            return self._memory[first : first + self._buffer_bytes]

    def give_back(self, buffer: torch.Tensor) -> None:
        """The buffer is another chunk's from here on."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()

    @property
    def num_used(self) -> int:
        """Buffers in use."""
        with self._changed:
            return self._made - len(self._free)

    def close(self) -> None:
        """Nothing is copied to or from it any more. Twice is fine."""
        pinned, self._pinned = self._pinned, False
        if not pinned:
            return
        try:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr()))
        except RuntimeError as error:  # of a device that has failed
            logger.error("the host memory for chunks stays pinned until this process ends: %s", error)
