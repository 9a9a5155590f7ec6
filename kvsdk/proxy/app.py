"""The proxy's HTTP application: a prefill, then its decode, for each request of a client."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import enum
import json
import logging
import re
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from kvsdk.config import split_address
from kvsdk.errors import ConfigError
from kvsdk.proxy.bodies import decode_body, error_body, is_one_sequence, prefill_body, split_events
from kvsdk.proxy.config import ProxyConfig
from kvsdk.proxy.servers import Server, ServerPool
from kvsdk.transfer_params import announce_params, prefill_params

log = logging.getLogger("kvsdk.proxy")

# Seconds for what a server answers at once: its models, its health.
_QUICK = 5.0
# Bytes of an unfinished SSE event that are held back; past them the stream is passed on as it comes.
_EVENT_LIMIT = 1024 * 1024
# Headers of a client that servers see, beside the request id.
_FORWARDED = ("Authorization", "traceparent", "tracestate")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# 4xx that speak of the server's state, not of the request.
_TRANSIENT = (408, 429)
_UNREACHABLE = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_FAILED = (aiohttp.ClientError, TimeoutError)


def make_app(config: ProxyConfig, *, clock: Callable[[], float] = time.monotonic) -> web.Application:
    """The application. Run it with `handler_cancellation`, as `make_runner` does, to notice a client that leaves.

    Args:
        config: the servers and the deadlines.
        clock: monotonic seconds, for setting servers aside.
    """
    proxy = _Proxy(config, clock)
    app = web.Application(client_max_size=config.max_body_bytes, middlewares=[proxy.guard])
    app.cleanup_ctx.append(proxy.open_session)
    app.add_routes(
        [
            web.post("/v1/completions", proxy.generate),
            web.post("/v1/chat/completions", proxy.generate),
            web.get("/v1/models", proxy.models),
            web.get("/health", proxy.health),
            web.get("/metrics", proxy.metrics),
        ]
    )
    return app


def make_runner(config: ProxyConfig) -> web.AppRunner:
    """A runner of `make_app` under which a client that leaves cancels its requests, and closing is bounded."""
    return web.AppRunner(
        make_app(config), handler_cancellation=True, shutdown_timeout=config.close_timeout, access_log=None
    )


async def serve(config: ProxyConfig) -> None:
    """Serves until SIGTERM or SIGINT; then running requests have `close_timeout` seconds to end.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    runner = make_runner(config)
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        await runner.setup()
        try:
            await web.TCPSite(runner, config.host, config.port).start()
        except OSError as error:
            where = f"--host {config.host} --port {config.port}"
            raise ConfigError(f"{where} cannot be listened on: {error.strerror or error}; choose another") from error
        host, port = runner.addresses[0][:2]
        log.info(
            "listening on http://%s:%d; prefill: %s; decode: %s; mode %s",
            host,
            port,
            ", ".join(config.prefill),
            ", ".join(config.decode),
            config.mode,
        )
        await stop.wait()
        log.info("stopping; running requests have %g s to end", config.close_timeout)
    finally:
        await runner.cleanup()
        for number in signals:
            loop.remove_signal_handler(number)


@dataclass(frozen=True)
class _Call:
    """What both legs of one client's request share."""

    path: str
    headers: Mapping[str, str]
    request_id: str


@dataclass(frozen=True)
class _Refusal:
    """A reply that ends the request: what the client sent is at fault."""

    response: web.Response


class _Outcome(enum.Enum):
    """Of a prefill that did not come to be."""

    UNREACHABLE = enum.auto()
    FAILED = enum.auto()


