"""What every `kvsdk.pipe.Pipe` promises, checked on pairs that the caller makes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from kvsdk.errors import DeadlineExceeded, PeerGone, PipeBusy, PipeClosed, ProtocolError
from kvsdk.pipe import Pipe
from kvsdk.testing.contracts.promise import PATIENCE, Call, Contract, Promise, check_promises, demand

PIPE_PROMISES = Contract()
"""In the order in which `check_pipe` checks them."""

Pair = tuple[Pipe, Pipe]

_SOON = 0.05  # seconds in which a call surely gets to where it waits, and the deadlines that are meant to pass
_promise = PIPE_PROMISES.promise


def check_pipe(
    make_pair: Callable[[], Pair],
    make_clogged_pair: Callable[[], Pair] | None = None,
    *,
    device: torch.device | str = "cpu",
    duplex: bool = True,
    patience: float = PATIENCE,
    promises: Iterable[Promise] = PIPE_PROMISES,
) -> None:
    """Checks that pairs keep what `kvsdk.pipe.Pipe` promises. Every pair is closed, whatever comes out.

    A call that never comes back is left in its thread, which ends with the process.

    Args:
        make_pair: returns two connected ends that nothing was sent over, with slots of 70,000 bytes or more.
        make_clogged_pair: returns two connected ends of which the first one's `send` waits, of a tensor of 8 bytes, as
            long as the second does not receive. Without it nothing is checked of sends that wait.
        device: where the pipe's tensors are.
        duplex: whether one thread may send while another receives.
        patience: seconds that anything may take that should happen at once.
        promises: those to check; for example one in each test.

    Raises:
        BrokenPromise: an AssertionError that names the first broken promise, and says what happened.
    """
    check_promises(promises, _Pipes(make_pair, make_clogged_pair, torch.device(device), duplex, patience))


class _Pipes:
    """Makes pairs and tensors, and calls with patience."""

    def __init__(
        self,
        make_pair: Callable[[], Pair],
        clogged: Callable[[], Pair] | None,
        device: torch.device,
        duplex: bool,
        patience: float,
    ):
        self._make_pair, self.clogged, self.device = make_pair, clogged, device
        self.duplex, self.patience = duplex, patience

    @contextlib.contextmanager
    def pair(self, clogged: bool = False) -> Iterator[Pair]:
        make = self.clogged if clogged else self._make_pair
        assert make is not None
        a, b = make()
        try:
            yield a, b
        finally:
            # At the same time: an end whose close hangs must not keep the other's threads.
            for call in [self.start(end.close, self.far()) for end in (a, b)]:
                call.result()

    def far(self) -> float:
        """A deadline that is not meant to be reached."""
        return time.monotonic() + 3 * self.patience

    def start(self, call: Callable[..., Any], *args: Any) -> Call:
        return Call(call, *args, patience=self.patience)

    def waiting(self, pipe: Pipe, direction: str) -> Call:
        """A call that waits for the peer: a receive, or a send of a clogged pair."""
        return self.start(getattr(pipe, direction), self.zeros(8), self.far()).settle(_SOON)

    def send(self, pipe: Pipe, tensor: torch.Tensor) -> Call:
        return self.start(pipe.send, tensor, self.far())

    def recv(self, pipe: Pipe, tensor: torch.Tensor) -> Call:
        return self.start(pipe.recv, tensor, self.far())

    def zeros(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    def random(self, nbytes: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).to(self.device)

    def carries(self, a: Pipe, b: Pipe, tensor: torch.Tensor) -> None:
        """Demands that the tensor gets from `a` to `b`."""
        got = self.zeros(tensor.numel() * tensor.element_size())
        sent = self.send(a, tensor)
        self.recv(b, got).result()
        sent.result()
        demand(torch.equal(got, tensor.reshape(-1).view(torch.uint8)), f"{got.numel()} bytes arrived changed")

    def send_row(self, pipe: Pipe, sent: Sequence[torch.Tensor]) -> Call:
        """Sends a row of tensors' bytes."""

        def fill(i: int, part: torch.Tensor) -> None:
            part.copy_(sent[i])

        return self.start(pipe.send_row, [tensor.numel() for tensor in sent], fill, self.far())

    def recv_row(self, pipe: Pipe, sizes: Sequence[int], later: bool = False) -> Call:
        """Receives a row; the call's result is a list of what came. With `later` it is read when that is waited for."""
        came: list[torch.Tensor] = []

        def drain(i: int, part: torch.Tensor) -> Callable[[], None] | None:
            def read() -> None:
                came.append(part.clone())

            return read if later else read()

        def receive() -> list[torch.Tensor]:
            pipe.recv_row(sizes, drain, self.far())
            return came

        return self.start(receive)

    @property
    def waits(self) -> tuple[str, ...]:
        """Directions in which a call of the first end of `pair(clogged=direction == "send")` waits for the peer."""
        return ("recv", "send") if self.clogged else ("recv",)


