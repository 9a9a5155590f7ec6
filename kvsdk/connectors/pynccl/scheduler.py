"""The scheduler half: offers on the producer, claims on the consumer."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import re
import time
from typing import Any

import numpy as np
import zmq.auth

from kvsdk.buffer import (
    BufferClient,
    BufferFull,
    BufferServer,
    ClientCurve,
    LookupBuffer,
    Pending,
    RemoteClaim,
    ServerCurve,
    Unheard,
    offer_name,
)
from kvsdk.config import Options, Producers, format_address
from kvsdk.connector.interface import (
    ASK_AGAIN,
    AskAgain,
    BlockIds,
    ConsumerScheduler,
    Context,
    Hit,
    Keep,
    ProducerScheduler,
    RequestView,
)
from kvsdk.connectors.pynccl.protocol import NO_DIGEST, Source, bind_address, compare
from kvsdk.errors import ConfigError, OfferTooLarge
from kvsdk.kernels import DIGEST_ALGORITHM
from kvsdk.transfer_params import Role, TransferParams, classify, offer_params

logger = logging.getLogger("kvsdk.pynccl")

ASK_EVERY = 0.004
"""Seconds between two lookups of a transfer or a prompt that is still to come."""


@dataclasses.dataclass
class _Lookup:
    """A request's question to producers.

    Attributes:
        until: when nothing more is asked, whatever the answer.
        announced: whether only a transfer that was not heard of is asked for again, rather than any prompt.
        again_at: when to ask again; None while an answer is awaited.
    """

    until: float
    announced: bool
    again_at: float | None = None


class PyNcclScheduler(ProducerScheduler, ConsumerScheduler):
    """Keeps a finished prompt's blocks for a consumer, and claims other servers' offers."""

    def __init__(self, context: Context):
        super().__init__(context)
        options, cache = context.options, context.cache
        self._buffer: LookupBuffer | None = None
        self._server: BufferServer | None = None
        self._client: BufferClient | None = None
        self._producers: Producers | None = None
        self._asked_producers: tuple[str, ...] = ()
        self._claims: dict[str, RemoteClaim] = {}
        self._lookups: dict[str, _Lookup] = {}
        self._announced: dict[str, str] = {}  # transfer id -> request id, while the offer stands
        if options.produces:
            if options.kv_buffer_size < cache.block_bytes:
                raise ConfigError(
                    f"kv_buffer_size={options.kv_buffer_size} holds no block: one takes {cache.block_bytes} bytes; "
                    f"set kv_buffer_size to at least {cache.block_bytes}"
                )
            # Its first use imports numpy.ma: 40 ms that would else be the model's thread's once the limit is reached.
            np.unique(np.zeros(1, np.int32))
            self._buffer = LookupBuffer(
                limit_bytes=int(options.kv_buffer_size),
                block_bytes=cache.block_bytes,
                lease=options.lease,
                clock=context.clock,
            )

    def start(self, workers: list[dict[str, Any]]) -> None:
        options, context = self.context.options, self.context
        if not all(workers):
            raise ConfigError(
                "no worker reported its KV cache: vLLM's MultiConnector passes on the first connector's report only; "
                "name this connector first"
            )
        identity = {
            "protocol": 1,
            "model": dict(context.model),
            "parallel": {"world_size": context.world_size},
            "layout": workers[0]["layout"],
            "digest": DIGEST_ALGORITHM if options.verify else NO_DIGEST,
            "pipes": list(workers[0]["pipes"]),
            "engine_id": context.engine_id,
            "workers": [worker["address"] for worker in workers],
        }

        def check_producer(theirs: dict[str, Any]) -> None:
            compare(identity | {"verify": options.verify}, theirs)

        def check_consumer(theirs: dict[str, Any]) -> None:
            compare(identity | {"verify": theirs.get("digest") != NO_DIGEST}, theirs)

        if self._buffer is not None:
            self._server = BufferServer(
                self._buffer,
                bind=bind_address(options.kv_ip),
                port=options.kv_port,
                identity=identity,
                check=check_consumer,
                engine_id=context.engine_id,
                curve=server_curve(options),
            ).start()
            logger.info(
                "offers prompts' KV at %s:%d, keeps up to %d bytes",
                options.kv_ip,
                self._server.port,
                int(options.kv_buffer_size),
            )
        if options.consumes:
            self._producers = Producers(options)
            producers = self._asked_producers = self._producers.current()
            self._client = BufferClient(
                identity=identity,
                producers=producers,
                check=check_producer,
                lookup_timeout=options.lookup_timeout,
                heartbeat=options.heartbeat,
                curve=client_curve(options),
            )
            logger.info("looks prompts up at %s", ", ".join(producers) or "the producers that kv_transfer_params name")

    # ---- consumer

    def find(self, request: RequestView, num_local_tokens: int) -> Hit | AskAgain | None:
        if self._client is None:
            return None
        claim = self._claims.get(request.id)
        if claim is not None:
            if self._client.lost(claim):
                logger.warning("request %s: %s ended the claim; the prompt is computed here", request.id, claim.address)
                return None
            return Hit(claim.num_tokens, claim)
        now, lookup = self.context.clock(), self._lookups.get(request.id)
        if lookup is None or lookup.again_at is not None:
            if not request.keys_ready or (lookup is not None and now < lookup.again_at):
                return ASK_AGAIN
            params = classify(request.kv_transfer_params)
            if not self._ask(request, params, num_local_tokens):
                return None
            if lookup is None:
                options = self.context.options
                wait = options.announce_wait if params.announced else options.lookup_wait
                lookup = self._lookups[request.id] = _Lookup(now + wait, params.announced)
            lookup.again_at = None
            # The client's thread is sending now, under the lock that `poll` takes: up to 1 ms of everybody's step.
            return ASK_AGAIN
        answer = self._client.poll(request.id)
        if answer is Pending:
            return ASK_AGAIN
        if isinstance(answer, RemoteClaim):
            self._claims[request.id] = answer
            return Hit(answer.num_tokens, answer)
        if (answer is Unheard or not lookup.announced) and now < lookup.until:
            lookup.again_at = now + ASK_EVERY
            return ASK_AGAIN
        if answer is Unheard and lookup.announced:
            logger.warning("request %s: its transfer did not begin in time; the prompt is computed here", request.id)
        return None

    def _ask(self, request: RequestView, params: TransferParams, num_local_tokens: int) -> bool:
        """Send the lookup; False when there is nothing to ask."""
        assert self._client is not None
        if params.reason:
            logger.warning("request %s: its kv_transfer_params are ignored: %s", request.id, params.reason)
        if params.role is Role.DECODE_ELSEWHERE:
            return False
        assert self._producers is not None
        producers = self._producers.current()
        if producers != self._asked_producers:
            self._asked_producers = producers
            logger.info("producers are now %s", ", ".join(producers) or "none")
            self._client.set_producers(producers)
        address = None
        if params.role is Role.PREFILLED_ELSEWHERE and params.remote_host is not None:
            address = format_address(params.remote_host, params.remote_port)
        elif params.announced and len(producers) == 1:
            (address,) = producers
        if address is not None:
            if self._may_ask(address):
                self._client.find_by_id(request.id, address, params.transfer_id, request.keys, num_local_tokens)
                return True
            logger.warning(
                "request %s: %s is not among this server's producers; looking the prompt up instead",
                request.id,
                address,
            )
        self._client.find(request.id, request.keys, num_local_tokens)
        return True

    def _may_ask(self, address: str) -> bool:
        """A client's parameters may name any producer where none is configured, and else only those configured: an
        address that any HTTP client chooses could serve wrong KV, which the prefix cache would then give to
        everybody."""
        options = self.context.options
        return address in self._asked_producers or not (options.producers or options.producers_file)

    def granted(self, request: RequestView, hit: Hit, num_tokens: int) -> Source:
        claim: RemoteClaim = hit.source
        return Source(tuple(claim.identity["workers"]), offer_name(claim.transfer_id, claim.generation))

    def load_ended(self, request: RequestView, hit: Hit, ok: bool) -> None:
        self._lookups.pop(request.id, None)
        claim = self._claims.pop(request.id, None)
        if claim is not None and self._client is not None:
            self._client.release(claim, used=True)

    def forget(self, request: RequestView) -> None:
        if self._client is None:
            return
        claim = self._claims.pop(request.id, None)
        if claim is not None:
            self._client.release(claim, used=True)
        elif request.id in self._lookups:
            self._client.cancel(request.id)
        self._lookups.pop(request.id, None)

    # ---- producer

    def finished(self, request: RequestView, blocks: BlockIds) -> Keep | None:
        if self._buffer is None or self._server is None:
            return None
        transfer_id = self._chosen_id(request)
        try:
            if transfer_id is not None and self._announced.get(transfer_id) == request.id:
                offer = self._buffer.complete(transfer_id, blocks[0])
            elif transfer_id is not None and self._buffer.over(transfer_id):
                offer = None
            else:
                offer = self._buffer.insert(request.keys, blocks[0], transfer_id)
        except (OfferTooLarge, BufferFull, ValueError) as error:
            logger.warning("request %s is not offered: %s", request.id, error)
            return None
        if offer is None:
            return None  # a consumer has all of it already, or nobody waits for it any more
        options = self.context.options
        answer = offer_params(
            offer.transfer_id,
            options.kv_ip,
            self._server.port,
            # Anything goes as an engine's name, but not in an HTTP header, where proxies may put it.
            re.sub(r"[^!-~]", "_", self.context.engine_id)[:256],
            num_tokens=request.num_prompt_tokens,
            tp_size=self.context.world_size,
        )
        return Keep(offer_name(offer.transfer_id, offer.generation), answer)

    @staticmethod
    def _chosen_id(request: RequestView) -> str | None:
        """The transfer id that a proxy has chosen for this prefill."""
        params = classify(request.kv_transfer_params)
        return params.transfer_id if params.role is Role.DECODE_ELSEWHERE else None

    def announced(self, request: RequestView) -> str | None:
        transfer_id = self._chosen_id(request)
        if self._buffer is None or self._server is None or transfer_id is None:
            return None
        try:
            generation = self._buffer.announce(request.keys, transfer_id)
        except (OfferTooLarge, BufferFull, ValueError) as error:
            logger.warning("request %s is not announced: %s", request.id, error)
            return None
        self._announced[transfer_id] = request.id
        return offer_name(transfer_id, generation)

    def broken_off(self, request: RequestView, hold_id: str) -> None:
        transfer_id = self._chosen_id(request)
        if self._buffer is not None and transfer_id is not None and self._buffer.break_off(transfer_id):
            logger.info("offer %s was broken off: request %s was not completed", transfer_id, request.id)

    def give_up(self, num_blocks: int) -> None:
        if self._buffer is not None:
            self._buffer.evict(num_blocks)
            self.tick()

    # ---- both

    def tick(self) -> None:
        if self._buffer is not None:
            for ended in self._buffer.take_ended():
                if ended.reason in ("expired", "evicted"):
                    logger.info("offer %s %s: %d blocks go back", ended.transfer_id, ended.reason, len(ended.block_ids))
                self._announced.pop(ended.transfer_id, None)
                self.holds.give_back(offer_name(ended.transfer_id, ended.generation))

    def reset(self) -> bool:
        if self._buffer is not None:
            self._buffer.evict_all_unclaimed()
            # What a consumer reads now cannot be withdrawn, and others could find it.
            return self._buffer.num_offers == 0
        return True

    def close(self) -> None:
        deadline = time.monotonic() + self.context.options.close_timeout
        for part in (self._client, self._server):
            if part is not None:
                part.close(max(0.1, deadline - time.monotonic()))
        if self._buffer is not None:
            self._buffer.close()


def server_curve(options: Options) -> ServerCurve | None:
    """A producer's keys, from the files that the options name.

    Raises:
        ConfigError: a file holds no such key.
    """
    if options.curve_secret_key is None:
        return None
    public, secret = _certificate("curve_secret_key", options.curve_secret_key, secret=True)
    clients = None
    if options.curve_client_keys is not None:
        folder = pathlib.Path(options.curve_client_keys)
        clients = frozenset(_certificate("curve_client_keys", str(file))[0] for file in sorted(folder.glob("*.key")))
        if not clients:
            raise ConfigError(f"curve_client_keys={folder} holds no *.key file: no consumer could connect")
    return ServerCurve(public, secret, clients)


def client_curve(options: Options) -> ClientCurve | None:
    """A consumer's keys, from the files that the options name.

    Raises:
        ConfigError: a file holds no such key.
    """
    if options.curve_server_key is None:
        return None
    if options.curve_secret_key is None:
        raise ConfigError("curve_server_key needs curve_secret_key, this server's own certificate")
    public, secret = _certificate("curve_secret_key", options.curve_secret_key, secret=True)
    return ClientCurve(public, secret, _certificate("curve_server_key", options.curve_server_key)[0])


def _certificate(option: str, path: str, *, secret: bool = False) -> tuple[bytes, bytes]:
    try:
        public, private = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}={path} is not a ZMQ certificate: {error}") from error
    if secret and private is None:
        raise ConfigError(f"{option}={path} holds no secret key")
    return public, private or b""
