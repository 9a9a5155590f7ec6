"""What is particular to each kind of pipe, and how pairs over gloo and shared memory are made and end. What every pipe
promises is in `kvsdk.testing.contracts`.

Gloo says nothing about NCCL's order or its kernels: those tests are in `tests/gpu/test_pipe_nccl.py`.
"""

import contextlib
import fcntl
import functools
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
    WindowUnavailable,
)
from kvsdk.pipe import PipeHost, choose, in_process_pair, join, lockstep_pair, prepare_process, shm_pipe, torch_pipe

SOON = 0.05
LONG = 20.0


def in_dev_shm():
    """Names in shared memory, but for those of other processes' semaphores and blocks, which Python makes."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("psm_", "sem."))}


def within(seconds):
    return time.monotonic() + seconds


def make_pair(kind, ours=None, theirs=None):
    """A pair between two threads; `ours` and `theirs` are further arguments of the two ends."""
    host = PipeHost(kind, "127.0.0.1", "cpu", **(ours or {}))
    invite = msgpack.unpackb(msgpack.packb(host.prepare()))
    with ThreadPoolExecutor(1) as threads:
        consumer = threads.submit(join, invite, "cpu", "127.0.0.1", within(LONG), **(theirs or {}))
        return host.accept(invite, within(LONG)), consumer.result()


KINDS = ["gloo", "shm"]
MAKERS = {
    "in-process": in_process_pair,
    "lockstep": lockstep_pair,
    **{kind: functools.partial(make_pair, kind) for kind in KINDS},
}


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


@pytest.mark.parametrize("name", MAKERS)
def test_a_pipe_names_its_kind(name):
    a, b = MAKERS[name]()
    assert a.kind == b.kind == {"lockstep": "in-process"}.get(name, name)
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
    [
        ("auto", "cpu", ("peer", "shm", "gloo")),
        ("shm", "cpu", ("shm",)),
        ("gloo", "cpu", ("gloo",)),
        ("peer", "cpu", ("peer",)),
        ("peer", "cuda", ("peer",)),
    ],
)
def test_the_kinds_follow_the_device(kind, device, chosen):
    assert choose(kind, device) == chosen


def test_a_window_has_no_host():
    with pytest.raises(ConfigError, match="window"):
        PipeHost("peer", "127.0.0.1", "cpu")


@pytest.mark.parametrize(
    ("kind", "device"), [("nccl", "cpu"), ("gloo", "cuda"), ("shm", "cuda"), ("ucx", "cpu"), ("auto", "xpu")]
)
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


# Making pairs


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


@pytest.fixture(params=KINDS)
def host(request):
    host = PipeHost(request.param, "127.0.0.1", "cpu")
    yield host
    host.close()


gloo_only = pytest.mark.parametrize("host", ["gloo"], indirect=True)
shm_only = pytest.mark.parametrize("host", ["shm"], indirect=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_leaves_nothing_behind(kind):
    for end in make_pair(kind):
        end.close(within(LONG))
    del end
    gc.collect()
    with nothing_is_left():
        for _ in range(3):
            a, b = make_pair(kind)
            for source, target in ((a, b), (b, a)):
                with ThreadPoolExecutor(1) as pool:
                    done = pool.submit(source.send_row, [5], lambda i, part: part.fill_(1), within(LONG))
                    target.recv_row([5], lambda i, part: None, within(LONG))
                    done.result()
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
    host.discard(host.prepare())  # what PyTorch starts once for the process is there from here on
    with nothing_is_left():
        invite = host.prepare()
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            host.accept(invite, start + SOON)
        assert time.monotonic() - start < SOON + 1


@gloo_only
def test_a_peer_that_joins_and_goes_silent_ends_at_the_deadline(host):
    invite = host.prepare()
    store = dist.TCPStore(invite["host"], invite["port"], 2, is_master=False, wait_for_workers=False)
    store.set(f"{invite['pair']}/joined", b"1")
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        host.accept(invite, start + 0.5)
    assert time.monotonic() - start < 2


class Unwanted:
    """A pair is given up a moment after it was begun."""

    def __init__(self):
        self.until = within(0.2)

        self.error = PeerGone("given up")

    def __call__(self):
        if time.monotonic() >= self.until:
            raise self.error

    @contextlib.contextmanager
    def ends(self):
        with pytest.raises(PeerGone) as caught:
            yield
        assert caught.value is self.error
        assert time.monotonic() < self.until + 2


def test_accept_ends_when_nobody_wants_the_pair(host):
    unwanted = Unwanted()
    with unwanted.ends():
        host.accept(host.prepare(), within(LONG), unwanted)


def test_accept_ends_when_nobody_wants_the_pair_that_the_peer_has_joined(host):
    """A consumer that is killed or stands still after its first sign of life; an earlier version waited for 20 s."""
    invite = host.prepare()
    if invite["kind"] == "shm":
        silent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        silent.connect(shm_pipe._address(invite["pair"]))
    else:
        silent = dist.TCPStore(invite["host"], invite["port"], 2, is_master=False, wait_for_workers=False)
        silent.set(f"{invite['pair']}/joined", b"1")
    unwanted = Unwanted()
    with unwanted.ends():
        host.accept(invite, within(LONG), unwanted)
    if invite["kind"] == "shm":
        silent.close()


@gloo_only
def test_accept_ends_when_nobody_wants_the_pair_whose_peer_is_silent(host, threads, monkeypatch):
    go_on, hello = threading.Event(), torch_pipe.TorchPipe._hello

    def late(self, deadline):
        if self._rank == 1:
            go_on.wait(LONG)
        hello(self, deadline)

    monkeypatch.setattr(torch_pipe.TorchPipe, "_hello", late)
    invite = host.prepare()
    consumer = threads.submit(join, invite, "cpu", "127.0.0.1", within(LONG))
    unwanted = Unwanted()
    with unwanted.ends():
        host.accept(invite, within(LONG), unwanted)
    go_on.set()
    with pytest.raises(PeerGone):
        consumer.result(LONG)


def test_join_ends_when_nobody_wants_the_pair(host):
    unwanted = Unwanted()
    with unwanted.ends():
        join(host.prepare(), "cpu", "127.0.0.1", within(LONG), wanted=unwanted)


@gloo_only
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


@gloo_only
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
    assert len({(invite["pair"], invite.get("port")) for invite in invites}) == 6
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
@gloo_only
def test_an_invite_from_the_network_is_not_trusted(host, change, error):
    with pytest.raises(error):
        join({**host.prepare(), **change}, "cpu", "127.0.0.1", within(SOON))


@pytest.mark.parametrize("invite", [None, [], "x", {}])
def test_what_is_no_invite_is_refused(invite):
    with pytest.raises((ProtocolError, MismatchError)):
        join(invite, "cpu", "127.0.0.1", within(SOON))


@pytest.mark.parametrize("kind", KINDS)
def test_ends_that_are_out_of_step_end_in_an_error(threads, kind):
    a, b = make_pair(kind)
    if kind == "gloo":
        b._numbers[0] = 5
    else:
        b._into.number = 5
    done = threads.submit(a.send, torch.zeros(4, dtype=torch.uint8), within(LONG))
    with pytest.raises(ProtocolError, match="out of step"):
        b.recv(torch.zeros(4, dtype=torch.uint8), within(LONG))
    with pytest.raises((ProtocolError, PeerGone)):
        done.result(LONG)
    a.close(within(LONG))
    b.close(within(LONG))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (2, 3), (3, 1), (1, 2), (20, 2)])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_rows_go_through_any_number_of_slots_on_either_side(threads, kind, ours, theirs, later):
    a, b = make_pair(kind, *({"num_slots": slots, "slot_bytes": 70_000} for slots in (ours, theirs)))
    sizes = [70_000, 1, 0, 4096, 70_000, 3, 65_536, 70_000, 0, 9]
    sent, came = [random_bytes(size, i) for i, size in enumerate(sizes)], []

    def drain(i, part):
        def read():
            came.append(part.clone())

        return read if later else read()

    for _ in range(2):
        done = threads.submit(a.send_row, sizes, lambda i, part: part.copy_(sent[i]), within(LONG))
        b.recv_row(sizes, drain, within(LONG))
        done.result()
    assert len(came) == 2 * len(sent) and all(map(torch.equal, came, sent * 2))
    for end in (a, b):
        end.close(within(LONG))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_filled_while_it_is_drained(threads, kind):
    """With three slots the sender is two messages ahead, and a message is drained while the next one is."""
    a, b = make_pair(kind)
    filled, allowed = [], threading.Semaphore(0)

    def drain(i, part):
        if i == 0:
            wait_until(lambda: len(filled) >= 3)
        if i == 1:
            allowed.release()
        return functools.partial(allowed.acquire, timeout=LONG) if i == 0 else None

    done = threads.submit(a.send_row, [8] * 6, lambda i, part: filled.append(i), within(LONG))
    b.recv_row([8] * 6, drain, within(LONG))
    done.result()
    for end in (a, b):
        end.close(within(LONG))


# Shared memory


def test_a_sender_that_closes_as_soon_as_it_may_is_not_missed(threads, monkeypatch):
    """The last slot's word is on its way before the receiver has nothing more to say."""
    a, b = make_pair("shm")
    finish = shm_pipe.Draining.finish
    monkeypatch.setattr(shm_pipe.Draining, "finish", lambda self: (time.sleep(0.2), finish(self))[1])

    def send_and_close():
        a.send(torch.arange(8, dtype=torch.uint8), within(LONG))
        a.close(within(LONG))

    done = threads.submit(send_and_close)
    got = torch.zeros(8, dtype=torch.uint8)
    b.recv(got, within(LONG))
    done.result()
    assert got.tolist() == list(range(8))
    b.close(within(LONG))