@_promise("both ends name the same kind, and nothing is broken before it was used")
def _(pipes: _Pipes) -> None:
    with pipes.pair() as (a, b):
        demand(isinstance(a.kind, str) and bool(a.kind), f"kind is {a.kind!r}")
        demand(a.kind == b.kind, f"one end is {a.kind}, the other {b.kind}")
        demand(not a.broken and not b.broken, "an unused pipe is broken")


@_promise("tensors arrive whole and in order")
def _(pipes: _Pipes) -> None:
    sent = [pipes.random(nbytes, seed) for seed, nbytes in enumerate([1, 0, 7, 4096, 1 << 20, 3])]
    with pipes.pair() as (a, b):
        sending = pipes.start(lambda: [a.send(tensor, pipes.far()) for tensor in sent])
        for i, tensor in enumerate(sent):
            got = pipes.zeros(tensor.numel())
            pipes.recv(b, got).result()
            demand(torch.equal(got, tensor), f"tensor {i}, of {tensor.numel()} bytes, arrived changed")
        sending.result()


@_promise("the second end sends as the first does")
def _(pipes: _Pipes) -> None:
    with pipes.pair() as (a, b):
        pipes.carries(b, a, pipes.random(1000))
        pipes.carries(a, b, pipes.random(10, 1))
        pipes.carries(b, a, pipes.random(10, 2))


@_promise("a tensor of any dtype and shape travels as its bytes")
def _(pipes: _Pipes) -> None:
    tensors = [
        torch.arange(24, dtype=torch.int64).view(2, 3, 4),
        torch.tensor(1.5),
        torch.arange(64, dtype=torch.uint8).view(torch.bfloat16),
        torch.zeros(0, 4),
    ]
    with pipes.pair() as (a, b):
        for tensor in tensors:
            pipes.carries(a, b, tensor.to(pipes.device))


@_promise("a tensor may be written again once send has returned")
def _(pipes: _Pipes) -> None:
    tensor = pipes.zeros(1 << 20)

    def send(pipe: Pipe) -> None:
        for i in range(1, 5):
            tensor.fill_(i)
            pipe.send(tensor, pipes.far())
        tensor.fill_(99)

    with pipes.pair() as (a, b):
        sending = pipes.start(send, a)
        for i in range(1, 5):
            got = pipes.zeros(tensor.numel())
            pipes.recv(b, got).result()
            demand(bool((got == i).all()), f"tensor {i} arrived with what was written after its send")
        sending.result()


@_promise("tensors made in inference mode travel")
def _(pipes: _Pipes) -> None:
    with torch.inference_mode():
        sent, got = pipes.random(100), pipes.zeros(100)
    with pipes.pair() as (a, b):
        sending, receiving = pipes.send(a, sent), pipes.recv(b, got)
        sending.result()
        receiving.result()
    demand(torch.equal(sent, got), "the bytes arrived changed")


@_promise("both directions run at the same time", needs="duplex")
def _(pipes: _Pipes) -> None:
    def send(pipe: Pipe, seed: int) -> None:
        for i in range(10):
            pipe.send(pipes.random(100_000, seed + i), pipes.far())

    def receive(pipe: Pipe, seed: int) -> None:
        for i in range(10):
            got = pipes.zeros(100_000)
            pipe.recv(got, pipes.far())
            demand(torch.equal(got, pipes.random(100_000, seed + i)), f"tensor {i} arrived changed")

    with pipes.pair() as (a, b):
        calls = [pipes.start(send, end, seed) for end, seed in ((a, 100), (b, 200))]
        calls += [pipes.start(receive, end, seed) for end, seed in ((b, 100), (a, 200))]
        for call in calls:
            call.result()


