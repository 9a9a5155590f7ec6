"""Starts `vllm serve` and other server processes on this machine, and ends them with everything that they started.

A `Server` is a process in a session of its own, so that its process group holds the whole family (vLLM starts an engine
core, which starts workers) and nothing else; ending the server means ending that group. vLLM is only ever run, never
imported.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsdk.errors import DeadlineExceeded, KVError

HOST = "127.0.0.1"
LOWEST_PORT = 15000
"""The lowest port that `free_port` gives out: above those that well-known services listen on."""
PORT_TRIES = 100
_given_out: set[int] = set()
HEALTH_POLL = 0.25
"""Seconds between two looks at a server that boots."""
ORPHAN_GRACE = 3.0
"""Seconds that a server's engine and workers have to end by themselves after the server has gone."""
ERROR = re.compile(r"(?<![`.\w])[A-Z]\w*(?:Error|Exception|Exceeded)\b[^`]*: ")
SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class ServerFailed(KVError):
    """A server process ended before it was healthy, or answered a request with an error."""


def free_port() -> int:
    """A TCP port that nobody uses now and that the system hands to nobody who asks for just any port.

    A server that boots takes half a minute to listen on the port that it was told. A port from the system's own range
    may by then be one end of any connection made meanwhile, so this one lies below that range (Linux's
    `ip_local_port_range`), at random, and each is given out once by a process.

    Raises:
        ServerFailed: no such port was found.
    """
    for _ in range(PORT_TRIES):
        port = random.SystemRandom().randrange(LOWEST_PORT, _first_ephemeral_port())
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                if port not in _given_out:
                    _given_out.add(port)
                    return port
    raise ServerFailed(f"no free TCP port from {LOWEST_PORT} to {_first_ephemeral_port() - 1}, {PORT_TRIES} tries")


def _first_ephemeral_port() -> int:
    with contextlib.suppress(OSError, ValueError):
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        return max(first, LOWEST_PORT + PORT_TRIES)
    return 32768


