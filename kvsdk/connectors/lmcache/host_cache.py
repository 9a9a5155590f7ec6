"""Host memory for chunks that were fetched or are to be stored: bounded, and made when it is first needed."""

from __future__ import annotations

import threading

import torch


class HostMemory:
    """Buffers of one size. Any thread may use it.

    A buffer that was given back is kept for the next chunk: pinned memory takes milliseconds to make.

    Args:
        buffer_bytes: of each buffer.
        limit: buffers at a time.
        pinned: whether a GPU copies to and from them.
    """

    def __init__(self, buffer_bytes: int, limit: int, *, pinned: bool):
        self.limit = limit
        self._buffer_bytes, self._pinned = buffer_bytes, pinned
        self._free: list[torch.Tensor] = []
        self._made = 0
        self._changed = threading.Condition()

    def take(self, timeout: float = 0.0) -> torch.Tensor | None:
        """A uint8 tensor of `buffer_bytes`, not initialised; None if all are in use for `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._made < self.limit, timeout)
            if self._free:
                return self._free.pop()
            if self._made >= self.limit:
                return None
            self._made += 1
        try:
            with torch.inference_mode(False):
                return torch.empty(self._buffer_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        except BaseException:
            with self._changed:
                self._made -= 1
                self._changed.notify()
            raise

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
