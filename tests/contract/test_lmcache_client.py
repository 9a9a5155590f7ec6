"""The client of `lm://` servers: every wait has a deadline, and a server that stalls is waited for once."""

import contextlib
import secrets
import socket
import statistics
import threading
import time

import pytest
from support import lmcache_servers
from support.lm_chunks import form_of, get, put, tensor
from support.lm_server import EXIST, GET, HEALTH, PUT, LMServer

from kvsdk.connectors.lmcache import chunks
from kvsdk.connectors.lmcache import client as clients
from kvsdk.connectors.lmcache.chunks import Incoming, Outgoing, digest
from kvsdk.connectors.lmcache.client import Damaged, Job, Pool
from kvsdk.connectors.lmcache.lm_client import LMConnection, piece_name
from kvsdk.connectors.lmcache.lm_client import LMServer as Watched
from kvsdk.connectors.lmcache.lm_protocol import REPLY_BYTES, REQUEST_BYTES, Command, decode_reply, encode_request
from kvsdk.errors import DeadlineExceeded, PeerGone, PipeClosed, ProtocolError

pytestmark = pytest.mark.usefixtures("no_thread_left")

needs_lmcache = lmcache_servers.needs_lmcache

KEY = "model@1@0@ab12@bfloat16"


@pytest.fixture
def server():
    with LMServer() as one:
        yield one


@pytest.fixture(scope="module")
def lmcache_server():
    with lmcache_servers.LMServer() as one:
        yield one


def connect(server, timeout=2.0):
    return LMConnection("127.0.0.1", server.port, timeout)


def soon(seconds=5.0):
    return time.monotonic() + seconds


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def reply(code=200, length=0, form=4, dtype=6, shape=(0, 0, 0, 0)):
    from support.lm_server import REPLY

    return REPLY.pack(code, length, form, dtype, *shape, 0)


# ---- the protocol


def test_requests_and_replies_have_the_sizes_of_the_protocol():
    assert (REQUEST_BYTES, REPLY_BYTES) == (186, 36)
    from support.lm_server import REQUEST

    command, length, form, dtype, location, *shape, key = REQUEST.unpack(encode_request(Command.PUT, KEY, 1000))
    assert (command, length, form, dtype, location, shape) == (1, 1000, 4, 6, 0, [1000, 0, 0, 0])
    assert key == KEY.encode().ljust(150)


@pytest.mark.parametrize("key", ["x" * 151, "a b@1@0@1@half", "ü@1@0@1@half"])
def test_a_key_that_does_not_fit_is_refused(key):
    with pytest.raises(ProtocolError, match="no key"):
        encode_request(Command.GET, key)


@pytest.mark.parametrize("length", [-1, 2**31])
def test_a_length_that_does_not_fit_is_refused(length):
    with pytest.raises(ProtocolError, match="cannot be announced"):
        encode_request(Command.PUT, KEY, length)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"x" * 35, "35 bytes"),
        (reply(code=7), "code 7"),
        (reply(length=-5), "-5 bytes"),
        (reply(length=8, shape=(9, 0, 0, 0)), "shape"),
        (reply(length=8, form=1, shape=(8, 0, 0, 0)), "kind 1"),
        (reply(length=8, dtype=3, shape=(8, 0, 0, 0)), "dtype 3"),
    ],
)
def test_a_reply_that_is_none_is_a_protocol_error(data, named):
    with pytest.raises(ProtocolError, match=named):
        decode_reply(data)


def test_replies_say_yes_no_and_how_much():
    assert decode_reply(reply(length=8, shape=(8, 0, 0, 0))) == 8
    assert decode_reply(reply()) == 0
    assert decode_reply(reply(code=400)) is None


# ---- a connection


def test_what_was_put_is_got_back_byte_for_byte(server, monkeypatch):
    monkeypatch.setattr(chunks, "PIECE_BYTES", 2**20)
    connection = connect(server)
    payload = bytes(range(256)) * 40_000  # ten pieces, the last one short
    assert not connection.exists(KEY, soon())
    assert put(connection, KEY, payload, soon())
    assert connection.exists(KEY, soon())
    assert get(connection, KEY, len(payload), soon()) == payload
    assert get(connection, "other@1@0@1@half", 16, soon()) is None
    connection.health(soon())
    connection.close()
    assert [command for command, _ in server.requests] == [GET, *[PUT] * 11, EXIST, GET, *[GET] * 11, GET, HEALTH]
    assert max(len(one[3]) for one in server.stored.values()) == 2**20


