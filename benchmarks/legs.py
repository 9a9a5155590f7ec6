"""The two HTTP requests of a handoff, sent as a proxy sends them, with the times that matter; and what servers count.

Times are `time.monotonic()`, which all processes of a machine share.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvsdk.demo.servers import HOST, LABEL, SAMPLE, Server, ServerFailed
from kvsdk.errors import DeadlineExceeded
from kvsdk.transfer_params import announce_params, prefill_params

SOURCES = ("external_kv_transfer", "local_cache_hit", "local_compute")
BY_SOURCE = "vllm:prompt_tokens_by_source_total"
COUNT_TIMEOUT = 5.0
"""Seconds within which a server has counted a prompt that it has answered."""


class Prompt:
    """Random token ids, drawn from a seed and the length, and the JSON that stands for them, made once."""

    def __init__(self, seed: str, length: int, vocabulary: int):
        self.length = length
        self._json = json.dumps(random.Random(f"{seed} {length}").choices(range(10, vocabulary), k=length)).encode()

    def body(self, max_tokens: int, params: Mapping[str, Any] | None = None, **fields: Any) -> bytes:
        """A completion request for just so many tokens."""
        fields |= {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        if params is not None:
            fields["kv_transfer_params"] = params
        return b'{"prompt":' + self._json + b"," + json.dumps(fields).encode()[1:]


class Leg:
    """One request to a server over a connection that is made beforehand, as a proxy's pool has it.

    Both methods raise ServerFailed when the server answers with an error, or not by the rules of HTTP, and OSError when
    it is not there or takes longer than `timeout` seconds between two bytes.
    """

    def __init__(self, server: Server, timeout: float):
        self._server = server
        self._connection = http.client.HTTPConnection(HOST, server.port, timeout=timeout)
        self._connection.connect()
        self._response: http.client.HTTPResponse | None = None

    def __enter__(self) -> Leg:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._response is not None:
            self._response.close()
        self._connection.close()

    @contextlib.contextmanager
    def _sent(self, body: bytes) -> Iterator[http.client.HTTPResponse]:
        try:
            yield self._send(body)
        except http.client.HTTPException as error:
            raise ServerFailed(f"{self._server.name}: {type(error).__name__}: {error}") from error

    def _send(self, body: bytes) -> http.client.HTTPResponse:
        self._connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = self._response = self._connection.getresponse()
        if response.status != 200:
            raise ServerFailed(f"{self._server.name} answered {response.status}: {response.read(300)!r}")
        return response

    def answer(self, body: bytes) -> tuple[float, bytes]:
        """When the whole answer was there, and the answer."""
        with self._sent(body) as response:
            answer = response.read()
        return time.monotonic(), answer

    def first_token(self, body: bytes) -> float:
        """When a streamed answer's first token was there; reads the rest."""
        first = None
        with self._sent(body) as response:
            while line := response.readline():
                if line.startswith(b"data: {"):
                    first = first or time.monotonic()
                    if line.startswith(b'data: {"error'):
                        raise ServerFailed(f"{self._server.name}: {line[:300]!r}")
        if first is None:
            raise ServerFailed(f"{self._server.name} ended a stream without a token")
        return first


@dataclass
class Pair:
    """A prefill server, a decode server and how a proxy addresses them.

    Attributes:
        kv_port: where the producer's lookup buffer listens; None for a connector that is not kvsdk's.
    """

    name: str
    prefill: Server
    decode: Server
    kv_port: int | None = None

    @property
    def servers(self) -> tuple[Server, Server]:
        return self.prefill, self.decode


@dataclass(frozen=True)
class Times:
    """When the prefill request was sent, when its answer was there, and when the decode server's first token was."""

    sent: float
    answered: float
    first: float


def hand_over(pair: Pair, prompt: Prompt, timeout: float, max_tokens: int = 1) -> Times:
    """The prefill leg, then the decode leg with what it answered. Raises ServerFailed, OSError."""
    with Leg(pair.prefill, timeout) as prefill, Leg(pair.decode, timeout) as decode:
        body = prompt.body(1, prefill_params())
        sent = time.monotonic()
        answered, answer = prefill.answer(body)
        params = json.loads(answer).get("kv_transfer_params")
        if params is None:
            raise ServerFailed(f"{pair.prefill.name} answered without kv_transfer_params")
        first = decode.first_token(prompt.body(max_tokens, params, stream=True))
    return Times(sent, answered, first)


