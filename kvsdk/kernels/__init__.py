"""Carries plans out: blocks copied and digested, by CUDA kernels on a GPU (`csrc/`), by PyTorch and NumPy on a CPU."""

from kvsdk.kernels.digest import DIGEST_ALGORITHM, splitmix64
from kvsdk.kernels.store import MAX_SMS, BlockStore, PeerBlocks, PeerCache

__all__ = ["DIGEST_ALGORITHM", "MAX_SMS", "BlockStore", "PeerBlocks", "PeerCache", "splitmix64"]
