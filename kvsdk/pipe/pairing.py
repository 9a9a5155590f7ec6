"""Making pairs: which kinds of pipe there are, and how two workers get from a message to the ends of one."""

from __future__ import annotations

import ipaddress
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, NotRequired, TypedDict

import torch
import torch.distributed as dist

from kvsdk.errors import ConfigError, DeadlineExceeded, MismatchError, PipeClosed, ProtocolError
from kvsdk.pipe.base import SLOT_BYTES, SLOTS, Pipe
from kvsdk.pipe.shm_pipe import ShmListener, join_shm
from kvsdk.pipe.torch_pipe import TorchListener, join_torch

PIPE_VERSION = 2
KINDS = ("peer", "shm", "gloo", "nccl")

_RUNS = {"cuda": ("nccl", "peer"), "cpu": ("gloo", "shm", "peer")}
_AUTO = {"cuda": ("peer", "nccl"), "cpu": ("peer", "shm", "gloo")}
_POLL = 0.005
_TORCH_FIELDS = {"host": str, "port": int, "max_ctas": int}
_FIELDS = {"shm": {"host": str}, "gloo": _TORCH_FIELDS, "nccl": _TORCH_FIELDS}


class PipeInvite(TypedDict):
    """What a `PipeHost` tells the other worker, as a message: plain values for msgpack.

    Attributes:
        version: of this protocol.
        kind: `shm`, `gloo` or `nccl`.
        pair: 32 hex digits; names the pair.
        host: `shm`: the boot of the host; else IP address of the pair's store.
        port: of the store; not with `shm`.
        max_ctas: thread blocks that NCCL may use for a transfer; 0 leaves it to NCCL. It also decides how much GPU
            memory the pair holds, on both sides. Not with `shm`.
    """

    version: int
    kind: str
    pair: str
    host: str
    port: NotRequired[int]
    max_ctas: NotRequired[int]


