"""What a prefill server costs while it does nothing, without offers and with some that nobody takes.

Starts one real `vllm serve` of a tiny model and reads the CPU time of its process group, in windows, in each of these
states: idle without an offer, with 1, with `--offers`. Steps of the engine are counted in the worker, by a subclass of
the connector that does nothing else. Latency is the time of a one-token completion of a one-token prompt, which is
never offered. At the end the server is asked to stop while the offers stand.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import percentile, table, write
from kvsdk.config import transfer_config
from kvsdk.connectors.pynccl import PyNcclConnector, PyNcclWorker
from kvsdk.demo.servers import Server, free_port, vllm_server

STEPS_FILE = "KVSDK_BENCHMARK_STEPS"
"""Environment variable: the file in which a worker counts its steps, a little-endian uint64."""
BLOCK_SIZE = 32
PROMPT_TOKENS = 100
VOCABULARY = 900
SETTLE = 2.0
"""Seconds between a change and the measurement."""


class CountingWorker(PyNcclWorker):
    """Counts steps: vLLM takes the counters once in each."""

    def __init__(self, context: Any):
        super().__init__(context)
        with open(os.environ[STEPS_FILE], "r+b") as file:
            self._steps = mmap.mmap(file.fileno(), 8)

    def take_counters(self) -> dict[str, float]:
        struct.pack_into("<Q", self._steps, 0, struct.unpack("<Q", self._steps[:8])[0] + 1)
        return super().take_counters()


class CountingConnector(PyNcclConnector):
    """`PyNcclConnector` whose worker counts steps in the file that `KVSDK_BENCHMARK_STEPS` names."""

    worker_half = CountingWorker


def cpu_seconds(group: int) -> dict[str, float]:
    """CPU seconds so far of each process of a process group, by its title and id."""
    ticks = os.sysconf("SC_CLK_TCK")
    seconds = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (folder / "stat").read_text(errors="replace").partition("(")[2].rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = rest.split()
        if int(fields[2]) == group:
            seconds[f"{name} {folder.name}"] = (int(fields[11]) + int(fields[12])) / ticks
    return seconds


def measure(server: Server, steps: Path, *, windows: int, window: float) -> dict[str, Any]:
    """CPU seconds a second of each process and of all, and steps a second: one figure a window of `window` seconds."""

    def look() -> tuple[float, dict[str, float], int]:
        return time.monotonic(), cpu_seconds(server.process.pid), struct.unpack("<Q", steps.read_bytes())[0]

    time.sleep(SETTLE)
    samples: dict[str, list[float]] = {}
    before = look()
    for _ in range(windows):
        time.sleep(window)
        after = look()
        elapsed = after[0] - before[0]
        spent = {name: (seconds - before[1].get(name, 0.0)) / elapsed for name, seconds in after[1].items()}
        row = spent | {"cpu": sum(spent.values()), "steps": (after[2] - before[2]) / elapsed}
        for name, value in row.items():
            samples.setdefault(name, []).append(round(value, 4))
        before = after
    return samples


def latencies(server: Server, count: int) -> list[float]:
    """Milliseconds of `count` completions of one token, one after another, each sent to an idle server."""
    rng = random.Random(0)
    times = []
    for _ in range(count):
        time.sleep(0.05 + 0.02 * rng.random())
        began = time.monotonic()
        server.complete([rng.randrange(1, VOCABULARY)], max_tokens=1)
        times.append(round((time.monotonic() - began) * 1e3, 3))
    return times


def offer(server: Server, count: int, seed: int) -> None:
    """Make `count` offers of `PROMPT_TOKENS` tokens."""
    rng = random.Random(seed)
    for _ in range(count):
        server.complete([rng.randrange(1, VOCABULARY) for _ in range(PROMPT_TOKENS)], max_tokens=1)


def run(folder: Path, *, offers: int, windows: int, window: float, requests: int) -> dict[str, Any]:
    """Boot the server, go through the states, stop it.

    Raises:
        ServerFailed: the server did not start, or did not answer.
    """
    from kvsdk.demo.models import make_tiny_llama

    steps = folder / "steps"
    steps.write_bytes(bytes(8))
    config = transfer_config(
        {
            "kv_connector": "PyNcclConnector",
            "kv_role": "kv_producer",
            "kv_port": free_port(),
            "kv_connector_extra_config": {"lease": 3600},
        }
    )
    config |= {"kv_connector": "benchmarks.idle:CountingConnector", "kv_connector_module_path": "kvsdk.vllm.connectors"}
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    states = {}
    with vllm_server(
        make_tiny_llama(folder / "model"), name="prefill", log=folder / "prefill.log", transfer_config=config,
        args=["--block-size", str(BLOCK_SIZE)], env={STEPS_FILE: str(steps), "PYTHONPATH": path},
    ) as server:  # fmt: skip
        server.wait_healthy(240)
        latencies(server, 3)
        made = 0
        for number in dict.fromkeys((0, 1, offers)):
            offer(server, number - made, seed=number)
            made = number
            states[str(number)] = measure(server, steps, windows=windows, window=window) | {
                "latency_ms": latencies(server, requests)
            }
        began = time.monotonic()
        server.stop(timeout=60)
        stop_seconds = time.monotonic() - began
    return {"states": states, "stop_seconds": round(stop_seconds, 2), "offers": offers, "window": window}


def report(result: dict[str, Any]) -> str:
    """The tables that are printed."""
    rows: list[Sequence[object]] = [
        ("offers", "CPU s/s", "API server", "engine", "worker", "steps/s", "latency ms", "p90")
    ]
    for number, samples in result["states"].items():
        # The system cuts a process's name after 15 characters.
        parts = {"EngineCor": 0.0, "Worker": 0.0, "API": 0.0}
        for name, values in samples.items():
            if name not in ("cpu", "steps", "latency_ms"):
                kind = next((part for part in ("EngineCor", "Worker") if part in name), "API")
                parts[kind] += statistics.median(values)
        latency = samples["latency_ms"]
        rows.append(
            (number, statistics.median(samples["cpu"]), parts["API"], parts["EngineCor"], parts["Worker"],
             round(statistics.median(samples["steps"])), statistics.median(latency), percentile(latency, 90))
        )  # fmt: skip
    return f"{table(rows)}\nstopping with {result['offers']} offers held took {result['stop_seconds']:.1f} s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.idle", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write JSON with the raw samples here")
    parser.add_argument("--offers", type=int, default=20, help="offers in the last state (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=5, help="measurements a state (default: %(default)s)")
    parser.add_argument("--window", type=float, default=4.0, help="seconds of one (default: %(default)s)")
    parser.add_argument(
        "--requests", type=int, default=30, help="requests for the latency of a state (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="kvsdk-idle-") as folder:
        result = run(
            Path(folder),
            offers=arguments.offers,
            windows=arguments.windows,
            window=arguments.window,
            requests=arguments.requests,
        )
    print(report(result))
    write(arguments.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
