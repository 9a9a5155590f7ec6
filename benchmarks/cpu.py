"""How fast two processes hand blocks over on CPUs: `python -m benchmarks.cpu --json FILE --svg FILE`.

Two worker halves of `PyNcclConnector`, a process each, around an 8B-shaped cache: 32 layers, each a tensor of its own,
blocks in random order in a pool of twice as many. A sample is one load, from handing the task over until its last block
has been checked and written. Beside it, in the same round: `memcpy`, one contiguous copy of the same bytes by one
thread, and `raw gloo`, one contiguous send and receive of them by a process group like that of a gloo pipe. The blocks
were offered, and so digested, before. PyTorch computes with one thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks import percentile, table, write
from kvsdk.config import parse_options
from kvsdk.connector.interface import CacheGeometry, Context
from kvsdk.connector.tasks import LoadOrder, LoadTask, TaskState
from kvsdk.connectors.pynccl import PyNcclWorker
from kvsdk.connectors.pynccl.protocol import Source
from kvsdk.kernels import BlockStore, torch_blocks
from kvsdk.layout import layout_of

LAYERS, TOKENS = 32, 16
SIZES_MIB, BLOCK_KIB = (64, 256, 1024), 64
ROUNDS, WARM_UP = 20, 2
PAIRS = {
    "peer": "memcpy",
    "peer, no digests": "memcpy",
    "shm": "memcpy",
    "shm, no digests": "memcpy",
    "gloo": "raw gloo",
    "gloo, no digests": "raw gloo",
}
"""What is measured, and what it is held against."""
AIMS = {"peer": 0.5, "shm": 0.5, "gloo": 0.85}
TIMEOUT = 60.0
QUIET = 0.2
"""Seconds in which the cores have to be idle before a sample."""
DISTURBED, DISTURBED_SECONDS = 0.12, 0.03
"""A sample in which other processes took a core for more of its time than this, and for longer, is taken again: their
CPU time decides, not how fast it was. The kernel counts in hundredths of a second."""
ATTEMPTS = 4


def ids(pool: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(pool)[:count].astype(np.int32)


def targets(pool: int, count: int) -> np.ndarray:
    """Where the consumer writes what the producer offers from `ids(pool, count, seed=count)`."""
    return ids(pool, count, seed=count + 1)


class End:
    """One server's worker halves, one for each kind of load, around one cache."""

    def __init__(self, role: str, pool: int, block_bytes: int, seed: int):
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(seed)
        shape = (pool, 1, TOKENS, block_bytes // TOKENS)
        self.caches = {
            f"layers.{i}": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for i in range(LAYERS)
        }
        layout = layout_of(self.caches, num_blocks=pool, block_size=TOKENS)
        self.store = BlockStore(self.caches, layout)
        self.halves = {}
        for name in PAIRS:
            kind, _, rest = name.partition(", ")
            extra = {"pipe": kind, "verify": not rest}
            config = {"kv_connector": "PyNcclConnector", "kv_role": role, "kv_connector_extra_config": extra}
            half = PyNcclWorker(
                Context(
                    options=parse_options(config),
                    engine_id=role,
                    rank=0,
                    world_size=1,
                    model={},
                    cache=CacheGeometry(TOKENS, pool, layout.block_bytes),
                )
            )
            half.register(self.caches, layout)
            self.halves[name] = half

    def close(self) -> None:
        for half in self.halves.values():
            half.close()


class RawGloo:
    """A process group of its own, made as a gloo pipe's is."""

    def __init__(self, port: int, rank: int):
        store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
        options = dist.ProcessGroupGloo._Options()
        options._threads = 1
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)]
        self._group = dist.ProcessGroupGloo(store, rank, 2, options)
        self._rank, self._word = rank, torch.zeros(1, dtype=torch.uint8)

    def send(self, data: torch.Tensor) -> None:
        """Sends once the other end asks."""
        self._group.recv([self._word], 1 - self._rank, 0).wait()
        self._group.send([data], 1 - self._rank, 1).wait()

    def fetch(self, data: torch.Tensor) -> None:
        self._group.send([self._word], 1 - self._rank, 0).wait()
        self._group.recv([data], 1 - self._rank, 1).wait()


