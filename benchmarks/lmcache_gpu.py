"""Time to the first token of a prompt whose KV comes from an LMCache server: kvsdk's connector and LMCache's own.

    python -m benchmarks.lmcache_gpu --prompts 6 --rounds 2 --out FILE

On two GPUs, or on one, with vLLM 0.26.0 and lmcache 0.5.3. The model has the shape of an 8B Llama and random weights,
so that each prompt of 8,192 tokens has 1 GiB of KV in bfloat16. For each connector and round an `lm://` server of
LMCache's and a producer on the first GPU are started; the producer computes all prompts and ends; a consumer on the
last GPU answers each with one token. The first two are not counted: they make memory and connections. The connectors
take turns, and a third consumer without one says what computing costs. No connector has any of it in its own memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import table, write

TOKENS, CHUNK, WARM_UP = 8192, 256, 2
CONNECTORS = ("LMCacheConnector", "LMCacheConnectorV1")
BOOT_SECONDS = 900


def make_llama_8b_shape(path: Path) -> Path:
    """A folder for `--load-format dummy`: a config of Llama-3.1-8B's sizes but for its vocabulary, and a tokenizer."""
    from kvsdk.demo.models import make_tiny_llama

    make_tiny_llama(path)
    (path / "model.safetensors").unlink()
    config = json.loads((path / "config.json").read_text())
    config |= {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 16384, "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(config))
    return path


def answer(connector: str, role: str, model: str, num_prompts: int, seed: int) -> None:
    """In a process of its own: answer every prompt, one after the other, and print seconds and loaded tokens."""
    from vllm import LLM, SamplingParams

    import kvsdk

    options: dict[str, Any] = {"load_format": "dummy", "max_model_len": TOKENS + 64, "gpu_memory_utilization": 0.85}
    if connector == "LMCacheConnector":
        given = {"kv_connector": connector, "kv_role": role, "lookup_timeout": 30.0, "max_local_cpu_size": 10.0}
        options["kv_transfer_config"] = kvsdk.kv_transfer_config(given)
    elif connector != "none":
        from vllm.config import KVTransferConfig

        options["kv_transfer_config"] = KVTransferConfig(kv_connector=connector, kv_role=role)
    llm = LLM(model, enforce_eager=True, disable_log_stats=False, max_num_batched_tokens=TOKENS, **options)
    one_token = SamplingParams(temperature=0, max_tokens=1)
    for number in range(num_prompts):
        # One token more than whole chunks: the last one is always computed.
        tokens = random.Random(f"{seed} {number}").choices(range(10, 1000), k=TOKENS + 1)
        began = time.perf_counter()
        (output,) = llm.generate({"prompt_token_ids": tokens}, one_token, use_tqdm=False)
        seconds = time.perf_counter() - began
        print("RESULT", json.dumps({"seconds": seconds, "cached": output.num_cached_tokens or 0}), flush=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def start(command: list[str], log: Path, **environ: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environ},
            start_new_session=True,
        )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    """It and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.poll()


def run_round(connector: str, model: Path, num_prompts: int, seed: int, work: Path) -> list[dict[str, Any]]:
    """What the consumer measured of each prompt."""
    port = free_port()
    environ = {
        "LMCACHE_REMOTE_URL": f"lm://127.0.0.1:{port}",
        "LMCACHE_REMOTE_SERDE": "naive",
        "LMCACHE_CHUNK_SIZE": str(CHUNK),
        "LMCACHE_LOCAL_CPU": "False",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "10",
        "LMCACHE_TRACK_USAGE": "false",
        "PYTHONHASHSEED": "0",  # without it LMCache's own finds nothing
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    server = start(["-m", "lmcache.v1.server", "127.0.0.1", str(port)], work / "server.log", **environ)
    processes = [server]
    try:
        deadline = time.monotonic() + 60
        while server.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        roles = ("kv_consumer",) if connector == "none" else ("kv_producer", "kv_consumer")
        for role in roles:
            log = work / f"{connector}-{role}.log"
            command = ["-m", "benchmarks.lmcache_gpu", "--answer", connector, role, str(model)]
            command += ["--prompts", str(num_prompts), "--seed", str(seed)]
            gpu = 0 if role == "kv_producer" else torch.cuda.device_count() - 1
            process = start(command, log, CUDA_VISIBLE_DEVICES=str(gpu), **environ)
            processes.append(process)
            if process.wait(BOOT_SECONDS) != 0:
                raise RuntimeError(f"{connector} {role} ended badly:\n{log.read_text(errors='replace')[-4000:]}")
            lines = log.read_text(errors="replace").splitlines()
        return [json.loads(line.split(" ", 1)[1]) for line in lines if line.startswith("RESULT ")]
    finally:
        for process in processes:
            end(process)


def run(num_prompts: int, rounds: int) -> dict[str, Any]:
    """Samples of each connector: seconds to the first token, and tokens that were not computed."""
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in (*CONNECTORS, "none")}
    with tempfile.TemporaryDirectory(prefix="kvsdk-") as folder:
        work = Path(folder)
        model = make_llama_8b_shape(work / "model")
        for number in range(rounds):
            for connector in (*(CONNECTORS if number % 2 == 0 else reversed(CONNECTORS)), "none"):
                if connector == "none" and number:
                    continue
                found = run_round(connector, model, num_prompts + WARM_UP, number, work)
                samples[connector] += found[WARM_UP:]
    return {"tokens": TOKENS, "samples": samples}


def report(result: dict[str, Any]) -> str:
    """Medians in milliseconds, and the ratio of kvsdk's to LMCache's."""
    rows: list[tuple[object, ...]] = [("time to first token", "ms", "tokens not computed")]
    medians = {}
    for name, samples in result["samples"].items():
        medians[name] = statistics.median(one["seconds"] for one in samples)
        rows.append((name, 1000 * medians[name], statistics.median(one["cached"] for one in samples)))
    rows.append(("ratio", medians[CONNECTORS[0]] / medians[CONNECTORS[1]], ""))
    return table(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=6, help="counted in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--answer", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.answer:
        answer(*arguments.answer, arguments.prompts, arguments.seed)
        return 0
    result = run(arguments.prompts, arguments.rounds)
    print(report(result))
    write(arguments.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
