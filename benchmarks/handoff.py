"""What a handoff between two vLLM servers costs: `python -m benchmarks.handoff --out FILE`, on two GPUs of one host.

Two pairs of servers of an 8B-shaped Llama run side by side: one with vLLM's NixlConnector, one with kvsdk's
PyNcclConnector. The benchmark is their proxy. Handoff = the decode server's first token minus the prefill server's
answer; its floor is the same for a prompt that the decode server has in its own prefix cache, so that nothing is
transferred. Early = both servers are asked at once. A sample whose tokens did not all come over is kept, marked and not
counted. The parts, in this order:

    fresh         samples while the pools of blocks are as they were made
    age           the same seeded mixed requests through each pair, several at a time
    handoff       samples, the ways interleaved, in rounds
    inter-token   intervals between tokens of running decodes: alone, while transfers arrive, while prompts arrive that
                  the decode server has in its own cache

The time that kvsdk's hooks take from the model's thread is recorded in both servers all the time, and reported for
the steps during transfers of the longest prompts. The JSON is written after each group of samples. `--seconds` bounds
everything; a part for which too little time is left is cut short, and the JSON says so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import write
from benchmarks.handoff_report import (
    COUNTED_ENDS,
    FLOORS,
    STATES,
    fault_of,
    inter_token_figures,
    intervals,
    plot,
    report,
    step_figures,
    summarize,
)
from benchmarks.hooks import STEPS_PATH, cost_of_a_call, read_steps, within
from benchmarks.legs import (
    Leg,
    Pair,
    Prompt,
    Tally,
    Times,
    answer_from_own_cache,
    by_source,
    hand_over,
    hand_over_early,
    read_counters,
)
from kvsdk.config import PIPES, transfer_config
from kvsdk.demo.run import Interrupted, Signals
from kvsdk.demo.servers import HOST, Server, ServerFailed, free_port, vllm_server
from kvsdk.errors import DeadlineExceeded, KVError
from kvsdk.transfer_params import prefill_params

PARTS = ("fresh", "age", "handoff", "inter-token")
STOP_RESERVE = 25.0
"""Seconds that are kept for ending servers and writing."""
REQUEST_TIMEOUT = 30.0
FAILURES = 3
"""Samples of a way that may fail in a row before it is left out."""
SAID = re.compile(r"moves KV blocks over|paired with|WARNING.*kvsdk|blocks did not load|ERROR")
NOTED = {
    "load_ms": ("kvsdk_load_seconds_total", 1e3),
    "bytes": ("kvsdk_loaded_bytes_total", 1),
    "nixl_bytes": ("vllm:nixl_bytes_transferred_sum", 1),
    "nixl_post_ms": ("vllm:nixl_post_time_seconds_sum", 1e3),
    "nixl_xfer_ms": ("vllm:nixl_xfer_time_seconds_sum", 1e3),
    "nixl_descriptors": ("vllm:nixl_num_descriptors_sum", 1),
}
"""What is kept of the decode server's counters with a sample: name, counter, factor."""


@dataclass(frozen=True)
class Setup:
    """What is run: prompts in tokens, one entry of `lengths` for each size of sample, the longest first.

    Attributes:
        mixed, answers: shortest and longest prompt and answer of the mixed requests; `at_once` of them in flight.
        stream_prompt, stream_tokens: prompt and answer of each of the `streams` decodes between whose tokens is
            measured.
        rotation: prompts of the longest size that arrive in turn: all fit into the prefill server's pool, and too few
            into the decode server's for one to be there still when it comes again.
        prefill_args, decode_args: of `vllm serve`.
    """

    lengths: tuple[int, ...]
    vocabulary: int
    block_size: int
    max_model_len: int
    mixed: tuple[int, int]
    answers: tuple[int, int]
    at_once: int
    streams: int
    stream_prompt: int
    stream_tokens: int
    rotation: int
    prefill_args: tuple[str, ...]
    decode_args: tuple[str, ...]
    kv_buffer_size: int