def test_both_ends_hold_the_same_memory_and_it_has_no_name(threads):
    before = in_dev_shm()
    a, b = make_pair("shm")
    seen = []

    def drain(i, part):
        a._out.ring.slots[0][0] = 77
        seen.append(int(part[0]))

    done = threads.submit(a.send_row, [8], lambda i, part: part.fill_(5), within(LONG))
    b.recv_row([8], drain, within(LONG))
    done.result()
    assert seen == [77]
    assert in_dev_shm() <= before
    for end in (a, b):
        end.close(within(LONG))


def test_a_tensor_longer_than_all_slots_travels(threads):
    a, b = make_pair("shm", {"slot_bytes": 5000}, {"slot_bytes": 100})
    for source, target in ((a, b), (b, a)):
        sent, got = random_bytes(100_001), torch.zeros(100_001, dtype=torch.uint8)
        done = threads.submit(source.send, sent, within(LONG))
        target.recv(got, within(LONG))
        done.result()
        assert torch.equal(sent, got)
    for end in (a, b):
        end.close(within(LONG))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"host": "another boot"}, WindowUnavailable),
        ({"pair": "0" * 32}, WindowUnavailable),
        ({"pair": "x" * 32}, ProtocolError),
        ({"host": 1}, ProtocolError),
        ({"port": 1}, ProtocolError),
        ({"version": 1}, MismatchError),
    ],
    ids=str,
)
@shm_only
def test_memory_is_shared_with_nobody_else(host, change, error):
    with pytest.raises(error):
        join({**host.prepare(), **change}, "cpu", "127.0.0.1", within(LONG))


