"""Promises of the buffer's server and client: one reply a message, no wait without an end, peers come and go."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
import zmq

from kvsdk.buffer import (
    BUFFER_WIRE,
    BufferClient,
    BufferServer,
    ClientCurve,
    LookupBuffer,
    Pending,
    ServerCurve,
    Unheard,
    Wire,
    prefix_keys,
)
from kvsdk.buffer import client as client_module
from kvsdk.demo.servers import free_port
from kvsdk.errors import ConfigError, MismatchError, ProtocolError

LONG = 10.0  # deadline of what must happen; nothing waits that long when all is well


class Clock:
    """The real time, and what a test adds to it."""

    def __init__(self):
        self.ahead = 0.0

    def __call__(self):
        return time.monotonic() + self.ahead


def keys_of(*tokens):
    return prefix_keys(np.array(tokens, dtype=np.int32), 4)


PROMPT = keys_of(*range(10))


def offer(buffer, keys=PROMPT, name=None, first_block=0):
    blocks = np.arange(first_block, first_block + -(-keys.num_tokens // 4), dtype=np.int32)
    return buffer.insert(keys, blocks, name)


def until(condition, timeout=LONG):
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)
    return result


def answer(client, ticket="t"):
    deadline = time.monotonic() + LONG
    while (result := client.poll(ticket)) is Pending:
        assert time.monotonic() < deadline, "no answer"
        time.sleep(0.001)
    return result


def ask(client, keys=PROMPT, min_tokens=0, ticket="t"):
    client.find(ticket, keys, min_tokens)
    return answer(client, ticket)


@pytest.fixture
def stack():
    threads = set(threading.enumerate())
    with ExitStack() as stack:
        yield stack
    left = [thread.name for thread in set(threading.enumerate()) - threads if thread.name.startswith("kvsdk-")]
    assert not left


@pytest.fixture
def make_buffer():
    return lambda lease=30.0: LookupBuffer(limit_bytes=10**6, block_bytes=1, lease=lease)


@pytest.fixture
def serve(stack, make_buffer):
    def serve(buffer=None, port=0, **options):
        buffer = buffer or make_buffer()
        server = BufferServer(buffer, bind="127.0.0.1", port=port, identity={"model": "m"}, **options).start()
        stack.callback(server.close)
        server.buffer = buffer
        return server

    return serve


@pytest.fixture
def connect(stack):
    def connect(*servers, ready=True, **options):
        options = {"identity": {"model": "m"}, "heartbeat": 0.1} | options
        client = BufferClient(producers=[getattr(server, "address", server) for server in servers], **options)
        stack.callback(client.close)
        assert not ready or client.wait_ready(LONG)
        return client

    return connect


@pytest.fixture
def dealer(stack):
    """A consumer that says what it likes."""

    def dealer(server):
        context = stack.enter_context(zmq.Context())
        dealer = stack.enter_context(context.socket(zmq.DEALER))
        dealer.linger, dealer.rcvtimeo, dealer.sndtimeo = 0, int(1000 * LONG), int(1000 * LONG)
        dealer.connect(f"tcp://{server.address}")
        return dealer

    return dealer


def say(dealer, kind, **fields):
    dealer.send(BUFFER_WIRE.encode(kind, **fields))
    return BUFFER_WIRE.decode(dealer.recv())


# -- finding


def test_a_prompt_is_found_claimed_and_released(serve, connect):
    server = serve(engine_id="prefill-0")
    offered = offer(server.buffer)
    client = connect(server)
    claim = ask(client)
    assert (claim.transfer_id, claim.num_tokens, claim.exclusive) == (offered.transfer_id, 10, True)
    assert (claim.generation, claim.address, claim.identity) == (offered.generation, server.address, {"model": "m"})
    assert claim.engine_id == server.engine_id
    assert claim.engine_id.startswith("prefill-0/")
    assert not client.lost(claim)
    client.release(claim, used=True)
    assert client.lost(claim)
    until(lambda: server.buffer.counters["released"] == 1)
    assert not server.buffer.standing(offered.transfer_id)
    assert ask(client) is None
    assert (client.num_tickets, client.num_claims, server.buffer.num_claims) == (0, 0, 0)


def test_more_than_min_tokens_or_nothing(serve, connect):
    server = serve()
    offer(server.buffer)
    client = connect(server)
    longer = keys_of(*range(10), 99)
    assert ask(client, longer, min_tokens=8) is None
    assert ask(client, longer, min_tokens=7).num_tokens == 8


def test_what_is_not_used_goes_back(serve, connect):
    server = serve()
    offer(server.buffer)
    client = connect(server)
    for _ in range(3):
        claim = ask(client)
        assert claim.exclusive
        client.release(claim, used=False)
        client.release(claim, used=True)  # twice is fine, and the first word counts
    until(lambda: server.buffer.num_claims == 0)
    assert server.buffer.num_offers == 1


def test_the_longest_of_several_answers_wins_and_the_others_are_released(serve, connect):
    servers = [serve() for _ in range(3)]
    for server, tokens in zip(servers, (4, 8, 4), strict=True):
        offer(server.buffer, keys_of(*range(tokens), 50, 51))
    claim = ask(connect(*servers), keys_of(*range(8)))
    assert (claim.address, claim.num_tokens) == (servers[1].address, 8)
    until(lambda: [server.buffer.num_claims for server in servers] == [0, 1, 0])
    assert all(server.buffer.counters["claimed"] == 1 for server in servers)


def test_of_equals_the_exclusive_one_wins(serve, connect):
    servers = [serve() for _ in range(3)]
    for server in servers:
        offer(server.buffer)
    for server in (servers[0], servers[2]):
        server.buffer.drop_select(PROMPT)  # what is left there is to share
    client = connect(*servers)
    for _ in range(5):
        claim = ask(client)
        assert (claim.address, claim.exclusive) == (servers[1].address, True)
        client.release(claim, used=False)
        until(lambda: [server.buffer.num_claims for server in servers] == [1, 0, 1])


def test_a_transfer_is_found_by_id_at_an_address_never_heard_of(serve, connect):
    server = serve()
    offer(server.buffer, name="transfer")
    client = connect()
    client.find_by_id("t", server.address, "transfer", PROMPT, 0)
    claim = answer(client)
    assert (claim.transfer_id, claim.num_tokens, claim.exclusive) == ("transfer", 10, True)
    client.find_by_id("t", server.address, "transfer", None)
    assert not answer(client).exclusive
    client.find_by_id("t", server.address, "other", PROMPT, 0)
    assert answer(client) is Unheard
    offer(server.buffer, name="gone")
    server.buffer.evict_all_unclaimed()
    client.find_by_id("t", server.address, "gone", PROMPT, 0)
    assert answer(client) is None
    assert ask(client) is None  # a temporary peer is not asked for prompts


def test_producers_may_change_while_serving(serve, connect):
    first, second = serve(), serve()
    offer(first.buffer)
    offer(second.buffer, keys_of(7, 7, 7, 7))
    client = connect(first)
    held = ask(client)
    client.set_producers([second.address])
    assert client.wait_ready(LONG)
    assert ask(client) is None  # the first is not asked any more
    assert ask(client, keys_of(7, 7, 7, 7)).address == second.address
    client.release(held, used=True)  # its claim has stood meanwhile
    until(lambda: first.buffer.counters["released"] == 1)
    client.set_producers([])
    assert ask(client, keys_of(7, 7, 7, 7)) is None


def test_a_temporary_peer_is_forgotten_after_a_minute_without_use(serve, connect):
    server, clock = serve(), Clock()
    offer(server.buffer, name="transfer")
    client = connect(clock=clock)
    client.find_by_id("t", server.address, "transfer", PROMPT)
    claim = answer(client)
    clock.ahead += 25  # within the lease
    time.sleep(0.3)
    clock.ahead += 25
    until(lambda: client.peers()[server.address].state == "up")
    assert not client.lost(claim)  # renewed all the while
    client.release(claim, used=True)
    clock.ahead += 61
    until(lambda: not client.peers())


# -- tickets


def test_every_ticket_ends(serve, connect):
    server = serve()
    offer(server.buffer)
    client = connect(server)
    for start in range(0, 10_000, 200):
        tickets = [str(i) for i in range(start, start + 200)]
        for ticket in tickets:
            client.find(ticket, PROMPT, 0)
        for ticket in tickets[::3]:
            client.cancel(ticket)
        for ticket in tickets[1::3]:
            client.find(ticket, PROMPT, 0)  # instead of the first
            client.cancel(ticket)
        for ticket in tickets[2::3]:
            client.release(answer(client, ticket), used=False)
    assert client.num_tickets == 0
    until(lambda: not any(peer.expecting or peer.waiting for peer in client._peers.values()))
    until(lambda: server.buffer.num_claims == 0)
    assert client.num_claims == 0
    assert (client.error, server.error, server.buffer.num_offers) == (None, None, 1)


def test_an_answer_is_polled_once_and_an_unknown_ticket_is_nothing(serve, connect):
    server = serve()
    offer(server.buffer)
    client = connect(server)
    assert ask(client) is not None
    assert client.poll("t") is None
    assert client.poll("never asked") is None
    client.cancel("never asked")


def test_an_answer_that_nobody_polls_is_released_after_a_minute(serve, connect):
    server, clock = serve(), Clock()
    offer(server.buffer)
    client = connect(server, clock=clock)
    client.find("t", PROMPT, 0)
    until(lambda: client.num_claims == 1)
    clock.ahead += 61
    until(lambda: client.num_tickets == 0)
    until(lambda: server.buffer.num_claims == 0)


class SlowBuffer(LookupBuffer):
    """Finds nothing before it is told to."""

    def __init__(self):
        super().__init__(limit_bytes=10**6, block_bytes=1)
        self.go = threading.Event()

    def find(self, keys, min_tokens=0):
        assert self.go.wait(LONG)
        return super().find(keys, min_tokens)


def test_a_late_answer_is_none_in_time_and_its_claim_is_released(serve, connect):
    server = serve(SlowBuffer())
    offer(server.buffer)
    client = connect(server, lookup_timeout=0.05, heartbeat=60.0)
    started = time.monotonic()
    assert ask(client) is None
    assert 0.05 <= time.monotonic() - started < 2
    server.buffer.go.set()
    until(lambda: server.buffer.counters["claimed"] == 1 and server.buffer.num_claims == 0)
    assert server.buffer.num_offers == 1


def test_at_the_timeout_the_best_answer_so_far_counts(serve, connect):
    slow, quick = serve(SlowBuffer()), serve()
    offer(slow.buffer)
    offer(quick.buffer, keys_of(0, 1, 2, 3, 99))
    client = connect(slow, quick, lookup_timeout=0.1, heartbeat=60.0)
    claim = ask(client)
    assert (claim.address, claim.num_tokens) == (quick.address, 4)
    slow.buffer.go.set()
    until(lambda: slow.buffer.counters["claimed"] == 1 and slow.buffer.num_claims == 0)


# -- leases


def test_a_claim_outlives_its_lease_as_long_as_its_holder_lives(serve, connect, make_buffer):
    server = serve(make_buffer(lease=1.0))
    offer(server.buffer)
    client = connect(server)
    claim = ask(client)
    time.sleep(2.2)
    assert not client.lost(claim)
    assert server.buffer.num_claims == 1
    client.close()
    until(lambda: server.buffer.num_offers == 0)  # unclaimed again, then expired, with nobody but the server's thread
    assert server.buffer.counters["expired"] == 1


def test_a_lease_that_ended_at_the_producer_is_lost(serve, connect, make_buffer):
    server = serve(make_buffer(lease=0.3))
    offer(server.buffer)
    client = connect(server)
    claim = ask(client)
    server.buffer.release(claim.claim_id, used=False)
    until(lambda: client.lost(claim))
    client.release(claim, used=True)
    assert client.num_claims == 0


# -- peers that die, come back, and do not match


def test_with_nobody_up_the_answer_is_there_at_once(connect):
    client = connect(f"127.0.0.1:{free_port()}", ready=False, lookup_timeout=60.0)
    client.find("t", PROMPT, 0)
    assert client.poll("t") is None
    assert not client.wait_ready(0.01)


def test_a_server_that_is_replaced_on_its_port_loses_the_claims_and_serves_new_ones(serve, connect):
    first = serve()
    offer(first.buffer)
    client = connect(first)
    claim = ask(client)
    first.close()
    second = serve(port=first.port)
    offer(second.buffer, name="new")
    until(lambda: client.lost(claim))
    until(lambda: client.peers()[first.address].engine_id == second.engine_id)
    assert client.wait_ready(LONG)
    assert ask(client).transfer_id == "new"


def test_a_dead_peer_is_down_and_not_waited_for(serve, connect, caplog):
    dead, alive = serve(), serve()
    offer(dead.buffer)
    offer(alive.buffer, keys_of(5, 5))
    client = connect(dead, alive, lookup_timeout=60.0)
    claim = ask(client)
    dead.close()
    client.find("pending", PROMPT, 0)
    until(lambda: client.peers()[dead.address].state == "down")
    assert client.lost(claim)
    assert client.poll("pending") is None
    assert ask(client, keys_of(5, 5)).address == alive.address
    assert "heartbeats" in client.peers()[dead.address].reason
    assert [r.levelname for r in caplog.records if f"{dead.address} is down" in r.getMessage()] == ["WARNING"]


def test_a_peer_that_answers_neither_a_lookup_nor_a_ping_is_down_and_then_up_again(serve, connect):
    server = serve(SlowBuffer())
    offer(server.buffer)
    client = connect(server, lookup_timeout=0.05, heartbeat=0.3)
    ask(client)
    until(lambda: client.peers()[server.address].state == "down")
    assert "neither a lookup nor a ping" in client.peers()[server.address].reason
    server.buffer.go.set()
    assert client.wait_ready(LONG)
    assert ask(client).num_tokens == 10


def test_a_connection_that_breaks_leaves_claims_alone(stack, serve, connect):
    server = serve()
    offer(server.buffer)
    relay = stack.enter_context(Relay(server.port))
    client = connect(relay.address)
    claim = ask(client)
    relay.cut()
    until(lambda: server.counters["messages"] > 0 and relay.connections >= 2)
    until(lambda: client.peers()[relay.address].state == "up" and ask(client) is not None)
    assert not client.lost(claim)
    assert server.buffer.renew([claim.claim_id]) == [claim.claim_id]


def test_the_first_lookup_over_a_new_connection_is_answered_too(stack, serve, connect):
    """libzmq makes a connection anew by itself, and the server does not know the new one until it is greeted."""
    server = serve()
    offer(server.buffer)
    relay = stack.enter_context(Relay(server.port))
    client = connect(relay.address)
    for connections in (2, 3):
        relay.cut()
        until(lambda wanted=connections: relay.connections >= wanted)
        before = server.counters["messages"]
        until(lambda before=before: server.counters["messages"] > before)
        claim = ask(client)
        assert claim is not None
        client.release(claim, used=False)
    assert client.peers()[relay.address].state == "up"


class Relay:
    """Passes bytes on between a port of its own and another, until the connections are cut."""

    def __init__(self, port):
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.connections = 0

    def __enter__(self):
        self._start(self._accept)
        return self

    def _start(self, target, *args):
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(LONG)
        for end in self._open:
            end.close()

    def cut(self):
        for end in self._open:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._port))
            self._open += [near, far]
            self.connections += 1
            for source, sink in ((near, far), (far, near)):
                self._start(self._pass_on, source, sink)

    def _pass_on(self, source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


def test_an_address_nobody_answers_on_is_one_warning_that_names_it(connect, caplog):
    clock, address = Clock(), f"127.0.0.1:{free_port()}"
    client = connect(address, ready=False, clock=clock)
    assert client.peers()[address].state == "connecting"
    for _ in range(5):
        clock.ahead += 6
        until(lambda: client.peers()[address].state == "down")
        time.sleep(0.15)
    assert [r.levelname for r in caplog.records if address in r.getMessage()] == ["WARNING"]


def test_a_producer_may_start_after_its_consumer(serve, connect):
    port, clock = free_port(), Clock()
    client = connect(f"127.0.0.1:{port}", ready=False, clock=clock)
    clock.ahead += 6
    until(lambda: client.peers()[f"127.0.0.1:{port}"].state == "down")
    server = serve(port=port)
    offer(server.buffer)
    assert client.wait_ready(LONG)
    assert ask(client).num_tokens == 10


def refuse(theirs):
    raise MismatchError("layout.block_size", 16, theirs.get("block_size"))


def test_a_mismatch_is_refused_by_the_producer_and_names_the_field_once(serve, connect, caplog):
    server, clock = serve(check=refuse), Clock()
    offer(server.buffer)
    client = connect(server, identity={"block_size": 32}, ready=False, clock=clock)
    until(lambda: client.peers()[server.address].state == "refused")
    assert client.peers()[server.address].reason == "layout.block_size differs: ours is 32, the peer's is 16"
    assert ask(client) is None
    client.find_by_id("t", server.address, "any", PROMPT)
    assert client.poll("t") is None
    for asked in (2, 3):
        clock.ahead += client_module.REFUSED_AGAIN_S
        until(lambda asked=asked: server.counters["refused"] == asked)
    warnings = [r.getMessage() for r in caplog.records if "no KV comes from" in r.getMessage()]
    assert len(warnings) == 1
    assert "layout.block_size" in warnings[0]
    assert server.address in warnings[0]


def test_a_mismatch_is_refused_by_the_consumer_too(serve, connect):
    server = serve()
    client = connect(server, check=refuse, ready=False)
    until(lambda: client.peers()[server.address].state == "refused")
    assert "layout.block_size" in client.peers()[server.address].reason


def test_a_refused_producer_that_is_replaced_by_one_that_matches_is_up(serve, connect):
    first = serve(check=refuse)
    client = connect(first, ready=False, heartbeat=0.05)
    until(lambda: client.peers()[first.address].state == "refused")
    first.close()
    second = serve(port=first.port)
    offer(second.buffer)
    assert client.wait_ready(LONG)
    assert ask(client).num_tokens == 10


def test_another_version_is_refused_by_name_on_both_sides(serve, connect):
    server = serve()
    newer = Wire("kvsdk.buffer/3", BUFFER_WIRE.kinds)
    client = connect(server, wire=newer, ready=False)
    until(lambda: client.peers()[server.address].state == "refused")
    reason = client.peers()[server.address].reason
    assert "kvsdk.buffer/2" in reason
    assert "kvsdk.buffer/2" in reason
    assert server.counters["refused"] == 1


# -- one reply to each message, whatever it says


def test_each_message_has_one_reply(serve, dealer):
    server = serve()
    offer(server.buffer)
    peer = dealer(server)
    assert say(peer, "find", ticket=1, keys=PROMPT.to_wire(), min_tokens=0)[0] == "hello_first"
    assert say(peer, "find_by_id", ticket=2, transfer_id="t", keys=None, min_tokens=0)[0] == "hello_first"
    kind, welcome = say(peer, "hello", identity={})
    assert (kind, welcome["identity"], welcome["lease"]) == ("welcome", {"model": "m"}, 30.0)
    kind, found = say(peer, "find", ticket=3, keys=PROMPT.to_wire(), min_tokens=0)
    claim_id = found["claim"]["claim_id"]
    assert (kind, found["ticket"]) == ("found", 3)
    assert say(peer, "renew", claim_ids=[claim_id, "x"]) == ("renewed", {"alive": [claim_id], "ended": ["x"]})
    assert say(peer, "release", claim_id=claim_id, used=True) == ("released", {"claim_id": claim_id, "known": True})
    assert say(peer, "release", claim_id=claim_id, used=True) == ("released", {"claim_id": claim_id, "known": False})
    assert say(peer, "find", ticket=4, keys=PROMPT.to_wire(), min_tokens=0) == (
        "found",
        {"ticket": 4, "claim": None, "heard": True},
    )
    assert say(peer, "ping") == ("pong", {"engine_id": server.engine_id})
    assert server.counters["messages"] == server.counters["replies"] == 9
    assert server.error is None


def bad_keys():
    return PROMPT.to_wire() | {"num_tokens": 11_000}


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xc1garbage"],
        [os.urandom(1000)],
        [b"\x00" * (BUFFER_WIRE.max_bytes + 1)],
        [BUFFER_WIRE.encode("pong", engine_id="x")],
        [Wire("kvsdk.buffer/2", {"unheard": {}}).encode("unheard")],
        [Wire("kvsdk.buffer/2", {"ping": {"more": int}}).encode("ping", more=1)],
        [Wire("kvsdk.buffer/9", {"ping": {}}).encode("ping")],
        [Wire("other/1", {"hello": {}}).encode("hello")],
        [BUFFER_WIRE.encode("ping"), BUFFER_WIRE.encode("ping")],
    ],
    ids=[
        "empty",
        "garbage",
        "random",
        "oversized",
        "a reply",
        "unknown kind",
        "unknown field",
        "version",
        "protocol",
        "two frames",
    ],
)
def test_what_is_not_a_message_is_counted_and_dropped(serve, dealer, frames):
    server = serve()
    peer = dealer(server)
    for _ in range(3):
        peer.send_multipart(frames)
    # The first reply is the one to the good message: to the others there was none.
    assert say(peer, "ping")[0] == "pong"
    assert server.counters["dropped"] == 3
    assert server.counters["replies"] == 1
    assert server.error is None


def test_far_more_than_a_message_costs_the_sender_its_connection_and_nobody_else(serve, connect, dealer):
    server = serve()
    offer(server.buffer)
    client = connect(server)
    dealer(server).send(b"\0" * (2 * BUFFER_WIRE.max_bytes + 1))
    for _ in range(20):
        client.release(ask(client), used=False)
    assert server.error is None


def test_a_message_that_contradicts_itself_is_answered_with_an_error(serve, dealer):
    server = serve()
    peer = dealer(server)
    say(peer, "hello", identity={})
    kind, fields = say(peer, "find", ticket=5, keys=bad_keys(), min_tokens=0)
    assert (kind, fields["ticket"]) == ("error", 5)
    assert server.counters["rejected"] == 1


class BrokenBuffer(LookupBuffer):
    def find(self, keys, min_tokens=0):
        raise OSError("broken on purpose")


def test_an_error_in_the_thread_is_logged_kept_and_answered_and_the_thread_goes_on(serve, connect, caplog):
    server = serve(BrokenBuffer(limit_bytes=10**6, block_bytes=1))
    client = connect(server, lookup_timeout=60.0)
    for _ in range(2):
        assert ask(client) is None
    assert isinstance(server.error, OSError)
    assert server.counters["errors"] == 2
    assert any(r.exc_info and r.exc_info[1] is server.error for r in caplog.records if r.levelno == logging.ERROR)


def test_a_check_that_breaks_is_an_error_of_the_client_and_not_its_end(serve, connect):
    server = serve()

    def check(theirs):
        raise RuntimeError("broken on purpose")

    client = connect(server, check=check, ready=False)
    until(lambda: isinstance(client.error, RuntimeError))
    assert ask(client) is None
    client.find("t", PROMPT, 0)
    assert client.poll("t") is None


class Liar:
    """A producer that welcomes everybody and answers lookups as a test says."""

    def __init__(self, context):
        self._router = context.socket(zmq.ROUTER)
        self._router.linger = 0
        self.address = f"127.0.0.1:{self._router.bind_to_random_port('tcp://127.0.0.1')}"
        self.released = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.answers = lambda ticket: []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(LONG)
        self._router.close()

    def _run(self):
        while not self._stop.is_set():
            if not self._router.poll(20):
                continue
            peer, data = self._router.recv_multipart()
            kind, fields = BUFFER_WIRE.decode(data)
            replies = []
            match kind:
                case "hello":
                    replies = [BUFFER_WIRE.encode("welcome", engine_id="e", identity={}, lease=30.0)]
                case "ping":
                    replies = [BUFFER_WIRE.encode("pong", engine_id="e")]
                case "find":
                    replies = self.answers(fields["ticket"])
                case "release":
                    self.released.append((fields["claim_id"], fields["used"]))
                    replies = [BUFFER_WIRE.encode("released", claim_id=fields["claim_id"], known=True)]
            for reply in replies:
                self._router.send_multipart([peer, reply])


def found(ticket, num_tokens, claim_id="c"):
    claim = {"claim_id": claim_id, "transfer_id": "t", "num_tokens": num_tokens, "exclusive": True, "generation": 1}
    return BUFFER_WIRE.encode("found", ticket=ticket, claim=claim, heard=True)


@pytest.fixture
def liar(stack):
    return stack.enter_context(Liar(stack.enter_context(zmq.Context())))


@pytest.mark.parametrize("num_tokens", [-1, 0, 4, 11, 2**40])
def test_a_claim_on_more_than_the_prompt_or_less_than_asked_for_is_not_taken(liar, connect, num_tokens):
    liar.answers = lambda ticket: [found(ticket, num_tokens)]
    client = connect(liar, lookup_timeout=60.0)
    assert ask(client, min_tokens=4) is None
    assert client.num_claims == 0
    until(lambda: liar.released == [("c", False)])


def test_a_second_answer_is_released(liar, connect):
    liar.answers = lambda ticket: [found(ticket, 8, "one"), found(ticket, 10, "two"), found(ticket + 99, 8, "three")]
    client = connect(liar)
    assert ask(client).claim_id == "one"
    until(lambda: sorted(liar.released) == [("three", False), ("two", False)])


def test_garbage_of_a_producer_is_dropped_and_ends_in_the_timeout(liar, connect):
    liar.answers = lambda ticket: [b"garbage", BUFFER_WIRE.encode("ping")]
    client = connect(liar, lookup_timeout=0.05)
    assert ask(client) is None
    assert client.dropped == 2
    assert client.error is None


# -- opening and closing


def test_a_port_in_use_is_a_clear_error(serve, make_buffer):
    server = serve()
    with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{server.port}.*in use.*kv_port"):
        BufferServer(make_buffer(), bind="127.0.0.1", port=server.port, identity={})


def test_an_address_of_another_host_is_a_clear_error(make_buffer):
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1.*kv_ip"):
        BufferServer(make_buffer(), bind="192.0.2.1", port=0, identity={})


@pytest.mark.parametrize(
    "address", ["", "host", "host:", "host:0", "host:65536", ":1", "tcp://host:1", "a b:1", "h:1;x"]
)
def test_what_is_not_an_address_is_an_error_at_start_and_nothing_in_a_request(connect, address):
    with pytest.raises(ConfigError, match="host:port"):
        BufferClient(identity={}, producers=[address])
    client = connect()
    client.find_by_id("t", address, "transfer", PROMPT)
    assert client.poll("t") is None
    assert not client.peers()


def test_requests_cannot_make_peers_without_end(connect, monkeypatch):
    monkeypatch.setattr(client_module, "MAX_TEMPORARY", 3)
    client = connect()
    for port in range(1, 6):
        client.find_by_id(str(port), f"127.0.0.1:{port}", "transfer", PROMPT)
    assert len(client.peers()) == 3
    assert client.poll("5") is None
    assert client.poll("1") is Pending


@pytest.mark.parametrize(
    "identity", [{"x": object()}, {"x": "y" * (BUFFER_WIRE.max_bytes + 1)}], ids=["object", "large"]
)
def test_an_identity_that_fits_no_message_is_an_error_at_once(make_buffer, identity):
    with pytest.raises(ProtocolError):
        BufferServer(make_buffer(), bind="127.0.0.1", port=0, identity=identity)
    with pytest.raises(ProtocolError):
        BufferClient(identity=identity)


def test_closing_is_quick_and_twice_is_fine_and_frees_the_port(serve, connect, make_buffer):
    server = serve()
    offer(server.buffer)
    client = connect(server, f"127.0.0.1:{free_port()}", ready=False)
    until(lambda: client.peers()[server.address].state == "up")
    polled = ask(client)
    client.find("under way", keys_of(1, 2), 0)
    started = time.monotonic()
    for _ in range(2):
        client.close()
    assert client.lost(polled)
    until(lambda: server.buffer.num_claims == 0)
    assert server.buffer.num_offers == 1
    for _ in range(2):
        server.close()
    assert time.monotonic() - started < 2
    client.find("t", PROMPT, 0)
    assert client.poll("t") is None
    client.set_producers([server.address])
    never_started = BufferServer(make_buffer(), bind="127.0.0.1", port=server.port, identity={})
    never_started.close()
    never_started.close()
    with pytest.raises(RuntimeError):
        never_started.start()


def test_closing_does_not_wait_for_a_peer_that_does_not_answer(serve, connect):
    server = serve(SlowBuffer())
    client = connect(server, heartbeat=60.0)
    client.find("t", PROMPT, 0)
    started = time.monotonic()
    client.close(timeout=0.3)
    assert time.monotonic() - started < 1
    assert not client._thread.is_alive()
    server.buffer.go.set()


def test_a_process_that_forgets_to_close_ends_all_the_same():
    code = (
        "from kvsdk.buffer import *\n"
        "s = BufferServer(LookupBuffer(limit_bytes=1, block_bytes=1), bind='127.0.0.1', port=0, identity={}).start()\n"
        "c = BufferClient(identity={}, producers=[s.address])\n"
        "assert c.wait_ready(10)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# -- keys


@pytest.mark.skipif(not zmq.has("curve"), reason="needs a libzmq with CURVE")
def test_with_keys_only_clients_that_are_allowed_get_in(serve, connect):
    server_key, friend, stranger = (zmq.curve_keypair() for _ in range(3))
    server = serve(curve=ServerCurve(*server_key, clients=frozenset({friend[0]})))
    open_server = serve(curve=ServerCurve(*server_key))
    offer(server.buffer)
    client = connect(server, open_server, curve=ClientCurve(*friend, server_key=server_key[0]))
    assert ask(client).num_tokens == 10
    keys = ClientCurve(*stranger, server_key=server_key[0])
    assert connect(open_server, curve=keys).peers()[open_server.address].state == "up"
    assert not connect(server, curve=keys, ready=False).wait_ready(0.3)
    assert not connect(server, ready=False).wait_ready(0.3)
    with pytest.raises(ConfigError, match="CURVE"):
        BufferClient(identity={}, curve=ClientCurve(b"short", b"short", b"short"))