def test_pieces_are_asked_for_before_the_one_in_front_has_come(server, monkeypatch):
    monkeypatch.setattr(chunks, "PIECE_BYTES", 1024)
    connection = connect(server)
    assert put(connection, KEY, bytes(8192), soon())
    incoming, seen = Incoming(form_of(8192), KEY, tensor(bytes(8192))), []

    def check(index):
        seen.append((index, server.count(GET)))
        time.sleep(0.02)

    incoming.check = check
    assert connection.get(incoming, soon())
    connection.close()
    before = 2  # `exists` was not asked, and the header was
    assert [index for index, _ in seen] == list(range(8))
    assert all(asked - before >= min(index + 2, 7) for index, asked in seen[1:]), seen


def test_of_two_who_store_at_once_a_reader_gets_what_one_of_them_stored(server, monkeypatch):
    monkeypatch.setattr(chunks, "PIECE_BYTES", 1024)
    contents, (one, other) = [secrets.token_bytes(4096) for _ in range(2)], [connect(server) for _ in range(2)]
    form, into = form_of(4096), tensor(bytes(4096))

    class Interrupted(Outgoing):
        def pieces(self):
            for number, each in enumerate(super().pieces()):
                if number == 2:
                    assert put(other, KEY, contents[1], soon())
                    assert get(other, KEY, 4096, soon()) == contents[1]
                yield each

    assert one.put(Interrupted(form, KEY, [1], tensor(contents[0])), soon())
    incoming = Incoming(form, KEY, into)
    assert other.get(incoming, soon())
    assert not incoming.damage
    assert into.numpy().tobytes() == contents[0]
    one.close()
    other.close()


