"""Disaggregated prefilling through an LMCache server: vLLM's example of the same name, for today's releases.

A producer `LLM` computes the KV cache of two prompts with a common beginning and ends; a consumer `LLM` finds their
chunks in the server and answers. Each runs in a process of its own, as does the server (LMCache's own, from `pip
install lmcache`).

    python examples/disaggregated_prefill_lmcache.py
    python examples/disaggregated_prefill_lmcache.py --model meta-llama/Llama-3.1-8B-Instruct

Where there are two GPUs, the producer and the consumer take one each; otherwise they run on the CPU. Without --model, a
small model with random weights is made: its answers mean nothing, but depend on all of the prompt. With --compare, a
third `LLM` without a connector computes the same prompts alone, and its tokens must be the consumer's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BOOT_SECONDS = 600
SENTENCE = "Hello, how are you? San Francisco is a city by the bay, and the fog comes over the hills in the evening. "
ENDINGS = ("Tell me a very long story.", "What is the weather like in Santa Clara?")

SERVERS = {
    "lm": ("lm", ["-m", "lmcache.v1.server", "127.0.0.1", "{port}"]),
    "mp": (
        "tcp",
        ["-c", "from lmcache.cli.main import main; main()", "server", "--host", "127.0.0.1", "--port", "{port}"],
    ),
}
"""LMCache's servers: the scheme of their `remote_url`, and Python's arguments. The second one is `lmcache server`."""


def answer(role: str, model: str, num_tokens: int, max_tokens: int, load_format: str) -> None:
    """In a process of its own: generate, and print the answers and how many tokens of the prompts were loaded."""
    from vllm import LLM, SamplingParams

    import kvsdk

    options = {"max_model_len": num_tokens + max_tokens + 64, "enforce_eager": True, "gpu_memory_utilization": 0.8}
    options |= {"disable_log_stats": False, "load_format": load_format}
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        options |= {"dtype": "float32", "block_size": 32}
    if role != "alone":
        # The server's address and the chunk size come from the environment, as LMCache's users set them.
        # A prompt of gigabytes takes more than the second that a lookup has unless told otherwise.
        given = {"kv_connector": "LMCacheConnector", "kv_role": role, "lookup_timeout": 30.0}
        options["kv_transfer_config"] = kvsdk.kv_transfer_config(given)
    llm = LLM(model, **options)
    tokenizer = llm.get_tokenizer()
    shared = tokenizer.encode(SENTENCE * (num_tokens // 10))[:num_tokens]
    prompts = [{"prompt_token_ids": shared + tokenizer.encode(ending, add_special_tokens=False)} for ending in ENDINGS]
    sampling = SamplingParams(temperature=0, max_tokens=1 if role == "kv_producer" else max_tokens)
    for output in llm.generate(prompts, sampling):
        (one,) = output.outputs
        result = {
            "prompt_tokens": len(output.prompt_token_ids),
            "cached": output.num_cached_tokens or 0,
            "tokens": list(one.token_ids),
            "text": one.text,
        }
        print("RESULT", json.dumps(result), flush=True)
    loaded = sum(one.value for one in llm.get_metrics() if one.name == "vllm:external_prefix_cache_hits")
    print("RESULT", json.dumps({"loaded": loaded}), flush=True)


class Process:
    """A process that leads a group of its own, so that what it starts ends with it."""

    def __init__(self, name: str, command: list[str], log: Path, environ: dict[str, str]):
        self.name, self.log = name, log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environ,
                start_new_session=True,
            )  # fmt: skip

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def results(self, deadline: float) -> list[dict]:
        """What it printed, once it has ended well."""
        try:
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = "no code, it took too long"
        if code != 0:
            sys.exit(f"the {self.name} ended with {code}; the end of its log:\n{self.log.read_text()[-3000:]}")
        lines = self.log.read_text().splitlines()
        return [json.loads(line.split(" ", 1)[1]) for line in lines if line.startswith("RESULT ")]

    def end(self) -> None:
        for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                break
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
        self._process.poll()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def wait_for_server(server: Process, port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if server.ended or time.monotonic() > deadline:
                sys.exit(f"the LMCache server did not come up; its log:\n{server.log.read_text()[-3000:]}")
            time.sleep(0.1)


def gpus() -> list[str]:
    """The producer's GPU and the consumer's; both may have the same one, since they run one after the other."""
    import torch

    count = torch.cuda.device_count()
    return ["0", str(count - 1)] if count else ["", ""]


def run(arguments: argparse.Namespace, work: Path) -> int:
    """Start the server, the producer and the consumer; returns the exit code."""
    model = arguments.model
    if model is None:
        from kvsdk.demo.models import make_tiny_llama

        model = str(make_tiny_llama(work / "model"))
    port = free_port()
    environ = {
        **os.environ,
        "LMCACHE_REMOTE_URL": f"{SERVERS[arguments.server][0]}://127.0.0.1:{port}",
        "LMCACHE_CHUNK_SIZE": str(arguments.chunk_size),
        "LMCACHE_TRACK_USAGE": "false",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if arguments.model is None:
        environ["HF_HUB_OFFLINE"] = "1"
    first, second = gpus()
    if not first:
        environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    started: list[Process] = []

    def start(name: str, command: list[str], **more: str) -> Process:
        process = Process(name, [sys.executable, *command], work / f"{name}.log", environ | more)
        started.append(process)
        return process

    def generate(role: str, gpu: str) -> list[dict]:
        command = [__file__, "--role", role, "--model", model, "--prompt-tokens", str(arguments.prompt_tokens)]
        command += ["--max-tokens", str(arguments.max_tokens), "--load-format", arguments.load_format]
        process = start(role, command, CUDA_VISIBLE_DEVICES=gpu)
        return process.results(time.monotonic() + BOOT_SECONDS)

    try:
        command = [word.format(port=port) for word in SERVERS[arguments.server][1]]
        if arguments.server == "mp":
            command += ["--http-port", str(free_port()), "--l1-size-gb", "4", "--eviction-policy", "LRU"]
            command += ["--disable-metrics"]
        # LMCache's servers keep KV in host memory; one that sees GPUs expects KV there.
        wait_for_server(start("server", command, CUDA_VISIBLE_DEVICES=""), port)
        print("the producer computes the prompts ...", flush=True)
        generate("kv_producer", first)
        print("the consumer answers them ...", flush=True)
        results = generate("kv_consumer", second)
        alone = generate("alone", second) if arguments.compare else None
    finally:
        for process in reversed(started):
            process.end()
    *answers, total = results
    for one in answers:
        print(f"{one['cached']} of {one['prompt_tokens']} prompt tokens were not computed again: {one['text']!r}")
    print(f"{total['loaded']} tokens came from the LMCache server")
    if alone is not None:
        same = [one["tokens"] for one in answers] == [one["tokens"] for one in alone[:-1]]
        print("the same tokens as without a connector" if same else f"OTHER TOKENS: {results} and {alone}")
        return 0 if same else 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model that vLLM can load; a tiny random one unless given")
    parser.add_argument("--server", choices=sorted(SERVERS), default="lm", help="which of LMCache's servers")
    parser.add_argument("--load-format", default="auto", help="vLLM's: dummy for random weights of a model's shape")
    parser.add_argument("--prompt-tokens", type=int, default=4000, help="length of what the prompts have in common")
    parser.add_argument("--max-tokens", type=int, default=10)
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--compare", action="store_true", help="answer without a connector as well, and compare")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        answer(
            arguments.role, arguments.model, arguments.prompt_tokens, arguments.max_tokens, arguments.load_format
        )  # fmt: skip
        return 0
    # Whoever stops this script stops what it has started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if importlib.util.find_spec("lmcache") is None:
        sys.exit("lmcache is not installed: pip install 'kvsdk[lmcache]'")
    with tempfile.TemporaryDirectory(prefix="kvsdk-") as work:
        return run(arguments, Path(work))


if __name__ == "__main__":
    sys.exit(main())