class _Proxy:
    def __init__(self, config: ProxyConfig, clock: Callable[[], float]):
        self._config = config
        self._prefill = ServerPool(config.prefill, set_aside=config.set_aside, clock=clock)
        self._decode = ServerPool(config.decode, set_aside=config.set_aside, clock=clock)
        self._session: aiohttp.ClientSession | None = None
        self._counts: collections.Counter[tuple[str, tuple[tuple[str, str], ...]]] = collections.Counter()
        self._told: set[str] = set()

    async def open_session(self, app: web.Application) -> AsyncIterator[None]:
        # One connection a request: a server closes an idle one when it likes, and a POST that meets that close would
        # look like a server that died.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as self._session:
            yield

    @web.middleware
    async def guard(self, request: web.Request, handler: Callable) -> web.StreamResponse:
        status = "cancelled"
        try:
            try:
                response = await handler(request)
            except web.HTTPException as error:
                kind = "invalid_request_error" if error.status < 500 else "server_error"
                response = web.json_response(error_body(error.reason, kind, error.status), status=error.status)
            except Exception:
                log.exception("request to %s failed in the proxy", request.path)
                if request.writer.output_size > 0:
                    # Part of a reply is out; only a broken connection can say that it is not whole.
                    raise
                response = _error("the proxy failed; its log says why", "server_error", 500)
            status = str(response.status)
            return response
        finally:
            # A handler is cancelled when its client leaves, and when the proxy stops.
            self._count("requests_total", path=_metric_path(request), status=status)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        request_id = request.headers.get("X-Request-Id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        headers = {name: request.headers[name] for name in _FORWARDED if name in request.headers}
        headers |= {"X-Request-Id": request_id, "Content-Type": "application/json", "Accept-Encoding": "identity"}
        call = _Call(request.path, headers, request_id)
        try:
            async with asyncio.timeout(self._config.client_timeout):
                raw = await request.read()
        except TimeoutError:
            return _error("the request's body did not arrive in time", "invalid_request_error", 408, request_id)
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            return _error("the request's body is not valid JSON", "invalid_request_error", 400, request_id)
        if not isinstance(body, dict):
            return _error("the request's body is not a JSON object", "invalid_request_error", 400, request_id)

        if self._config.mode == "early" and is_one_sequence(body):
            return await self._run_both(request, call, body)
        prefilled = await self._run_prefill(call, body)
        if isinstance(prefilled, _Refusal):
            return prefilled.response
        # Byte for byte what the client sent, wherever nothing had to change.
        as_sent = prefilled is None and "kv_transfer_params" not in body
        data = raw if as_sent else json.dumps(decode_body(body, prefilled)).encode()
        return await self._run_decode(request, call, data)

    async def _run_both(self, request: web.Request, call: _Call, body: Mapping[str, Any]) -> web.StreamResponse:
        """Sends the prompt to a prefill and a decode server at once, announced under one transfer id."""
        tried: list[Server] = []
        while (server := self._prefill.pick(tried=tried)) is not None:
            tried.append(server)
            host, port = split_address(self._config.prefill_kv[self._prefill.servers.index(server)])
            ours, theirs = announce_params(uuid.uuid4().hex, host, port)
            legs = [
                asyncio.create_task(self._announced_prefill(server, call, prefill_body(body, ours))),
                asyncio.create_task(self._run_decode(request, call, json.dumps(decode_body(body, theirs)).encode())),
            ]
            prefill, decode = legs
            try:
                await asyncio.wait(legs, return_when=asyncio.FIRST_COMPLETED)
                # Once the client has a part of the reply it gets the rest: the decode server computes what is missing.
                if not prefill.done() or prefill.result() is None or decode.done() or request.writer.output_size:
                    return await decode
                outcome = prefill.result()
            finally:
                for leg in legs:
                    leg.cancel()
                await asyncio.gather(*legs, return_exceptions=True)
            if isinstance(outcome, _Refusal):
                return outcome.response
            if outcome is not _Outcome.UNREACHABLE:
                break
        else:
            self._prefill_failed(call, "every prefill server", "cannot be reached")
        return await self._run_decode(request, call, json.dumps(decode_body(body, None)).encode())

    async def _announced_prefill(self, server: Server, call: _Call, body: dict[str, Any]) -> _Refusal | _Outcome | None:
        """None when the prefill server has computed the prompt, else what to do instead."""
        try:
            async with asyncio.timeout(self._config.prefill_timeout):
                data = json.dumps(body).encode()
                async with self._post(self._prefill, server, call, data, aiohttp.ClientTimeout()) as upstream:
                    answer = await _read(upstream, call)
        except _UNREACHABLE as error:
            log.warning("request %s: prefill server %s cannot be reached: %s", call.request_id, server.url, error)
            return _Outcome.UNREACHABLE
        except _FAILED as error:
            self._prefill_failed(call, server.url, _name(error))
            return _Outcome.FAILED
        if 400 <= answer.status < 500 and answer.status not in _TRANSIENT:
            self._count("prefills_total", outcome="refused")
            return _Refusal(answer)
        if answer.status != 200:
            self._prefill_failed(call, server.url, f"status {answer.status}")
            return _Outcome.FAILED
        self._count("prefills_total", outcome="announced")
        return None

    async def _run_prefill(self, call: _Call, body: Mapping[str, Any]) -> dict[str, Any] | _Refusal | None:
        """The prefill server's `kv_transfer_params`, None if there are none for any reason, or a client's error."""
        with_params = self._config.mode != "repeat" and is_one_sequence(body)
        data = json.dumps(prefill_body(body, prefill_params() if with_params else None)).encode()
        try:
            async with asyncio.timeout(self._config.prefill_timeout):
                return await self._try_prefill(call, data, with_params)
        except TimeoutError:
            self._prefill_failed(call, "any prefill server", f"no answer within {self._config.prefill_timeout:g} s")
            return None

    async def _try_prefill(self, call: _Call, data: bytes, with_params: bool) -> dict[str, Any] | _Refusal | None:
        tried: list[Server] = []
        while (server := self._prefill.pick(tried=tried)) is not None:
            tried.append(server)
            try:
                async with self._post(self._prefill, server, call, data, aiohttp.ClientTimeout()) as upstream:
                    answer = await _read(upstream, call)
            except _UNREACHABLE as error:
                log.warning("request %s: prefill server %s cannot be reached: %s", call.request_id, server.url, error)
                continue
            except aiohttp.ClientError as error:
                self._prefill_failed(call, server.url, _name(error))
                return None
            if 400 <= answer.status < 500 and answer.status not in _TRANSIENT:
                self._count("prefills_total", outcome="refused")
                return _Refusal(answer)
            if answer.status != 200:
                self._prefill_failed(call, server.url, f"status {answer.status}")
                return None
            try:
                params = json.loads(answer.body).get("kv_transfer_params")
            except (ValueError, AttributeError, RecursionError):
                self._prefill_failed(call, server.url, "a body that is not a JSON object")
                return None
            if not with_params:
                self._count("prefills_total", outcome="repeated")
                return None
            if not params or not isinstance(params, dict):
                self._count("prefills_total", outcome="no_params")
                self._tell_once(server)
                return None
            self._count("prefills_total", outcome="params")
            return params
        self._prefill_failed(call, "every prefill server", "cannot be reached")
        return None

    def _prefill_failed(self, call: _Call, server: str, why: str) -> None:
        self._count("prefills_total", outcome="failed")
        log.warning("request %s: prefill failed at %s: %s; the decode server computes it", call.request_id, server, why)

    def _tell_once(self, server: Server) -> None:
        if server.url not in self._told:
            self._told.add(server.url)
            level = logging.WARNING if self._config.mode == "params" else logging.INFO
            log.log(level, "%s answers without kv_transfer_params; its prompts are sent again as they are", server.url)

    async def _run_decode(self, request: web.Request, call: _Call, data: bytes) -> web.StreamResponse:
        timeout = aiohttp.ClientTimeout(sock_read=self._config.decode_timeout)
        tried: list[Server] = []
        answer: web.Response | None = None
        while (server := self._decode.pick(tried=tried, last_resort=True)) is not None:
            if tried:
                self._count("decode_retries_total")
            tried.append(server)
            try:
                async with self._post(self._decode, server, call, data, timeout) as upstream:
                    if upstream.status == 200 and upstream.content_type == "text/event-stream":
                        first = await upstream.content.readany()
                        return await self._stream(request, call, server, upstream, first)
                    answer = await _read(upstream, call)
            except _FAILED as error:
                log.warning("request %s: decode server %s failed: %s", call.request_id, server.url, _name(error))
                continue
            if answer.status < 500:
                return answer
            log.warning("request %s: decode server %s: status %d", call.request_id, server.url, answer.status)
        if answer is not None:
            return answer
        return _error(
            "no decode server is available; try again later", "service_unavailable_error", 503, call.request_id
        )

    async def _stream(
        self, request: web.Request, call: _Call, server: Server, upstream: aiohttp.ClientResponse, first: bytes
    ) -> web.StreamResponse:
        """Passes an SSE stream on, each piece as it comes. Its errors end here: the client has its first bytes."""
        response = web.StreamResponse(
            headers={
                "Content-Type": upstream.headers["Content-Type"],
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                "X-Request-Id": call.request_id,
            }
        )
        try:
            async with asyncio.timeout(self._config.client_timeout):
                await response.prepare(request)
            piece, held = first, b""
            while piece:
                events, held = split_events(held + piece)
                if len(held) > _EVENT_LIMIT:
                    events, held = events + held, b""
                if events:
                    await self._write(response, events)
                try:
                    piece = await upstream.content.readany()
                except _FAILED as error:
                    log.warning(
                        "request %s: decode server %s failed in mid-stream: %s",
                        call.request_id,
                        server.url,
                        _name(error),
                    )
                    self._count("broken_streams_total")
                    broken = error_body("the decode server failed before the reply was complete", "server_error", 502)
                    held = b"data: " + json.dumps(broken).encode() + b"\n\n"
                    break
            if held:
                await self._write(response, held)
        except (ConnectionError, TimeoutError):
            log.info("request %s: the client left", call.request_id)
        return response

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        async with asyncio.timeout(self._config.client_timeout):
            await response.write(data)

    @contextlib.asynccontextmanager
    async def _post(
        self, pool: ServerPool, server: Server, call: _Call, data: bytes, timeout: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One leg. Leaving before its end closes the connection, upon which vLLM aborts the request."""
        bounded = aiohttp.ClientTimeout(
            total=None, sock_connect=self._config.connect_timeout, sock_read=timeout.sock_read
        )
        server.in_flight += 1
        try:
            async with self._session.post(
                server.url + call.path, data=data, headers=call.headers, timeout=bounded, allow_redirects=False
            ) as upstream:
                pool.answered(server)
                yield upstream
        except _UNREACHABLE:
            pool.failed(server)
            raise
        finally:
            server.in_flight -= 1

    async def models(self, request: web.Request) -> web.Response:
        headers = {name: request.headers[name] for name in _FORWARDED if name in request.headers}
        tried: list[Server] = []
        while (server := self._decode.pick(tried=tried, last_resort=True)) is not None:
            tried.append(server)
            try:
                async with self._get(server, request.path, headers) as upstream:
                    answer = await _read(upstream, None)
            except _FAILED as error:
                log.warning("models of %s: %s", server.url, _name(error))
                continue
            if answer.status < 500:
                return answer
        return _error("no decode server is available; try again later", "service_unavailable_error", 503)

    async def health(self, request: web.Request) -> web.Response:
        """200 while a decode server is healthy, since requests then complete; the body names each server's state."""

        async def healthy(server: Server) -> bool:
            try:
                async with self._get(server, "/health", {}) as upstream:
                    return upstream.status == 200
            except _FAILED:
                return False

        pools = {"prefill": self._prefill, "decode": self._decode}
        servers = [(role, server) for role, pool in pools.items() for server in pool.servers]
        states = await asyncio.gather(*(healthy(server) for _, server in servers))
        report: dict[str, Any] = {"prefill": {}, "decode": {}}
        for (role, server), state in zip(servers, states, strict=True):
            report[role][server.url] = state
        up = any(report["decode"].values())
        report["status"] = "ok" if all(states) else "degraded" if up else "down"
        return web.json_response(report, status=200 if up else 503)

    def _get(self, server: Server, path: str, headers: Mapping[str, str]) -> Any:
        timeout = aiohttp.ClientTimeout(total=_QUICK, sock_connect=self._config.connect_timeout)
        return self._session.get(server.url + path, headers=headers, timeout=timeout, allow_redirects=False)

    async def metrics(self, request: web.Request) -> web.Response:
        """The proxy's own counters in Prometheus' text format."""
        lines = [
            f"kvsdk_proxy_{name}{_labels(**dict(labels))} {count}"
            for (name, labels), count in sorted(self._counts.items())
        ]
        for role, pool in (("prefill", self._prefill), ("decode", self._decode)):
            for server in pool.servers:
                labels = _labels(role=role, server=server.url)
                lines.append(f"kvsdk_proxy_in_flight{labels} {server.in_flight}")
                lines.append(f"kvsdk_proxy_set_aside{labels} {int(pool.is_aside(server))}")
        return web.Response(text="\n".join(lines) + "\n")

    def _count(self, name: str, **labels: str) -> None:
        self._counts[name, tuple(sorted(labels.items()))] += 1


async def _read(upstream: aiohttp.ClientResponse, call: _Call | None) -> web.Response:
    """A whole reply, as the client is to get it."""
    headers = {"Content-Type": upstream.headers.get("Content-Type", "application/json")}
    if call is not None:
        headers["X-Request-Id"] = call.request_id
    return web.Response(status=upstream.status, body=await upstream.read(), headers=headers)


def _error(message: str, kind: str, status: int, request_id: str | None = None) -> web.Response:
    headers = {} if request_id is None else {"X-Request-Id": request_id}
    return web.json_response(error_body(message, kind, status), status=status, headers=headers)


def _metric_path(request: web.Request) -> str:
    # Whatever paths clients make up must not become new time series.
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "other"


def _labels(**labels: str) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}" if labels else ""


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
