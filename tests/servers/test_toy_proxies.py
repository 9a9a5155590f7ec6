"""The proxies that vLLM's own tests use for its NIXL connector run unchanged in front of PyNcclConnector.

They are part of vLLM's source distributions, which `make compat` fetches.
"""

import pathlib
import sys

import pytest

from kvsdk.config import transfer_config
from kvsdk.demo.servers import Server, free_port, vllm_server, wait_all_healthy

SOURCES = sorted((pathlib.Path(__file__).parents[2] / ".cache").glob("vllm-*"))
PROXY = pathlib.Path("tests", "v1", "kv_connector", "nixl_integration", "toy_proxy_server.py")
SCRIPTS = {folder.name: folder / PROXY for folder in SOURCES if (folder / PROXY).exists()}

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(not SCRIPTS, reason="vLLM's source distributions are not here; `make compat` fetches them"),
]


@pytest.fixture(scope="module")
def servers(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy-proxies")
    port = free_port()

    def start(name, role):
        config = {"kv_connector": "PyNcclConnector", "kv_role": role, "kv_port": port}
        return vllm_server(
            tiny_llama,
            name=name,
            log=folder / f"{name}.log",
            transfer_config=transfer_config(config),
            args=["--block-size", "32", "--enable-request-id-headers"],
        )

    prefill, decode = start("prefill", "kv_producer"), start("decode", "kv_consumer")
    proxies = {}
    try:
        for name, script in SCRIPTS.items():
            proxy_port = free_port()
            command = [sys.executable, str(script), "--port", str(proxy_port)]
            command += ["--prefiller-ports", str(prefill.port), "--decoder-ports", str(decode.port)]
            command += ["--prefiller-hosts", "127.0.0.1", "--decoder-hosts", "127.0.0.1"]
            proxies[name] = Server(command, name=name, port=proxy_port, log=folder / f"{name}.log")
        wait_all_healthy([prefill, decode])
        yield prefill, decode, proxies
    finally:
        for server in (*proxies.values(), prefill, decode):
            server.stop()


@pytest.mark.parametrize("release", sorted(SCRIPTS) or ["none"])
def test_a_toy_proxy_of_vllm_hands_over(servers, release):
    _, decode, proxies = servers
    for i, text in enumerate(
        ("San Francisco is a", "Santa Clara is a", f"{release} reads the prompt, block by block. " * 20)
    ):
        prompt = f"{release}: {text}"
        before = decode.metrics()["vllm:external_prefix_cache_hits_total"]
        answer = proxies[release].complete(prompt, max_tokens=12, model="tiny", stream=False)
        ids = answer["choices"][0]["token_ids"]
        came = decode.metrics()["vllm:external_prefix_cache_hits_total"] - before
        assert came == answer["usage"]["prompt_tokens"], (i, answer)
        # The decode server's own prefix cache answers the second time, with whole blocks that came over.
        assert decode.complete(prompt, max_tokens=12)["choices"][0]["token_ids"] == ids