@shm_only
def test_a_host_of_shared_memory_that_is_gone_is_found_at_once(host):
    invite = host.prepare()
    host.discard(invite)
    with pytest.raises(WindowUnavailable, match="network namespace"):
        join(invite, "cpu", "127.0.0.1", within(LONG))


@shm_only
@pytest.mark.parametrize("who", ["producer", "consumer"])
def test_another_users_process_is_refused(host, threads, monkeypatch, who):
    invite = host.prepare()
    waiting = threads.submit(host.accept, invite, within(1))
    user = shm_pipe._user
    theirs = threading.get_ident()

    def another(connection):
        consumer = threading.get_ident() == theirs
        return user(connection) + 1 if consumer == (who == "producer") else user(connection)

    monkeypatch.setattr(shm_pipe, "_user", another)
    error, message = (WindowUnavailable, "user") if who == "producer" else (PeerGone, "went away")
    with pytest.raises(error, match=message):
        join(invite, "cpu", "127.0.0.1", within(LONG))
    with pytest.raises((DeadlineExceeded, PeerGone)):
        waiting.result(LONG)


@shm_only
def test_a_system_without_shared_memory_says_so(host, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    with nothing_is_left():
        monkeypatch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(WindowUnavailable, match="No space left"):
            host.prepare()


def memory(size, seal=fcntl.F_SEAL_SHRINK):
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
    return fd


@pytest.mark.parametrize(
    ("make", "slots", "stride", "message"),
    [
        (lambda: memory(4095), 1, 4096, "4095 bytes, not 4096"),
        (lambda: memory(8192), 3, 4096, "8192 bytes, not 12288"),
        (lambda: memory(8192, 0), 2, 4096, "may shrink"),
        (lambda: memory(8192, fcntl.F_SEAL_GROW), 2, 4096, "may shrink"),
        (lambda: os.open(__file__, os.O_RDONLY), 1, 4096, "no seals"),
        (lambda: os.pipe()[0], 1, 4096, "no seals"),
        (lambda: memory(8192), 0, 4096, "cannot have 0 slots"),
        (lambda: memory(8192), 65, 4096, "cannot have 65 slots"),
        (lambda: memory(8192), 2, 4000, "cannot have 2 slots of 4000"),
        (lambda: memory(8192), 2, 0, "cannot have 2 slots of 0"),
        (lambda: memory(8192), 2, 1 << 62, "cannot have 2 slots"),
        (lambda: memory(8192, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE), 2, 4096, "cannot be mapped"),
    ],
)
def test_memory_that_a_peer_lies_about_is_not_touched(make, slots, stride, message):
    fd = make()
    with pytest.raises(ProtocolError, match=message):
        shm_pipe.Ring.open(fd, slots, stride)
    os.close(fd)


@pytest.mark.parametrize("lie", ["no memory", "two memories", "small slots", "another answer"])
def test_a_peer_that_lies_breaks_the_pair_and_leaves_nothing(lie, threads):
    def header(sizes):
        return shm_pipe._HEADER.pack(*shm_pipe._header(0, sizes), 2, 4096)

    with nothing_is_left():
        a, b = make_pair("shm")
        fds = [memory(8192) for _ in range({"no memory": 0, "two memories": 2}.get(lie, 1))]
        sizes = [5000] if lie == "small slots" else [8]
        socket.send_fds(a._out.socket, [header(sizes)], fds)
        if lie == "another answer":
            a._out.socket.sendall(b"x")
        with pytest.raises(ProtocolError):
            b.recv_row(sizes, lambda i, part: None, within(LONG))
        for fd in fds:
            os.close(fd)
        a.close(within(LONG))
        b.close(within(LONG))
        del a, b  # what broke a pipe knows where, and so the memory


# Two processes

CHILD = """
import sys, time, msgpack, torch
from kvsdk.pipe import join
pipe = join(msgpack.unpackb(bytes.fromhex(sys.argv[1])), "cpu", "127.0.0.1", time.monotonic() + 30)
tensor = torch.zeros(int(sys.argv[3]), dtype=torch.uint8)
while True:
    if sys.argv[2] == "drain":
        pipe.recv_row([1 << 20] * 16, lambda i, part: None, time.monotonic() + 30)
    elif sys.argv[2] == "fill":
        pipe.send_row([1 << 20] * 16, lambda i, part: part.fill_(i), time.monotonic() + 30)
    else:
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
    ("host", "what", "kill"),
    [
        ("gloo", "send", signal.SIGKILL),
        ("gloo", "recv", signal.SIGKILL),
        ("gloo", "recv", signal.SIGSTOP),
        ("shm", "recv", signal.SIGKILL),
        ("shm", "fill", signal.SIGKILL),
        ("shm", "drain", signal.SIGKILL),
        ("shm", "drain", signal.SIGSTOP),
    ],
    indirect=["host"],
)
def test_a_peer_that_dies_or_stops_in_mid_transfer_ends_in_an_error_and_the_next_pair_works(child, threads, what, kill):
    names = in_dev_shm()
    process, pipe = child(what, 64 << 20)
    moved = []

    def carry():
        tensor = torch.zeros(64 << 20, dtype=torch.uint8)
        while True:
            if what == "fill":
                pipe.recv_row([1 << 20] * 16, lambda i, part: None, within(2))
            elif what == "drain":
                pipe.send_row([1 << 20] * 16, lambda i, part: part.fill_(i), within(2))
            else:
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
    assert in_dev_shm() <= names
    _, again = child("echo", 8)
    sent, got = random_bytes(8), torch.zeros(8, dtype=torch.uint8)
    again.send(sent, within(LONG))
    again.recv(got, within(LONG))
    assert torch.equal(sent, got)