def hand_over_early(pair: Pair, prompt: Prompt, timeout: float) -> Times:
    """Both legs at once, announced by the proxy (kvsdk only). Raises ServerFailed, OSError, DeadlineExceeded."""
    assert pair.kv_port is not None
    params, claim = announce_params(uuid.uuid4().hex, HOST, pair.kv_port)
    bodies = prompt.body(1, params), prompt.body(1, claim, stream=True)
    came: list[float | Exception] = []

    with Leg(pair.prefill, timeout) as prefill, Leg(pair.decode, timeout) as decode:

        def follow() -> None:
            try:
                came.append(decode.first_token(bodies[1]))
            except Exception as error:  # noqa: BLE001 - raised below, in the thread that waits
                came.append(error)

        thread = threading.Thread(target=follow, daemon=True)
        sent = time.monotonic()
        thread.start()
        answered, _ = prefill.answer(bodies[0])
        thread.join(timeout)
        if not came:
            raise DeadlineExceeded(f"{pair.decode.name} did not answer within {timeout:.0f} s")
        if isinstance(came[0], Exception):
            raise came[0]
    return Times(sent, answered, came[0])


def answer_from_own_cache(pair: Pair, prompt: Prompt, timeout: float) -> Times:
    """Both legs for a prompt that the decode server has in its own prefix cache, with nothing to transfer: the floor.

    kvsdk looks up every prompt but one whose parameters say that it is for another server to decode, so the decode leg
    says that; NIXL transfers only what parameters name, so there both legs have none.
    """
    params = prefill_params() if pair.kv_port is not None else None
    with Leg(pair.prefill, timeout) as prefill, Leg(pair.decode, timeout) as decode:
        bodies = prompt.body(1, params), prompt.body(1, params, stream=True)
        sent = time.monotonic()
        answered, _ = prefill.answer(bodies[0])
        return Times(sent, answered, decode.first_token(bodies[1]))


# ---- what servers count


def counters(text: str) -> dict[str, float]:
    """What `/metrics` says: each name's sum over its labels, and for those with a `source`, "name source" as well."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        match = None if line.startswith("#") else SAMPLE.match(line)
        if match is None:
            continue
        names = [match[1]]
        if source := dict(LABEL.findall(match[2] or "")).get("source"):
            names.append(f"{match[1]} {source}")
        for name in names:
            found[name] = found.get(name, 0.0) + float(match[3])
    return found


def read_counters(server: Server, timeout: float = 30.0) -> dict[str, float]:
    """`counters` of a server now. Raises ServerFailed, OSError."""
    return counters(server.request("GET", "/metrics", timeout=timeout).decode())


class Tally:
    """What a server has counted since it was last asked."""

    def __init__(self, server: Server):
        self._server = server
        self._last = read_counters(server)

    def since(self, num_tokens: int = 0) -> dict[str, float]:
        """The differences, once so many prompt tokens were counted, since vLLM counts a prompt after its answer.

        Raises:
            DeadlineExceeded: they were not counted within `COUNT_TIMEOUT`.
        """
        deadline = time.monotonic() + COUNT_TIMEOUT
        while True:
            now = read_counters(self._server)
            change = {name: value - self._last.get(name, 0.0) for name, value in now.items()}
            if sum(change.get(f"{BY_SOURCE} {source}", 0.0) for source in SOURCES) >= num_tokens:
                self._last = now
                return change
            if time.monotonic() > deadline:
                self._last = now
                raise DeadlineExceeded(f"{self._server.name} has not counted a prompt after {COUNT_TIMEOUT:.0f} s")
            time.sleep(0.01)


def by_source(change: Mapping[str, float]) -> dict[str, int]:
    """Prompt tokens by where they came from."""
    return {source: int(change.get(f"{BY_SOURCE} {source}", 0)) for source in SOURCES}
