"""How fast scattered blocks move from one GPU to another: `python -m benchmarks.blocks --json FILE --svg FILE`.

Two processes with one GPU each, as servers are, hold an 8B-shaped cache: 32 layers, each a tensor of its own. In every
round each way of moving the same blocks has its turn:

- `peer`, `nccl`: the worker halves of two `PyNcclConnector`s, from the load's arrival to the last digest checked
  (`no digests`: nothing checked), each time of a new offer, which the producer has digested before, as it does while a
  proxy is still on its way to the decode server;
- `NIXL`: a READ as vLLM's NixlConnector posts it, from making the transfer to its end;
- ceilings: one contiguous peer copy of as many bytes, by a process that sees both GPUs; one contiguous send and receive
  over NCCL between the two processes.

Blocks lie next to each other, in random order, or as a block pool scatters them that has served 600 mixed requests.
GB/s are 1e9 bytes of payload a second; medians of all rounds after two that do not count.

`--sweep max_sms=16,32,64` gives an option several values, each of them a way of its own in every round: this is how
defaults were chosen.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import multiprocessing
import os
import random
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import table, version, write
from benchmarks.plots import lines, save

LAYERS, BLOCK_SIZE = 32, 16
MIB = 2**20
CONFIGS = (
    # KiB of a block in one layer, MiB of a transfer, pattern
    (64, 4096, "random"),
    (64, 1024, "random"),
    (32, 1024, "random"),
    (16, 1024, "random"),
    (64, 128, "random"),
    (64, 1024, "contiguous"),
    (64, 1024, "aged"),
    (64, 4096, "aged"),
    (64, 128, "aged"),
    (256, 1024, "random"),
    (2048, 1024, "random"),
    (4, 256, "random"),
    (64, 16, "random"),
    (64, 512, "random"),
    (16, 1024, "contiguous"),
    (256, 1024, "contiguous"),
    (16, 1024, "aged"),
    (256, 1024, "aged"),
)
POOL_MIB = 8192
WARM_UP = 2
LIMIT = 120.0
"""Seconds for anything that one process is asked for."""
AGEING_REQUESTS = 600
DIGESTED_AFTER = 0.02
"""Seconds from an offer to its load; an H200 digests 4 GiB in 3 ms."""


def pattern(kind: str, pool: int, count: int, seed: int) -> np.ndarray:
    """Ids of `count` blocks of a pool, int32: `contiguous`, `random` or `aged`."""
    if kind == "contiguous":
        return np.arange(1, count + 1, dtype=np.int32)
    if kind == "random":
        return (1 + np.random.default_rng(seed).permutation(pool - 1)[:count]).astype(np.int32)
    return aged(pool, count, seed)


def aged(pool: int, count: int, seed: int) -> np.ndarray:
    """What a pool that takes free blocks from the front and gives them back at the end, a request's last block first,
    as vLLM's does, hands out after mixed requests of which up to 16 run at a time."""
    rng = random.Random(seed)
    free = collections.deque(range(1, pool))
    running: list[list[int]] = []
    for _ in range(AGEING_REQUESTS):
        size = min(rng.randint(1, max(2, pool // 16)), pool // 2)
        while running and (len(running) == 16 or len(free) < size):
            free.extend(reversed(running.pop(rng.randrange(len(running)))))
        running.append([free.popleft() for _ in range(size)])
    while running:
        free.extend(reversed(running.pop(rng.randrange(len(running)))))
    return np.array([free.popleft() for _ in range(count)], dtype=np.int32)


class End:
    """One process with one device. Every public method is a command."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._halves: dict[str, Any] = {}
        self._nixl: _Nixl | None = None

    def about(self) -> dict[str, Any]:
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if self.device.type == "cuda" else None
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        return {"device": name, "torch": torch.__version__, "nccl": nccl, "nixl": version("nixl-cu13")}

    # ---- ceilings

    def open_group(self, rank: int, port: int) -> None:
        """A process group of the two ends, for the ceiling alone."""
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(
            backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
        )

    def raw(self, nbytes: int) -> float:
        """Seconds of one contiguous send and receive."""
        flat = self._flat(nbytes)
        self._sync()
        began = time.perf_counter()
        if torch.distributed.get_rank() == 0:
            torch.distributed.send(flat, 1)
        else:
            torch.distributed.recv(flat, 0)
        self._sync()
        return time.perf_counter() - began

    # ---- the cache

    def make(self, pool: int, block_bytes: int, seed: int) -> None:
        """A cache of random bytes in place of the one before."""
        self.drop()
        self._seed, self._pool, self._block_bytes = seed, pool, block_bytes
        self.caches = dict(self._random(seed))

    def _random(self, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (self._pool, 1, BLOCK_SIZE, self._block_bytes // BLOCK_SIZE // 4)
        bits = {"dtype": torch.int32, "device": self.device, "generator": generator}
        for i in range(LAYERS):
            yield f"layers.{i}", torch.randint(-(2**31), 2**31, shape, **bits)

    def drop(self) -> None:
        """Give up the cache and all that reads it."""
        while self._halves:
            self._halves.popitem()[1].close()
        if self._nixl is not None:
            self._nixl.close()
            self._nixl = None
        self.caches: dict[str, torch.Tensor] = {}
        self._flats: dict[int, torch.Tensor] = {}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def clear(self, ids: np.ndarray) -> None:
        at = torch.from_numpy(ids.astype(np.int64)).to(self.device)
        for cache in self.caches.values():
            cache[at] = 0
        self._sync()

    def same(self, seed: int, theirs: np.ndarray, ours: np.ndarray) -> int:
        """How many blocks, counted in each layer, differ from those of a cache that `seed` made."""
        of, at = (torch.from_numpy(ids.astype(np.int64)).to(self.device) for ids in (theirs, ours))
        different = 0
        for name, cache in self._random(seed):
            unequal = (cache[of] != self.caches[name][at]).flatten(1).any(1)
            different += int(unequal.sum())
        return different

    # ---- kvsdk

    def half(self, name: str, role: str, options: dict[str, Any]) -> str:
        """A worker half over the cache; returns its address."""
        from kvsdk.config import parse_options
        from kvsdk.connector.interface import CacheGeometry, Context
        from kvsdk.connectors.pynccl import PyNcclWorker
        from kvsdk.layout import layout_of

        layout = layout_of(self.caches, num_blocks=self._pool, block_size=BLOCK_SIZE)
        config = {"kv_connector": "PyNcclConnector", "kv_role": role, "kv_connector_extra_config": options}
        geometry = CacheGeometry(BLOCK_SIZE, self._pool, layout.block_bytes)
        half = self._halves[name] = PyNcclWorker(Context(parse_options(config), name, 0, 1, {}, geometry))
        half.register(self.caches, layout)
        return half.handshake()["address"]

    def keep(self, name: str, hold: str, ids: np.ndarray) -> None:
        """A new offer, which is given the time to be digested."""
        self._halves[name].kept(hold, (ids,))
        time.sleep(DIGESTED_AFTER)

    def let_go(self, name: str, hold: str) -> None:
        self._halves[name].let_go(hold)

    def load(self, name: str, address: str, hold: str, ids: np.ndarray) -> float:
        """Seconds from the arrival of a load to its end."""
        from kvsdk.connector.tasks import LoadOrder, LoadTask
        from kvsdk.connectors.pynccl.protocol import Source

        class Timed(LoadTask):
            ended_at = 0.0

            def done(self) -> None:
                super().done()
                self.ended_at = time.perf_counter()

        order = LoadOrder(1, "r", (ids,), 0, len(ids) * BLOCK_SIZE, Source((address,), hold), LIMIT)
        fence = None
        if self.device.type == "cuda":
            fence = torch.cuda.Event()
            fence.record()
        began = time.perf_counter()
        task = Timed(order, time.monotonic() + LIMIT, fence)
        self._halves[name].load(task)
        while not task.ended_at and not task.error and time.perf_counter() < began + LIMIT:
            time.sleep(1e-3)
        if not task.ended_at:
            raise RuntimeError(f"{name}: the load ended as {task.state.value}: {task.error}")
        return task.ended_at - began

    # ---- NIXL

    def open_nixl(self, name: str) -> tuple[bytes, int]:
        self._nixl = _Nixl(name, self.caches, self._block_bytes, self.device)
        return self._nixl.metadata, self._nixl.device

    def meet_nixl(self, metadata: bytes, pool: int, bases: list[int], device: int) -> None:
        self._nixl.meet(metadata, pool, bases, device)

    def bases(self) -> list[int]:
        return [cache.data_ptr() for cache in self.caches.values()]

    def read_nixl(self, theirs: np.ndarray, ours: np.ndarray) -> float:
        return self._nixl.read(theirs, ours)

    # ----

    def _flat(self, nbytes: int) -> torch.Tensor:
        if nbytes not in self._flats:
            self._flats = {nbytes: torch.zeros(nbytes, dtype=torch.uint8, device=self.device)}
        return self._flats[nbytes]

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class _Nixl:
    """A NIXL agent over a cache, used as vLLM's NixlConnector uses it: every block of every layer is a descriptor,
    prepared once, and a transfer is a list of their indices."""

    def __init__(self, name: str, caches: dict[str, torch.Tensor], block_bytes: int, device: torch.device):
        from nixl._api import nixl_agent, nixl_agent_config

        self._agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
        self._kind = "VRAM" if device.type == "cuda" else "DRAM"
        self._block_bytes, self.device = block_bytes, device.index or 0
        self._pool = len(next(iter(caches.values())))
        regions = [(cache.data_ptr(), cache.numel() * cache.itemsize, self.device, "") for cache in caches.values()]
        self._registered = self._agent.get_reg_descs(regions, self._kind)
        self._agent.register_memory(self._registered, backends=["UCX"])
        bases = [cache.data_ptr() for cache in caches.values()]
        self._ours = self._prepare("NIXL_INIT_AGENT", bases, self._pool, self.device)
        self.metadata = self._agent.get_agent_metadata()
        self._theirs: Any = None

    def _prepare(self, agent: str, bases: list[int], pool: int, device: int) -> Any:
        blocks = np.zeros((len(bases), pool, 3), np.uint64)
        blocks[..., 0] = np.array(bases, np.uint64)[:, None] + np.arange(pool, dtype=np.uint64) * self._block_bytes
        blocks[..., 1], blocks[..., 2] = self._block_bytes, device
        return self._agent.prep_xfer_dlist(agent, self._agent.get_xfer_descs(blocks.reshape(-1, 3), self._kind))

    def meet(self, metadata: bytes, pool: int, bases: list[int], device: int) -> None:
        self._peer = self._agent.add_remote_agent(metadata)
        self._theirs = self._prepare(self._peer, bases, pool, device)
        self._their_pool = pool

    def read(self, theirs: np.ndarray, ours: np.ndarray) -> float:
        """Seconds from making a transfer to its end."""
        began = time.perf_counter()
        layers = np.arange(LAYERS, dtype=np.int32)[:, None]
        local = (layers * self._pool + ours).ravel().astype(np.int32)
        remote = (layers * self._their_pool + theirs).ravel().astype(np.int32)
        handle = self._agent.make_prepped_xfer("READ", self._ours, local, self._theirs, remote)
        state = self._agent.transfer(handle)
        while state == "PROC":
            if time.perf_counter() > began + LIMIT:
                raise RuntimeError("NIXL did not end")
            state = self._agent.check_xfer_state(handle)
        seconds = time.perf_counter() - began
        self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError(f"NIXL ended as {state}")
        return seconds

    def close(self) -> None:
        if self._theirs is not None:
            self._agent.release_dlist_handle(self._theirs)
            self._agent.remove_remote_agent(self._peer)
        self._agent.release_dlist_handle(self._ours)
        self._agent.deregister_memory(self._registered)


class PeerCopy:
    """A process that sees both devices."""

    def __init__(self, devices: Sequence[str]):
        self._devices = [torch.device(device) for device in devices]
        self._nbytes = 0

    def copy(self, nbytes: int) -> float:
        """Seconds of one contiguous copy from the first device to the second."""
        if nbytes != self._nbytes:
            self._buffers = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for device in self._devices]
            self._nbytes = nbytes
        a, b = self._buffers
        self._sync()
        began = time.perf_counter()
        b.copy_(a)
        self._sync()
        return time.perf_counter() - began

    def _sync(self) -> None:
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)


def _obey(connection: Connection, kind: type, *args: Any) -> None:
    """The other process: carries out commands until there are no more."""
    obeyer = None
    while (command := connection.recv()) is not None:
        try:
            if obeyer is None:
                obeyer = kind(*args)
            name, arguments = command
            connection.send((True, getattr(obeyer, name)(*arguments)))
        except Exception:  # noqa: BLE001 - it goes to the other process, whatever it is
            connection.send((False, traceback.format_exc()))


class Process:
    """A handle on another process; every answer has a limit."""

    def __init__(self, name: str, visible: str | None, kind: type, *args: Any):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_obey, args=(theirs, kind, *args), name=name, daemon=True)
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        try:
            self._process.start()
        finally:
            if before is None:
                os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = before
        theirs.close()

    def start(self, name: str, *args: Any) -> None:
        self._connection.send((name, args))

    def answer(self) -> Any:
        if not self._connection.poll(LIMIT):
            raise RuntimeError(f"{self.name} did not answer within {LIMIT:g} s")
        well, answer = self._connection.recv()
        if not well:
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def __call__(self, name: str, *args: Any) -> Any:
        self.start(name, *args)
        return self.answer()

    def stop(self) -> None:
        self._process.kill()
        self._process.join(10)


def together(first: Process, second: Process, name: str, *args: Sequence[Any]) -> tuple[Any, Any]:
    """The same command to both at once; `args` are pairs."""
    for process, own in ((first, 0), (second, 1)):
        process.start(name, *(pair[own] for pair in args))
    return first.answer(), second.answer()


class Bench:
    """All processes of a run, and what was measured so far."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        gpus = args.devices.split(",") if not args.cpu else None
        self.producer = Process("producer", gpus and gpus[0], End, "cuda:0" if gpus else "cpu")
        self.consumer = Process("consumer", gpus and gpus[1], End, "cuda:0" if gpus else "cpu")
        both = ["cuda:0", "cuda:1"] if gpus else ["cpu", "cpu"]
        self.one = gpus is not None and gpus[0] == gpus[1]  # NCCL refuses a device twice
        if self.one:
            both = ["cuda:0", "cuda:0"]
        self.copier = Process("copier", gpus and ",".join(dict.fromkeys(gpus)), PeerCopy, both)
        self.kinds = ["gloo"] if not gpus else ["peer"] if self.one else ["peer", "nccl"]
        self.results: list[dict[str, Any]] = []
        self.about: dict[str, Any] = {}

    def __enter__(self) -> Bench:
        self.about = self.producer("about")
        self.consumer("about")
        if self.one:
            return self
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        together(self.producer, self.consumer, "open_group", (0, 1), (port, port))
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in (self.producer, self.consumer, self.copier):
            process.stop()

    def measure(self, kib: int, mib: int, kind: str) -> dict[str, Any]:
        """One line of the curve: raw samples of every way."""
        args, block_bytes = self.args, kib * 1024
        total = mib * MIB if not args.cpu else mib * MIB // 64
        count = max(1, total // (block_bytes * LAYERS))
        pool = max(2 * count, min(POOL_MIB if mib > 1024 else POOL_MIB // 2, 2**31) * MIB // (block_bytes * LAYERS)) + 1
        if args.cpu:
            pool = 2 * count + 1
        moved = count * block_bytes * LAYERS
        together(self.producer, self.consumer, "make", (pool, pool), (block_bytes, block_bytes), (1, 2))
        theirs, ours = pattern(kind, pool, count, 3), pattern(kind, pool, count, 4)
        ways: dict[str, Callable[[], float]] = {
            "peer copy": lambda: self.copier("copy", moved),
            "raw NCCL": lambda: together(self.producer, self.consumer, "raw", (moved, moved))[1],
        }
        if self.one:
            del ways["raw NCCL"]
        for pipe in self.kinds:
            for name, options in self._variants(pipe):
                ways[name] = self._pair(name, theirs, ours, pipe=pipe, **options)
        if args.nixl:
            ways["NIXL"] = self._nixl(pool, theirs, ours)
        samples: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(args.rounds + WARM_UP):
            for name, way in list(ways.items()):
                try:
                    seconds = way()
                except RuntimeError as error:
                    print(f"{name} failed: {error}", file=sys.stderr, flush=True)
                    del ways[name]
                else:
                    samples[name] += [seconds] if i >= WARM_UP else []
        wrong = {}
        for name, way in ways.items():
            if name in ("peer copy", "raw NCCL"):
                continue
            self.consumer("clear", ours)
            way()
            wrong[name] = self.consumer("same", 1, theirs, ours)
        together(self.producer, self.consumer, "drop")
        result = {
            "block_kib": kib,
            "bytes": moved,
            "blocks": count,
            "pattern": kind,
            "seconds": samples,
            "blocks_that_differ": wrong,
        }
        self.results.append(result)
        return result

    def _variants(self, pipe: str) -> Iterator[tuple[str, dict[str, Any]]]:
        args = self.args
        if args.sweep:
            option, _, values = args.sweep.partition("=")
            for value in values.split(","):
                yield f"{pipe}, {option} {value}", {**args.options, option: int(value)}
            return
        yield pipe, {**args.options, "verify": True}
        yield f"{pipe}, no digests", {**args.options, "verify": False}

    def _pair(self, name: str, theirs: np.ndarray, ours: np.ndarray, **options: Any) -> Callable[[], float]:
        address = self.producer("half", name, "kv_producer", options)
        self.consumer("half", name, "kv_consumer", options)
        numbers = itertools.count()

        def way() -> float:
            hold = f"offer {next(numbers)}"
            self.producer("keep", name, hold, theirs)
            seconds = self.consumer("load", name, address, hold, ours)
            self.producer("let_go", name, hold)
            return seconds

        return way

    def _nixl(self, pool: int, theirs: np.ndarray, ours: np.ndarray) -> Callable[[], float]:
        (metadata, device), _ = together(self.producer, self.consumer, "open_nixl", ("producer", "consumer"))
        self.consumer("meet_nixl", metadata, pool, self.producer("bases"), device)
        return lambda: self.consumer("read_nixl", theirs, ours)


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """How the medians of one line compare."""
    median = {name: statistics.median(seconds) for name, seconds in result["seconds"].items() if seconds}
    found = {}
    for name in median:
        if name.partition(",")[0] not in ("peer", "nccl", "gloo") or name.endswith("no digests"):
            continue
        if "peer copy" in median:
            found[f"{name} / (peer copy + 0.2 ms)"] = (median["peer copy"] + 2e-4) / median[name]
        if "raw NCCL" in median:
            found[f"{name} / raw"] = median["raw NCCL"] / median[name]
        if f"{name}, no digests" in median:
            found[f"{name}: digests on / off"] = median[f"{name}, no digests"] / median[name]
        if "NIXL" in median:
            found[f"{name} / NIXL"] = median["NIXL"] / median[name]
    return found


def show(results: Sequence[dict[str, Any]]) -> str:
    """The medians in GB/s and the ratios, as Markdown."""
    names = list(dict.fromkeys(name for result in results for name in result["seconds"]))
    rows: list[list[Any]] = [["KiB a block", "MiB", "order", *names]]
    for result in results:
        speeds = (result["seconds"].get(name) for name in names)
        figures = [f"{result['bytes'] / statistics.median(s) / 1e9:.1f}" if s else "" for s in speeds]
        rows.append([result["block_kib"], round(result["bytes"] / MIB), result["pattern"], *figures])
    out = [table(rows), ""]
    for result in results:
        what = f"{result['block_kib']} KiB, {result['bytes'] / MIB:.0f} MiB, {result['pattern']}"
        out.append(f"- {what}: " + "; ".join(f"{name} {value:.3f}" for name, value in ratios(result).items()))
        if any(result["blocks_that_differ"].values()):
            out.append(f"  **blocks that differ: {result['blocks_that_differ']}**")
    return "\n".join(out)


def chosen(numbers: str) -> list[tuple[int, int, str]]:
    """The lines of the curve that `3`, `0-4` or `1,5-7` names."""
    found = []
    for part in numbers.split(","):
        first, _, last = part.partition("-")
        found += CONFIGS[int(first) : int(last or first) + 1]
    return found


def draw(results: Sequence[dict[str, Any]]) -> str:
    """Throughput against bytes of a block, in random order and of the size that most lines have, as SVG."""
    series: dict[str, list[tuple[float, float]]] = {}
    size = statistics.mode(result["bytes"] for result in results)
    for result in results:
        if result["pattern"] == "random" and result["bytes"] == size:
            for name, samples in result["seconds"].items():
                if samples:
                    point = (result["block_kib"], result["bytes"] / statistics.median(samples) / 1e9)
                    series.setdefault(name, []).append(point)
    return lines(
        series,
        title=f"{size // MIB} MiB in blocks in random order, from process to process",
        x="KiB of a block in one layer",
        y="GB/s, median",
        log_x=True,
        log_y=True,
        x_ticks=sorted({x for points in series.values() for x, _ in points}),
        dashed=[name for name in series if name in ("peer copy", "raw NCCL")],
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocks", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the raw samples here, after each line")
    parser.add_argument("--svg", type=Path, help="draw throughput against bytes of a block here")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each (default: %(default)s)")
    parser.add_argument("--devices", default="0,1", help="the two GPUs, or one twice (default: %(default)s)")
    parser.add_argument("--nixl", action="store_true", help="measure NIXL, too")
    parser.add_argument(
        "--lines", default=f"0-{len(CONFIGS) - 1}", help="which lines of the curve (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=480.0, help="begin no line after that (default: %(default)s)")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of options of the connectors")
    parser.add_argument("--sweep", metavar="OPTION=N,N,...", help="measure the connectors with each of these values")
    parser.add_argument("--cpu", action="store_true", help="a 64th of the size over gloo: shows that the program works")
    args = parser.parse_args(arguments)
    if not args.cpu and torch.cuda.device_count() < len(set(args.devices.split(","))):
        parser.error(f"devices {args.devices} are not all here")
    began = time.monotonic()
    with Bench(args) as bench:
        for line in chosen(args.lines):
            if time.monotonic() > began + args.seconds:
                print(f"no time is left for {line}", file=sys.stderr)
                continue
            before = time.monotonic()
            bench.measure(*line)
            print(f"{line} took {time.monotonic() - before:.1f} s", file=sys.stderr, flush=True)
            if args.json:
                write(args.json, {"about": bench.about, "options": args.options, "lines": bench.results})
        print(show(bench.results))
        if args.svg:
            save(args.svg, draw(bench.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