def produce(connection: Any, port: int, pool: int, block_bytes: int) -> None:
    """The other process: offers blocks, and sends raw bytes when told to."""
    end = End("kv_producer", pool, block_bytes, seed=1)
    connection.send({name: half.handshake()["address"] for name, half in end.halves.items()})
    gloo = RawGloo(port, 0)
    data = torch.ones(pool // 2 * block_bytes * LAYERS, dtype=torch.uint8)
    while (command := connection.recv()) is not None:
        what, count = command
        if what == "offer":
            for half in end.halves.values():
                half.kept(str(count), (ids(pool, count, seed=count),))
            digests = end.store.new_digests(count)
            end.store.digest_in_place(ids(pool, count, seed=count), np.arange(count), digests)
            connection.send(digests.numpy())
        elif what == "cpu":
            connection.send(time.process_time())
        else:
            gloo.send(data[: count * block_bytes * LAYERS])
    end.close()


def wait_for_quiet(patience: float) -> None:
    """Waits until other processes have left the cores alone for a moment, `patience` seconds at most."""
    limit = time.monotonic() + patience
    while True:
        before = _cpu_times()
        time.sleep(QUIET)
        spent = [after - then for after, then in zip(_cpu_times(), before, strict=True)]
        if spent[3] + spent[4] >= 0.9 * sum(spent) or time.monotonic() >= limit:  # idle, or waiting for a disk
            return


def _cpu_times() -> list[int]:
    """Of all cores since the start: user, nice, system, idle, iowait and so on."""
    return [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]


def measure(sizes_mib: list[int], block_bytes: int, rounds: int, patience: float, rest: float) -> dict[str, Any]:
    """Raw samples, `{MiB: {what: [seconds]}}`, on the wall clock, of both processes' CPU time and of other processes';
    those that were taken again; speeds of single steps.
    """
    counts = {mib: max(1, (mib << 20) // (block_bytes * LAYERS)) for mib in sizes_mib}
    pool = 2 * max(counts.values())
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=produce, args=(theirs, port, pool, block_bytes), daemon=True)
    process.start()
    try:
        end = End("kv_consumer", pool, block_bytes, seed=2)
        addresses = ours.recv()
        gloo = RawGloo(port, 1)
        samples: dict[int, dict[str, list[float]]] = {}
        spent: dict[int, dict[str, list[float]]] = {}
        others: dict[int, dict[str, list[float]]] = {}
        again: dict[int, dict[str, list[float]]] = {}

        def cpu_seconds() -> float:
            ours.send(("cpu", 0))
            return time.process_time() + ours.recv()

        for mib, count in counts.items():
            nbytes = count * block_bytes * LAYERS
            a, b = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
            ours.send(("offer", count))
            expected = ours.recv()

            def raw(count: int = count, b: torch.Tensor = b) -> None:
                ours.send(("send", count))
                gloo.fetch(b)

            operations: dict[str, Callable[[], object]] = {
                "memcpy": lambda a=a, b=b: b.copy_(a),
                "raw gloo": raw,
                **{name: lambda n=name, c=count: load(end.halves[n], addresses[n], pool, c) for name in PAIRS},
            }
            samples[mib], spent[mib], others[mib], again[mib] = ({name: [] for name in operations} for _ in range(4))
            for i in range(WARM_UP + rounds):
                for name, operation in operations.items():
                    attempts = ATTEMPTS if patience and i >= WARM_UP else 1
                    for attempt in range(1, attempts + 1):
                        if attempts > 1:
                            wait_for_quiet(patience)
                        time.sleep(rest)
                        all_before, before, began = _busy_seconds(), cpu_seconds(), time.perf_counter()
                        operation()
                        seconds = time.perf_counter() - began
                        ours_spent = cpu_seconds() - before
                        others_spent = max(0.0, _busy_seconds() - all_before - ours_spent)
                        if attempt == attempts or others_spent <= max(DISTURBED * seconds, DISTURBED_SECONDS):
                            break
                        again[mib][name].append(seconds)
                    if i >= WARM_UP:
                        samples[mib][name].append(seconds)
                        spent[mib][name].append(ours_spent)
                        others[mib][name].append(others_spent)
            for name in PAIRS:
                nothing = torch.zeros(end.store.staging_bytes(count), dtype=torch.uint8)
                end.store.scatter(targets(pool, count), nothing)
                operations[name]()
                digests = end.store.new_digests(count)
                end.store.digest_in_place(targets(pool, count), np.arange(count), digests)
                if not np.array_equal(digests.numpy(), expected):
                    raise SystemExit(f"{name}: blocks differ from the producer's")
        ours.send(None)
        steps = single_steps(end.store, pool, rounds)
        end.close()
        process.join(TIMEOUT)
    finally:
        process.kill()
        process.join()
    sizes = {mib: count * block_bytes * LAYERS for mib, count in counts.items()}
    return {
        "seconds": samples,
        "cpu seconds": spent,
        "cpu seconds of others": others,
        "seconds of samples taken again": again,
        "bytes": sizes,
        **steps,
    }


def _busy_seconds() -> float:
    """For which all cores together have been at work since the start."""
    times = _cpu_times()
    return (sum(times[:8]) - times[3] - times[4]) / os.sysconf("SC_CLK_TCK")


class WaitedFor(LoadTask):
    """Says when it ends: looking again and again would cost a core that the load needs."""

    def __init__(self, order: LoadOrder, deadline: float):
        super().__init__(order, deadline)
        self.over = threading.Event()

    def done(self) -> None:
        super().done()
        self.over.set()

    def fail(self, error: BaseException, failed: np.ndarray | None = None) -> None:
        super().fail(error, failed)
        self.over.set()


def load(half: PyNcclWorker, address: str, pool: int, count: int) -> None:
    """One load into blocks in random order."""
    source = Source((address,), str(count))
    order = LoadOrder(1, "r", (targets(pool, count),), 0, count * TOKENS, source, TIMEOUT)
    task = WaitedFor(order, time.monotonic() + TIMEOUT)
    half.load(task)
    task.over.wait(TIMEOUT)
    if task.state is not TaskState.DONE:
        raise SystemExit(f"a load is {task.state.value}: {task.error}")


def single_steps(store: BlockStore, pool: int, rounds: int) -> dict[str, Any]:
    """What one thread does of a load, each step by itself, over blocks that it has not just touched."""
    chunk = min(pool // 4, max(1, (21 << 20) // store.staging_bytes(1)))
    staging, positions = store.staging(chunk), np.arange(chunk)
    order = ids(pool, pool, seed=5)
    at = 0

    def following() -> np.ndarray:
        nonlocal at
        at = (at + chunk) % (pool - chunk)
        return order[at : at + chunk]

    peer, digests = store.peer(store.layout, store.addresses), store.new_digests(chunk)  # this process's own memory
    operations: dict[str, Callable[[], object]] = {
        "gather": lambda: store.gather(following(), staging),
        "digest of a staged message": lambda: store.digest(staging, chunk, positions),
        "scatter": lambda: store.scatter(following(), staging),
        "pull, with digests": lambda: store.pull(
            store.choose(peer, following(), positions), following(), digests=digests
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    for i in range(WARM_UP + rounds):
        for name, operation in operations.items():
            began = time.perf_counter()
            operation()
            if i >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    return {"steps": {"bytes": store.staging_bytes(chunk), "seconds": seconds}}


def ratios(samples: dict[int, dict[str, list[float]]]) -> dict[str, dict[int, float]]:
    """Medians of what is measured against its ceiling's: 1 is as fast."""
    return {
        name: {mib: statistics.median(by[ceiling]) / statistics.median(by[name]) for mib, by in samples.items()}
        for name, ceiling in PAIRS.items()
    }


def plot(samples: dict[int, dict[str, list[float]]], sizes: dict[int, int]) -> str:
    """An SVG: GB/s of each, a bar to the median and a dot a sample."""
    names = list(next(iter(samples.values())))
    colours = dict(
        zip(
            names, ("#888888", "#bbbbbb", "#2f7d4f", "#9ad3b0", "#1b6ca8", "#8fc1e3", "#c05621", "#f0b48a"), strict=True
        )
    )
    top = max(percentile([sizes[mib] / s / 1e9 for s in by[name]], 95) for mib, by in samples.items() for name in names)
    wide, high, left, base = 34, 260, 50, 300
    parts, x = [], left
    for step in range(int(top) + 1):
        y = base - high * step / top
        parts.append(f'<path d="M{left} {y:.1f}H{{right}}" stroke="#ddd"/><text x="8" y="{y + 4:.1f}">{step}</text>')
    for mib, by in samples.items():
        middle = x + wide * len(names) / 2
        parts.append(f'<text x="{middle:.0f}" y="{base + 18}" text-anchor="middle">{mib} MiB</text>')
        for name in names:
            speeds = [sizes[mib] / s / 1e9 for s in by[name]]
            bar = high * statistics.median(speeds) / top
            colour = colours[name]
            parts.append(f'<path d="M{x} {base}h{wide - 6}v{-bar:.1f}h{6 - wide}z" fill="{colour}"/>')
            dots = (base - high * min(speed, top) / top for speed in speeds)
            parts += [f'<circle cx="{x + wide / 2 - 3}" cy="{y:.1f}" r="1.5" fill="#222"/>' for y in dots]
            x += wide
        x += wide
    for i, name in enumerate(names):
        at = left + 150 * i
        parts.append(f'<path d="M{at} {base + 32}h12v12h-12z" fill="{colours[name]}"/>')
        parts.append(f'<text x="{at + 16}" y="{base + 43}">{escape(name)}</text>')
    right = max(x, left + 150 * len(names))
    body = "".join(parts).replace("{right}", str(right))
    title = '<text x="8" y="18">GB/s, medians and samples; 64 KiB blocks in random order, or contiguous (grey)</text>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{right}" height="{base + 60}" font-family="sans-serif"'
    return f'{head} font-size="12"><rect width="100%" height="100%" fill="#fff"/>{title}{body}</svg>\n'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the raw samples here")
    parser.add_argument("--svg", type=Path, help="draw them here")
    parser.add_argument("--mib", type=int, nargs="+", default=list(SIZES_MIB), help="sizes of a load")
    parser.add_argument("--kib", type=int, default=BLOCK_KIB, help="KiB of a block in one layer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each (default: %(default)s)")
    parser.add_argument(
        "--patience",
        type=float,
        default=10.0,
        help="most seconds to wait before each sample until the cores are idle, and again after one that others "
        "disturbed; 0 does not look (default: %(default)s)",
    )
    parser.add_argument(
        "--rest",
        type=float,
        default=0.0,
        help="seconds without work before each sample, for others on a shared machine (default: %(default)s)",
    )
    parser.add_argument(
        "--piece", type=int, help="MiB that a thread reads in place at a time (default: kvsdk.kernels.torch_blocks's)"
    )
    args = parser.parse_args(arguments)
    if args.piece:
        torch_blocks.PIECE_BYTES = args.piece << 20
    result = measure(args.mib, args.kib * 1024, args.rounds, args.patience, args.rest)
    samples, sizes, against = result["seconds"], result["bytes"], ratios(result["seconds"])
    rows: list[list[Any]] = [["GB/s, median", *(f"{mib} MiB" for mib in samples)]]
    for name in next(iter(samples.values())):
        rows.append([name, *(f"{sizes[mib] / statistics.median(by[name]) / 1e9:.2f}" for mib, by in samples.items())])
    for name, by_size in against.items():
        aim = f", aim {AIMS[name]}" if name in AIMS else ""
        rows.append([f"{name} / {PAIRS[name]}{aim}", *(f"{ratio:.2f}" for ratio in by_size.values())])
    for name in samples[args.mib[0]]:
        spent = ((mib, statistics.median(by[name])) for mib, by in result["cpu seconds"].items())
        rows.append([f"CPU s a GB, both processes: {name}", *(f"{cpu / sizes[mib] * 1e9:.2f}" for mib, cpu in spent)])
    steps = result["steps"]
    for name, seconds in steps["seconds"].items():
        rows.append([f"one thread: {name}", f"{steps['bytes'] / statistics.median(seconds) / 1e9:.2f}"])
    again = [sum(map(len, by.values())) for by in result["seconds of samples taken again"].values()]
    if any(again):
        rows.append(["samples taken again, which others disturbed", *map(str, again)])
    widest = max(map(len, rows))
    print(table(row + [""] * (widest - len(row)) for row in rows))
    write(args.json, {"layers": LAYERS, "kib": args.kib, "ratios": against, **result})
    if args.svg is not None:
        args.svg.parent.mkdir(parents=True, exist_ok=True)
        args.svg.write_text(plot(samples, sizes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
