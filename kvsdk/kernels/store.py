"""`BlockStore`: whole blocks of one worker's KV cache, copied and digested.

A chunk of n blocks travels as one contiguous uint8 tensor, the staging buffer, layer-major: for each layer in the
layout's order, the n blocks' payloads one after the other (`kvsdk.layout.staging_layout`). So a message is one tensor,
however many layers and blocks it holds. A peer's cache is read in place.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvsdk.errors import ConfigError
from kvsdk.kernels.cuda import CudaBlocks
from kvsdk.kernels.results import Check
from kvsdk.kernels.torch_blocks import TorchBlocks
from kvsdk.layout import CacheLayout, plan_copy

logger = logging.getLogger("kvsdk.kernels")

MAX_SMS = 64
"""Thread blocks of one launch unless the store is told otherwise."""


@dataclass(frozen=True, eq=False)
class PeerCache:
    """Another worker's KV cache, as `BlockStore.pull` reads it; from `BlockStore.peer`.

    On CUDA it belongs to the stream that was current when it was made, and to one thread at a time.

    Attributes:
        layout: of the peer's cache.
        owner: whatever keeps a GPU's memory mapped; held as long as this object.
        puller: what reads it.
    """

    layout: CacheLayout
    owner: Any
    puller: Any


@dataclass(frozen=True, eq=False)
class PeerBlocks:
    """Blocks of a peer that may be read; from `BlockStore.choose`.

    Attributes:
        peer: whose they are.
        count: how many.
        checked: whether they are digested when they are read, and whether the digests they should have are known.
        chosen: what the puller needs.
    """

    peer: PeerCache
    count: int
    checked: tuple[bool, bool]
    chosen: Any


class BlockStore:
    """Reads and writes whole blocks of one worker's KV cache.

    The tensors are vLLM's: the store keeps references to their storage and never allocates or frees blocks.

    On CUDA everything is enqueued on the current stream by one or two kernels for all layers and blocks; only `digest`
    waits for the stream. Memory for arguments is kept for each stream and used again, so that nothing is allocated once
    the largest operation has run. What a caller passes in (staging buffers, `digests`, `wrong`, a `PeerCache`) must
    live until the stream has come that far; NumPy arrays may change at once. On CPUs all is done when a method returns.

    Without the kernels (`accelerated` is false) PyTorch does the same, slower, and whatever digests waits.

    Safe to use from several threads as long as they use different staging buffers and write different blocks.
    """

    def __init__(self, kv_caches: dict[str, torch.Tensor], layout: CacheLayout, *, max_sms: int = MAX_SMS):
        """Prepares copying; on CUDA the first store of a machine compiles the kernels, in about two seconds.

        Args:
            kv_caches: the tensors from which `layout` was read, by layer name.
            layout: what `layout_of` made of them.
            max_sms: how many of a GPU's SMs an operation may take.

        Raises:
            ValueError: the layers lie on different devices, or `max_sms` is less than 1.
        """
        devices = {kv_caches[layer.name].device for layer in layout.layers}
        if len(devices) != 1:
            raise ValueError(f"the layers of one worker must be on one device, not on {sorted(map(str, devices))}")
        if max_sms < 1:
            raise ValueError(f"max_sms must be at least 1, not {max_sms}")
        self.layout = layout
        self.device = devices.pop()
        self.max_sms = max_sms
        tensors = [kv_caches[layer.name] for layer in layout.layers]
        self.addresses = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uint64)
        """uint64 `(layers,)`: where block 0 of each layer lies."""
        self._storages = [tensor.untyped_storage() for tensor in tensors]
        self._blocks: CudaBlocks | TorchBlocks = self._make_blocks(kv_caches)

    def _make_blocks(self, kv_caches: dict[str, torch.Tensor]) -> CudaBlocks | TorchBlocks:
        if self.device.type == "cuda":
            try:
                return CudaBlocks(self.addresses, self.layout, self.device, self.max_sms)
            except ConfigError as error:
                logger.warning("blocks are moved by PyTorch, which is slower, and no peer's memory is read: %s", error)
        return TorchBlocks(kv_caches, self.layout)

    @property
    def accelerated(self) -> bool:
        """Whether the kernels do the work."""
        return isinstance(self._blocks, CudaBlocks)

    # ---- what goes in and comes out

    def staging_bytes(self, num_blocks: int) -> int:
        """Bytes that `num_blocks` blocks take in a staging buffer."""
        return num_blocks * self.layout.block_bytes

    def staging(self, num_blocks: int) -> torch.Tensor:
        """A new staging buffer for up to `num_blocks` blocks: 1-D, uint8, on the store's device, not initialised."""
        with torch.inference_mode(False):
            return torch.empty(self.staging_bytes(num_blocks), dtype=torch.uint8, device=self.device)

    def new_digests(self, num_blocks: int) -> torch.Tensor:
        """For `digests`: int64 `(num_blocks,)`, in memory that the host reads (pinned, for a GPU), not initialised.

        `.numpy().view(np.uint64)` has the digests once the stream has come that far.
        """
        return self._results(num_blocks, torch.int64)

    def new_wrong(self, num_blocks: int) -> torch.Tensor:
        """For `wrong`: uint8 `(num_blocks,)`, in memory that the host reads, not initialised."""
        return self._results(num_blocks, torch.uint8)

    def _results(self, num_blocks: int, dtype: torch.dtype) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(num_blocks, dtype=dtype, pin_memory=self.device.type == "cuda")

    # ---- through a staging buffer

    def gather(self, block_ids: np.ndarray, staging: torch.Tensor) -> None:
        """Copies blocks from the cache into the front of a staging buffer, in the order of `block_ids`.

        Args:
            block_ids: 1-D int32, repeats allowed.
            staging: from `staging`, for at least as many blocks.

        Raises:
            ValueError: an id is out of range, or the staging buffer does not fit.
        """
        self._check_ids(block_ids)
        self._check_staging(staging, len(block_ids))
        if len(block_ids):
            self._blocks.gather(block_ids, staging)

    def gather_digest(
        self, block_ids: np.ndarray, positions: np.ndarray, staging: torch.Tensor, digests: torch.Tensor
    ) -> None:
        """`gather`, and the digests of what was copied.

        Args:
            block_ids: 1-D int32, repeats allowed.
            positions: int64, as many: each block's position in its prompt, in blocks.
            staging: as for `gather`.
            digests: int64, as many, on the store's device or in pinned memory: written with the digests' bits.

        Raises:
            ValueError: as `gather`, or `positions` or `digests` does not fit.
        """
        self._check_ids(block_ids)
        self._check_staging(staging, len(block_ids))
        check = self._check(len(block_ids), positions, digests=digests)
        if len(block_ids):
            self._blocks.gather(block_ids, staging, check)

    def scatter(self, block_ids: np.ndarray, staging: torch.Tensor, select: np.ndarray | None = None) -> None:
        """Copies blocks from the front of a staging buffer into the cache.

        Args:
            block_ids: 1-D int32: where each staged block belongs; no id twice, since either write might last.
            staging: holds `len(block_ids)` blocks.
            select: which of the staged blocks to write, by index into `block_ids`; all of them if None.

        Raises:
            ValueError: an id or an index is out of range or comes twice, or the staging buffer does not fit.
        """
        self._check_ids(block_ids)
        _check_once(block_ids, self.layout.num_blocks)
        self._check_staging(staging, len(block_ids))
        if select is not None:
            select = np.asarray(select)
            if select.ndim != 1 or (select.size and select.dtype.kind not in "iu"):
                raise ValueError(f"select must be a 1-D array of integers, not {select.dtype} of shape {select.shape}")
            if select.size == 0:
                return
            if select.min() < 0 or select.max() >= len(block_ids) or len(np.unique(select)) != len(select):
                raise ValueError(f"select must hold different indices from 0 to {len(block_ids) - 1}")
        if len(block_ids):
            self._blocks.scatter(block_ids, staging, select)

    def scatter_verified(
        self,
        block_ids: np.ndarray,
        positions: np.ndarray,
        staging: torch.Tensor,
        expected: np.ndarray,
        wrong: torch.Tensor,
    ) -> None:
        """`scatter` of those staged blocks whose digests are as expected; the others stay out of the cache.

        On CUDA the digests are compared by the device, so nothing waits between receiving and writing.

        Args:
            block_ids: 1-D int32: where each staged block belongs; no id twice.
            positions: int64, as many: each block's position in its prompt, in blocks.
            staging: holds as many blocks.
            expected: uint64, as many.
            wrong: uint8, as many, on the store's device or in pinned memory: written with 1 for each block whose digest
                is another one, else 0.

        Raises:
            ValueError: as `scatter`, or one of the others does not fit.
        """
        self._check_ids(block_ids)
        _check_once(block_ids, self.layout.num_blocks)
        self._check_staging(staging, len(block_ids))
        check = self._check(len(block_ids), positions, expected=expected, wrong=wrong)
        if len(block_ids):
            self._blocks.scatter_right(block_ids, staging, check)

    def digest(self, staging: torch.Tensor, num_blocks: int, positions: np.ndarray) -> np.ndarray:
        """Digests the first `num_blocks` blocks of a staging buffer.

        A digest is a 64-bit number over a block's bytes in all layers, each byte's place, the layers' order and the
        block's position in its prompt: a flipped bit, swapped blocks, shifted positions and exchanged layers show. It
        is no protection against an adversary.

        Args:
            staging: holds `num_blocks` blocks.
            num_blocks: how many to digest.
            positions: 1-D int64: each block's position in its prompt, in blocks.

        Returns:
            1-D uint64 on the host. On CUDA this waits for the current stream, and for nothing else.

        Raises:
            ValueError: the staging buffer or `positions` does not fit.
        """
        positions = np.asarray(positions)
        self._check_staging(staging, num_blocks)
        digests = self.new_digests(num_blocks)
        check = self._check(num_blocks, positions, digests=digests)
        if num_blocks:
            self._blocks.digest_staging(staging, num_blocks, check)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
        return digests.numpy().view(np.uint64)

    # ---- in place

    def digest_in_place(self, block_ids: np.ndarray, positions: np.ndarray, digests: torch.Tensor) -> None:
        """Digests blocks where they lie: those that `gather_digest` would give, without a copy.

        Args:
            block_ids: 1-D int32, repeats allowed.
            positions: int64, as many: each block's position in its prompt, in blocks.
            digests: int64, as many, on the store's device or in pinned memory: written with the digests' bits.

        Raises:
            ValueError: an id is out of range, or one of the others does not fit.
        """
        self._check_ids(block_ids)
        check = self._check(len(block_ids), positions, digests=digests)
        if len(block_ids):
            self._blocks.digest(block_ids, check)

    def peer(self, layout: CacheLayout, addresses: np.ndarray, owner: Any = None, pid: int | None = None) -> PeerCache:
        """Prepares reading from another worker's cache; done once, at the handshake.

        Args:
            layout: of the peer's cache; the same content as this one, in whatever order and spacing.
            addresses: uint64 `(layers,)`: where block 0 of each of its layers lies: for a GPU in this process, into
                which CUDA IPC maps it, for a CPU in the process `pid`.
            owner: whatever keeps a GPU's memory mapped.
            pid: for a CPU: whose memory it is; this process's unless given.

        Raises:
            MismatchError: naming what differs between the contents.
            ConfigError: this is a GPU without the kernels.
            ValueError: `addresses` is not one for each layer.
        """
        plan = plan_copy(layout, self.layout)
        addresses = np.array(addresses, dtype=np.uint64)
        if addresses.shape != (len(layout.layers),):
            raise ValueError(f"addresses must be one for each of {len(layout.layers)} layers, not {addresses.shape}")
        if self.device.type == "cuda" and not self.accelerated:
            raise ConfigError("a peer's GPU memory is read by the kernels alone, which this worker lacks: see its log")
        if isinstance(self._blocks, TorchBlocks):
            return PeerCache(layout, owner, self._blocks.puller(plan, addresses, pid))
        return PeerCache(layout, owner, self._blocks.puller(plan, addresses))

    def choose(
        self,
        peer: PeerCache,
        block_ids: np.ndarray,
        positions: np.ndarray | None = None,
        expected: np.ndarray | None = None,
    ) -> PeerBlocks:
        """Names blocks of a peer that may be read. On CUDA the device is told: done ahead, it makes a pull quicker.

        Args:
            peer: from `peer`.
            block_ids: 1-D int32: blocks of the peer, repeats allowed.
            positions: int64, as many: each block's position in its prompt, in blocks; nothing is digested if None.
            expected: uint64, as many: the digests that the peer told.

        Raises:
            ValueError: an id is out of range, or one of the others does not fit.
        """
        _check_range(block_ids, peer.layout.num_blocks)
        if positions is not None:
            Check(positions, expected).validate(len(block_ids), self.device)
        elif expected is not None:
            raise ValueError("digests need positions")
        checked = positions is not None, expected is not None
        return PeerBlocks(peer, len(block_ids), checked, peer.puller.choose(block_ids, positions, expected))

    def pull(
        self,
        blocks: PeerBlocks,
        dst_ids: np.ndarray,
        *,
        first: int = 0,
        wrong: torch.Tensor | None = None,
        digests: torch.Tensor | None = None,
    ) -> None:
        """Copies blocks from a peer's cache straight into this one, and digests what was copied if they were chosen so.

        Digests are over the words as they were read and written, in the peer's order. Blocks that turn out wrong have
        been written: they must be reported as failed, and nothing may decode from them. On CUDA all of it is enqueued
        on the peer's stream, which must have carried out the pull before.

        Args:
            blocks: from `choose`.
            dst_ids: 1-D int32: where the chosen blocks from `first` on go, one for one. No id twice, which is not
                checked: either write might last.
            first: index into the chosen blocks.
            wrong: uint8, at least as many as `dst_ids`, from `new_wrong`: written with 1 where the digest is not the
                one that was told, else 0.
            digests: int64, likewise, from `new_digests`: written with the digests' bits.

        Raises:
            ValueError: an id is out of range, there are not so many blocks, or one of the others does not fit.
        """
        n = len(dst_ids)
        self._check_ids(dst_ids)
        if not 0 <= first <= blocks.count - n:
            raise ValueError(f"of {blocks.count} blocks {n} cannot be copied from {first} on")
        if wrong is not None or digests is not None:
            _check_told(blocks, n, wrong, digests)
        if n:
            blocks.peer.puller.pull(blocks.chosen, first, dst_ids, wrong, digests)

    # ---- checks

    def _check(self, num_blocks: int, positions: np.ndarray, **rest: Any) -> Check:
        check = Check(positions, **rest)
        check.validate(num_blocks, self.device)
        return check

    def _check_staging(self, staging: torch.Tensor, num_blocks: int) -> None:
        needed = self.staging_bytes(num_blocks)
        if (
            staging.dtype != torch.uint8
            or staging.dim() != 1
            or not staging.is_contiguous()
            or staging.numel() < needed
            or staging.device != self.device
        ):
            raise ValueError(
                f"staging must be a contiguous 1-D uint8 tensor on {self.device} of at least {needed} bytes, "
                f"not {staging.dtype} of shape {tuple(staging.shape)} on {staging.device}"
            )
        if staging.data_ptr() % 8:
            raise ValueError("staging must start at a multiple of 8 bytes")

    def _check_ids(self, block_ids: np.ndarray) -> None:
        _check_range(block_ids, self.layout.num_blocks)


def _check_told(blocks: PeerBlocks, n: int, wrong: torch.Tensor | None, digests: torch.Tensor | None) -> None:
    for name, tensor, known in (("wrong", wrong, blocks.checked[1]), ("digests", digests, blocks.checked[0])):
        if tensor is not None and not known:
            raise ValueError(f"{name} can only be told of blocks that were chosen with what it takes")
        if tensor is not None and tensor.numel() < n:
            raise ValueError(f"{name} has room for {tensor.numel()} blocks, not for {n}")


def _check_range(block_ids: np.ndarray, num_blocks: int) -> None:
    if not isinstance(block_ids, np.ndarray) or block_ids.ndim != 1 or block_ids.dtype != np.int32:
        raise ValueError("block ids must be a 1-D int32 array")
    if block_ids.size and (block_ids.min() < 0 or block_ids.max() >= num_blocks):
        raise ValueError(f"block ids must be from 0 to {num_blocks - 1}, not {block_ids.min()} to {block_ids.max()}")


def _check_once(block_ids: np.ndarray, num_blocks: int) -> None:
    written = np.zeros(num_blocks, bool)
    written[block_ids] = True
    if np.count_nonzero(written) != len(block_ids):
        raise ValueError("a block id comes twice: each block can be written once")
