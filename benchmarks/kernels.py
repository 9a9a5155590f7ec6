"""How fast one GPU gathers, scatters and digests scattered blocks: `python -m benchmarks.kernels --json FILE`.

An 8B-shaped cache: 32 layers, each a tensor of its own; blocks in random order in a pool of twice as many. GB/s counts
the payload once (a gather reads it and writes it). Medians of the time on the device, between events around 20 single
operations after 3 that do not count; `device copy` is one contiguous copy of the same bytes in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import table, write
from kvsdk.kernels import BlockStore
from kvsdk.layout import layout_of

LAYERS = 32
BLOCK_KIB = (16, 32, 64, 128, 2048)
SMS = (16, 32, 64, 132)
ROUNDS, WARM_UP = 20, 3


def times(operation: Callable[[], object], rounds: int) -> list[float]:
    """Seconds on the device of each operation."""
    for _ in range(WARM_UP):
        operation()
    events = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        operation()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def measure(
    device: torch.device, total: int, block_bytes: int, sms: tuple[int, ...], rounds: int
) -> dict[str, list[float]]:
    """Raw samples in seconds, by operation and number of SMs.

    Args:
        device: where the cache is made.
        total: bytes of an operation.
        block_bytes: bytes of a block in one layer.
        sms: numbers of SMs.
        rounds: samples of each.
    """
    blocks = max(1, total // (block_bytes * LAYERS))
    pool = 2 * blocks
    caches = {
        f"layers.{i}": torch.randint(0, 256, (pool, 1, 16, block_bytes // 16), dtype=torch.uint8, device=device)
        for i in range(LAYERS)
    }
    layout = layout_of(caches, num_blocks=pool, block_size=16)
    rng = np.random.default_rng(0)
    ids, positions = rng.permutation(pool)[:blocks].astype(np.int32), np.arange(blocks)
    into = np.setdiff1d(np.arange(pool), ids).astype(np.int32)
    rng.shuffle(into)
    samples: dict[str, list[float]] = {}
    for count in sms:
        store = BlockStore(caches, layout, max_sms=count)
        if not store.accelerated:
            raise SystemExit("the kernels did not load; see the warning")
        staging, digests, wrong = store.staging(blocks), store.new_digests(blocks), store.new_wrong(blocks)
        own = store.peer(layout, store.addresses)
        store.gather_digest(ids, positions, staging, digests)
        torch.cuda.synchronize()
        expected = digests.numpy().view(np.uint64).copy()
        plain, checked = store.choose(own, ids), store.choose(own, ids, positions, expected)
        operations: dict[str, Callable[[], object]] = {
            "gather": lambda s=store, t=staging: s.gather(ids, t),
            "scatter": lambda s=store, t=staging: s.scatter(into, t),
            "digest in place": lambda s=store, d=digests: s.digest_in_place(ids, positions, d),
            "gather + digest": lambda s=store, t=staging, d=digests: s.gather_digest(ids, positions, t, d),
            "verify + scatter": lambda s=store, t=staging, e=expected, w=wrong: s.scatter_verified(
                into, positions, t, e, w
            ),
            "pull": lambda s=store, c=plain: s.pull(c, into),
            "pull + verify": lambda s=store, c=checked, w=wrong: s.pull(c, into, wrong=w),
        }
        for name, operation in operations.items():
            samples[f"{name}, {count} SMs"] = times(operation, rounds)
        if wrong.any():
            raise SystemExit("blocks differ from their digests")
    a, b = (torch.empty(blocks * block_bytes * LAYERS, dtype=torch.uint8, device=device) for _ in range(2))
    samples["device copy"] = times(lambda: b.copy_(a), rounds)
    return samples


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the raw samples here")
    parser.add_argument("--gib", type=float, default=1.0, help="size of an operation (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each (default: %(default)s)")
    parser.add_argument("--kib", type=int, nargs="+", default=list(BLOCK_KIB), help="KiB of a block in one layer")
    parser.add_argument("--sms", type=int, nargs="+", default=list(SMS), help="numbers of SMs")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    device, results = torch.device("cuda", torch.cuda.current_device()), {}
    rows: list[list[Any]] = []
    for kib in args.kib:
        samples = measure(device, int(args.gib * 2**30), kib * 1024, tuple(args.sms), args.rounds)
        moved = max(1, int(args.gib * 2**30) // (kib * 1024 * LAYERS)) * kib * 1024 * LAYERS
        results[str(kib)] = {"bytes": moved, "seconds": samples}
        if not rows:
            rows = [["GB/s, median"], *([name] for name in samples)]
        rows[0].append(f"{kib} KiB")
        for row, seconds in zip(rows[1:], samples.values(), strict=True):
            row.append(f"{moved / statistics.median(seconds) / 1e9:.0f}")
    print(table(rows))
    write(args.json, {"gpu": torch.cuda.get_device_name(device), "layers": LAYERS, "kib": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
