"""Mistakes of an operator: one clear line names what to change, and the server ends or starts; it never hangs."""

from __future__ import annotations

import json
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fleet import BLOCK, BOOT_TIMEOUT, Count, Prompts, answer, consumer, offer, producer, until

from kvsdk.demo.models import make_tiny_llama
from kvsdk.demo.servers import HOST, Server, free_port

pytestmark = [pytest.mark.servers, pytest.mark.timeout(400)]

END_TIMEOUT = 30.0
"""Seconds from the line that names the mistake to the end of the server."""
NOT_OURS = "203.0.113.7"  # of a block that is reserved for documentation: no host has it

# name -> (options of a prefill server, what its line says)
MISTAKES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no_such_role": ({"kv_role": "kv_prefill"}, ("Input should be 'kv_producer', 'kv_both' or 'kv_consumer'",)),
    "buffer_of_0": ({"kv_buffer_size": 0}, ("kv_buffer_size=0", "such as 1e9")),
    "buffer_of_12": ({"kv_buffer_size": 12}, ("kv_buffer_size=12", "set kv_buffer_size to at least 65536")),
    "no_such_option": ({"kv_bufer_size": 5}, ("unknown option 'kv_bufer_size'", "'kv_buffer_size'")),
    "no_peer": ({"kv_parallel_size": 1}, ("kv_parallel_size=1", "without a peer", "at least 2")),
    "foreign_kv_ip": ({"kv_ip": NOT_OURS}, (f"kv_ip={NOT_OURS}", "set kv_ip to an address of this host")),
    "port_in_use": ({}, ("in use", "set kv_port to a free port")),
    "state_space": ({}, ("state-space models are not supported",)),
}


REFUSED_AT_ONCE = ("no_such_role", "buffer_of_0", "buffer_of_12", "no_peer")
"""Refused as `no_such_option` is, before anything starts; tests/test_config.py has them without servers."""


@pytest.fixture(scope="module")
def mistaken(request, new_fleet, tiny_llama, tmp_path_factory):
    """The server of every mistake that is tested, by name, once it has ended or not; four run at a time."""
    tests = [item for item in request.session.items if "mistaken" in getattr(item, "fixturenames", ())]
    names = [item.callspec.params["name"] for item in tests]
    mamba = _tiny_mamba(tmp_path_factory.mktemp("tiny-mamba"), tiny_llama)
    with socket.socket() as busy, new_fleet(tiny_llama) as fleet:
        busy.bind((HOST, 0))
        busy.listen()

        def run(name: str) -> Server:
            options, _ = MISTAKES[name]
            port = busy.getsockname()[1] if name == "port_in_use" else free_port()
            # As an operator would write it by hand: `kvsdk config` refuses most of these before vLLM is started.
            extra = {"kv_parallel_size": 2, "kv_port": port} | options
            config = {"kv_connector": "PyNcclConnector", "kv_role": extra.pop("kv_role", "kv_producer")}
            config |= {"kv_connector_extra_config": extra}
            more = {"model": mamba, "args": ("--load-format", "dummy")} if name == "state_space" else {}
            server = fleet.vllm(name, config, **more)
            until(f"{name} says what is wrong", lambda: _complaints(server, name), BOOT_TIMEOUT)
            deadline = time.monotonic() + END_TIMEOUT
            while server.process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            return server

        with ThreadPoolExecutor(4) as pool:
            yield dict(zip(names, pool.map(run, names), strict=True))


def _complaints(server: Server, name: str) -> list[str]:
    """The lines that say what is wrong; vLLM repeats what they say in its tracebacks, without the connector's name."""
    lines = server.log.read_text(errors="replace").splitlines()
    # vLLM itself knows the roles, and refuses others before it loads a connector.
    wanted = [*MISTAKES[name][1], *(["PyNcclConnector: "] if name != "no_such_role" else [])]
    return [line for line in lines if all(words in line for words in wanted)]


def _tiny_mamba(path: Path, tokenizer: Path) -> Path:
    config = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 64, "state_size": 16}
    config |= {"num_hidden_layers": 2, "vocab_size": 1024, "conv_kernel": 4, "intermediate_size": 128}
    config |= {"time_step_rank": 4, "use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5}
    (path / "config.json").write_text(json.dumps(config))
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in REFUSED_AT_ONCE else name for name in MISTAKES]
)
def test_a_mistake_is_one_line_and_the_end_of_the_server(mistaken, name):
    server = mistaken[name]
    assert server.process.poll() is not None, f"{name} still runs {END_TIMEOUT:g} s after it said what is wrong"
    assert server.process.returncode != 0
    assert len(_complaints(server, name)) == 1, _complaints(server, name)


@pytest.fixture(scope="module")
def strangers(new_fleet, tiny_llama, tmp_path_factory):
    """A prefill server, and three decode servers that ask it although they cannot use its KV."""
    port = free_port()
    other = make_tiny_llama(tmp_path_factory.mktemp("other") / "other-llama", seed=1)
    with new_fleet(tiny_llama) as fleet:
        servers = {
            "prefill": fleet.vllm("prefill", producer(port)),
            "model.id": fleet.vllm("model", consumer(port), model=other),
            "layout.block_size": fleet.vllm("block", consumer(port), args=("--block-size", str(2 * BLOCK))),
            "model.dtype": fleet.vllm("dtype", consumer(port), dtype="bfloat16"),
        }
        fleet.wait()
        yield servers


@pytest.mark.parametrize("field", ["model.id", "layout.block_size", "model.dtype"])
def test_a_peer_that_differs_is_refused_by_field_and_prompts_are_computed_here(strangers, field):
    prefill, decode = strangers["prefill"], strangers[field]
    prompts = Prompts(field)
    for length in (40, 130):
        prompt = prompts.of(length)
        offer(prefill, prompt)
        count = Count(decode)
        tokens = answer(decode, prompt)
        assert count.adds_up_to(length)["local_compute"] == length
        if field == "layout.block_size":
            assert tokens == answer(prefill, prompt)
    lines = [line for line in decode.log.read_text().splitlines() if "no KV comes from the producer on" in line]
    assert len(lines) == 1, lines
    assert f"{field} differs: ours is " in lines[0]