QUIET = "--disable-uvicorn-access-log"
GPU_ARGS = (QUIET, "--load-format", "dummy", "--block-size", "16", "--gpu-memory-utilization", "0.3")
ON_GPUS = Setup(
    lengths=(30000, 8192, 1024), vocabulary=128256, block_size=16, max_model_len=32768, mixed=(100, 8000),
    answers=(1, 64), at_once=16, streams=16, stream_prompt=512, stream_tokens=600, rotation=8,
    # 2 MiB a block: 19,456 and 12,288 blocks. Given in bytes, since four servers that boot at once and share two GPUs
    # would each measure the others' memory as its own.
    prefill_args=(*GPU_ARGS, "--kv-cache-memory-bytes", str(38 << 30)),
    decode_args=(*GPU_ARGS, "--kv-cache-memory-bytes", str(24 << 30)),
    kv_buffer_size=32 << 30,
)  # fmt: skip
ON_ONE_GPU = dataclasses.replace(
    ON_GPUS, rotation=4, kv_buffer_size=12 << 30,
    # Four servers have to fit: 8,192 and 6,144 blocks.
    prefill_args=(*GPU_ARGS, "--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(16 << 30)),
    decode_args=(*GPU_ARGS, "--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(12 << 30)),
)  # fmt: skip
CPU_ARGS = (QUIET, "--block-size", "32", "--max-num-batched-tokens", "512")
ON_CPU = Setup(
    lengths=(1500, 700, 200), vocabulary=1024, block_size=32, max_model_len=2048, mixed=(50, 400), answers=(1, 8),
    at_once=4, streams=4, stream_prompt=64, stream_tokens=400, rotation=5,
    prefill_args=(*CPU_ARGS, "--num-gpu-blocks-override", "400"),
    decode_args=(*CPU_ARGS, "--num-gpu-blocks-override", "190"),
    kv_buffer_size=1 << 30,
)  # fmt: skip


def make_llama_8b_shape(path: Path) -> Path:
    """Config and tokenizer of a Llama of the shape of Llama-3.1-8B, without weights: for `--load-format dummy`.

    128 KiB of KV a token in bfloat16: 32 layers of 8 KV heads of 128. Each token id decodes to some text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    begin, end = "<|begin|>", "<|end|>"
    tokens = [begin, end, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"token{i}" for i in range(ON_GPUS.vocabulary - len(tokens))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": ON_GPUS.vocabulary, "max_position_embeddings": ON_GPUS.max_model_len, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "dtype": "bfloat16",
    }  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    tokenizer.save(str(path / "tokenizer.json"), pretty=False)
    of_tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end,
                    "model_max_length": ON_GPUS.max_model_len, "clean_up_tokenization_spaces": False}  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(of_tokenizer))
    return path


# ---- pure parts


def mixed_requests(
    count: int, prompt: tuple[int, int], answer: tuple[int, int], seed: int = 0
) -> list[tuple[int, int]]:
    """(tokens of the prompt, tokens of the answer) of each request: prompts' logarithms and answers equally spread."""
    rng = random.Random(seed)
    low, high = map(math.log, prompt)
    drawn = [(round(math.exp(rng.uniform(low, high))), rng.randint(*answer)) for _ in range(count)]
    return [(min(max(length, prompt[0]), prompt[1]), tokens) for length, tokens in drawn]


# ---- the run


class Run:
    """Servers, the clock and the result, which is written as it grows."""

    def __init__(self, arguments: argparse.Namespace, setup: Setup, folder: Path, signals: Signals):
        self.arguments, self.setup, self.folder, self._signals = arguments, setup, folder, signals
        self._began = time.monotonic()
        self._end = self._began + arguments.seconds - STOP_RESERVE
        self.servers: list[Server] = []
        self.pairs: dict[str, Pair] = {}
        self.tallies: dict[str, Tally] = {}
        self._failures: dict[str, int] = {}
        given = {name: value.name if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        self.result: dict[str, Any] = {
            "benchmark": "handoff", "arguments": given, "ended": "it was killed", "errors": [], "cut_short": [],
            "timeline": [], "gpus": _gpus(), "said": [], "summary": {}, "samples": [], "mixed": {}, "inter_token": [],
            "steps": {}, "counters": {},
        }  # fmt: skip

    # -- time

    @property
    def left(self) -> float:
        """Seconds until servers must be stopped."""
        return self._end - time.monotonic()

    @property
    def timeout(self) -> float:
        """Seconds that a request may take."""
        return max(1.0, min(REQUEST_TIMEOUT, self.left))

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {text}", flush=True)

    def failed(self, what: str) -> None:
        self.say(f"FAIL: {what}")
        self.result["errors"].append(what)

    def cut(self, what: str) -> None:
        """Say what there was no time for."""
        self.say(f"CUT SHORT: {what}")
        self.result["cut_short"].append(what)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        self.say(f"{name}: begins")
        try:
            yield
        finally:
            spent = time.monotonic() - began
            self.result["timeline"].append(
                {"part": name, "at": round(began - self._began, 1), "seconds": round(spent, 1)}
            )
            self.save()

    def save(self) -> None:
        self.result["summary"] = {
            "handoff": summarize(self.result["samples"]),
            "inter_token": inter_token_figures(self.result["inter_token"]),
        }
        if (out := self.arguments.out) is not None:
            with self._signals.held():
                part = out.with_name(out.name + ".part")
                write(part, self.result)
                part.replace(out)

    # -- servers

    def boot(self) -> None:
        """Start all servers at the same time; one of NIXL's that fails costs its pair, one of kvsdk's the run."""
        arguments = self.arguments
        if arguments.cpu:
            from kvsdk.demo.models import make_tiny_llama

            model = make_tiny_llama(self.folder / "model")
        else:
            model = make_llama_8b_shape(self.folder / "model")
        with self._signals.held():
            if not (arguments.no_nixl or arguments.cpu):
                self._start_pair(model, "nixl", arguments.gpus)
            self._start_pair(model, "kvsdk", arguments.gpus[::-1] if arguments.cross else arguments.gpus)
        waiting, deadline = {server.name: server for server in self.servers}, time.monotonic() + min(300.0, self.left)
        while waiting:
            for server in list(waiting.values()):
                try:
                    if server.healthy():
                        del waiting[server.name]
                        self.say(f"{server.name} is ready")
                except ServerFailed as error:
                    if server.name.startswith("kvsdk"):
                        raise
                    self._drop("nixl", f"without NIXL: {error}")
                    waiting = {name: other for name, other in waiting.items() if not name.startswith("nixl")}
                    break
            if waiting and time.monotonic() > deadline:
                raise DeadlineExceeded(f"{', '.join(waiting)} not healthy in time")
            time.sleep(0.1)
        pair = self.pairs["kvsdk"]
        said, deadline = f"the producer on {HOST}:{pair.kv_port} is up", time.monotonic() + 20
        while said not in pair.decode.log.read_text(errors="replace"):
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"the decode server does not say that {said}")
            time.sleep(0.1)
        self.tallies = {name: Tally(pair.decode) for name, pair in self.pairs.items()}

    def _start_pair(self, model: Path, name: str, gpus: tuple[str, str]) -> None:
        setup, kv_port = self.setup, free_port()
        root = str(Path(__file__).resolve().parents[1])
        servers = []
        for role, gpu, args in zip(("prefill", "decode"), gpus, (setup.prefill_args, setup.decode_args), strict=True):
            env = {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
            kv_role = "kv_producer" if role == "prefill" else "kv_consumer"
            # A load that fails must not look like a slow one.
            config: dict[str, Any] = {"kv_role": kv_role, "kv_load_failure_policy": "fail"}
            if name == "nixl":
                config["kv_connector"] = "NixlConnector"
                env |= {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), "UCX_NET_DEVICES": "all"}
            else:
                options = {"pipe": self.arguments.pipe, "lookup_timeout": 5.0, "kv_buffer_size": setup.kv_buffer_size}
                config |= {"kv_connector": "PyNcclConnector", "kv_port": kv_port, "kv_connector_extra_config": options}
                config = transfer_config(config) | {"kv_connector": "TimedPyNcclConnector"}
                config["kv_connector_module_path"] = "benchmarks.timed_connector"
                env[STEPS_PATH] = str(self.folder / f"steps-{role}")
            log = (self.arguments.keep_logs or self.folder) / f"{name}-{role}.log"
            server = vllm_server(
                model, name=f"{name} {role}", log=log, transfer_config=config, blocks=None, args=args, env=env,
                gpu=None if self.arguments.cpu else gpu, max_model_len=setup.max_model_len,
            )  # fmt: skip
            self.servers.append(server)
            servers.append(server)
        self.pairs[name] = Pair(name, *servers, kv_port=None if name == "nixl" else kv_port)

    def _drop(self, name: str, why: str) -> None:
        """Go on without a pair."""
        self.failed(why)
        pair = self.pairs.pop(name)
        with self._signals.held():
            for server in pair.servers:
                server.stop()

    def stop(self) -> None:
        with self._signals.held(), ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda server: server.stop(timeout=10), self.servers))

    # -- samples

    def prompt(self, name: str, length: int) -> Prompt:
        return Prompt(f"{self.arguments.seed} {name}", length, self.setup.vocabulary)

    @property
    def ways(self) -> list[str]:
        ways = [way for way in ("nixl", "kvsdk", "early") if way in self.pairs or way == "early"]
        return [way for way in ways if self._failures.get(way, 0) < FAILURES]

    def round(self, pools: str, number: int, length: int) -> None:
        """One sample of each way, and of each pair's floor after the sample whose prompt it repeats."""
        ways = self.ways
        ways = ways[number % len(ways) :] + ways[: number % len(ways)] if ways else []
        for way in ways:
            prompt = self.prompt(f"{pools} {way} {number}", length)
            if self._sample(pools, way, prompt, number) and way != "early":
                self._sample(pools, FLOORS[way], prompt, number)

    def _sample(self, pools: str, way: str, prompt: Prompt, number: int) -> bool:
        """Take a sample; False if the requests failed."""
        pair = self.pairs["nixl" if way.startswith("nixl") else "kvsdk"]
        send: Callable[[Pair, Prompt, float], Times] = hand_over_early if way == "early" else hand_over
        if way.endswith("floor"):
            send = answer_from_own_cache
        sample: dict[str, Any] = {"pools": pools, "way": way, "tokens": prompt.length, "round": number}
        began = time.monotonic()
        try:
            times = send(pair, prompt, self.timeout)
        except (KVError, OSError, ValueError) as error:
            self._failures[way] = self._failures.get(way, 0) + 1
            self.failed(f"{pools} {way} {prompt.length}: {type(error).__name__}: {error}"[:600])
            self._look_after(pair)
            return False
        self._failures[way] = 0
        try:
            change = self.tallies[pair.name].since(prompt.length)
            fault = fault_of(way, prompt.length, self.setup.block_size, change)
        except DeadlineExceeded as error:
            change, fault = {}, str(error)
        sample |= {
            "handoff_ms": round((times.first - times.answered) * 1e3, 3),
            "prefill_ms": round((times.answered - times.sent) * 1e3, 3),
            "window": [round(began, 6), round(times.first, 6)],
            "fault": fault,
        }
        sample |= {
            name: round(change[counter] * factor, 3) for name, (counter, factor) in NOTED.items() if change.get(counter)
        }
        self.result["samples"].append(sample)
        return True

    def _look_after(self, pair: Pair) -> None:
        """After a failure: go on without NIXL's pair if a server of it has ended. Raises ServerFailed for kvsdk's."""
        try:
            for server in pair.servers:
                server.healthy()
            self.tallies[pair.name] = Tally(pair.decode)
        except (ServerFailed, OSError) as error:
            if pair.name != "nixl":
                raise
            self._drop("nixl", f"without NIXL from here on: {error}")

    def warm_up(self) -> None:
        """Each way once for each length, which the first transfers of a pair make slow; not kept but for faults."""
        for length in reversed(self.setup.lengths):
            self.round("warm-up", 0, length)
        warm = [sample for sample in self.result["samples"] if sample["pools"] == "warm-up"]
        self.result["samples"] = [sample for sample in self.result["samples"] if sample["pools"] != "warm-up"]
        for sample in warm:
            if sample["fault"]:
                self.failed(f"in the warm-up, {sample['way']} {sample['tokens']}: {sample['fault']}")

    def rounds(self, pools: str, count: int) -> None:
        """Rounds of all lengths, as many as there is time for; the longest a round took so far is what one takes."""
        longest = 0.0
        for number in range(count):
            if self.left < longest * 1.1 or not self.ways:
                self.cut(f"{pools}: {number} rounds of {count}, {self.left:.0f} s left, ways {self.ways}")
                return
            began = time.monotonic()
            for length in self.setup.lengths:
                self.round(pools, number, length)
            longest = max(longest, time.monotonic() - began)
            self.save()
            if number in (0, count // 2):
                self.say(f"{pools}: round {number + 1} of {count} took {time.monotonic() - began:.1f} s")

    # -- ageing

    def age(self, limit: float) -> None:
        """The mixed requests through each pair, the pairs at the same time; what `limit` seconds leave time for."""
        setup = self.setup
        requests = mixed_requests(self.arguments.mixed, setup.mixed, setup.answers)
        deadline = time.monotonic() + limit
        done = {name: 0 for name in self.pairs}
        failures: dict[str, list[str]] = {name: [] for name in self.pairs}
        halt, lock = threading.Event(), threading.Lock()

        def work(pair: Pair, turns: Iterator[tuple[int, tuple[int, int]]]) -> None:
            while not halt.is_set() and time.monotonic() < deadline:
                with lock:
                    turn = next(turns, None)
                if turn is None or len(failures[pair.name]) > 20:
                    return
                index, (length, tokens) = turn
                try:
                    hand_over(pair, self.prompt(f"mixed {index}", length), self.timeout, tokens)
                except (KVError, OSError, ValueError) as error:
                    what = f"mixed request {index}, {pair.name}: {type(error).__name__}: {error}"
                    failures[pair.name].append(what[:300])
                with lock:
                    done[pair.name] += 1

        pool = ThreadPoolExecutor(setup.at_once * len(self.pairs))
        try:
            futures: list[Future[None]] = []
            for pair in self.pairs.values():
                turns = iter(list(enumerate(requests)))
                futures += [pool.submit(work, pair, turns) for _ in range(setup.at_once)]
            _, late = wait(futures, timeout=limit + self.timeout)
            for future in set(futures) - late:
                future.result()
        finally:
            halt.set()
            pool.shutdown(wait=False, cancel_futures=True)
        for failure in itertools.chain(*failures.values()):
            self.failed(failure)
        time.sleep(0.5)  # vLLM counts a request after it has answered it
        for name, count in done.items():
            self.result["mixed"][name] = {"requests": count} | by_source(self.tallies[name].since())
            if count < len(requests):
                self.cut(f"{name}: {count} of {len(requests)} mixed requests")

    # -- between tokens

    def inter_token(self, count: int) -> None:
        """Rounds of running decodes in each state, as many as there is time for."""
        setup, pair = self.setup, self.pairs["kvsdk"]
        length = setup.lengths[0]
        rotation = [self.prompt(f"rotation {i}", length) for i in range(setup.rotation)]
        for prompt in rotation:
            if self.left < 30:
                self.cut(f"inter-token: {self.left:.0f} s left before it began")
                return
            with Leg(pair.prefill, self.timeout) as leg:
                leg.answer(prompt.body(1, prefill_params()))
        own, turns = self.prompt("own", length), itertools.cycle(rotation)
        arrivals: dict[str, Callable[[], Times] | None] = {
            "alone": None,
            "transfers": lambda: hand_over(pair, next(turns), self.timeout),
            "own cache": lambda: answer_from_own_cache(pair, own, self.timeout),
        }
        longest = 0.0
        for number in range(count):
            # Back and forth, so that what drifts does so for all states alike.
            for state in STATES if number % 2 == 0 else reversed(STATES):
                if self.left < longest * 1.2 + 5:
                    self.cut(f"inter-token: {number} of {count} rounds, {self.left:.0f} s left")
                    return
                began = time.monotonic()
                if state == "own cache":
                    hand_over(pair, own, self.timeout)
                self.tallies["kvsdk"].since()
                entry = self._stream(pair, arrivals[state])
                time.sleep(0.2)
                change = self.tallies["kvsdk"].since()
                entry |= {"state": state, "round": number} | by_source(change)
                faults = [f"{name} rose by {change[name]:.0f}" for name in COUNTED_ENDS if change.get(name)]
                arrived = len(entry["arrivals"]) * (length if state == "transfers" else 0)
                if entry["external_kv_transfer"] < 0.95 * arrived:
                    faults.append(f"{entry['external_kv_transfer']} tokens came over, not {arrived}")
                if state == "own cache" and entry["external_kv_transfer"]:
                    faults.append("something came over")
                entry["faults"] = entry["faults"] + faults
                self.result["inter_token"].append(entry)
                self.save()
                longest = max(longest, time.monotonic() - began)

    def _stream(self, pair: Pair, arrive: Callable[[], Times] | None) -> dict[str, Any]:
        """Let decodes run in the decode server while prompts arrive, one after the other."""
        setup = self.setup
        prompts = [self.prompt(f"stream {i}", setup.stream_prompt) for i in range(setup.streams)]
        bodies = [prompt.body(setup.stream_tokens, prefill_params(), stream=True).decode() for prompt in prompts]
        spec = {"port": pair.decode.port, "bodies": bodies, "seconds": self.timeout}
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.streams"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).resolve().parents[1],
        )  # fmt: skip
        lines: list[str] = []
        running, ended = threading.Event(), threading.Event()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                running.set()
            ended.set()
            running.set()

        reader = threading.Thread(target=read, daemon=True)
        arrivals: list[Times] = []
        faults: list[str] = []
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(spec) + "\n")
            process.stdin.close()
            reader.start()
            running.wait(self.timeout)
            while not ended.is_set() and arrive is not None:
                began = time.monotonic()
                try:
                    arrivals.append(arrive())
                except (KVError, OSError, ValueError) as error:
                    faults.append(f"an arrival: {type(error).__name__}: {error}"[:300])
                    break
                ended.wait(max(0.0, self.arguments.gap - (time.monotonic() - began)))
            if not ended.wait(self.timeout):
                raise DeadlineExceeded(f"the streams of {pair.decode.name} have not ended")
            process.wait(10)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10)
            if reader.ident is not None:
                reader.join(10)
            assert process.stdout is not None
            process.stdout.close()
        found = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {"times": [], "faults": ["no result"]}
        faults += found["faults"] or [f"stream {i} had no token" for i, t in enumerate(found["times"]) if not t]
        entry: dict[str, Any] = {"faults": faults, "intervals_ms": [], "window": [0.0, 0.0], "arrivals": []}
        if not faults:
            samples, window = intervals(found["times"])
            entry |= {"intervals_ms": [round(sample, 2) for sample in samples], "window": list(window)}
            entry["events"] = sum(map(len, found["times"]))
        for times in arrivals:
            if entry["window"][0] <= times.sent and times.first <= entry["window"][1]:
                entry["arrivals_inside"] = entry.get("arrivals_inside", 0) + 1
            handoff, prefill = times.first - times.answered, times.answered - times.sent
            entry["arrivals"].append({"handoff_ms": round(handoff * 1e3, 3), "prefill_ms": round(prefill * 1e3, 3)})
        return entry

    # -- what was recorded in the servers

    def collect(self) -> None:
        """Steps during transfers, steps' beginnings between tokens, and all servers' counters."""
        longest, result = self.setup.lengths[0], self.result
        samples = [s["window"] for s in result["samples"] if s["tokens"] == longest and s["way"] in ("kvsdk", "early")]
        rounds = result["inter_token"]
        beside = [r["window"] for r in rounds if r["state"] == "transfers" and not r["faults"]]
        found: dict[str, Any] = {}
        for role in ("prefill", "decode"):
            steps = read_steps(self.folder / f"steps-{role}")
            figures = found[role] = {"recorded": len(steps)}
            for name, windows in (("samples", samples), ("beside decodes", beside)):
                figures[name] = step_figures([step for steps in within(steps, windows) for step in steps])
            everything = sorted([*map(tuple, samples), *map(tuple, beside)])
            figures["all"] = step_figures([step for steps in within(steps, everything) for step in steps])
            if role == "decode":
                for entry, inside in zip(rounds, within(steps, [r["window"] for r in rounds]), strict=True):
                    gaps = [(b.began - a.began) * 1e3 for a, b in itertools.pairwise(inside)]
                    entry["step_intervals_ms"] = [round(gap, 2) for gap in gaps]
        result["steps"] = found | {"microseconds that timing adds to a call": round(cost_of_a_call(), 3)}
        for pair in self.pairs.values():
            for server in pair.servers:
                wanted = ("kvsdk_", "vllm:nixl_", "vllm:prompt_tokens_by_source", "vllm:num_preemptions_total")
                result["counters"][server.name] = {
                    name: value for name, value in read_counters(server, 3.0).items()
                    if name.startswith(wanted) and not name.endswith(("_bucket", "_created"))
                }  # fmt: skip
        self.save()

    def finish(self) -> None:
        """Collect what is in the servers, end them, write and print everything. Whatever of this fails is an error in
        the result, and the rest is done."""
        for what in (self.save, self.collect, self._quote_logs, self.stop, self._draw, self.save):
            try:
                what()
            except (KVError, OSError, ValueError) as error:
                self.failed(f"{what.__name__}: {type(error).__name__}: {error}"[:600])
        print(f"\n{report(self.result)}", flush=True)

    def _quote_logs(self) -> None:
        """What kvsdk's servers say about their pipe, and their warnings; if something failed, the end of every log."""
        for server in self.servers:
            if self.result["errors"]:
                print(f"\n---- {server.name}: {server.log_says()}")
            if server.name.startswith("kvsdk"):
                lines = server.log.read_text(errors="replace").splitlines()
                self.result["said"] += [f"{server.name}: {line[:300]}" for line in lines if SAID.search(line)][:40]

    def _draw(self) -> None:
        if self.arguments.out is not None and (document := plot(self.result)) is not None:
            self.arguments.out.with_suffix(".svg").write_text(document)


