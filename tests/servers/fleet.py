"""Sets of vLLM servers on CPUs, and clients that ask them, for the tests of this folder."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kvsdk
from kvsdk.config import transfer_config
from kvsdk.demo.servers import HOST, Server, ServerFailed, vllm_server, wait_all_healthy

BLOCK = 32
"""Tokens a block: the least that vLLM's attention on CPUs accepts."""
BOOT_TIMEOUT = 240.0
SOURCES = ("local_cache_hit", "external_kv_transfer", "local_compute")
"""Where a prompt's tokens come from, in vLLM's `vllm:prompt_tokens_by_source`."""
SUPPORT = Path(__file__).parents[1] / "support"


def producer(port: int, **options: Any) -> dict[str, Any]:
    """`--kv-transfer-config` of a prefill server that binds `port`."""
    given = {"kv_connector": "PyNcclConnector", "kv_role": "kv_producer", "kv_parallel_size": 2, "kv_port": port}
    return transfer_config(given | options)


def consumer(*ports: int, **options: Any) -> dict[str, Any]:
    """`--kv-transfer-config` of a decode server that asks the producers on `ports`."""
    # Tests wait for what comes over, however busy the machine is; a prompt that no producer has is known at once.
    extra = {"producers": [f"{HOST}:{port}" for port in ports], "kv_parallel_size": 2, "lookup_timeout": 10.0}
    extra |= options.pop("kv_connector_extra_config", {})
    given = {"kv_connector": "PyNcclConnector", "kv_role": "kv_consumer", "kv_connector_extra_config": extra}
    return transfer_config(given | options)


class Fleet:
    """Servers of one model that boot at the same time and end together, as a context manager."""

    def __init__(self, model: Path, folder: Path):
        self.model, self._folder = model, folder
        self.servers: list[Server] = []

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(Server.stop, self.servers))

    def vllm(
        self,
        name: str,
        config: dict[str, Any] | None = None,
        *,
        model: Path | None = None,
        args: Sequence[str] = (),
        **options: Any,
    ) -> Server:
        """Start `vllm serve` with blocks of `BLOCK` tokens; `options` are those of `vllm_server`."""
        log = self._folder / f"{name}-{len(self.servers)}.log"
        args = ("--block-size", str(BLOCK), *args)
        server = vllm_server(model or self.model, name=name, log=log, transfer_config=config, args=args, **options)
        self.servers.append(server)
        return server

    def proxy(self, mode: str, prefill: Server, decode: Server, port: int, *, kv_port: int | None = None) -> Server:
        """Start `kvsdk proxy` in `mode` on `port`; `kv_port` is the prefill server's, for the mode `early`."""
        command = [sys.executable, "-m", "kvsdk.cli", "proxy", "--host", HOST, "--port", str(port), "--mode", mode]
        command += ["--prefill", prefill.url, "--decode", decode.url]
        if mode == "early":
            command += ["--prefill-kv", f"{HOST}:{kv_port}"]
        server = Server(command, name=f"proxy-{mode}", port=port, log=self._folder / f"proxy-{mode}-{port}.log")
        self.servers.append(server)
        return server

    def wait(self) -> Fleet:
        """Wait until all that were started are healthy."""
        wait_all_healthy([server for server in self.servers if server.process.poll() is None], BOOT_TIMEOUT)
        return self


def met(decode: Server, *ports: int) -> None:
    """Wait until the decode server has said that the producers on `ports` are up: before that it asks none of them."""
    for port in ports:
        said = f"the producer on {HOST}:{port} is up"
        until(f"{decode.name} says that {said}", lambda said=said: said in decode.log.read_text(errors="replace"))


def said(server: Server, lines: int = 12) -> str:
    """The last lines of the server's log that come from modules with names of kvsdk's, or tell of an error."""
    ours = {module.name for module in Path(kvsdk.__file__).parent.rglob("*.py")}
    log = server.log.read_text(errors="replace").splitlines()
    told = [line for line in log if ours.intersection(re.findall(r"\[(\w+\.py):\d+\]", line)) or "ERROR" in line]
    return "\n".join(told[-lines:])