def cut_put(port, key, payload):
    """What a producer does that dies while it sends."""
    with socket.create_connection(("127.0.0.1", port)) as one:
        one.sendall(encode_request(Command.PUT, key, len(payload)) + payload[: len(payload) // 2])


def check_what_is_cut_on_its_way_in(port):
    payload = secrets.token_bytes(100_000)
    piece, header = piece_name(KEY, 0, digest(payload)), form_of(len(payload)).header(KEY, [1], [digest(payload)])

    def connected(what):
        with contextlib.closing(LMConnection("127.0.0.1", port, 2.0)) as one:
            return what(one)

    def cut(key, content):
        cut_put(port, key, content)
        wait_until(lambda: connected(lambda one: _raw_get_fails(one, key)))

    def stored(one):
        return one.exists(KEY, soon())

    def got(one):
        return get(one, KEY, len(payload), soon())

    # A piece: no header says that the chunk is there.
    cut(piece, payload)
    assert not connected(stored)
    assert connected(got) is None
    assert connected(lambda one: put(one, KEY, payload, soon()))
    assert connected(stored)
    assert connected(got) == payload
    # A piece of what is there, by another producer of the same chunk; or the header. Whoever meets it says so, and the
    # chunk is stored again.
    for name, content in ((piece, payload), (KEY, header)):
        cut(name, content)
        with pytest.raises(Damaged):
            connected(got)
        assert not connected(lambda one: one.condemn(KEY, soon()) or stored(one))
        assert connected(got) is None
        assert connected(lambda one: put(one, KEY, payload, soon()))
        assert connected(got) == payload


def _raw_get_fails(connection, key):
    connection._send([encode_request(Command.GET, key)], soon())
    if (length := connection._reply(soon())) is None:
        return False
    try:
        connection._receive(memoryview(bytearray(length)), soon())
    except PeerGone:
        return True
    return False


def test_what_was_cut_on_its_way_in_is_not_taken_for_stored(server):
    check_what_is_cut_on_its_way_in(server.port)


@needs_lmcache
def test_lmcaches_own_server_neither(lmcache_server):
    check_what_is_cut_on_its_way_in(lmcache_server.port)


@needs_lmcache
def test_a_small_answer_of_lmcaches_own_server_is_not_held_up(lmcache_server):
    connection = LMConnection("127.0.0.1", lmcache_server.port, 2.0)
    assert put(connection, "small@1@0@1@half", bytes(16), soon())
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        assert connection.exists("small@1@0@1@half", soon())
        seconds.append(time.perf_counter() - began)
    connection.close()
    assert statistics.median(seconds) < 0.02, "the kernel waits 40 ms with its acknowledgement"


def test_a_put_is_confirmed_only_by_the_server_that_keeps_it(server):
    connection = connect(server)
    server.capacity = 10
    with pytest.raises(PeerGone):
        put(connection, KEY, bytes(104), soon())
    connection.close()


def test_another_length_than_was_stored_is_a_protocol_error(server):
    connection = connect(server)
    assert put(connection, KEY, bytes(104), soon())
    with pytest.raises(ProtocolError, match="another chunk"):
        get(connection, KEY, 48, soon())
    connection.close()
    for key, what in ((piece_name(KEY, 0, digest(bytes(104))), "48 bytes of piece 0"), (KEY, "48 bytes under")):
        connection, (form, dtype, _, value) = connect(server), server.stored[key]
        server.stored[key] = (form, dtype, (48, 0, 0, 0), value[:48])
        with pytest.raises(ProtocolError, match=what):
            get(connection, KEY, 104, soon())
        connection.close()


@pytest.mark.parametrize("what", ["exists", "get", "put", "health"])
def test_a_stalled_server_costs_its_timeout(server, what):
    connection = connect(server, timeout=0.2)
    server.frozen.set()
    asked = {
        "exists": lambda: connection.exists(KEY, soon()),
        "get": lambda: get(connection, KEY, 8, soon()),
        "put": lambda: put(connection, KEY, bytes(8), soon()),
        "health": lambda: connection.health(soon()),
    }[what]
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        asked()
    assert 0.15 < time.monotonic() - began < 1.0
    connection.close()


def test_the_deadline_of_a_request_counts_as_well_as_the_timeout(server):
    connection = connect(server, timeout=60.0)
    server.frozen.set()
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        connection.exists(KEY, soon(0.2))
    assert time.monotonic() - began < 1.0
    connection.close()


def test_a_payload_that_is_cut_is_a_lost_peer(server):
    connection = connect(server)
    assert put(connection, KEY, bytes(1000), soon())
    server.cut_after = 500
    with pytest.raises(Damaged, match="closed the connection"):
        get(connection, KEY, 1000, soon())
    connection.close()


def test_nobody_listens():
    with LMServer() as gone:
        port = gone.port
    with pytest.raises(PeerGone, match="nobody answers"):
        LMConnection("127.0.0.1", port, 1.0)


# ---- a pool


class Ask(Job):
    """Asks for a key; `said` is the answer or the error."""

    def __init__(self, key=KEY, hold=None):
        self.key, self.hold = key, hold
        self.said = None
        self.ended = threading.Event()

    def run(self, connection):
        if self.hold is not None:
            self.hold.wait(5.0)
        self._end(connection.exists(self.key, soon()))

    def fail(self, error):
        self._end(error)

    def _end(self, said):
        self.said = said
        self.ended.set()

    def answer(self, seconds=5.0):
        assert self.ended.wait(seconds), "no answer"
        return self.said


class Client:
    def __init__(self, port, timeout=0.3, connections=2, host="127.0.0.1"):
        self.states = []
        self.server = Watched(host, port, timeout=timeout, on_state=self.states.append)
        self.pool = Pool(self.server, "test", connections)
        self.server.wait_known(2.0)

    def ask(self, **more):
        job = Ask(**more)
        self.pool.submit(job)
        return job

    def close(self):
        self.pool.close(soon(2.0))
        self.server.close(soon(2.0))


@pytest.fixture
def client(server):
    one = Client(server.port)
    yield one
    one.close()


def test_jobs_are_carried_out(client):
    assert [job.answer() for job in [client.ask() for _ in range(20)]] == [False] * 20


def test_no_more_requests_are_in_flight_than_connections(client, server):
    server.delay = 0.05
    began = time.monotonic()
    for job in [client.ask() for _ in range(8)]:
        assert job.answer() is False
    assert time.monotonic() - began >= 4 * 0.05


def test_a_stalled_server_is_waited_for_once_and_found_again(client, server):
    assert client.ask().answer() is False
    server.frozen.set()
    began = time.monotonic()
    assert isinstance(client.ask().answer(), DeadlineExceeded)
    assert time.monotonic() - began < 1.0
    began = time.monotonic()
    for _ in range(20):
        assert isinstance(client.ask().answer(), PeerGone)
    assert time.monotonic() - began < 2.0, "it was waited for again"
    server.frozen.clear()
    wait_until(lambda: client.server.up)
    assert client.ask().answer() is False
    assert client.states[-3:] == [True, False, True]


def test_a_server_that_is_killed_and_started_again_is_found(client, server):
    assert client.ask().answer() is False
    losses = client.server.losses
    server.close()
    assert isinstance(client.ask().answer(), PeerGone)
    with LMServer(server.port):
        wait_until(lambda: client.server.up, 10.0)
        assert client.ask().answer() is False
        assert client.server.losses > losses


def test_a_connection_that_was_closed_meanwhile_costs_no_request(server):
    client = Client(server.port, connections=1)
    assert client.ask().answer() is False
    losses = client.server.losses
    server.drop_connections()
    assert client.ask().answer() is False
    assert client.server.losses > losses, "what the server was known to have may be gone, and nobody was told"
    client.close()


def test_a_restart_is_noticed_without_a_request(monkeypatch, server):
    monkeypatch.setattr(clients, "HEARTBEAT", 0.05)
    client = Client(server.port)
    losses = client.server.losses
    server.drop_connections()
    wait_until(lambda: client.server.losses > losses)
    assert client.server.up
    client.close()


def test_a_server_that_comes_later_is_found():
    with LMServer() as gone:
        port = gone.port
    client = Client(port)
    assert not client.server.up
    assert isinstance(client.ask().answer(), PeerGone)
    with LMServer(port):
        wait_until(lambda: client.server.up)
        assert client.ask().answer() is False
    client.close()


def test_names_are_looked_up_where_nobody_waits(server, monkeypatch):
    looked_up, let_go, real = [], threading.Event(), socket.getaddrinfo

    def look_up(host, *arguments, **named):
        if host != "store":
            return real(host, *arguments, **named)
        looked_up.append(threading.current_thread().name)
        let_go.wait(10.0)
        return real("127.0.0.1", *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    client = Client(server.port, host="store")
    began = time.monotonic()
    assert isinstance(client.ask().answer(), PeerGone)
    assert time.monotonic() - began < 1.0
    let_go.set()
    wait_until(lambda: client.server.up)
    assert [job.answer() for job in [client.ask() for _ in range(4)]] == [False] * 4
    client.close()
    assert set(looked_up) == {"kvsdk-lmcache-watch"}


def test_a_name_that_nobody_has_is_a_server_that_is_down(server, monkeypatch):
    def look_up(*_arguments, **_named):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    client = Client(server.port, host="store")
    assert not client.server.up
    client.close()


def test_a_job_that_raises_fails_and_the_next_one_is_carried_out(client, caplog):
    class Broken(Ask):
        def run(self, connection):
            raise ZeroDivisionError("a mistake")

    job = Broken()
    client.pool.submit(job)
    assert isinstance(job.answer(), ZeroDivisionError)
    assert "a job of the LMCache client's test threads failed" in caplog.text
    assert client.ask().answer() is False


def test_closing_fails_what_is_queued_and_is_bounded(server):
    client = Client(server.port, timeout=30.0)
    server.frozen.set()
    jobs = [client.ask() for _ in range(10)]
    time.sleep(0.05)
    began = time.monotonic()
    client.close()
    client.close()
    assert time.monotonic() - began < 2.0
    for job in jobs:
        assert isinstance(job.answer(), (PipeClosed, PeerGone))
    assert isinstance(client.ask().answer(), PipeClosed)
