"""What is particular to each kind of pipe, and how pairs over gloo are made and end. What every pipe promises is in
`kvsdk.testing.contracts`.

Gloo says nothing about NCCL's order or its kernels: those tests are in `tests/gpu/test_pipe_nccl.py`.
"""

import contextlib
import gc
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import msgpack
import pytest
import torch
import torch.distributed as dist

from kvsdk.errors import (
    ConfigError,
    DeadlineExceeded,
    MismatchError,
    PeerGone,
    PipeClosed,
    ProtocolError,
)
from kvsdk.pipe import PipeHost, choose, in_process_pair, join, lockstep_pair, prepare_process

SOON = 0.05
LONG = 20.0


def within(seconds):
    return time.monotonic() + seconds


def gloo_pair():
    host = PipeHost("gloo", "127.0.0.1", "cpu")
    invite = msgpack.unpackb(msgpack.packb(host.prepare()))
    with ThreadPoolExecutor(1) as threads:
        consumer = threads.submit(join, invite, "cpu", "127.0.0.1", within(LONG))
        return host.accept(invite, within(LONG)), consumer.result()


MAKERS = {"in-process": in_process_pair, "lockstep": lockstep_pair, "gloo": gloo_pair}


@pytest.fixture
def threads():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def random_bytes(n, seed=0):
    return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def wait_until(condition):
    end = within(LONG)
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.002)


def start_blocked(threads, call, *args):
    """Starts a call that waits for its peer, and lets it get there."""
    started = threading.Event()

    def run():
        started.set()
        return call(*args)

    future = threads.submit(run)
    started.wait()
    time.sleep(SOON)
    return future


@pytest.mark.parametrize("name", MAKERS)
def test_a_mismatch_of_sizes_names_both(name, threads):
    a, b = MAKERS[name]()
    outcome = threads.submit(a.send, random_bytes(8), within(LONG))
    with pytest.raises(ProtocolError, match=r"8 bytes.*7"):
        b.recv(torch.zeros(7, dtype=torch.uint8), within(LONG))
    with contextlib.suppress(ProtocolError, PeerGone):
        outcome.result()
    for end in (a, b):
        end.close(within(LONG))


@pytest.mark.parametrize(("name", "kind"), [("in-process", "in-process"), ("lockstep", "in-process"), ("gloo", "gloo")])
def test_a_pipe_names_its_kind(name, kind):
    a, b = MAKERS[name]()
    assert a.kind == b.kind == kind
    a.close(within(LONG))
    b.close(within(LONG))


# In-process pairs


def test_a_buffer_holds_as_much_as_asked_for():
    a, _b = in_process_pair(capacity=2)
    for i in range(2):
        a.send(torch.full((4,), i, dtype=torch.uint8), within(LONG))
    with pytest.raises(DeadlineExceeded):
        a.send(torch.zeros(4, dtype=torch.uint8), within(SOON))
    with pytest.raises(ValueError, match="capacity"):
        in_process_pair(0)


def test_a_closed_end_leaves_what_it_sent_and_an_aborted_one_does_not():
    got = torch.zeros(4, dtype=torch.uint8)
    for closed in (True, False):
        a, b = in_process_pair(capacity=1)
        a.send(torch.ones(4, dtype=torch.uint8), within(LONG))
        if closed:
            a.close(within(LONG))
            b.recv(got, within(LONG))
            assert (got == 1).all()
        else:
            a.abort()
            a.close(within(LONG))
        with pytest.raises(PeerGone):
            b.recv(got, within(LONG))


def test_in_lockstep_send_ends_when_the_peer_has_received(threads):
    a, b = lockstep_pair()
    done = start_blocked(threads, a.send, torch.ones(4, dtype=torch.uint8), within(LONG))
    assert not done.done()
    b.recv(torch.zeros(4, dtype=torch.uint8), within(LONG))
    done.result(LONG)


def test_in_lockstep_a_send_that_ended_early_leaves_nothing_behind():
    a, b = lockstep_pair()
    with pytest.raises(DeadlineExceeded):
        a.send(torch.ones(4, dtype=torch.uint8), within(SOON))
    with pytest.raises(PeerGone):
        b.recv(torch.zeros(4, dtype=torch.uint8), within(LONG))


# Choosing


@pytest.mark.parametrize(
    ("kind", "device", "chosen"),
    [("auto", "cpu", ("gloo",)), ("gloo", "cpu", ("gloo",)), ("peer", "cpu", ("peer",)), ("peer", "cuda", ("peer",))],
)
def test_the_kinds_follow_the_device(kind, device, chosen):
    assert choose(kind, device) == chosen


def test_a_window_has_no_host():
    with pytest.raises(ConfigError, match="window"):
        PipeHost("peer", "127.0.0.1", "cpu")


@pytest.mark.parametrize(("kind", "device"), [("nccl", "cpu"), ("gloo", "cuda"), ("ucx", "cpu"), ("auto", "xpu")])
def test_a_kind_that_cannot_run_is_refused_by_name(kind, device):
    with pytest.raises(ConfigError, match=f"'{kind if device != 'xpu' else device}'"):
        choose(kind, device)