def kill(server: Server) -> None:
    """SIGKILL to the server and all its processes, as when a machine goes down; returns when none is left."""
    os.killpg(server.process.pid, signal.SIGKILL)
    server.stop()


@contextlib.contextmanager
def frozen(server: Server):
    """No process of the server runs inside the block; its sockets stay open."""
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)


def until(what: str, said: Callable[[], Any], timeout: float = 20.0) -> Any:
    """Wait until `said()` is true and return it; fail with `what` and its last value after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := said()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what} (last: {value!r})"
        time.sleep(0.1)
    return value


class Prompts:
    """Prompts of the tiny models' vocabulary, as token ids; no two of them share a prefix unless asked to."""

    def __init__(self, seed: str):
        self._random = random.Random(seed)

    def of(self, length: int, prefix: Sequence[int] = ()) -> list[int]:
        """A prompt of `length` tokens, `prefix` included."""
        return [*prefix, *self._random.choices(range(4, 1024), k=length - len(prefix))]


def answer(server: Server, prompt: list[int], max_tokens: int = 16) -> list[int]:
    """The token ids of a greedy completion."""
    return server.complete(prompt, max_tokens=max_tokens)["choices"][0]["token_ids"]


def offer(prefill: Server, prompt: list[int]) -> None:
    """Let the prefill server compute the prompt, as a proxy that repeats it does first."""
    prefill.complete(prompt, max_tokens=1)


def stream(
    server: Server, path: str, body: dict[str, Any], *, leave_after: int | None = None, timeout: float = 120.0
) -> list[int]:
    """The token ids of a streamed answer; the client closes the connection once it has `leave_after` tokens."""
    connection = http.client.HTTPConnection(HOST, server.port, timeout=timeout)
    try:
        sent = json.dumps(body | {"stream": True})
        connection.request("POST", path, sent, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ServerFailed(f"{server.name} answered {response.status}: {response.read(500)!r}")
        tokens: list[int] = []
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise ServerFailed(f"{server.name}: {event['error']}")
            tokens += [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
            if leave_after is not None and len(tokens) >= leave_after:
                break
        return tokens
    finally:
        connection.close()


def leave(server: Server, body: dict[str, Any], seconds: float) -> None:
    """Ask for a completion and close the connection after `seconds`, whatever has come by then."""
    connection = http.client.HTTPConnection(HOST, server.port, timeout=30)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        time.sleep(seconds)
    finally:
        connection.close()


class Count:
    """The prompt tokens that a server has counted since this was made, by where they came from."""

    def __init__(self, server: Server):
        self._server = server
        self._before = self._now()

    def _now(self) -> list[int]:
        found = self._server.metrics_by("vllm:prompt_tokens_by_source_total", "source")
        return [int(found.get(source, 0)) for source in SOURCES]

    def since(self) -> dict[str, int]:
        return {source: now - then for source, now, then in zip(SOURCES, self._now(), self._before, strict=True)}

    def adds_up_to(self, num_tokens: int) -> dict[str, int]:
        """Wait until so many were counted, since vLLM counts a request after it has answered it, and no more."""

        def enough() -> dict[str, int] | None:
            tokens = self.since()
            return tokens if sum(tokens.values()) >= num_tokens else None

        tokens = until(f"{self._server.name} counts {num_tokens} prompt tokens", enough, 5.0)
        assert sum(tokens.values()) == num_tokens, tokens
        return tokens


def holds(server: Server) -> float:
    """The share of the server's blocks that something holds: running requests, loads, offers."""
    return server.metrics()["vllm:kv_cache_usage_perc"]


def holds_nothing(server: Server, timeout: float) -> None:
    """Fails unless the server is idle and holds no block within `timeout` seconds."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")

    def clear() -> bool:
        metrics = server.metrics()
        return not any(metrics[name] for name in names)

    until(f"{server.name} is idle and holds no block", clear, timeout)