class Server:
    """One server process that answers HTTP on the loopback interface, started by the constructor.

    As a context manager it is stopped at the end of the block.

    Args:
        command: program and arguments; it must listen on `port`.
        name: what progress lines and errors call it.
        port: the TCP port that `command` was told.
        log: file that takes its output; made anew.
        env: variables added to this process's environment; a value of None removes one.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str,
        port: int,
        log: str | Path,
        env: Mapping[str, str | None] | None = None,
    ):
        self.name, self.port, self.log, self.command = name, port, Path(log), list(command)
        self.url = f"http://{HOST}:{port}"
        # vLLM's engines leave their sockets in this folder; a path of a Unix socket has 107 bytes, so it must be short.
        self._sockets = tempfile.mkdtemp(prefix="kv-")
        environ = os.environ | {"VLLM_RPC_BASE_PATH": self._sockets} | (env or {})
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.log.open("wb") as output:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={key: value for key, value in environ.items() if value is not None},
                    start_new_session=True,
                )
        except BaseException:
            shutil.rmtree(self._sockets, ignore_errors=True)
            raise
        self.started = time.monotonic()
        self._stopped = False

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def wait_healthy(self, timeout: float = 180.0, progress: Callable[[Server, bool], None] | None = None) -> float:
        """Wait as `wait_all_healthy` does for this server alone; returns the seconds since the process was started."""
        wait_all_healthy([self], timeout, progress)
        return time.monotonic() - self.started

    def healthy(self) -> bool:
        """Whether `/health` answers 200 now.

        Raises:
            ServerFailed: the process ended; the message holds the end of its log.
        """
        if (status := self.process.poll()) is not None:
            raise ServerFailed(f"{self.name} ended with status {status}; {self.log_says()}")
        try:
            return self._exchange("GET", "/health", None, timeout=5)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def request(self, method: str, path: str, body: Any = None, timeout: float = 120.0) -> bytes:
        """Send one HTTP request, `body` as JSON, and return the body of the answer.

        Raises:
            ServerFailed: the status was not 200.
            OSError: the server was not there, or took longer than `timeout` seconds between two bytes.
        """
        status, answer = self._exchange(method, path, body, timeout)
        if status != 200:
            said = answer[:500].decode(errors="replace")
            raise ServerFailed(f"{self.name} answered {method} {path} with {status}: {said}")
        return answer

    def complete(self, prompt: str | list[int], **options: Any) -> dict[str, Any]:
        """The JSON answer to a greedy completion of `prompt`, with the ids of its tokens in `choices[0]["token_ids"]`.

        `options` are further fields of the request, such as `max_tokens`. Raises as `request` does.
        """
        body = {"prompt": prompt, "temperature": 0, "return_token_ids": True} | options
        return json.loads(self.request("POST", "/v1/completions", body))

    def metrics(self) -> dict[str, float]:
        """What `/metrics` says now: name to value, summed over the labels. Raises as `request` does."""
        totals: dict[str, float] = {}
        for name, _, value in self._samples():
            totals[name] = totals.get(name, 0.0) + value
        return totals

    def metrics_by(self, name: str, label: str) -> dict[str, float]:
        """The metric `name` split by the values of `label`, summed over its other labels. Raises as `request` does."""
        totals: dict[str, float] = {}
        for sample, labels, value in self._samples():
            if sample == name and label in labels:
                totals[labels[label]] = totals.get(labels[label], 0.0) + value
        return totals

    def stop(self, timeout: float = 20.0) -> None:
        """End the server and every process of its group; returns when none is left. Twice is fine.

        All of them are asked by SIGTERM. Those that are left `timeout` seconds later, or `ORPHAN_GRACE` seconds after
        the server itself has gone, are killed.

        Raises:
            DeadlineExceeded: a process was still there 10 s after SIGKILL.
        """
        if self._stopped:
            return
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout
        orphaned = False
        while self._members() and time.monotonic() < deadline:
            if self.process.poll() is not None and not orphaned:
                orphaned, deadline = True, min(deadline, time.monotonic() + ORPHAN_GRACE)
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while self._members():
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"processes {self._members()} of {self.name} outlived SIGKILL by 10 s")
            time.sleep(0.02)
        self.process.wait(timeout=10)
        shutil.rmtree(self._sockets, ignore_errors=True)
        self._stopped = True

    def log_tail(self, lines: int = 15) -> str:
        """The last `lines` lines that the process wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def log_says(self) -> str:
        """The first error in the log and the end of the log, for a message.

        vLLM's processes each report the failure of the one below them, so the last lines are the least telling.
        """
        lines = self.log.read_text(errors="replace").splitlines()
        first = next((line for line in lines if ERROR.search(line)), None)
        return (f"first error: {first.strip()}\n" if first else "") + f"the end of {self.log}:\n{self.log_tail()}"

    def _exchange(self, method: str, path: str, body: Any, timeout: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _samples(self) -> list[tuple[str, dict[str, str], float]]:
        text = self.request("GET", "/metrics").decode()
        found = [SAMPLE.match(line) for line in text.splitlines() if not line.startswith("#")]
        return [(m[1], dict(LABEL.findall(m[2] or "")), float(m[3])) for m in found if m]

    def _signal(self, number: int) -> None:
        # Only while a member is there: the number of a group that is gone may be another's by now.
        if self._members():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def _members(self) -> list[int]:
        """Ids of the processes of the group, without those that have ended and wait for a parent to collect them.

        Asking the group with signal 0 would count those too, and in a container whose first process collects nobody's
        children they stay for ever.
        """
        self.process.poll()
        members = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                # The program's name, in parentheses, may hold spaces and parentheses itself.
                state, _, group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(group) == self.process.pid and state not in "ZX":
                members.append(int(stat.parent.name))
        return members


def vllm_server(
    model: str | Path,
    *,
    name: str = "vllm",
    log: str | Path,
    port: int | None = None,
    transfer_config: Mapping[str, Any] | None = None,
    gpu: str | None = None,
    dtype: str | None = None,
    max_model_len: int = 2048,
    blocks: int | None = 256,
    args: Sequence[str] = (),
    env: Mapping[str, str | None] | None = None,
) -> Server:
    """Start `vllm serve MODEL` of the environment that this Python belongs to, offline and eager.

    Args:
        model: the checkpoint's folder.
        name: what progress lines and errors call the server.
        log: file that takes its output.
        port: TCP port; a free one if None.
        transfer_config: for `--kv-transfer-config`; none if None.
        gpu: value of CUDA_VISIBLE_DEVICES; None means a CPU build of vLLM.
        dtype: of the model; None is float32 on a CPU, where equal tokens are to be expected, and the checkpoint's own
            on a GPU.
        max_model_len: tokens of a prompt and its answer together.
        blocks: number of blocks in the KV cache; vLLM's own choice if None.
        args: further arguments, which come last and so win.
        env: further variables, which win; a value of None removes one.
    """
    port = free_port() if port is None else port
    # By module, not by the script `vllm`: an environment put together from archives has none.
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--host", HOST, "--port", str(port), "--served-model-name", "tiny"),
        *("--max-model-len", str(max_model_len), "--enforce-eager"),
    ]
    environ: dict[str, str | None] = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if gpu is None:
        # One thread a server: several share few cores here, and the model is tiny.
        environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        dtype = dtype or "float32"
    else:
        environ |= {"CUDA_VISIBLE_DEVICES": gpu}
    if dtype is not None:
        command += ["--dtype", dtype]
    if blocks is not None:
        command += ["--num-gpu-blocks-override", str(blocks)]
    if transfer_config is not None:
        command += ["--kv-transfer-config", json.dumps(transfer_config)]
    return Server([*command, *args], name=name, port=port, log=log, env=environ | (env or {}))


def wait_all_healthy(
    servers: Sequence[Server], timeout: float = 240.0, progress: Callable[[Server, bool], None] | None = None
) -> None:
    """Wait until every server, all of which boot at the same time, is healthy.

    Args:
        servers: those to wait for.
        timeout: seconds from now for all of them.
        progress: called at every look, four times a second, with each server that was not healthy before and whether it
            is now.

    Raises:
        ServerFailed: a process ended; the message holds its first error and the end of its log.
        DeadlineExceeded: one was not healthy in time; the same.
    """
    deadline = time.monotonic() + timeout
    waiting = list(servers)
    while True:
        for server in list(waiting):
            healthy = server.healthy()
            if progress is not None:
                progress(server, healthy)
            if healthy:
                waiting.remove(server)
        if not waiting:
            return
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"{waiting[0].name} was not healthy after {timeout:.0f} s; {waiting[0].log_says()}")
        time.sleep(HEALTH_POLL)
