"""Pipes through memory that two processes of one host share, for CPUs.

Each direction of a pair is a ring of slots in a `memfd` that both processes map, and a Unix stream socket: the sender
fills a slot of the ring and says so by a byte, the receiver drains the slot where it lies and answers by a byte. So a
message is copied by whoever fills and whoever drains it, and by nobody else.

What a process holds here ends with it: the memory has no name in any file system, the socket that a producer listens on
lies in Linux's abstract namespace, and a peer that dies is the end of its sockets. Both ends check that the other one
runs as the same user. A network namespace of its own, which a container usually has, keeps the peer from being found.

A peer is trusted with its blocks' bytes and with nothing else. A receiver maps only memory that is sealed against
shrinking, and looks only at what lies within its true size, so that no peer can end this process by a SIGBUS.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import select
import socket
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from kvsdk.errors import (
    ConfigError,
    DeadlineExceeded,
    KVError,
    PeerGone,
    PipeClosed,
    ProtocolError,
    WindowUnavailable,
)
from kvsdk.pipe.base import Drain, Draining, Fill, Pipe, check_contiguous
from kvsdk.pipe.window import this_host

logger = logging.getLogger("kvsdk.pipe")

MAX_SLOTS = 64
_MAX_SLOT_BYTES = 1 << 40
_HELLO = b"kvsdk shm pipe 1"
_SLICE_MS = 50  # between two looks at whether a pair that is being made is still wanted
# Before each row and tensor, from both ends: magic, number, messages, their bytes, a checksum of their sizes; and the
# sender's ring: its slots, and the bytes from one to the next. The ring's memory comes with the first header.
_HEADER = struct.Struct("<QQQQIIQ")
_MAGIC = 0x6B7673646B73686D
_FILLED, _DRAINED = b"f", b"d"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Ring:
    """Slots in memory that two processes map. It is unmapped when nobody holds the ring or a slot any more."""

    def __init__(self, fd: int, num_slots: int, stride: int):
        memory = mmap.mmap(fd, num_slots * stride, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        with torch.inference_mode(False):
            self.slots = torch.frombuffer(memory, dtype=torch.uint8).split(stride)
        self.stride = stride

    @classmethod
    def open(cls, fd: int, num_slots: int, stride: int) -> Ring:
        """The peer's ring.

        Raises:
            ProtocolError: the memory is not what the peer says, or could become less.
        """
        if not 0 < num_slots <= MAX_SLOTS or not 0 < stride <= _MAX_SLOT_BYTES or stride % mmap.PAGESIZE:
            raise ProtocolError(f"the peer's ring cannot have {num_slots} slots of {stride} bytes")
        try:
            status, seals = os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise ProtocolError(f"the peer's memory has no seals: {error}") from error
        if not stat.S_ISREG(status.st_mode) or not seals & fcntl.F_SEAL_SHRINK:
            raise ProtocolError("the peer's memory may shrink while it is read")
        if status.st_size < num_slots * stride:
            raise ProtocolError(f"the peer's memory has {status.st_size} bytes, not {num_slots * stride}")
        try:
            return cls(fd, num_slots, stride)
        except (OSError, ValueError) as error:
            raise ProtocolError(f"the peer's memory cannot be mapped: {error}") from error


def _new_memory(num_slots: int, slot_bytes: int) -> int:
    """A file descriptor of memory for a ring.

    Raises:
        OSError: there is not as much.
    """
    fd = os.memfd_create("kvsdk-pipe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Memory that is missing is an error here, and a SIGBUS where a slot is first written.
        os.posix_fallocate(fd, 0, num_slots * _stride(slot_bytes))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _stride(slot_bytes: int) -> int:
    return -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class _Lane:
    """One direction of a pair: its socket, used by one thread at a time, and its ring once there is one.

    Attributes:
        number: of the next row or tensor.
        unsent: a file descriptor of the ring's memory, until the peer has it.
    """

    def __init__(self, connection: socket.socket, unsent: int | None = None):
        self.socket, self.unsent = connection, unsent
        self.ring: Ring | None = None
        self.number = 0

    def close(self) -> None:
        self.socket.close()
        self.ring = None
        if self.unsent is not None:
            os.close(self.unsent)
            self.unsent = None


class ShmPipe(Pipe):
    """A pair through shared memory. One thread may send while another receives.

    `send` returns once the peer has the bytes.
    """

    kind = "shm"

    def __init__(self, out: _Lane, into: _Lane, num_slots: int, slot_bytes: int):
        super().__init__(num_slots, slot_bytes)
        self._out, self._into = out, into

    def close(self, deadline: float) -> None:
        self._fail(PipeClosed("the pipe was closed"))
        if not self._wait_idle(deadline):
            logger.error("a call was still inside a closed pipe at the deadline; its memory is kept")
            return
        self._out.close()
        self._into.close()

    def _check(self, tensor: torch.Tensor) -> None:
        check_contiguous(tensor)
        if tensor.device.type != "cpu":
            raise ValueError(f"a pipe through shared memory carries CPU tensors, not tensors on {tensor.device}")

    def _send(self, data: torch.Tensor, deadline: float) -> None:
        ring = self._offer([data.numel()], deadline)
        pieces = data.split(ring.stride) if data.numel() else ()
        self._push(ring, [len(piece) for piece in pieces], lambda i, part: _copy(part, pieces[i]), deadline)

    def _recv(self, data: torch.Tensor, deadline: float) -> None:
        ring = self._take([data.numel()], deadline)
        pieces = data.split(ring.stride) if data.numel() else ()
        self._pull(ring, [len(piece) for piece in pieces], lambda i, part: _copy(pieces[i], part), deadline)

    def _send_row(self, sizes: list[int], fill: Fill, deadline: float) -> None:
        self._push(self._offer(sizes, deadline), sizes, fill, deadline)

    def _recv_row(self, sizes: list[int], drain: Drain, deadline: float) -> None:
        ring = self._take(sizes, deadline)
        if any(size > ring.stride for size in sizes):
            raise self._fail(ProtocolError(f"messages of {sizes} bytes do not fit the peer's slots of {ring.stride}"))
        self._pull(ring, sizes, drain, deadline)

    def _push(self, ring: Ring, sizes: Sequence[int], fill: Fill, deadline: float) -> None:
        """Sends messages through the slots, one after the other."""
        lane, free = self._out, len(ring.slots)
        for i, size in enumerate(sizes):
            if not free:
                self._read(lane, _DRAINED, deadline)
                free += 1
            fill(i, ring.slots[i % len(ring.slots)][:size])
            free -= 1
            self._write(lane, _FILLED, deadline)
        for _ in range(len(ring.slots) - free):
            self._read(lane, _DRAINED, deadline)

    def _pull(self, ring: Ring, sizes: Sequence[int], drain: Drain, deadline: float) -> None:
        """Receives messages, as `_push` sends them."""
        lane, draining = self._into, Draining(drain, len(ring.slots))
        for i, size in enumerate(sizes):
            self._read(lane, _FILLED, deadline)
            freed = draining.start(i, ring.slots[i % len(ring.slots)][:size])
            self._write(lane, _DRAINED * freed, deadline)
        self._write(lane, _DRAINED * draining.finish(), deadline)

    # ---- headers

    def _offer(self, sizes: Sequence[int], deadline: float) -> Ring:
        """Meets the peer, which must be about to receive messages of these sizes; returns the ring for them."""
        lane, ring = self._out, self._own_ring()
        ours = _header(lane.number, sizes)
        lane.number += 1
        data = _HEADER.pack(*ours, len(ring.slots), ring.stride)
        with self._typed_errors(deadline):
            _limit(lane.socket, deadline)
            if lane.unsent is None:
                lane.socket.sendall(data)
            else:
                sent = socket.send_fds(lane.socket, [data], [lane.unsent])
                os.close(lane.unsent)
                lane.unsent = None
                lane.socket.sendall(data[sent:])
            theirs = _HEADER.unpack(_read(lane.socket, _HEADER.size, deadline))
        self._compare(ours, theirs, sending=True)
        return ring

    def _own_ring(self) -> Ring:
        lane = self._out
        if lane.ring is None:
            try:
                if lane.unsent is None:
                    lane.unsent = _new_memory(self.num_slots, self.slot_bytes)
                lane.ring = Ring(lane.unsent, self.num_slots, _stride(self.slot_bytes))
            except OSError as error:
                raise self._fail(PipeClosed(f"there is no memory to share: {error}")) from error
        return lane.ring

    def _take(self, sizes: Sequence[int], deadline: float) -> Ring:
        """Meets the peer, which must be about to send messages of these sizes; returns the ring that they come through.

        Raises:
            ProtocolError: also when the peer's memory is not what it says.
        """
        lane, fds = self._into, []
        ours = _header(lane.number, sizes)
        lane.number += 1
        try:
            with self._typed_errors(deadline):
                _limit(lane.socket, deadline)
                lane.socket.sendall(_HEADER.pack(*ours, 0, 0))
                *theirs, num_slots, stride = _HEADER.unpack(_read(lane.socket, _HEADER.size, deadline, fds))
            self._compare(ours, theirs, sending=False)
            if lane.ring is None:
                if len(fds) != 1:
                    raise self._fail(ProtocolError(f"the peer shared {len(fds)} pieces of memory, not one"))
                try:
                    lane.ring = Ring.open(fds[0], num_slots, stride)
                except ProtocolError as error:
                    raise self._fail(error) from error
        finally:
            for fd in fds:
                os.close(fd)
        return lane.ring

    def _compare(self, ours: Sequence[int], theirs: Sequence[int], *, sending: bool) -> None:
        self._raise_if_broken()
        _, number, count, nbytes, checksum = ours
        magic, their_number, their_count, their_nbytes, their_checksum = theirs[:5]
        if magic != _MAGIC or their_number != number:
            error = f"the two ends are out of step: at tensor {number} here, at {their_number} there"
        elif their_nbytes != nbytes:
            sent, expected = (nbytes, their_nbytes) if sending else (their_nbytes, nbytes)
            error = f"the sender's tensor has {sent} bytes, the receiver's {expected}"
        elif (their_count, their_checksum) != (count, checksum):
            error = f"the two ends cut {nbytes} bytes into messages of other sizes"
        else:
            return
        raise self._fail(ProtocolError(error))

    # ---- the socket

    def _read(self, lane: _Lane, wanted: bytes, deadline: float) -> None:
        with self._typed_errors(deadline):
            got = _read(lane.socket, 1, deadline)
        self._raise_if_broken()
        if got != wanted:
            raise self._fail(ProtocolError(f"the peer sent {got!r}, not {wanted!r}"))

    def _write(self, lane: _Lane, data: bytes, deadline: float) -> None:
        if not data:
            return  # even a write of nothing fails once the peer, which has all that it waited for, has closed
        with self._typed_errors(deadline):
            _limit(lane.socket, deadline)
            lane.socket.sendall(data)

    @contextlib.contextmanager
    def _typed_errors(self, deadline: float) -> Iterator[None]:
        try:
            yield
        except KVError:
            raise
        except TimeoutError as error:
            self._raise_if_broken()
            raise self._fail(DeadlineExceeded("waited for the peer until the deadline")) from error
        except OSError as error:
            self._raise_if_broken()
            raise self._fail(PeerGone(f"the peer went away: {error}")) from error

    def _break(self) -> None:
        for lane in (self._out, self._into):
            try:
                lane.socket.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                logger.debug("the peer was gone before: %s", error)


class ShmListener:
    """The producer's side of one pair that is being made; see `PipeHost`.

    Raises:
        WindowUnavailable: this system shares no memory.
    """

    def __init__(self, pair: str, num_slots: int, slot_bytes: int):
        if num_slots > MAX_SLOTS:
            raise ConfigError(f"a pipe through shared memory has {MAX_SLOTS} slots at most, not {num_slots}")
        self.fields = {"host": this_host()}
        self._num_slots, self._slot_bytes = num_slots, slot_bytes
        self._connection: socket.socket | None = None
        self._memory: int | None = None
        try:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise WindowUnavailable(f"there are no Unix sockets: {error}") from error
        try:
            self._listener.bind(_address(pair))
            self._listener.listen(1)
            self._listener.setblocking(False)
            self._memory = _new_memory(num_slots, slot_bytes)
        except OSError as error:
            self._listener.close()
            raise WindowUnavailable(f"no memory can be shared: {error}") from error

    def joined(self) -> bool:
        """Whether the peer is there. Raises PipeClosed after `close`."""
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            raise PipeClosed("the invite is used up, or the pipe host is closed") from error
        if _user(connection) != os.geteuid():
            logger.warning("a process of user %d wanted to join a pair, and was refused", _user(connection))
            connection.close()
            return False
        self._connection = connection
        return True

    def connect(self, deadline: float, wanted: Callable[[], None]) -> Pipe:
        """The producer's end; see `PipeHost.accept`."""
        out, self._connection = self._connection, None
        memory, self._memory = self._memory, None
        if out is None or memory is None:
            raise PipeClosed("the invite is used up, or the pipe host is closed")
        into, theirs = socket.socketpair()
        pipe = ShmPipe(_Lane(out, memory), _Lane(into), self._num_slots, self._slot_bytes)
        with theirs, _set_up(pipe):
            _limit(out, deadline)
            socket.send_fds(out, [_HELLO], [theirs.fileno()])
            _hear_hello(out, deadline, wanted)
            pipe._own_ring()  # takes a while, in which the consumer prepares its first read
        return pipe

    def close(self) -> None:
        """Stops listening. Twice is fine."""
        self._listener.close()
        connection, self._connection = self._connection, None
        memory, self._memory = self._memory, None
        if connection is not None:
            connection.close()
        if memory is not None:
            os.close(memory)


