"""What the connector costs the threads that run vLLM's scheduler and the model, in microseconds a step.

vLLM's real scheduler and a stand-in for the model (`kvsdk.vllm.harness`) in one process, as vLLM runs a single GPU; the
other server is a process of its own, over real ZMQ and gloo. Every hook that vLLM calls on the scheduler's and on the
worker's connector is timed on the wall clock, so what background threads take from it (Python's interpreter lock)
counts.

Steps are measured with `--running` decodes in three states: nothing else; a producer that keeps 20 offers and takes a
new prompt every tenth step; a consumer that loads a prompt every tenth step. Calls are measured for prompts of 1,000
and 30,000 tokens, and so is what prefix keys, computed in another thread, take from a busy one.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import inspect
import logging
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import percentile, table, write
from kvsdk.buffer.keys import prefix_keys
from kvsdk.demo.servers import free_port
from kvsdk.errors import DeadlineExceeded, PeerGone

LIMIT = 500.0
"""Microseconds a step that the connector may take."""
BLOCK_SIZE = 16
PROMPT_TOKENS = 500
EVERY = 10
"""Steps between two arrivals."""
OFFERS = 20
WARM_UP = 50
"""Steps that are not counted."""
DEADLINE = 120.0


class Stopwatch:
    """Times every public method of connectors; of nested calls, the outermost.

    Args:
        clock: in nanoseconds. `time.thread_time_ns` leaves out what the thread waited for others on a busy machine,
            but reading it is a system call, which makes everything slower.
    """

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock
        self._inside = False
        self._step: collections.Counter[tuple[str, str]] = collections.Counter()
        self.steps: list[collections.Counter[tuple[str, str]]] = []
        self.calls: collections.defaultdict[tuple[str, str], list[float]] = collections.defaultdict(list)

    def watch(self, connector: Any, side: str) -> None:
        for name, method in inspect.getmembers(connector, inspect.ismethod):
            if not name.startswith("_") and not inspect.isclass(method.__self__):
                setattr(connector, name, functools.partial(self._timed, (side, name), method))

    def _timed(self, key: tuple[str, str], method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._inside:
            return method(*args, **kwargs)
        self._inside = True
        began = self._clock()
        try:
            return method(*args, **kwargs)
        finally:
            spent = (self._clock() - began) / 1e3
            self._inside = False
            self._step[key] += spent
            self.calls[key].append(spent)

    def end_step(self) -> None:
        self.steps.append(self._step)
        self._step = collections.Counter()

    def clear(self) -> None:
        self.steps.clear()
        self.calls.clear()
        self._step.clear()

    def sums(self, side: str | None = None) -> list[float]:
        """Microseconds of each step, of one side or of both."""
        return [round(sum(spent for (at, _), spent in step.items() if side in (None, at)), 1) for step in self.steps]


def make_engine(role: str, port: int, *, num_blocks: int, max_tokens: int, running: int, **options: Any) -> Any:
    from kvsdk.vllm.harness import Engine

    logging.getLogger("vllm").setLevel(logging.ERROR)
    config = {
        "kv_connector": "PyNcclConnector",
        "kv_connector_module_path": "kvsdk.vllm.connectors",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        # The stand-in's folder has another name in each process.
        "kv_connector_extra_config": {"kv_port": port, "lease": 600, "model_id": "stand-in", **options},
    }
    return Engine(
        config,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=running + 8,
        max_num_batched_tokens=max(2048, max_tokens),
        max_model_len=max_tokens + 64,
    )


def block_bytes(engine: Any) -> int:
    return sum(cache[0].nbytes for cache in engine.workers[0].kv_caches.values())


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 900, length).tolist()


# ---- the other server


def _serve(link: Connection, port: int, num_blocks: int, max_tokens: int) -> None:
    """A producer that computes what it is told, (length, seed) each, and serves until `link` closes."""
    engine = make_engine("kv_producer", port, num_blocks=num_blocks, max_tokens=max_tokens, running=8)
    try:
        link.send("ready")
        number = 0
        while True:
            if link.poll(0 if engine.step() else 0.05):
                for length, seed in link.recv():
                    engine.add(f"offer-{number}", prompt(length, seed))
                    engine.run(until=lambda name=f"offer-{number}": name in engine.finish_reasons)
                    number += 1
                link.send("done")
            time.sleep(0.001)
    except EOFError:
        engine.close()


@contextlib.contextmanager
def producer(port: int, *, num_blocks: int, max_tokens: int) -> Iterator[Callable[[Sequence[tuple[int, int]]], None]]:
    """A producer in a process of its own; yields what makes it offer prompts, given as (length, seed)."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, port, num_blocks, max_tokens), daemon=True)
    process.start()
    theirs.close()

    def answer(timeout: float) -> None:
        if not ours.poll(timeout):
            raise DeadlineExceeded(f"the producer did not answer within {timeout:.0f} s")
        try:
            ours.recv()
        except EOFError as error:
            raise PeerGone("the producer died") from error

    def offer(prompts: Sequence[tuple[int, int]]) -> None:
        ours.send(list(prompts))
        answer(DEADLINE)

    try:
        answer(DEADLINE)
        yield offer
    finally:
        ours.close()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join(10)


