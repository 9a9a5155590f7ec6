"""`LLM(...)` of Python users, without a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
from fleet import BLOCK, Prompts

from kvsdk.demo.servers import free_port

pytestmark = [pytest.mark.servers, pytest.mark.timeout(300)]

SCRIPT = """
import json, sys

import kvsdk
from vllm import LLM, SamplingParams

model, config, prompt = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = LLM(
    model, dtype="float32", enforce_eager=True, max_model_len=512, block_size=32, num_gpu_blocks_override=64,
    kv_transfer_config=kvsdk.kv_transfer_config(config),
)
output = llm.generate([{"prompt_token_ids": prompt}], SamplingParams(temperature=0, max_tokens=8))[0]
print("TOKENS", json.dumps(list(output.outputs[0].token_ids)))
print("PARAMS", json.dumps(output.kv_transfer_params))
"""


def _greedy(model_path, prompt: list[int], max_tokens: int) -> list[int]:
    """The answer of transformers' model, without vLLM."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(max_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_a_producer_in_one_process_generates_offers_and_ends(tiny_llama):
    prompt, port = Prompts("offline").of(2 * BLOCK + 5), free_port()
    old = {"kv_connector": "PyNcclConnector", "kv_role": "kv_producer", "kv_rank": 0, "kv_parallel_size": 2}
    config = json.dumps(old | {"kv_port": port})
    environ = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tiny_llama), config, json.dumps(prompt)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environ, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = dict(line.split(" ", 1) for line in ran.stdout.splitlines() if line.startswith(("TOKENS ", "PARAMS ")))
    assert json.loads(said["TOKENS"]) == _greedy(tiny_llama, prompt, 8)
    params = json.loads(said["PARAMS"])
    assert params["remote_port"] == port
    assert params["remote_num_tokens"] == len(prompt)