def join_shm(
    invite: Mapping[str, Any], num_slots: int, slot_bytes: int, deadline: float, wanted: Callable[[], None]
) -> Pipe:
    """The consumer's end of a pair; see `kvsdk.pipe.join`, which has checked the invite's types."""
    if invite["host"] != this_host():
        raise WindowUnavailable("it is on another host")
    into, fds = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), []
    try:
        _limit(into, deadline)
        into.connect(_address(invite["pair"]))
        if _user(into) != os.geteuid():
            raise WindowUnavailable("it runs as another user")
        _hear_hello(into, deadline, wanted, fds)
        if len(fds) != 1:
            raise ProtocolError(f"the peer handed {len(fds)} sockets over, not one")
        out = socket.socket(fileno=fds.pop())
    except KVError:
        into.close()
        raise
    except TimeoutError as error:
        into.close()
        raise DeadlineExceeded("the peer did not answer by the deadline") from error
    except (FileNotFoundError, ConnectionRefusedError) as error:
        into.close()
        raise WindowUnavailable(f"its socket is not to be found here, in this network namespace: {error}") from error
    except OSError as error:
        into.close()
        raise PeerGone(f"the peer went away: {error}") from error
    finally:
        for fd in fds:
            os.close(fd)
    pipe = ShmPipe(_Lane(out), _Lane(into), num_slots, slot_bytes)
    with _set_up(pipe):
        _limit(into, deadline)
        into.sendall(_HELLO)
    return pipe