@_promise("a tensor of another size ends in ProtocolError, never in a cut or padded one, and breaks both ends")
def _(pipes: _Pipes) -> None:
    for sent, expected in ((8, 7), (7, 8), (0, 1), (1, 0), (1 << 20, 1)):
        with pipes.pair() as (a, b):
            sending = pipes.send(a, pipes.random(sent))
            pipes.recv(b, pipes.zeros(expected)).raises(ProtocolError)
            demand(b.broken, "the receiving end is not broken")
            if sending.error() is not None:
                sending.raises(ProtocolError, PeerGone)
            pipes.send(a, pipes.zeros(1)).raises(ProtocolError, PeerGone)
            demand(a.broken, "the sending end is not broken")
            pipes.recv(b, pipes.zeros(1)).raises(ProtocolError)


@_promise("what cannot travel is refused with ValueError, and harms nothing")
def _(pipes: _Pipes) -> None:
    wide = pipes.zeros(64)
    with pipes.pair() as (a, b):
        pipes.send(a, wide[::2]).raises(ValueError)
        pipes.recv(b, wide[::2]).raises(ValueError)
        pipes.recv(b, wide.view(torch.float32)).raises(ValueError)
        demand(not a.broken and not b.broken, "the refusal broke the pipe")
        pipes.carries(a, b, pipes.random(8))


@_promise("a wait ends at its deadline in DeadlineExceeded, and the pipe is broken")
def _(pipes: _Pipes) -> None:
    for direction in pipes.waits:
        with pipes.pair(clogged=direction == "send") as (a, _b):
            start = time.monotonic()
            pipes.start(getattr(a, direction), pipes.zeros(8), start + _SOON).raises(DeadlineExceeded)
            demand(time.monotonic() - start >= _SOON, f"{direction} ended before its deadline")
            demand(a.broken, f"the pipe is not broken after {direction} ended at its deadline")
            pipes.start(getattr(a, direction), pipes.zeros(8), pipes.far()).raises(DeadlineExceeded)


@_promise("a deadline that has passed before the call is exceeded")
def _(pipes: _Pipes) -> None:
    for direction in ("send", "recv"):
        with pipes.pair() as (a, b):
            if direction == "recv":
                pipes.send(b, pipes.zeros(8)).settle(_SOON)
            pipes.start(getattr(a, direction), pipes.zeros(8), time.monotonic() - 1).raises(DeadlineExceeded)


@_promise("after a deadline the peer learns that this end is gone")
def _(pipes: _Pipes) -> None:
    for direction in pipes.waits:
        with pipes.pair(clogged=direction == "send") as (a, b):
            told = pipes.waiting(b, "recv") if direction == "recv" else None
            pipes.start(getattr(a, direction), pipes.zeros(8), time.monotonic() + _SOON).raises(DeadlineExceeded)
            (told or pipes.send(b, pipes.zeros(8))).raises(PeerGone)


@_promise("abort and close wake this end's calls with PipeClosed")
def _(pipes: _Pipes) -> None:
    for how in ("abort", "close"):
        for direction in pipes.waits:
            with pipes.pair(clogged=direction == "send") as (a, _b):
                waiting = pipes.waiting(a, direction)
                demand(not waiting.over, f"{direction} did not wait for the peer")
                _end(pipes, a, how)
                waiting.raises(PipeClosed)


@_promise("abort and close wake the peer's calls with PeerGone")
def _(pipes: _Pipes) -> None:
    for how in ("abort", "close"):
        for direction in pipes.waits:
            with pipes.pair(clogged=direction == "send") as (a, b):
                waiting = pipes.waiting(a, direction)
                _end(pipes, b, how)
                waiting.raises(PeerGone)


@_promise("abort wakes a send and a receive that both wait", needs="clogged")
def _(pipes: _Pipes) -> None:
    if not pipes.duplex:
        return
    with pipes.pair(clogged=True) as (a, _b):
        waiting = [pipes.waiting(a, "recv"), pipes.waiting(a, "send")]
        _end(pipes, a, "abort")
        for call in waiting:
            call.raises(PipeClosed)


@_promise("abort ends a tensor that is halfway")
def _(pipes: _Pipes) -> None:
    with pipes.pair() as (a, b):
        tensor = pipes.zeros(8 << 20)
        calls = [pipes.send(a, tensor), pipes.recv(b, torch.empty_like(tensor))]
        _end(pipes, a, "abort")
        for call in calls:
            if call.error() is not None:
                call.raises(PipeClosed, PeerGone)