def go(run: Run) -> None:
    """All parts of the arguments, in order."""
    arguments = run.arguments
    with run.part("boot"):
        run.boot()
    with run.part("warm-up"):
        run.warm_up()
    if "fresh" in arguments.parts:
        with run.part("fresh"):
            run.rounds("fresh", arguments.fresh)
    if "age" in arguments.parts:
        with run.part("age"):
            run.age(run.left * 0.5)
    if "handoff" in arguments.parts:
        with run.part("handoff"):
            run.rounds("aged" if "age" in arguments.parts else "used", arguments.samples)
    if "inter-token" in arguments.parts:
        with run.part("inter-token"):
            run.inter_token(arguments.rounds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it.

    Returns:
        0 if every part was run, 1 if something failed or time ran out, 128 + n after signal n. What was measured until
        then is written in any case, and no process that was started is left.
    """
    arguments = parse(argv)
    with Signals() as signals, tempfile.TemporaryDirectory(prefix="kvsdk-handoff-") as folder:
        setup = ON_CPU if arguments.cpu else ON_ONE_GPU if len(set(arguments.gpus)) == 1 else ON_GPUS
        run = Run(arguments, setup, Path(folder), signals)
        # Requests have deadlines and parts have limits; should they not do, this ends the run while there is time left.
        alarm = threading.Timer(arguments.seconds - STOP_RESERVE * 0.8, os.kill, (os.getpid(), signal.SIGTERM))
        alarm.daemon = True
        alarm.start()
        status = 1
        try:
            go(run)
            ways = {"errors": "with errors", "cut_short": "cut short"}
            run.result["ended"] = next((ended for name, ended in ways.items() if run.result[name]), "complete")
            status = 0 if run.result["ended"] == "complete" else 1
        except Interrupted as interrupted:
            run.result["ended"], status = f"stopped by {interrupted}", interrupted.status
        except (KVError, OSError, ValueError) as error:
            run.result["ended"] = "failed"
            run.failed(f"{type(error).__name__}: {error}")
        finally:
            signals.finishing = True
            alarm.cancel()
            run.finish()
    return status


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.handoff", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write JSON with the raw samples here, and a plot beside it (.svg)")
    parser.add_argument("--seconds", type=float, default=480.0, help="end within so many (default: %(default)s)")
    parser.add_argument(
        "--parts", type=_parts, default=PARTS, help=f"what to run, separated by commas (default: {','.join(PARTS)})"
    )
    parser.add_argument("--samples", type=int, help="of each way and length, after ageing (default: 20; --cpu: 3)")
    parser.add_argument("--fresh", type=int, help="the same before ageing (default: 5; --cpu: 1)")
    parser.add_argument("--mixed", type=int, help="requests that age the pools (default: 600; --cpu: 24)")
    parser.add_argument("--rounds", type=int, help="of decodes in each state (default: 3; --cpu: 1)")
    parser.add_argument(
        "--gap", type=float, default=0.0,
        help="seconds from one arrival to the next beside decodes, at least (default: none, one after the other)",
    )  # fmt: skip
    parser.add_argument(
        "--gpus", type=_gpu_pair, default=("0", "1"), metavar="P,D",
        help="of the prefill and the decode server; one for both, as 0,0, needs pipe=peer (default: 0,1)",
    )  # fmt: skip
    parser.add_argument("--pipe", choices=PIPES, default="auto", help="kvsdk's option pipe (default: %(default)s)")
    parser.add_argument("--no-nixl", action="store_true", help="without NixlConnector's pair")
    parser.add_argument(
        "--cross", action="store_true", help="kvsdk's pair prefills on GPU 1, so that both GPUs share the ageing's work"
    )
    parser.add_argument("--seed", default="0", help="of all prompts (default: %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="two servers of a tiny model on this machine's CPUs")
    parser.add_argument(
        "--keep-logs", type=Path, metavar="DIR", help="write the servers' logs here (default: not kept)"
    )
    arguments = parser.parse_args(argv)
    for name, on_gpus, on_cpu in (("samples", 20, 3), ("fresh", 5, 1), ("mixed", 600, 24), ("rounds", 3, 1)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, on_cpu if arguments.cpu else on_gpus)
    return arguments


def _parts(text: str) -> tuple[str, ...]:
    chosen = text.split(",")
    if unknown := [part for part in chosen if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in chosen)


def _gpu_pair(text: str) -> tuple[str, str]:
    first, comma, second = text.partition(",")
    if not (first.isdecimal() and comma and second.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not two GPUs, as 0,1 is")
    return first, second


def _gpus() -> list[str]:
    """Name and driver of each GPU."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    return []


if __name__ == "__main__":
    sys.exit(main())