@contextlib.contextmanager
def _set_up(pipe: ShmPipe) -> Iterator[None]:
    """Closes a pipe that does not come about, with a typed error."""
    try:
        with pipe._typed_errors(0.0):
            yield
    except BaseException:
        pipe.close(time.monotonic() + 1.0)
        raise


def _address(pair: str) -> str:
    return f"\0kvsdk-pipe-{pair}"


def _user(connection: socket.socket) -> int:
    """The user that the process at the other end runs as."""
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]


def _hear_hello(
    connection: socket.socket, deadline: float, wanted: Callable[[], None], fds: list[int] | None = None
) -> None:
    heard = select.poll()
    heard.register(connection, select.POLLIN)
    while not heard.poll(_SLICE_MS):
        wanted()
        _limit(connection, deadline)
    if _read(connection, len(_HELLO), deadline, fds) != _HELLO:
        raise ProtocolError("the peer's first message is not of this protocol")


def _header(number: int, sizes: Sequence[int]) -> tuple[int, int, int, int, int]:
    return _MAGIC, number, len(sizes), sum(sizes), zlib.crc32(repr(list(sizes)).encode())


def _limit(connection: socket.socket, deadline: float) -> None:
    """Lets the next call on a socket take until the deadline.

    Raises:
        TimeoutError: it has passed.
    """
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    connection.settimeout(remaining)


def _read(connection: socket.socket, nbytes: int, deadline: float, fds: list[int] | None = None) -> bytes:
    """Reads so many bytes; appends to `fds` what file descriptors come with them.

    Raises:
        TimeoutError: they were not there by the deadline.
        OSError: the connection has ended.
    """
    data = b""
    while len(data) < nbytes:
        _limit(connection, deadline)
        if fds is None:
            got = connection.recv(nbytes - len(data))
        else:
            got, new, _, _ = socket.recv_fds(connection, nbytes - len(data), 4, socket.MSG_CMSG_CLOEXEC)
            fds.extend(new)
        if not got:
            raise ConnectionResetError("its socket is closed")
        data += got
    return data


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
