"""What operations on blocks are told and tell about digests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Check:
    """Digests of n blocks: what they are over, what they should be, where they go.

    Attributes:
        positions: int64 `(n,)`: each block's position in its prompt, in blocks.
        expected: uint64 `(n,)`, or None.
        digests: int64 `(n,)`, written with the bits of the digests, or None.
        wrong: uint8 `(n,)`, written with 1 where a digest is not the expected one and 0 elsewhere, or None.
    """

    positions: np.ndarray
    expected: np.ndarray | None = None
    digests: torch.Tensor | None = None
    wrong: torch.Tensor | None = None

    def validate(self, num_blocks: int, device: torch.device) -> None:
        """Whether all of it is for `num_blocks` blocks and can be written from `device`.

        Raises:
            ValueError: naming what does not fit.
        """
        for name, array, dtype in (("positions", self.positions, np.int64), ("expected", self.expected, np.uint64)):
            if array is None and name == "expected":
                continue
            if not isinstance(array, np.ndarray) or array.shape != (num_blocks,) or array.dtype != dtype:
                got = (array.dtype, array.shape) if isinstance(array, np.ndarray) else type(array).__name__
                raise ValueError(f"{name} must be {np.dtype(dtype)} of shape ({num_blocks},), not {got}")
        for name, tensor, torch_dtype in (
            ("digests", self.digests, torch.int64),
            ("wrong", self.wrong, torch.uint8),
        ):
            if tensor is None:
                continue
            # An empty tensor is never pinned, and nothing is written to it.
            pinned = tensor.is_pinned() or (num_blocks == 0 and tensor.device.type == "cpu")
            reachable = tensor.device == device or (device.type == "cuda" and pinned)
            if (
                tensor.dtype != torch_dtype
                or tuple(tensor.shape) != (num_blocks,)
                or not tensor.is_contiguous()
                or not reachable
            ):
                raise ValueError(
                    f"{name} must be a contiguous {torch_dtype} tensor of shape ({num_blocks},) on {device} or in "
                    f"pinned memory, not {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
                )
        if self.wrong is not None and self.expected is None:
            raise ValueError("wrong can only be told with expected digests")
