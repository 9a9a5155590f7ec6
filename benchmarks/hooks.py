"""Times what vLLM's main thread spends in a connector's hooks, step by step, in the server's own processes.

`timed` wraps hooks so that a process-wide `Recorder` adds up their durations; `benchmarks.timed_connector` does so for
`PyNcclConnector`. On GPUs one process holds scheduler and worker, so that both sides' hooks count in a step.
"""

from __future__ import annotations

import array
import atexit
import collections
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STEPS_PATH = "KVSDK_BENCHMARK_STEPS"
"""Environment variable: the beginning of the path of the files in which a server's processes leave their steps."""
WORKER_HOOKS = (
    "handle_preemptions", "bind_connector_metadata", "start_load_kv", "wait_for_save", "get_finished",
    "get_transfer_results", "get_block_ids_with_load_errors", "get_kv_connector_stats",
    "get_kv_connector_kv_cache_events", "build_connector_worker_meta", "clear_connector_metadata", "finish_forward",
)  # fmt: skip
"""Without the two that vLLM calls for each layer, since kvsdk's do nothing: timing them would cost most of what is
measured."""
SCHEDULER_HOOKS = (
    "on_new_request", "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta",
    "update_connector_output", "request_finished", "has_pending_push_work", "take_events",
)  # fmt: skip
HOOKS = WORKER_HOOKS + SCHEDULER_HOOKS
WRITE_EVERY = 0.5
"""Seconds between two visits of the thread that writes."""
BINS_PER_DECADE = 100


class Step(NamedTuple):
    """One step: when it began (`time.monotonic`), microseconds in the worker's and the scheduler's hooks, calls, and of
    the longest call its microseconds and its hook's index in `HOOKS`."""

    began: float
    worker_us: float
    scheduler_us: float
    calls: float
    longest_us: float
    longest: float


class Recorder:
    """Adds up hooks' durations by step, in memory; a thread writes them to a file twice a second.

    A step begins with the worker's first hook (`bind_connector_metadata`), or, in a process that holds no worker, with
    the scheduler's `build_connector_meta`. The step that is under way is not written.

    Args:
        path: the beginning of the file's path; the process id is added. None: from `KVSDK_BENCHMARK_STEPS`; nothing is
            written where that is not set.
    """

    def __init__(self, path: str | None = None) -> None:
        path = os.environ.get(STEPS_PATH) if path is None else path
        self._path = Path(f"{path}-{os.getpid()}.f64") if path else None
        self._rows: collections.deque[Step] = collections.deque()
        self._began: int | None = None
        self._clear()
        self._inside = False
        self._thread: threading.Thread | None = None
        self.first_hook = "build_connector_meta"

    def call(self, side: str, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the method and count its time, unless it is called from within another hook."""
        if self._inside:
            return method(*args, **kwargs)
        self._inside = True
        began = time.monotonic_ns()
        if name == self.first_hook:
            self._next_step(began)
        try:
            return method(*args, **kwargs)
        finally:
            spent = time.monotonic_ns() - began
            self._spent[side] += spent
            self._calls += 1
            if spent > self._longest[0]:
                self._longest = spent, name
            self._inside = False

    def _clear(self) -> None:
        self._spent = {"worker": 0, "scheduler": 0}
        self._calls, self._longest = 0, (0, HOOKS[0])

    def _next_step(self, now: int) -> None:
        if self._began is not None:
            worker, scheduler, (longest, name) = *self._spent.values(), self._longest
            row = Step(self._began / 1e9, worker / 1e3, scheduler / 1e3, self._calls, longest / 1e3, HOOKS.index(name))
            self._rows.append(row)
            if self._thread is None and self._path is not None:
                self._thread = threading.Thread(target=self._write_on, name="benchmark-steps", daemon=True)
                self._thread.start()
                atexit.register(self.write)
        self._began = now
        self._clear()

    def _write_on(self) -> None:
        while True:
            time.sleep(WRITE_EVERY)
            self.write()

    def write(self) -> None:
        """Append the steps that have ended since the last call to the file."""
        flat = array.array("d")
        while self._rows:
            flat.extend(self._rows.popleft())
        if flat and self._path is not None:
            with self._path.open("ab") as file:
                flat.tofile(file)


RECORDER = Recorder()


def timed(base: type, recorder: Recorder = RECORDER) -> dict[str, Callable[..., Any]]:
    """The hooks that `base` has, each wrapped so that the recorder counts its time: members for a subclass of it."""
    members = {}
    for side, names in (("worker", WORKER_HOOKS), ("scheduler", SCHEDULER_HOOKS)):
        for name in names:
            if callable(method := getattr(base, name, None)):
                members[name] = _wrap(recorder, side, name, method)
    return members


def _wrap(recorder: Recorder, side: str, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        return recorder.call(side, name, method, self, *args, **kwargs)

    return hook


def cost_of_a_call(calls: int = 20_000) -> float:
    """Microseconds that timing adds to a hook, on this machine, now."""

    class Base:
        def get_finished(self) -> None:
            pass

    plain = Base()
    watched = type("Watched", (Base,), timed(Base, Recorder("")))()

    def seconds(method: Callable[[], None]) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            method()
        return time.perf_counter() - began

    return min(seconds(watched.get_finished) - seconds(plain.get_finished) for _ in range(3)) / calls * 1e6


# ---- reading


def read_steps(path: str | Path) -> list[Step]:
    """Every step of the files that begin with the path, in the order of time, but for one that is half written."""
    path = Path(path)
    steps = []
    for file in path.parent.glob(f"{path.name}-*.f64"):
        data = file.read_bytes()
        flat = array.array("d")
        width = len(Step._fields)
        flat.frombytes(data[: len(data) // (8 * width) * 8 * width])
        steps += [Step(*flat[i : i + width]) for i in range(0, len(flat), width)]
    return sorted(steps)


def within(steps: Iterable[Step], windows: Iterable[tuple[float, float]]) -> list[list[Step]]:
    """The steps that began inside each window. Both in the order of time, windows apart from each other."""
    found: list[list[Step]] = []
    iterator = iter(steps)
    step = next(iterator, None)
    for begin, end in windows:
        found.append([])
        while step is not None and step.began < end:
            if step.began >= begin:
                found[-1].append(step)
            step = next(iterator, None)
    return found


def histogram(samples: Sequence[float]) -> dict[str, int]:
    """How many samples lie in each bin; a bin's name is its upper end, bins are 1/100 of a decade (2.3 %) wide."""
    counts: collections.Counter[float] = collections.Counter()
    for sample in samples:
        counts[math.ceil(math.log10(max(sample, 0.1)) * BINS_PER_DECADE)] += 1
    return {f"{10 ** (index / BINS_PER_DECADE):.4g}": counts[index] for index in sorted(counts)}