@_promise("what broke stays broken, and each later call raises the same type")
def _(pipes: _Pipes) -> None:
    for which, how in ((0, "abort"), (0, "close"), (1, "abort"), (1, "close")):
        with pipes.pair() as pair:
            _end(pipes, pair[which], how)
            wanted = PeerGone if which else PipeClosed
            for direction in ("recv", "send", "recv", "send"):
                pipes.start(getattr(pair[0], direction), pipes.zeros(8), pipes.far()).raises(wanted)
            demand(pair[0].broken, f"the pipe is not broken after {'the peer' if which else 'its own'} {how}")


@_promise("an end that broke for one reason does not change its mind when it is closed")
def _(pipes: _Pipes) -> None:
    with pipes.pair() as (a, b):
        _end(pipes, b, "abort")
        pipes.recv(a, pipes.zeros(8)).raises(PeerGone)
        _end(pipes, a, "close")
        pipes.recv(a, pipes.zeros(8)).raises(PeerGone)


@_promise("what was sent before a close arrives")
def _(pipes: _Pipes) -> None:
    def send_and_close(pipe: Pipe, tensor: torch.Tensor) -> None:
        pipe.send(tensor, pipes.far())
        pipe.close(pipes.far())

    for nbytes in (8, 4 << 20):
        sent, got = pipes.random(nbytes), pipes.zeros(nbytes)
        with pipes.pair() as (a, b):
            sending = pipes.start(send_and_close, a, sent)
            if nbytes == 8:
                sending.settle(_SOON)  # a pipe with a buffer has closed by then
            pipes.recv(b, got).result()
            sending.result()
            demand(torch.equal(got, sent), "the bytes arrived changed")
            pipes.recv(b, got).raises(PeerGone)


@_promise("abort and close any number of times, in any order, are fine")
def _(pipes: _Pipes) -> None:
    with pipes.pair() as (a, b):
        for how in ("close", "abort", "close"):
            for end in (a, b):
                _end(pipes, end, how)
    with pipes.pair() as (a, b):
        for how in ("abort", "close", "abort"):
            for end in (b, a):
                _end(pipes, end, how)


@_promise("close returns by its deadline while calls run")
def _(pipes: _Pipes) -> None:
    for direction in pipes.waits:
        with pipes.pair(clogged=direction == "send") as (a, _b):
            waiting = pipes.waiting(a, direction)
            pipes.start(a.close, time.monotonic() + pipes.patience / 2).result()
            waiting.raises(PipeClosed)


@_promise("of two threads in one direction the second gets PipeBusy, and the first goes on")
def _(pipes: _Pipes) -> None:
    for direction in pipes.waits:
        with pipes.pair(clogged=direction == "send") as (a, b):
            calls = [pipes.start(getattr(a, direction), pipes.zeros(8), pipes.far()) for _ in range(2)]
            limit = time.monotonic() + pipes.patience
            while not any(call.over for call in calls):
                demand(time.monotonic() < limit, f"two threads wait in {direction} of one pipe")
                time.sleep(0.001)
            refused, goes_on = sorted(calls, key=lambda call: not call.over)
            refused.raises(PipeBusy)
            demand(not a.broken, "the refusal broke the pipe")
            if direction == "recv":
                pipes.send(b, pipes.zeros(8)).result()
                goes_on.result()
            else:
                time.sleep(_SOON)
                demand(not goes_on.over, "the refusal ended the other thread's send")


@_promise("pairs do not share their fate")
def _(pipes: _Pipes) -> None:
    with pipes.pair() as (a, _), pipes.pair() as (c, d):
        _end(pipes, a, "abort")
        pipes.carries(c, d, pipes.random(8))
        _end(pipes, a, "close")
        pipes.carries(d, c, pipes.random(8))


@_promise("a closed pair leaves no thread behind")
def _(pipes: _Pipes) -> None:
    with pipes.pair() as (a, b):
        pipes.carries(a, b, pipes.random(8))  # what a library starts once for the process is there from here on
    before = set(threading.enumerate())
    with pipes.pair() as (a, b):
        pipes.carries(a, b, pipes.random(8))
    limit = time.monotonic() + pipes.patience
    while left := [thread.name for thread in set(threading.enumerate()) - before if thread.is_alive()]:
        demand(time.monotonic() < limit, f"still running: {', '.join(left)}")
        time.sleep(0.005)


