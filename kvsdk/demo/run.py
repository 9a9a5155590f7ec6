"""The demo: prompts go from a prefill server to a decode server; a third, alone, must give the same tokens."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from kvsdk.config import transfer_config
from kvsdk.demo.servers import HOST, Server, free_port, vllm_server, wait_all_healthy
from kvsdk.errors import ConfigError, DeadlineExceeded, KVError

CPU_BLOCK_SIZE = 32
"""Tokens a block on CPUs: the least that vLLM's CPU attention accepts, so that a short text fills several blocks."""
BOOT_TIMEOUT = 240.0
METRICS_TIMEOUT = 5.0
SOURCES = ("external_kv_transfer", "local_cache_hit", "local_compute")
"""Where vLLM says that a prompt's tokens came from, in `vllm:prompt_tokens_by_source`; together they are the prompt."""
LONG_PROMPT = "".join(
    f"{number}. The prefill server reads line {number} of the prompt and hands its keys and values over. "
    for number in range(1, 13)
)
PROMPTS = ("San Francisco is a", "Santa Clara is a", LONG_PROMPT)


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; `status` is the exit status that says so."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Signals:
    """While entered, SIGINT and SIGTERM raise `Interrupted` in the main thread, though not inside `held()`, and no more
    once `finishing` is set.

    Otherwise one that arrives just after a server was started, or while servers are being stopped, would leave that
    server running.
    """

    def __init__(self) -> None:
        self.finishing = False
        self._depth = 0
        self._pending: int | None = None

    def __enter__(self) -> Signals:
        self._previous = {n: signal.signal(n, self._arrived) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep signals until the end of the outermost block."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        self._raise()

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self._pending = number
        self._raise()

    def _raise(self) -> None:
        if self._pending is not None and not self._depth and not self.finishing:
            raise Interrupted(self._pending)


@dataclass(frozen=True)
class Handover:
    """What happened to one prompt.

    Attributes:
        prompt: the text.
        alone: token ids that the server without a connector answered.
        answer: token ids that came through the proxy.
        tokens: for each of `SOURCES`, the prompt's tokens that the decode server had from there.
        seconds: from the request to the proxy until the end of the answer.
        loaded_bytes: bytes of KV that the decode server took over, and `load_seconds` how long that took it.
    """

    prompt: str
    alone: list[int]
    answer: list[int]
    tokens: dict[str, int]
    seconds: float
    loaded_bytes: float
    load_seconds: float

    @property
    def fault(self) -> str | None:
        """What is wrong with it, in one line; None if nothing is."""
        name = repr(_shorten(self.prompt))
        if self.answer != self.alone:
            same = next((i for i, (a, b) in enumerate(zip(self.answer, self.alone, strict=False)) if a != b), "length")
            return f"{name}: the answer differs from that of one server alone (first at token {same})"
        if not self.tokens["external_kv_transfer"]:
            return f"{name}: no token came over from the prefill server"
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print what happened.

    Returns:
        0 when every answer is that of one server alone and every prompt came over; 1 when not, or when a server failed;
        130 or 143 when it was interrupted. No process that it started is left in any case.

    Raises:
        SystemExit: an argument or an option of the connector is wrong; with status 2, before anything is started.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        configs = _configs(arguments)
    except ConfigError as error:
        parser.error(str(error))
    with Signals() as signals, tempfile.TemporaryDirectory(prefix="kvsdk-demo-") as folder:
        try:
            return _run(arguments, configs, Path(folder), signals)
        except Interrupted as interrupted:
            print(f"stopped by {interrupted}", flush=True)
            return interrupted.status
        except KVError as error:
            print(f"FAIL: {error}", flush=True)
            return 1


def _configs(arguments: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    """`--kv-transfer-config` of each vLLM server, by name. Raises ConfigError as `transfer_config` does."""
    configs: dict[str, dict[str, Any] | None] = {"alone": None, "prefill": None, "decode": None}
    if arguments.connector == "none":
        if arguments.options:
            raise ConfigError("--options without a connector; name one by --connector")
        return configs
    # Three servers that have just booted on a laptop may be slow to answer; a prompt is not computed for that.
    extra = {"lookup_timeout": 10.0, **arguments.options}
    common = {"kv_connector": arguments.connector, "kv_connector_extra_config": extra}
    common |= {"kv_parallel_size": 2, "kv_port": free_port()}
    configs["prefill"] = transfer_config(common | {"kv_role": "kv_producer", "kv_rank": 0})
    configs["decode"] = transfer_config(common | {"kv_role": "kv_consumer", "kv_rank": 1})
    return configs


def _run(
    arguments: argparse.Namespace, configs: Mapping[str, dict[str, Any] | None], folder: Path, signals: Signals
) -> int:
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    model = arguments.model
    if model is None:
        from kvsdk.demo.models import make_llama_1b, make_tiny_llama

        model = folder / "model"
        if arguments.gpus:
            make_llama_1b(model, "cuda")
        else:
            make_tiny_llama(model)
        say("made a model with random weights")
    logs = arguments.keep_logs or folder
    servers: list[Server] = []
    try:
        with signals.held():
            _start(arguments, configs, model, logs, servers)
        say(f"starting {', '.join(server.name for server in servers)}; their logs are in {logs}")
        _wait(servers, say)
        alone, _, decode, proxy = servers
        results = []
        for prompt in PROMPTS:
            results.append(_hand_over(prompt, alone, decode, proxy, arguments))
            say(f"answered {_shorten(prompt)!r}")
    finally:
        with signals.held():
            for server in reversed(servers):
                server.stop()
    say("all servers have ended")
    print(_table(results))
    faults = [result.fault for result in results if result.fault]
    print("\n".join(f"FAIL: {fault}" for fault in faults) or "PASS: every prompt came over, every token is the same")
    return 1 if faults else 0


def _start(
    arguments: argparse.Namespace,
    configs: Mapping[str, dict[str, Any] | None],
    model: Path,
    logs: Path,
    servers: list[Server],
) -> None:
    """Append to `servers`, as each is started: that which works alone, the prefill and the decode server, the proxy."""
    gpus: dict[str, str] = {}
    args = ["--block-size", str(CPU_BLOCK_SIZE)]
    if arguments.gpus:
        first, second = arguments.gpus
        gpus = {"alone": first, "prefill": first, "decode": second}
        # Two servers share the first device.
        args = ["--gpu-memory-utilization", "0.35"]
    for name, config in configs.items():
        server = vllm_server(
            model, name=name, log=logs / f"{name}.log", transfer_config=config, gpu=gpus.get(name), args=args
        )
        servers.append(server)
    port = free_port()
    command = [sys.executable, "-m", "kvsdk.cli", "proxy", "--host", HOST, "--port", str(port)]
    command += ["--prefill", servers[1].url, "--decode", servers[2].url]
    servers.append(Server(command, name="proxy", port=port, log=logs / "proxy.log"))


def _wait(servers: Sequence[Server], say: Any) -> None:
    waiting = {server.name for server in servers}
    spoken = time.monotonic()

    def progress(server: Server, healthy: bool) -> None:
        nonlocal spoken
        if healthy:
            waiting.discard(server.name)
            say(f"{server.name} is ready")
        elif time.monotonic() - spoken > 5:
            say(f"waiting for {', '.join(s.name for s in servers if s.name in waiting)}")
        else:
            return
        spoken = time.monotonic()

    wait_all_healthy(servers, BOOT_TIMEOUT, progress)


def _hand_over(prompt: str, alone: Server, decode: Server, proxy: Server, arguments: argparse.Namespace) -> Handover:
    options = {"max_tokens": arguments.max_tokens}
    expected = alone.complete(prompt, **options)
    if arguments.gpus:
        # Kernels that compute a prompt round differently from those that read its cache: compare with the latter.
        expected = alone.complete(prompt, **options)
    before, loaded = _sources(decode), decode.metrics()
    began = time.monotonic()
    answer = proxy.complete(prompt, **options)
    seconds = time.monotonic() - began
    deadline = began + seconds + METRICS_TIMEOUT
    # vLLM counts a request after it has answered it.
    while sum(tokens := _difference(_sources(decode), before)) < answer["usage"]["prompt_tokens"]:
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"the decode server has not counted its prompt after {METRICS_TIMEOUT:.0f} s")
        time.sleep(0.05)
    after = decode.metrics()
    moved, spent = (
        after.get(name, 0.0) - loaded.get(name, 0.0)
        for name in ("kvsdk_loaded_bytes_total", "kvsdk_load_seconds_total")
    )
    ids = (reply["choices"][0]["token_ids"] for reply in (expected, answer))
    return Handover(prompt, *ids, dict(zip(SOURCES, tokens, strict=True)), seconds, moved, spent)


def _sources(server: Server) -> list[int]:
    found = server.metrics_by("vllm:prompt_tokens_by_source_total", "source")
    return [int(found.get(source, 0)) for source in SOURCES]


def _difference(after: list[int], before: list[int]) -> list[int]:
    return [a - b for a, b in zip(after, before, strict=True)]


def _table(results: Sequence[Handover]) -> str:
    rows = [("prompt", "tokens", "came over", "cached", "computed", "answer", "same", "seconds", "MB", "MB/s")]
    for result in results:
        speed = f"{result.loaded_bytes / 1e6 / result.load_seconds:.1f}" if result.load_seconds else "-"
        rows.append(
            (
                _shorten(result.prompt),
                str(sum(result.tokens.values())),
                *(str(result.tokens[source]) for source in SOURCES),
                str(len(result.answer)),
                "yes" if result.answer == result.alone else "NO",
                f"{result.seconds:.2f}",
                f"{result.loaded_bytes / 1e6:.2f}",
                speed,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _shorten(prompt: str) -> str:
    return prompt if len(prompt) <= 24 else prompt[:21] + "..."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvsdk demo",
        description="Boot a prefill server, a decode server, a proxy and a server that works alone; hand prompts over "
        "and compare the tokens. Exit status 1 when any token differs or a prompt did not come over.",
    )
    parser.add_argument(
        "--connector", default="PyNcclConnector", help="the connector to use, or none (default: %(default)s)"
    )
    parser.add_argument(
        "--options",
        type=_object,
        default={},
        metavar="JSON",
        help="the connector's options, for the kv_connector_extra_config of the prefill and the decode server",
    )
    parser.add_argument(
        "--model", type=_folder, metavar="PATH", help="a checkpoint's folder (default: a small random one)"
    )
    parser.add_argument(
        "--keep-logs", type=Path, metavar="DIR", help="write the servers' logs here (default: not kept)"
    )
    parser.add_argument("--max-tokens", type=int, default=24, help="tokens of each answer (default: %(default)s)")
    parser.add_argument(
        "--gpus",
        type=_devices,
        nargs="?",
        const=("0", "1"),
        metavar="A,B",
        help="use two CUDA devices, 0 and 1 unless given (default: the CPU)",
    )
    return parser


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no object of options, as '{{\"load_timeout\": 5}}' is")
    return value


def _folder(text: str) -> Path:
    if not (path := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder with a checkpoint")
    return path


def _devices(text: str) -> tuple[str, str]:
    devices = text.split(",")
    if len(set(devices)) != 2 or len(devices) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} does not name two different devices, as 0,1 does")
    return devices[0], devices[1]