# ---- steps


def measure(
    engine: Any, steps: int, running: int, clock: Callable[[], int], arrive: Callable[[int], None] | None = None
) -> Stopwatch:
    """`steps` steps with `running` decodes; `arrive(i)` is called before each `EVERY`-th."""
    length = 200
    for number in range(running):
        engine.add(f"decode-{number}", prompt(length, 10_000 + number), max_tokens=10 * steps + 10 * WARM_UP)
    stopwatch = Stopwatch(clock)
    stopwatch.watch(engine.connector, "scheduler")
    stopwatch.watch(engine.workers[0].connector, "worker")
    for number in range(steps + WARM_UP):
        if number == WARM_UP:
            stopwatch.clear()
        if arrive is not None and number % EVERY == 0:
            arrive(number // EVERY)
        engine.step()
        stopwatch.end_step()
    assert all(not engine.finish_reasons.get(f"decode-{number}") for number in range(running)), "a decode has ended"
    return stopwatch


def _blocks(steps: int, running: int) -> int:
    return running * (200 + steps + WARM_UP + 64) // BLOCK_SIZE + 4096


def _max_tokens(steps: int) -> int:
    return 200 + 10 * (steps + WARM_UP) + PROMPT_TOKENS


def decodes_alone(steps: int, running: int, clock: Callable[[], int]) -> Stopwatch:
    engine = make_engine(
        "kv_producer", free_port(), num_blocks=_blocks(steps, running), max_tokens=_max_tokens(steps), running=running
    )
    with contextlib.closing(engine):
        return measure(engine, steps, running, clock)


def decodes_and_offers(steps: int, running: int, clock: Callable[[], int]) -> Stopwatch:
    num_blocks, max_tokens = _blocks(steps, running), _max_tokens(steps)
    engine = make_engine("kv_producer", free_port(), num_blocks=num_blocks, max_tokens=max_tokens, running=running,
                         kv_buffer_size=OFFERS * -(-PROMPT_TOKENS // BLOCK_SIZE) * 1024)  # fmt: skip
    with contextlib.closing(engine):
        assert block_bytes(engine) == 1024, "the limit above holds OFFERS offers at 1,024 bytes a block"
        return measure(engine, steps, running, clock, lambda i: engine.add(f"offer-{i}", prompt(PROMPT_TOKENS, i)))


def decodes_and_loads(steps: int, running: int, clock: Callable[[], int]) -> tuple[Stopwatch, int]:
    """Also returns how many loads ended well, those included that ended after the last step measured."""
    port, num_blocks, max_tokens = free_port(), _blocks(steps, running), _max_tokens(steps)
    count = (steps + WARM_UP) // EVERY + 1
    with producer(port, num_blocks=count * (PROMPT_TOKENS // BLOCK_SIZE + 2) + 512, max_tokens=2048) as offer:
        offer([(PROMPT_TOKENS, i) for i in range(count)])
        engine = make_engine("kv_consumer", port, num_blocks=num_blocks, max_tokens=max_tokens, running=running)
        with contextlib.closing(engine):
            assert engine.connector._scheduler._half._client.wait_ready(10)
            stopwatch = measure(
                engine, steps, running, clock, lambda i: engine.add(f"load-{i}", prompt(PROMPT_TOKENS, i))
            )
            names = [f"load-{i}" for i in range(-(-(steps + WARM_UP) // EVERY))]
            deadline = time.monotonic() + DEADLINE
            while not all(name in engine.finish_reasons for name in names):
                engine.step()
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(f"the loads have not ended after {DEADLINE:.0f} s")
            return stopwatch, int(engine.stats["loads_done"])


# ---- calls


def calls(length: int, count: int) -> dict[str, list[float]]:
    """Microseconds of each hook's calls for prompts of `length` tokens, one at a time: a consumer's, then a producer's.

    Hooks that are called in every step have their `count` longest calls here.
    """
    port, num_blocks, max_tokens = free_port(), (count + 2) * (length // BLOCK_SIZE + 2) + 64, length
    stopwatches = {}
    with producer(port, num_blocks=num_blocks, max_tokens=max_tokens) as offer:
        for role in ("kv_consumer", "kv_producer"):
            engine = make_engine(
                role,
                port if role == "kv_consumer" else free_port(),
                num_blocks=num_blocks,
                max_tokens=max_tokens,
                running=1,
            )
            with contextlib.closing(engine):
                if role == "kv_consumer":
                    assert engine.connector._scheduler._half._client.wait_ready(10)
                    offer([(length, i) for i in range(count)])
                stopwatch = stopwatches[role] = Stopwatch()
                stopwatch.watch(engine.connector, "scheduler")
                stopwatch.watch(engine.workers[0].connector, "worker")
                for number in range(count):
                    name = f"request-{number}"
                    engine.add(name, prompt(length, number))
                    deadline = time.monotonic() + DEADLINE
                    while name not in engine.finish_reasons:
                        engine.step()
                        stopwatch.end_step()
                        time.sleep(0.0005)
                        if time.monotonic() > deadline:
                            raise DeadlineExceeded(f"{name} has not ended after {DEADLINE:.0f} s")
    names = (
        "on_new_request",
        "get_num_new_matched_tokens",
        "update_state_after_alloc",
        "build_connector_meta",
        "request_finished",
    )
    result = {}
    for role, stopwatch in stopwatches.items():
        for name in names:
            result[f"{role[3:]} {name}"] = sorted(
                (round(us, 1) for us in stopwatch.calls[("scheduler", name)]), reverse=True
            )[:count]
    return result


# ---- what prefix keys take from the scheduler's thread


def keys_in_background(length: int, count: int) -> dict[str, list[float]]:
    """Microseconds of the keys alone, and of some Python code, alone and while another thread computes the keys."""
    tokens = np.asarray(prompt(length, 0), np.int32)

    def work() -> float:
        began = time.perf_counter_ns()
        total = 0
        for i in range(40_000):
            total += i
        return (time.perf_counter_ns() - began) / 1e3

    result: dict[str, list[float]] = {"keys": [], "work alone": [], "work beside keys": []}
    for _ in range(count):
        began = time.perf_counter_ns()
        prefix_keys(tokens, BLOCK_SIZE)
        result["keys"].append((time.perf_counter_ns() - began) / 1e3)
        result["work alone"].append(work())
        thread = threading.Thread(target=prefix_keys, args=(tokens, BLOCK_SIZE))
        began = time.perf_counter_ns()
        thread.start()
        work()
        thread.join()
        result["work beside keys"].append((time.perf_counter_ns() - began) / 1e3)
    return {name: [round(us, 1) for us in samples] for name, samples in result.items()}


# ---- results


def summary(samples: Sequence[float]) -> dict[str, float]:
    tails = {f"p{percent}": percentile(samples, percent) for percent in (99, 99.9)}
    return {"median": statistics.median(samples), **tails, "max": max(samples)}


def run(*, steps: int, running: int, lengths: Sequence[int], count: int, clock: str = "wall") -> dict[str, Any]:
    ns = time.perf_counter_ns if clock == "wall" else time.thread_time_ns
    loads, loaded = decodes_and_loads(steps, running, ns)
    states = {
        f"{running} decodes": decodes_alone(steps, running, ns),
        f"{running} decodes, offers": decodes_and_offers(steps, running, ns),
        f"{running} decodes, loads": loads,
    }
    result: dict[str, Any] = {
        "limit_us": LIMIT,
        "clock": clock,
        "running": running,
        "loads_done": loaded,
        "steps": {},
        "calls": {},
        "keys": {},
    }
    for name, stopwatch in states.items():
        hooks = {key for step in stopwatch.steps for key in step}
        result["steps"][name] = {
            "sum_us": stopwatch.sums(),
            "scheduler_us": stopwatch.sums("scheduler"),
            "worker_us": stopwatch.sums("worker"),
            "hooks_us": {
                " ".join(key): summary([round(step[key], 1) for step in stopwatch.steps]) for key in sorted(hooks)
            },
        }
    for length in lengths:
        result["calls"][str(length)] = calls(length, count)
        result["keys"][str(length)] = keys_in_background(length, count)
    return result


def report(result: dict[str, Any]) -> str:
    """The tables that are printed."""
    head = ("median", "p99", "p99.9", "max")
    rows: list[Sequence[object]] = [(f"microseconds a step ({result['clock']} clock), all hooks", *head)]
    hooks: list[Sequence[object]] = [("microseconds a step, each hook", *head)]
    for state, figures in result["steps"].items():
        for side in ("sum", "scheduler", "worker"):
            rows.append((f"{state}: {side}", *summary(figures[f"{side}_us"]).values()))
        hooks += [
            (f"{state}: {name}", *values.values())
            for name, values in figures["hooks_us"].items()
            if values["p99"] >= 1.0
        ]
    over = [
        state for state, figures in result["steps"].items() if statistics.median(figures["sum_us"]) > result["limit_us"]
    ]
    calls_rows: list[Sequence[object]] = [("microseconds a call", "tokens", "median", "max")]
    for group in ("calls", "keys"):
        for length, figures in result[group].items():
            calls_rows += [(name, length, statistics.median(us), max(us)) for name, us in figures.items() if us]
    verdict = (
        f"median over {result['limit_us']:.0f} us: {', '.join(over)}"
        if over
        else f"every median is under {result['limit_us']:.0f} us"
    )
    return "\n\n".join([table(rows), table(hooks), table(calls_rows), f"{verdict}; {result['loads_done']} loads"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write JSON with the raw samples here")
    parser.add_argument("--steps", type=int, default=1000, help="steps measured in each state (default: %(default)s)")
    parser.add_argument("--running", type=int, default=32, help="requests that decode (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[1000, 30000], help="lengths of prompts (default: 1000 30000)"
    )
    parser.add_argument("--count", type=int, default=15, help="prompts of each length (default: %(default)s)")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="of the steps; cpu is the thread's own time"
    )
    arguments = parser.parse_args(argv)
    options = {name: getattr(arguments, name) for name in ("steps", "running", "count", "clock")}
    result = run(lengths=arguments.tokens, **options)
    print(report(result))
    write(arguments.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