def choose(kind: str, device_type: str) -> tuple[str, ...]:
    """The kinds of pipe to use on a device, the best one first.

    Args:
        kind: `auto`, `peer`, `shm`, `gloo` or `nccl`.
        device_type: `cpu` or `cuda`.

    Raises:
        ConfigError: the kind is unknown or cannot run on the device.
    """
    if device_type not in _RUNS:
        raise ConfigError(f"no pipe runs on device type {device_type!r}; use cpu or cuda")
    if kind != "auto" and kind not in KINDS:
        raise ConfigError(f"pipe kind {kind!r} is unknown; use auto, {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if kind != "auto" and kind not in _RUNS[device_type]:
        raise ConfigError(f"pipe kind {kind!r} does not run on {device_type}; use auto or {_RUNS[device_type][0]}")
    chosen = _AUTO[device_type] if kind == "auto" else (kind,)
    if "nccl" in chosen and not dist.is_nccl_available():
        raise ConfigError("pipe kind 'nccl' needs a build of PyTorch with NCCL")
    return chosen


class PipeHost:
    """The producer's side of making pairs: any number of them, from any thread.

    A pair is made in two steps, so that the invite can travel in a message of the caller's: `prepare` listens, and
    `accept` waits for the other worker to `join`.
    """

    def __init__(
        self,
        kind: str,
        bind_ip: str,
        device: torch.device | str,
        max_ctas: int = 0,
        *,
        num_slots: int = SLOTS,
        slot_bytes: int = SLOT_BYTES,
    ):
        """Checks the arguments; listens to nothing yet.

        Args:
            kind: `shm`, `gloo` or `nccl`, from `choose`.
            bind_ip: IP address to listen on, and which the peer can reach; not a wildcard. `shm` listens on none.
            device: where the tensors are.
            max_ctas: thread blocks that NCCL may use for a transfer; 0 leaves it to NCCL.
            num_slots: of each pipe, see `Pipe`.
            slot_bytes: likewise.

        Raises:
            ConfigError: an argument is not usable.
        """
        self._device = _with_index(torch.device(device))
        (self._kind,) = choose(kind, self._device.type)
        if self._kind == "peer":
            raise ConfigError("a peer's memory is a window (kvsdk.pipe.window), not a pipe that has a host")
        self._ip = _checked_ip(bind_ip)
        if not 0 <= max_ctas <= 64:
            raise ConfigError(f"max_ctas must be from 0 to 64, not {max_ctas}")
        self._max_ctas = max_ctas
        self._slots = num_slots, slot_bytes
        self._lock = threading.Lock()
        self._listeners: dict[str, ShmListener | TorchListener] = {}
        self._closed = False

    def prepare(self) -> PipeInvite:
        """Listens for one peer, in a place of its own, until `accept`, `discard` or `close`.

        Returns:
            What the peer needs for `join`.

        Raises:
            PipeClosed: the host is closed.
            ConfigError: `bind_ip` is no address of this machine.
            WindowUnavailable: this system shares no memory.
        """
        pair = uuid.uuid4().hex
        listener: ShmListener | TorchListener
        if self._kind == "shm":
            listener = ShmListener(pair, *self._slots)
        else:
            listener = TorchListener(self._kind, pair, self._ip, self._device, self._max_ctas, *self._slots)
        with self._lock:
            if not self._closed:
                self._listeners[pair] = listener
        if self._closed:
            listener.close()
            raise PipeClosed("the pipe host is closed")
        return PipeInvite(version=PIPE_VERSION, kind=self._kind, pair=pair, **listener.fields)

    def accept(self, invite: PipeInvite, deadline: float, wanted: Callable[[], None] = lambda: None) -> Pipe:
        """Waits for the peer to join and connects to it, both ways. The invite is used up, whatever happens.

        Args:
            invite: from `prepare`.
            deadline: absolute, in seconds of `time.monotonic()`.
            wanted: called again and again until the pair is made; what it raises ends the wait and comes out of here.

        Returns:
            The producer's end.

        Raises:
            DeadlineExceeded: the peer did not join, or did not answer, in time.
            PeerGone: it joined and went away.
            PipeClosed: the host was closed, or the invite was used up or discarded before.
        """
        pair = invite["pair"]
        try:
            while not self._listener(pair).joined():
                if time.monotonic() >= deadline:
                    raise DeadlineExceeded("no peer joined by the deadline")
                wanted()
                time.sleep(_POLL)
            listener = self._listener(pair)
            with self._lock:
                self._listeners.pop(pair, None)
            try:
                return listener.connect(deadline, wanted)
            finally:
                listener.close()
        finally:
            self.discard(invite)

    def _listener(self, pair: str) -> ShmListener | TorchListener:
        with self._lock:
            listener = self._listeners.get(pair)
        if listener is None:
            raise PipeClosed("the invite is used up, or the pipe host is closed")
        return listener

    def discard(self, invite: PipeInvite) -> None:
        """Stops listening for a peer that will not come. Fine after `accept`, too."""
        with self._lock:
            listener = self._listeners.pop(invite["pair"], None)
        if listener is not None:
            listener.close()

    def close(self) -> None:
        """Stops listening; `accept` calls that wait raise `PipeClosed`. Pipes that exist stay. Twice is fine."""
        with self._lock:
            self._closed = True
            listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener.close()


def join(
    invite: dict[str, Any],
    device: torch.device | str,
    bind_ip: str,
    deadline: float,
    *,
    num_slots: int = SLOTS,
    slot_bytes: int = SLOT_BYTES,
    wanted: Callable[[], None] = lambda: None,
) -> Pipe:
    """Connects to the producer that made an invite: the consumer's end.

    Args:
        invite: a `PipeInvite` from the network: anything may be in it.
        device: where the tensors are.
        bind_ip: IP address of this machine to listen on, and which the peer can reach; not a wildcard. `shm` listens
            on none.
        deadline: absolute, in seconds of `time.monotonic()`.
        num_slots: of the pipe, see `Pipe`.
        slot_bytes: likewise.
        wanted: called again and again until the pair is made; what it raises ends the wait and comes out of here.

    Raises:
        ProtocolError: the invite is malformed.
        MismatchError: it is of another version, or for another kind of device.
        ConfigError: `bind_ip` or the device is not usable.
        WindowUnavailable: memory cannot be shared with that worker; the message says why.
        PeerGone: nobody listens there any more, or the peer went away.
        DeadlineExceeded: the peer did not answer in time.
    """
    device = _with_index(torch.device(device))
    bind_ip = _checked_ip(bind_ip)
    _check_invite(invite, device.type)
    if time.monotonic() >= deadline:
        raise DeadlineExceeded("the deadline had passed before the call")
    if invite["kind"] == "shm":
        return join_shm(invite, num_slots, slot_bytes, deadline, wanted)
    return join_torch(invite, device, bind_ip, num_slots, slot_bytes, deadline, wanted)


def _check_invite(invite: Any, device_type: str) -> None:
    """Raises ProtocolError or MismatchError unless every field is there, of its type and in range."""
    if not isinstance(invite, dict):
        raise ProtocolError(f"an invite must be a dict, not {type(invite).__name__}")
    if invite.get("version") != PIPE_VERSION:
        raise MismatchError("pipe.version", PIPE_VERSION, invite.get("version"))
    kind = invite.get("kind")
    if not isinstance(kind, str):
        raise ProtocolError(f"an invite's kind must be str, not {kind!r}")
    ours = [kind for kind in _RUNS[device_type] if kind in _FIELDS]
    if kind not in ours:
        raise MismatchError("pipe.kind", " or ".join(ours), kind)
    fields = {"version": int, "kind": str, "pair": str, **_FIELDS[kind]}
    for name, wanted in fields.items():
        if type(invite.get(name)) is not wanted:
            raise ProtocolError(f"an invite's {name} must be {wanted.__name__}, not {invite.get(name)!r}")
    if len(invite) > len(fields):
        raise ProtocolError(f"an invite has no {sorted(set(invite) - set(fields), key=str)}")
    if len(invite["pair"]) != 32 or set(invite["pair"]) - set("0123456789abcdef"):
        raise ProtocolError("an invite's pair must be 32 hex digits")
    if kind == "shm":
        return
    try:
        _checked_ip(invite["host"])
    except ConfigError as error:
        raise ProtocolError(f"an invite's host is not usable: {error}") from error
    if not 0 < invite["port"] < 65536:
        raise ProtocolError(f"an invite's port must be from 1 to 65535, not {invite['port']}")
    if not 0 <= invite["max_ctas"] <= 64:
        raise ProtocolError(f"an invite's max_ctas must be from 0 to 64, not {invite['max_ctas']}")


def _checked_ip(ip: str) -> str:
    try:
        address = ipaddress.ip_address(ip)
    except ValueError as error:
        raise ConfigError(f"{ip!r} is not an IP address") from error
    if address.is_unspecified:
        raise ConfigError(f"{ip} is every address of this machine; name the one that the peer can reach")
    return ip


def _with_index(device: torch.device) -> torch.device:
    """The current device is a thread's own, so a pipe, which any thread may use, needs the number."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
