"""The proxy between fake vLLM servers on loopback: what each leg is sent, and what the client gets whatever fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp", reason="needs aiohttp (kvsdk[proxy])")

from aiohttp import web  # noqa: E402

import kvsdk.proxy  # noqa: E402
from kvsdk.errors import ConfigError  # noqa: E402
from kvsdk.proxy import ProxyConfig  # noqa: E402
from kvsdk.proxy.app import make_runner  # noqa: E402
from kvsdk.proxy.bodies import is_one_sequence, prefill_body, split_events  # noqa: E402
from kvsdk.proxy.servers import ServerPool  # noqa: E402
from kvsdk.transfer_params import Role, classify, offer_params, prefill_params  # noqa: E402

PARAMS = offer_params("t-1", "127.0.0.1", 14579, "engine-p", num_tokens=9)
PROMPT = {"model": "m", "prompt": "San Francisco is a", "max_tokens": 7}
LIMIT = 20.0  # seconds; no test comes near it


@dataclass
class Fake:
    """A vLLM server that says what `answer` says, and remembers what it was asked."""

    answer: Callable[[web.Request, dict], Any]
    bodies: list[dict] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    headers: list[Any] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    healthy: bool = True
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/health":
            return web.Response(status=200 if self.healthy else 503)
        raw = await request.read()
        body = json.loads(raw) if raw else {}
        self.bodies.append(body)
        self.raw.append(raw)
        self.headers.append(request.headers.copy())
        self.paths.append(request.path)
        try:
            return await self.answer(request, body)
        except asyncio.CancelledError:
            self.aborted.set()
            raise


async def prefilled(request: web.Request, body: dict) -> web.Response:
    return web.json_response({"choices": [{"text": "x"}], "kv_transfer_params": PARAMS})


async def without_params(request: web.Request, body: dict) -> web.Response:
    return web.json_response({"choices": [{"text": "x"}], "kv_transfer_params": None})


async def decoded(request: web.Request, body: dict) -> web.StreamResponse:
    if not body.get("stream"):
        return web.json_response({"choices": [{"text": "city"}]})
    response = await sse(request)
    for text in ("a", "b"):
        await response.write(event(text))
    await response.write(b"data: [DONE]\n\n")
    return response


async def for_ever(request: web.Request, body: dict) -> web.Response:
    await asyncio.sleep(LIMIT)
    return web.Response()


def status(code: int, body: Any = None) -> Callable:
    async def answer(request: web.Request, _: dict) -> web.Response:
        return web.json_response({"error": {"message": "no"}} if body is None else body, status=code)

    return answer


async def sse(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    return response


def event(text: str) -> bytes:
    return b'data: {"choices": [{"text": "%s"}]}\n\n' % text.encode()


async def start(stack: contextlib.AsyncExitStack, runner: web.AppRunner) -> str:
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


async def start_fake(stack: contextlib.AsyncExitStack, fake: Fake) -> Fake:
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", fake.handle)
    fake.url = await start(stack, web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1))
    return fake


@dataclass
class Rig:
    prefill: list[Fake]
    decode: list[Fake]
    url: str
    client: aiohttp.ClientSession

    def post(self, body: Any = PROMPT, path: str = "/v1/completions", **kwargs: Any) -> Any:
        return self.client.post(self.url + path, json=body, **kwargs)

    async def metrics(self) -> dict[str, float]:
        async with self.client.get(self.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


DOWN = "down"


@contextlib.asynccontextmanager
async def rig(prefill: list = (prefilled,), decode: list = (decoded,), **options: Any) -> AsyncIterator[Rig]:
    """A proxy in front of fake servers; `DOWN` in place of an answer is a server that refuses connections."""
    defaults = {"connect_timeout": 2.0, "prefill_timeout": 5.0, "decode_timeout": 5.0, "close_timeout": 0.2}
    async with asyncio.timeout(LIMIT), contextlib.AsyncExitStack() as stack:

        async def servers(answers: list) -> list[Fake]:
            fakes = []
            for answer in answers:
                if answer is DOWN:
                    unused, port = await reserve()
                    stack.callback(unused.close)
                    fakes.append(Fake(decoded, url=f"http://127.0.0.1:{port}"))
                else:
                    fakes.append(await start_fake(stack, Fake(answer)))
            return fakes

        fakes = await servers(prefill), await servers(decode)
        urls = [tuple(fake.url for fake in side) for side in fakes]
        url = await start(stack, make_runner(ProxyConfig(*urls, **{**defaults, **options})))
        client = await stack.enter_async_context(aiohttp.ClientSession(auto_decompress=False))
        yield Rig(*fakes, url, client)


async def reserve() -> tuple[Any, int]:
    """A port that is bound but not listened on, so that a connection to it is refused and nobody else gets it."""
    import socket

    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    return bound, bound.getsockname()[1]


def in_loop(test: Callable[[], Any]) -> Callable[[], None]:
    """Runs an async test, with its fixtures bound by keyword."""
    import functools

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


# What the servers are sent


@in_loop
async def test_the_prefill_server_gets_one_token_to_make_and_the_decode_server_its_answer():
    async with rig() as r:
        async with r.post() as response:
            assert response.status == 200
            assert (await response.json())["choices"] == [{"text": "city"}]
        assert r.prefill[0].bodies == [
            PROMPT | {"max_tokens": 1, "stream": False, "kv_transfer_params": prefill_params()}
        ]
        assert r.decode[0].bodies == [PROMPT | {"kv_transfer_params": PARAMS}]
        assert r.prefill[0].paths == r.decode[0].paths == ["/v1/completions"]


@in_loop
async def test_chat_goes_the_same_way_and_keeps_what_shapes_its_prompt():
    chat = {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function"}],
        "max_completion_tokens": 9,
        "min_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 3,
        "n": 1,
    }
    async with rig() as r:
        async with r.post(chat, "/v1/chat/completions") as response:
            assert await response.read() == event("a") + event("b") + b"data: [DONE]\n\n"
        kept = {name: chat[name] for name in ("messages", "tools")}
        one = {"max_tokens": 1, "max_completion_tokens": 1, "n": 1, "stream": False}
        assert r.prefill[0].bodies == [kept | one | {"kv_transfer_params": prefill_params()}]
        assert r.decode[0].bodies == [chat | {"kv_transfer_params": PARAMS}]


@pytest.mark.parametrize("mode", ["repeat", "auto"])
@in_loop
async def test_a_prompt_is_only_repeated_byte_for_byte_where_there_are_no_params(mode):
    sent = b'{ "prompt": "caf\\u00e9", "max_tokens" : 7, "seed": 12345678901234567890123 }'
    async with rig([without_params], mode=mode) as r:
        async with r.client.post(r.url + "/v1/completions", data=sent) as response:
            assert response.status == 200
        assert r.decode[0].raw == [sent]
        assert r.prefill[0].bodies[0]["prompt"] == "café"
        assert ("kv_transfer_params" in r.prefill[0].bodies[0]) == (mode == "auto")


@pytest.mark.parametrize("several", [{"prompt": ["a", "b"]}, {"prompt": [[1], [2]]}, {"n": 2}, {"best_of": 2}])
@in_loop
async def test_a_request_of_several_sequences_is_repeated_because_params_name_one_transfer(several):
    async with rig(mode="params") as r:
        async with r.post(PROMPT | several) as response:
            assert response.status == 200
        assert "kv_transfer_params" not in r.prefill[0].bodies[0]
        assert r.decode[0].bodies == [PROMPT | several]


def test_one_prompt_in_a_list_and_a_prompt_of_token_ids_are_one_sequence():
    assert is_one_sequence({"prompt": ["a"]})
    assert is_one_sequence({"prompt": [1, 2, 3]})
    assert is_one_sequence({"prompt": [], "n": None, "best_of": 1})
    assert not is_one_sequence({"prompt": "a", "use_beam_search": True})


def test_a_prefill_body_leaves_the_clients_own_untouched():
    body = {"prompt": "a", "min_tokens": 3, "max_tokens": 5, "n": 4, "echo": True}
    before = dict(body)
    assert prefill_body(body, None) == {"prompt": "a", "max_tokens": 1, "n": 1, "stream": False}
    assert body == before


@in_loop
async def test_params_of_a_client_reach_no_server():
    mine = PROMPT | {"kv_transfer_params": {"do_remote_prefill": True, "transfer_id": "x", "remote_host": "evil"}}
    async with rig([without_params], mode="repeat") as r:
        async with r.post(mine) as response:
            assert response.status == 200
        assert "kv_transfer_params" not in r.prefill[0].bodies[0] | r.decode[0].bodies[0]


@in_loop
async def test_both_legs_and_the_client_see_one_request_id_and_the_servers_its_authorization():
    async with rig() as r:
        async with r.post(headers={"X-Request-Id": "abc", "Authorization": "Bearer k", "Cookie": "c=1"}) as response:
            assert response.headers["X-Request-Id"] == "abc"
        async with r.post(headers={"X-Request-Id": "not one\tid"}) as response:
            made = response.headers["X-Request-Id"]
        legs = list(zip(r.prefill[0].headers, r.decode[0].headers, strict=True))
        for leg in legs[0]:
            assert (leg["X-Request-Id"], leg["Authorization"]) == ("abc", "Bearer k")
            assert "Cookie" not in leg
        assert {leg["X-Request-Id"] for leg in legs[1]} == {made}
        assert len(made) == 32


@in_loop
async def test_each_leg_has_a_connection_of_its_own_so_that_none_is_closed_under_it():
    peers = []

    async def answer(request, body):
        peers.append(request.transport.get_extra_info("peername"))
        return await decoded(request, body)

    async with rig(decode=[answer]) as r:
        for _ in range(3):
            async with r.post() as response:
                assert response.status == 200
    assert len(set(peers)) == 3


@in_loop
async def test_a_server_cannot_send_a_request_elsewhere():
    async with rig(decode=[decoded, decoded]) as r:

        async def elsewhere(request, body):
            return web.Response(status=307, headers={"Location": r.decode[1].url + request.path})

        r.decode[0].answer = elsewhere
        async with r.post(allow_redirects=False) as response:
            assert response.status == 307
            assert "Location" not in response.headers
        assert r.decode[1].bodies == []


# What vLLM's own connectors answer: a NIXL prefill server of two KV cache groups, and one of MoRIIO.
OTHER_ANSWERS = [
    {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [[3, 1, 2], []],
        "remote_engine_id": "5b5fb28f-3f30-4bdd-9a36-958d52459200",
        "remote_request_id": "cmpl-1-0-ab12",
        "remote_host": "ahost",
        "remote_port": 4032,
        "tp_size": 1,
        "remote_num_tokens": 64,
        "remote_blocks_expiry_time": None,
        "remote_registration_generation": 0,
        "transfer_mode": "read",
    },
    {"remote_engine_id": "ahost:4032", "remote_block_ids": [1, 2, 3], "transfer_id": "tx-1", "tp_size": 1},
]


@pytest.mark.parametrize("answer", OTHER_ANSWERS, ids=["NIXL", "MoRIIO"])
@in_loop
async def test_the_answer_of_any_connector_is_passed_on_unchanged(answer):
    async with rig([status(200, {"kv_transfer_params": answer})], mode="params") as r:
        async with r.post() as response:
            assert response.status == 200
        assert r.decode[0].bodies == [PROMPT | {"kv_transfer_params": answer}]


# Streams


@in_loop
async def test_each_event_reaches_the_client_before_the_next_is_made():
    passed = asyncio.Queue()

    async def answer(request, body):
        response = await sse(request)
        for text in ("a", "b", "c"):
            await response.write(event(text))
            assert await passed.get() == text
        return response

    async with rig(decode=[answer]) as r, r.post(PROMPT | {"stream": True}) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        for text in ("a", "b", "c"):
            assert await response.content.readuntil(b"\n\n") == event(text)
            passed.put_nowait(text)
        assert await response.content.read() == b""


@in_loop
async def test_a_decode_server_that_breaks_off_ends_the_stream_in_an_error_event_of_its_own():
    async def answer(request, body):
        response = await sse(request)
        await response.write(event("a") + b'data: {"choices": [{"te')
        await asyncio.sleep(0.05)
        request.transport.abort()
        return response

    async with rig(decode=[answer, answer]) as r:
        async with r.post(PROMPT | {"stream": True}) as response:
            events = (await response.content.read()).split(b"\n\n")
        assert events[0] + b"\n\n" == event("a")
        error = json.loads(events[1].removeprefix(b"data: "))["error"]
        assert error["code"] == 502
        assert "decode server failed" in error["message"]
        assert events[2:] == [b""]
        assert len(r.decode[0].bodies) + len(r.decode[1].bodies) == 1, "nothing is generated twice once text was sent"
        assert (await r.metrics())["kvsdk_proxy_broken_streams_total"] == 1


def test_events_are_split_after_the_last_whole_one():
    assert split_events(b"data: 1\n\ndata: 2\n\ndata") == (b"data: 1\n\ndata: 2\n\n", b"data")
    assert split_events(b"data: 1\r\n\r\nda") == (b"data: 1\r\n\r\n", b"da")
    assert split_events(b"data: 1\n") == (b"", b"data: 1\n")
    assert split_events(b"") == (b"", b"")


@pytest.mark.parametrize("leg", ["prefill", "decode"])
@in_loop
async def test_a_client_that_leaves_aborts_the_leg_under_way(leg):
    async with rig([for_ever] if leg == "prefill" else [prefilled], [for_ever]) as r:
        fake = r.prefill[0] if leg == "prefill" else r.decode[0]
        task = asyncio.create_task(r.client.post(r.url + "/v1/completions", json=PROMPT))
        while not fake.bodies:
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.wait_for(fake.aborted.wait(), 5)
        assert len(r.decode[0].bodies) == (leg == "decode")
        metrics = await r.metrics()
        assert metrics['kvsdk_proxy_requests_total{path="/v1/completions",status="cancelled"}'] == 1
        assert not any(value for name, value in metrics.items() if "in_flight" in name)


@in_loop
async def test_a_client_that_leaves_a_stream_aborts_it():
    async def answer(request, body):
        response = await sse(request)
        while True:
            await response.write(event("a"))
            await asyncio.sleep(0.01)

    async with rig(decode=[answer]) as r:
        response = await r.post(PROMPT | {"stream": True})
        await response.content.readuntil(b"\n\n")
        response.close()
        await asyncio.wait_for(r.decode[0].aborted.wait(), 5)


# Prefill servers that fail


async def hang_up(request: web.Request, body: dict) -> web.Response:
    request.transport.abort()
    return web.Response()


async def garbage(request: web.Request, body: dict) -> web.Response:
    return web.Response(body=b"\x00not json")


@pytest.mark.parametrize(
    "answer",
    [
        DOWN,
        for_ever,
        hang_up,
        garbage,
        status(500),
        status(503),
        status(429),
        status(302),
        status(200, []),
        status(200, {"kv_transfer_params": "soon"}),
    ],
)
@in_loop
async def test_a_request_completes_on_the_decode_server_whatever_the_prefill_server_does(answer):
    async with rig([answer], prefill_timeout=0.2) as r:
        async with r.post() as response:
            assert response.status == 200
            assert (await response.json())["choices"] == [{"text": "city"}]
        assert r.decode[0].bodies == [PROMPT]


@in_loop
async def test_a_prefill_that_takes_too_long_is_aborted():
    async with rig([for_ever], prefill_timeout=0.1) as r:
        async with r.post() as response:
            assert response.status == 200
        await asyncio.wait_for(r.prefill[0].aborted.wait(), 5)


@pytest.mark.parametrize("code", [400, 401, 404, 422])
@in_loop
async def test_a_clients_mistake_found_by_the_prefill_server_goes_back_as_it_is(code):
    mistake = {"error": {"message": "This model's maximum context length is 9", "code": code}}
    async with rig([status(code, mistake)]) as r:
        async with r.post() as response:
            assert response.status == code
            assert await response.json() == mistake
        assert r.decode[0].bodies == []


@in_loop
async def test_a_prefill_server_that_is_down_is_replaced_by_the_next_and_set_aside():
    async with rig([DOWN, prefilled], set_aside=60.0) as r:
        for _ in range(3):
            async with r.post() as response:
                assert response.status == 200
        assert len(r.prefill[1].bodies) == 3
        assert all("kv_transfer_params" in body for body in r.decode[0].bodies)
        name = f'kvsdk_proxy_set_aside{{role="prefill",server="{r.prefill[0].url}"}}'
        assert (await r.metrics())[name] == 1


# Decode servers that fail


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failing", [DOWN, hang_up, status(500), for_ever])
@in_loop
async def test_the_next_decode_server_takes_over_before_anything_was_sent(failing, stream):
    async with rig(decode=[failing, decoded], decode_timeout=0.2) as r:
        for _ in range(2):
            async with r.post(PROMPT | {"stream": stream}) as response:
                assert response.status == 200
                text = await response.text()
                assert ("[DONE]" if stream else "city") in text
        assert r.decode[1].bodies == [PROMPT | {"stream": stream, "kv_transfer_params": PARAMS}] * 2


@in_loop
async def test_a_reply_that_breaks_off_is_taken_over_too_unless_it_is_streamed():
    async def answer(request, body):
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "100"})
        await response.prepare(request)
        await response.write(b'{"choices"')
        request.transport.close()
        return response

    async with rig(decode=[answer, decoded]) as r, r.post() as response:
        assert (await response.json())["choices"] == [{"text": "city"}]


@pytest.mark.parametrize("decode", [[DOWN], [DOWN, hang_up]])
@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_the_client_gets_a_clear_503_when_no_decode_server_is_left(decode, stream):
    async with rig(decode=decode) as r:
        for _ in range(2):
            async with r.post(PROMPT | {"stream": stream}) as response:
                assert response.status == 503
                error = (await response.json())["error"]
                assert error == {
                    "message": "no decode server is available; try again later",
                    "type": "service_unavailable_error",
                    "param": None,
                    "code": 503,
                }


@in_loop
async def test_the_answer_of_the_only_decode_server_is_passed_back_even_if_it_is_an_error():
    async with rig(decode=[status(500)]) as r, r.post() as response:
        assert response.status == 500
        assert (await response.json())["error"]["message"] == "no"


@in_loop
async def test_a_decode_server_that_comes_back_is_found_by_the_next_request():
    async with contextlib.AsyncExitStack() as stack:
        bound, port = await reserve()
        stack.callback(bound.close)
        prefill = await start_fake(stack, Fake(prefilled))
        config = ProxyConfig((prefill.url,), (f"http://127.0.0.1:{port}",), set_aside=60.0, close_timeout=0.2)
        url = await start(stack, make_runner(config))
        client = await stack.enter_async_context(aiohttp.ClientSession())
        async with client.post(url + "/v1/completions", json=PROMPT) as response:
            assert response.status == 503
        bound.listen()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", Fake(decoded).handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.SockSite(runner, bound).start()
        async with client.post(url + "/v1/completions", json=PROMPT) as response:
            assert response.status == 200


@in_loop
async def test_a_bug_in_the_proxy_is_logged_and_never_looks_like_a_whole_reply(monkeypatch, caplog):
    def bug(*args):
        raise ZeroDivisionError("a bug")

    async with rig() as r:
        monkeypatch.setattr("kvsdk.proxy.app.split_events", bug)
        async with r.post(PROMPT | {"stream": True}) as response:
            with pytest.raises(aiohttp.ClientError):
                await response.read()
        monkeypatch.setattr("kvsdk.proxy.app.decode_body", bug)
        async with r.post() as response:
            assert response.status == 500
            assert "its log says why" in (await response.json())["error"]["message"]
    assert caplog.text.count("ZeroDivisionError: a bug") >= 2


# Many servers


@in_loop
async def test_requests_are_spread_evenly_over_any_number_of_servers():
    async with rig([prefilled] * 2, [decoded] * 3) as r:
        for _ in range(6):
            async with r.post() as response:
                assert response.status == 200
        assert [len(fake.bodies) for fake in r.prefill] == [3, 3]
        assert [len(fake.bodies) for fake in r.decode] == [2, 2, 2]


@in_loop
async def test_a_busy_server_is_passed_over():
    gate = asyncio.Event()

    async def slow(request, body):
        await gate.wait()
        return await decoded(request, body)

    async with rig(decode=[slow, decoded]) as r:
        first = asyncio.create_task(r.client.post(r.url + "/v1/completions", json=PROMPT))
        while not r.decode[0].bodies:
            await asyncio.sleep(0.005)
        for _ in range(3):
            async with r.post() as response:
                assert response.status == 200
        gate.set()
        async with await first as response:
            assert response.status == 200
        assert [len(fake.bodies) for fake in r.decode] == [1, 3]


def test_a_server_is_set_aside_for_a_while_and_picked_meanwhile_only_as_a_last_resort():
    now = [0.0]
    pool = ServerPool(["a", "b"], set_aside=2.0, clock=lambda: now[0])
    a, b = pool.servers
    pool.failed(a)
    assert [pool.pick() for _ in range(2)] == [b, b]
    assert pool.pick(tried=[b]) is None
    assert pool.pick(tried=[b], last_resort=True) is a
    assert pool.pick(tried=[a, b], last_resort=True) is None
    now[0] = 2.0
    assert not pool.is_aside(a)
    assert {pool.pick(), pool.pick()} == {a, b}
    pool.failed(b)
    pool.answered(b)
    assert not pool.is_aside(b)


# Requests that are none


@pytest.mark.parametrize("sent", [b"", b"{", b"[1]", b"null", b"[" * 100_000])
@in_loop
async def test_a_body_that_is_no_json_object_is_refused_before_any_server_is_asked(sent):
    async with rig() as r:
        async with r.client.post(r.url + "/v1/completions", data=sent) as response:
            assert response.status == 400
            assert (await response.json())["error"]["type"] == "invalid_request_error"
        assert r.prefill[0].bodies == r.decode[0].bodies == []


@in_loop
async def test_a_body_over_the_limit_is_refused():
    async with rig(max_body_bytes=1000) as r:
        async with r.post(PROMPT | {"prompt": "x" * 900}) as response:
            assert response.status == 200
        async with r.post(PROMPT | {"prompt": "x" * 1100}) as response:
            assert response.status == 413
            assert (await response.json())["error"]["code"] == 413


@in_loop
async def test_a_body_that_does_not_arrive_is_given_up():
    async def trickle():
        yield b"{"
        await asyncio.sleep(LIMIT)

    async with rig(client_timeout=0.1) as r:
        async with r.client.post(r.url + "/v1/completions", data=trickle()) as response:
            assert response.status == 408


@in_loop
async def test_an_unknown_path_is_a_404_in_the_same_format():
    async with rig() as r, r.post(path="/v1/nothing") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == 404


# What an operator reads


@in_loop
async def test_models_come_from_a_decode_server():
    async with rig(decode=[DOWN, status(200, {"data": ["m"]})]) as r:
        async with r.client.get(r.url + "/v1/models", headers={"Authorization": "Bearer k"}) as response:
            assert await response.json() == {"data": ["m"]}
        assert r.decode[1].headers[0]["Authorization"] == "Bearer k"


@in_loop
async def test_health_is_good_while_a_decode_server_is_and_names_each_server():
    async with rig([DOWN], [decoded, DOWN]) as r:
        async with r.client.get(r.url + "/health") as response:
            assert response.status == 200
            assert await response.json() == {
                "status": "degraded",
                "prefill": {r.prefill[0].url: False},
                "decode": {r.decode[0].url: True, r.decode[1].url: False},
            }
        r.decode[0].healthy = False
        async with r.client.get(r.url + "/health") as response:
            assert response.status == 503
            assert (await response.json())["status"] == "down"


@in_loop
async def test_counters_tell_how_prompts_were_handed_over():
    async with rig([prefilled, without_params]) as r:
        for _ in range(2):
            async with r.post():
                pass
        metrics = await r.metrics()
    assert metrics['kvsdk_proxy_prefills_total{outcome="params"}'] == 1
    assert metrics['kvsdk_proxy_prefills_total{outcome="no_params"}'] == 1
    assert metrics['kvsdk_proxy_requests_total{path="/v1/completions",status="200"}'] == 2


@in_loop
async def test_what_clients_write_never_reaches_the_log(caplog):
    with caplog.at_level("DEBUG", "kvsdk"):
        async with rig([hang_up], [hang_up]) as r, r.post(PROMPT | {"prompt": "secret"}):
            pass
    assert "prefill failed" in caplog.text
    assert "secret" not in caplog.text


# The command


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prefill": ()}, "--prefill is not set"),
        ({"decode": ("localhost:8200",)}, "--decode localhost:8200 is not http://host:port"),
        ({"decode": ("http://a:1/v1",)}, "--decode http://a:1/v1 is not"),
        ({"decode": ("http://a:99999",)}, "--decode http://a:99999 is not"),
        ({"decode": ("http://a:1", "http://a:1/")}, "given more than once"),
        ({"mode": "push"}, "--mode push"),
        ({"port": 65536}, "--port 65536"),
        ({"decode_timeout": 0.0}, "--decode-timeout 0.0"),
        ({"max_body_bytes": 0}, "--max-body-bytes 0"),
    ],
)
def test_an_option_out_of_range_is_refused_by_its_name(options, named):
    good = ProxyConfig(("http://a:1",), ("http://b:1/",))
    assert good.decode == ("http://b:1",)
    with pytest.raises(ConfigError) as caught:
        replace(good, **options)
    assert named in str(caught.value)


def test_the_command_names_a_mistake_on_one_line(capsys):
    assert kvsdk.proxy.main(["--prefill", "a:1", "--decode", "http://b:1"]) == 2
    assert capsys.readouterr().err == "kvsdk proxy: --prefill a:1 is not http://host:port\n"


def test_without_aiohttp_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "kvsdk.proxy.app")
    assert kvsdk.proxy.main(["--prefill", "http://a:1", "--decode", "http://b:1"]) == 2
    assert (
        capsys.readouterr().err
        == 'kvsdk proxy: aiohttp is not installed; install it with: pip install "kvsdk[proxy]"\n'
    )


@in_loop
async def test_a_port_in_use_is_one_line(capsys):
    from kvsdk.proxy.app import serve

    bound, port = await reserve()
    with bound:
        bound.listen()
        with pytest.raises(ConfigError, match=f"--port {port} cannot be listened on"):
            await serve(ProxyConfig(("http://a:1",), ("http://b:1",), port=port))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_in_time_though_a_request_runs(number):
    @in_loop
    async def run():
        async with asyncio.timeout(LIMIT), contextlib.AsyncExitStack() as stack:
            prefill, decode = await start_fake(stack, Fake(prefilled)), await start_fake(stack, Fake(for_ever))
            servers = ("--prefill", prefill.url, "--decode", decode.url)
            command = "import sys; from kvsdk.proxy import main; sys.exit(main(sys.argv[1:]))"
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", command, *servers, "--port", "0", "--close-timeout", "0.3"),
                stderr=subprocess.PIPE,
            )
            stack.callback(lambda: process.returncode is None and process.kill())
            line = (await process.stderr.readline()).decode()
            url = line.split("listening on ")[1].split(";")[0]
            client = await stack.enter_async_context(aiohttp.ClientSession())
            task = asyncio.create_task(client.post(url + "/v1/completions", json=PROMPT))
            while not decode.bodies:
                await asyncio.sleep(0.005)
            process.send_signal(number)
            assert await asyncio.wait_for(process.wait(), 5) == 0
            await asyncio.wait_for(decode.aborted.wait(), 5)
            await asyncio.wait([task])
            assert task.exception() is not None
            assert b"Traceback" not in await process.stderr.read()

    run()


# Both at once


EARLY = {"mode": "early"}


def early(*servers: int) -> dict[str, Any]:
    return EARLY | {"prefill_kv": tuple(f"10.0.0.{n}:14579" for n in servers)}


@in_loop
async def test_early_both_servers_get_one_transfer_id_at_the_same_time():
    both = asyncio.Barrier(2)

    async def prefill(request: web.Request, body: dict) -> web.Response:
        await both.wait()
        return await prefilled(request, body)

    async def decode(request: web.Request, body: dict) -> web.StreamResponse:
        await both.wait()
        return await decoded(request, body)

    async with rig([prefill], [decode], **early(1)) as r:
        async with r.post() as response:
            assert (await response.json())["choices"] == [{"text": "city"}]
        ours, theirs = r.prefill[0].bodies[0], r.decode[0].bodies[0]
        assert ours["max_tokens"] == 1
        params = theirs["kv_transfer_params"]
        assert theirs == PROMPT | {"kv_transfer_params": params}
        assert ours["kv_transfer_params"]["transfer_id"] == params["transfer_id"]
        assert (params["remote_host"], params["remote_port"]) == ("10.0.0.1", 14579)
        assert classify(params).announced
        assert classify(ours["kv_transfer_params"]).role is Role.DECODE_ELSEWHERE
        assert (await r.metrics())['kvsdk_proxy_prefills_total{outcome="announced"}'] == 1


@in_loop
async def test_early_the_reply_is_streamed_while_the_prefill_still_runs():
    async with rig([for_ever], [sse], **early(1)) as r:
        async with r.post(PROMPT | {"stream": True}) as response:
            assert await response.content.readany()


@pytest.mark.parametrize("answer", [status(500), status(503), hang_up])
@in_loop
async def test_early_a_prefill_that_fails_lets_the_decode_server_start_over_without_params(answer):
    async def waiting(request: web.Request, body: dict) -> web.StreamResponse:
        return await (for_ever if "kv_transfer_params" in body else decoded)(request, body)

    async with rig([answer], [waiting], **early(1)) as r:
        async with r.post() as response:
            assert (await response.json())["choices"] == [{"text": "city"}]
        assert r.decode[0].bodies[-1] == PROMPT


@in_loop
async def test_early_a_clients_mistake_goes_back_and_the_decode_server_is_let_go():
    async with rig([status(400, {"error": "no"})], [for_ever], **early(1)) as r:
        async with r.post() as response:
            assert response.status == 400
            assert await response.json() == {"error": "no"}


@in_loop
async def test_early_the_next_prefill_server_is_announced_where_it_is():
    async def waiting(request: web.Request, body: dict) -> web.StreamResponse:
        far = body["kv_transfer_params"]["remote_host"] == "10.0.0.1"
        return await (for_ever if far else decoded)(request, body)

    async with rig([DOWN, prefilled], [waiting], **early(1, 2)) as r:
        async with r.post() as response:
            assert response.status == 200
        assert r.decode[0].bodies[-1]["kv_transfer_params"]["remote_host"] == "10.0.0.2"


@in_loop
async def test_early_without_any_prefill_server_the_prompt_goes_to_the_decode_server_alone():
    async def waiting(request: web.Request, body: dict) -> web.StreamResponse:
        return await (for_ever if "kv_transfer_params" in body else decoded)(request, body)

    async with rig([DOWN], [waiting], **early(1)) as r:
        async with r.post() as response:
            assert response.status == 200


@in_loop
async def test_early_a_client_that_leaves_aborts_both_legs():
    async with rig([for_ever], [for_ever], **early(1)) as r:
        with pytest.raises(TimeoutError):
            async with r.post(timeout=aiohttp.ClientTimeout(total=0.3)):
                pass
        for server in (r.prefill[0], r.decode[0]):
            await asyncio.wait_for(server.aborted.wait(), 5)


@in_loop
async def test_early_several_sequences_are_repeated():
    async with rig(**early(1)) as r:
        body = PROMPT | {"n": 2}
        async with r.post(body) as response:
            assert response.status == 200
        assert r.decode[0].bodies == [body]


@pytest.mark.parametrize(
    "options", [EARLY, early(1, 2), {"prefill_kv": ("10.0.0.1:14579",)}, EARLY | {"prefill_kv": ("10.0.0.1",)}]
)
def test_early_needs_the_kv_address_of_each_prefill_server(options):
    with pytest.raises(ConfigError, match="prefill-kv"):
        ProxyConfig(("http://127.0.0.1:1",), ("http://127.0.0.1:2",), **options)