def _end(pipes: _Pipes, pipe: Pipe, how: str) -> None:
    (pipes.start(pipe.abort) if how == "abort" else pipes.start(pipe.close, pipes.far())).result()


_ROW = [70_000, 1, 0, 4096, 70_000, 3, 65_536, 70_000, 0, 9]


class _Given(Exception):
    """What a contract's own callback raises."""


@_promise("a row arrives whole and in order, in both directions")
def _(pipes: _Pipes) -> None:
    _check_row(pipes, later=False)


@_promise("a message that drain leaves to others stays as it is until they were waited for")
def _(pipes: _Pipes) -> None:
    _check_row(pipes, later=True)


def _check_row(pipes: _Pipes, later: bool) -> None:
    sent = [pipes.random(nbytes, seed) for seed, nbytes in enumerate(_ROW)]
    with pipes.pair() as (a, b):
        for source, target in ((a, b), (a, b), (b, a)):
            sending = pipes.send_row(source, sent)
            came = pipes.recv_row(target, _ROW, later).result()
            sending.result()
            demand(len(came) == len(sent), f"{len(came)} of {len(sent)} messages were drained")
            for i, (got, tensor) in enumerate(zip(came, sent, strict=True)):
                demand(torch.equal(got, tensor), f"message {i} of a row changed")
        pipes.carries(b, a, pipes.random(10))


@_promise("a row of nothing takes its turn")
def _(pipes: _Pipes) -> None:
    with pipes.pair() as (a, b):
        sending = pipes.send_row(a, [])
        demand(pipes.recv_row(b, []).result() == [], "a message came")
        sending.result()
        pipes.carries(a, b, pipes.random(10))


@_promise("what fill, drain or what it left raises comes out, breaks the pipe, and ends the peer's row")
def _(pipes: _Pipes) -> None:
    def nothing(i: int, part: torch.Tensor) -> None:
        pass

    def give_up(i: int, part: torch.Tensor) -> None:
        if i == 2:
            raise _Given

    def give_up_later(i: int, part: torch.Tensor) -> Callable[[], None]:
        return lambda: give_up(i, part)

    for fill, drain in ((give_up, nothing), (nothing, give_up), (nothing, give_up_later)):
        fills = fill is give_up
        with pipes.pair() as (a, b):
            calls = [
                pipes.start(row, [8] * 50, work, pipes.far()) for row, work in ((a.send_row, fill), (b.recv_row, drain))
            ]
            calls[0 if fills else 1].raises(_Given)
            demand((a if fills else b).broken, "the pipe is not broken")
            error = calls[1 if fills else 0].error()
            demand(fills is False or isinstance(error, PeerGone), f"the receiving end's row ended in {error!r}")


@_promise("messages that do not fit the slots are refused with ValueError, and harm nothing")
def _(pipes: _Pipes) -> None:
    def nothing(i: int, part: torch.Tensor) -> None:
        pass

    with pipes.pair() as (a, b):
        for end, row in ((a, a.send_row), (b, b.recv_row)):
            for sizes in ([-1], [end.slot_bytes + 1], [8, end.slot_bytes + 1]):
                pipes.start(row, sizes, nothing, pipes.far()).raises(ValueError)
        demand(not a.broken and not b.broken, "the refusal broke the pipe")
        pipes.carries(a, b, pipes.random(8))


@_promise("rows that are not cut alike end in ProtocolError and in nothing else")
def _(pipes: _Pipes) -> None:
    for sent, expected in (([8, 8], [8, 9]), ([8], [7])):
        with pipes.pair() as (a, b):
            sending = pipes.send_row(a, [pipes.random(nbytes) for nbytes in sent])
            pipes.recv_row(b, expected).raises(ProtocolError)
            if sending.error() is not None:
                sending.raises(ProtocolError, PeerGone)


@_promise("a row that waits for its peer ends at the deadline, or when the peer goes")
def _(pipes: _Pipes) -> None:
    def nothing(i: int, part: torch.Tensor) -> None:
        pass

    with pipes.pair() as (a, _b):
        row = pipes.start(a.recv_row, [8, 8], nothing, time.monotonic() + _SOON)
        row.raises(DeadlineExceeded)
        demand(a.broken, "the pipe is not broken")
    with pipes.pair() as (a, b):
        row = pipes.start(a.recv_row, [8, 8], nothing, pipes.far()).settle(_SOON)
        b.abort()
        row.raises(PeerGone)