def test_prepare_process_sets_what_keeps_the_watchdog_from_ending_a_server(monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    monkeypatch.delenv("TORCH_NCCL_ENABLE_MONITORING", raising=False)
    for name in ("RETHROW_CUDA_ERRORS", "DUMP_ON_TIMEOUT", "WAIT_TIMEOUT_DUMP_MILSEC"):
        monkeypatch.setenv(f"TORCH_NCCL_{name}", "7")
    prepare_process("cpu")
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    prepare_process("cuda")
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "0"


# Making pairs over gloo


def listening_addresses():
    """Where this process listens: `(host, port)` of each TCP socket that does."""
    addresses = set()
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with socket.socket(fileno=os.dup(fd)) as s:
                    if s.family != socket.AF_UNIX and s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        addresses.add(s.getsockname()[:2])
    return addresses


def footprint():
    """Threads, open files and listening sockets of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), len(listening_addresses())


@contextlib.contextmanager
def nothing_is_left():
    before = footprint()
    yield
    # Threads of the operating system end a moment after they are joined.
    wait_until(lambda: all(now <= then for now, then in zip(footprint(), before, strict=True)))


@pytest.fixture
def host():
    host = PipeHost("gloo", "127.0.0.1", "cpu")
    yield host
    host.close()


def test_a_pair_leaves_nothing_behind(threads):
    gloo_pair()[0].close(within(LONG))
    gc.collect()
    with nothing_is_left():
        for _ in range(3):
            a, b = gloo_pair()
            a.close(within(LONG))
            b.close(within(LONG))
            del a, b


def test_everything_listens_on_the_address_asked_for_only():
    before = listening_addresses()
    host = PipeHost("gloo", "127.0.0.2", "cpu")
    invite = host.prepare()
    with ThreadPoolExecutor(1) as pool:
        consumer = pool.submit(join, invite, "cpu", "127.0.0.3", within(LONG))
        a, b = host.accept(invite, within(LONG)), consumer.result()
    new = listening_addresses() - before
    assert {address for address, _ in new} == {"127.0.0.2", "127.0.0.3"}
    assert ("127.0.0.2", invite["port"]) in new
    a.close(within(LONG))
    b.close(within(LONG))


@pytest.mark.parametrize("ip", ["0.0.0.0", "::", "localhost", ""])
def test_a_wildcard_or_a_name_is_no_address_to_listen_on(ip):
    with pytest.raises(ConfigError):
        PipeHost("gloo", ip, "cpu")


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        PipeHost("gloo", "192.0.2.1", "cpu").prepare()


def test_a_peer_that_never_joins_ends_at_the_deadline_and_leaves_nothing(host):
    with nothing_is_left():
        invite = host.prepare()
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            host.accept(invite, start + SOON)
        assert time.monotonic() - start < SOON + 1


def test_a_peer_that_joins_and_goes_silent_ends_at_the_deadline(host):
    invite = host.prepare()
    store = dist.TCPStore(invite["host"], invite["port"], 2, is_master=False, wait_for_workers=False)
    store.set(f"{invite['pair']}/joined", b"1")
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        host.accept(invite, start + 0.5)
    assert time.monotonic() - start < 2


def test_a_host_that_is_gone_is_found_at_once(host):
    invite = host.prepare()
    host.discard(invite)
    gc.collect()
    start = time.monotonic()
    with pytest.raises(PeerGone, match=f"127.0.0.1:{invite['port']}"):
        join(invite, "cpu", "127.0.0.1", within(LONG))
    assert time.monotonic() - start < 5


def test_a_host_that_does_not_accept_ends_at_the_deadline(host):
    invite = host.prepare()
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        join(invite, "cpu", "127.0.0.1", start + 0.5)
    assert time.monotonic() - start < 2


def test_a_listener_that_is_no_store_ends_at_the_deadline(host):
    invite = dict(host.prepare())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        invite["port"] = silent.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            join(invite, "cpu", "127.0.0.1", start + 0.5)
        assert time.monotonic() - start < 2


def test_an_invite_works_once(host, threads):
    invite = host.prepare()
    consumer = threads.submit(join, invite, "cpu", "127.0.0.1", within(LONG))
    a = host.accept(invite, within(LONG))
    b = consumer.result()
    with pytest.raises(PipeClosed):
        host.accept(invite, within(LONG))
    a.close(within(LONG))
    b.close(within(LONG))


def test_closing_the_host_ends_accept(host, threads):
    waiting = start_blocked(threads, host.accept, host.prepare(), within(LONG))
    host.close()
    host.close()
    with pytest.raises(PipeClosed):
        waiting.result(LONG)
    with pytest.raises(PipeClosed):
        host.prepare()


def test_many_pairs_connect_at_once(host, threads):
    invites = [host.prepare() for _ in range(6)]
    assert len({invite["port"] for invite in invites}) == 6
    with ThreadPoolExecutor(12) as pool:
        ours = [pool.submit(host.accept, invite, within(LONG)) for invite in invites]
        theirs = [pool.submit(join, invite, "cpu", "127.0.0.1", within(LONG)) for invite in invites]
        pairs = [(a.result(), b.result()) for a, b in zip(ours, theirs, strict=True)]
    pairs[0][0].abort()
    for i, (a, b) in enumerate(pairs[1:]):
        done = threads.submit(a.send, torch.full((4,), i, dtype=torch.uint8), within(LONG))
        got = torch.zeros(4, dtype=torch.uint8)
        b.recv(got, within(LONG))
        done.result()
        assert (got == i).all()
    for a, b in pairs:
        a.close(within(LONG))
        b.close(within(LONG))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"version": 99}, MismatchError),
        ({"version": None}, MismatchError),
        ({"kind": "nccl"}, MismatchError),
        ({"kind": 1}, ProtocolError),
        ({"host": "example.org"}, ProtocolError),
        ({"host": "0.0.0.0"}, ProtocolError),
        ({"host": b"127.0.0.1"}, ProtocolError),
        ({"port": 0}, ProtocolError),
        ({"port": 65536}, ProtocolError),
        ({"port": "80"}, ProtocolError),
        ({"port": True}, ProtocolError),
        ({"pair": "x" * 32}, ProtocolError),
        ({"pair": "ab"}, ProtocolError),
        ({"max_ctas": -1}, ProtocolError),
        ({"max_ctas": 65}, ProtocolError),
        ({"more": 1}, ProtocolError),
    ],
    ids=str,
)
def test_an_invite_from_the_network_is_not_trusted(host, change, error):
    with pytest.raises(error):
        join({**host.prepare(), **change}, "cpu", "127.0.0.1", within(SOON))


@pytest.mark.parametrize("invite", [None, [], "x", {}])
def test_what_is_no_invite_is_refused(invite):
    with pytest.raises((ProtocolError, MismatchError)):
        join(invite, "cpu", "127.0.0.1", within(SOON))


def test_ends_that_are_out_of_step_end_in_an_error(threads):
    a, b = gloo_pair()
    b._numbers[0] = 5
    done = threads.submit(a.send, torch.zeros(4, dtype=torch.uint8), within(LONG))
    with pytest.raises(ProtocolError, match="out of step"):
        b.recv(torch.zeros(4, dtype=torch.uint8), within(LONG))
    with pytest.raises((ProtocolError, PeerGone)):
        done.result(LONG)
    a.close(within(LONG))
    b.close(within(LONG))


# Two processes

CHILD = """
import sys, time, msgpack, torch
from kvsdk.pipe import join
pipe = join(msgpack.unpackb(bytes.fromhex(sys.argv[1])), "cpu", "127.0.0.1", time.monotonic() + 30)
tensor = torch.zeros(int(sys.argv[3]), dtype=torch.uint8)
while True:
    if sys.argv[2] != "send":
        pipe.recv(tensor, time.monotonic() + 30)
    if sys.argv[2] != "recv":
        pipe.send(tensor, time.monotonic() + 30)
"""


@pytest.fixture
def child(host, threads):  # closed before the threads are joined
    """Starts a process at the other end, which echoes, sends for ever or receives for ever."""
    children, pipes = [], []

    def start(what, nbytes):
        invite = host.prepare()
        arguments = [msgpack.packb(invite).hex(), what, str(nbytes)]
        children.append(subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stderr=subprocess.DEVNULL))
        pipes.append(host.accept(invite, within(60)))
        return children[-1], pipes[-1]

    yield start
    for process in children:
        process.kill()
        process.wait()
    for pipe in pipes:
        pipe.close(within(LONG))


def test_bytes_come_back_from_another_process(child):
    _, pipe = child("echo", 1 << 20)
    for i in range(3):
        sent, got = random_bytes(1 << 20, i), torch.zeros(1 << 20, dtype=torch.uint8)
        pipe.send(sent, within(LONG))
        pipe.recv(got, within(LONG))
        assert torch.equal(sent, got)


@pytest.mark.parametrize(
    ("what", "kill"), [("send", signal.SIGKILL), ("recv", signal.SIGKILL), ("recv", signal.SIGSTOP)]
)
def test_a_peer_that_dies_or_stops_in_mid_transfer_ends_in_an_error_and_the_next_pair_works(child, threads, what, kill):
    process, pipe = child(what, 64 << 20)
    moved = []

    def carry():
        tensor = torch.zeros(64 << 20, dtype=torch.uint8)
        while True:
            (pipe.recv if what == "send" else pipe.send)(tensor, within(2))
            moved.append(1)

    running = threads.submit(carry)
    wait_until(lambda: moved)
    process.send_signal(kill)
    start = time.monotonic()
    with pytest.raises(PeerGone if kill == signal.SIGKILL else DeadlineExceeded):
        running.result(LONG)
    assert time.monotonic() - start < (2 if kill == signal.SIGKILL else 5)
    assert pipe.broken
    pipe.close(within(LONG))
    _, again = child("echo", 8)
    sent, got = random_bytes(8), torch.zeros(8, dtype=torch.uint8)
    again.send(sent, within(LONG))
    again.recv(got, within(LONG))
    assert torch.equal(sent, got)
