"""The client of LMCache's multi-process server (`lmcache server`), over LMCache's own request client.

That server moves KV between its memory and the KV cache of a worker, which it maps, and finds it by the tokens of a
prompt. It cannot be given bytes under a name. So a worker half registers a **KV cache of slots**: shared memory which
looks like one layer of a paged cache whose blocks are as long as the server's chunks, with as many bytes a token as a
chunk of ours needs. A chunk is stored from a slot and retrieved into one; its name becomes the tokens of a prompt that
is one chunk long. vLLM's own KV cache stays where it is, and what comes is compared with its digest as from any server.

LMCache's client waits without end for the answer of a server that died or cannot do what it is asked. Here each answer
has a deadline; one that takes long has the server asked whether it is well; and when it is not, or when its connection
is lost, everything under way fails at once. The slots are left alone then, since a server that wakes up may still write
to them, and the next session brings new ones. Their name goes as soon as the server has mapped them, so that nothing is
left in `/dev/shm` whoever dies.

The server answers a store of what it already has with success and keeps the old one, so that a damaged chunk stays
until it is evicted.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import logging
import mmap
import os
import queue
import secrets
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from kvsdk.connectors.lmcache.chunks import Incoming, Outgoing
from kvsdk.connectors.lmcache.client import Connection, Server, Stalled
from kvsdk.connectors.pynccl.channel import Bell
from kvsdk.errors import ConfigError, DeadlineExceeded, KVError, PeerGone

logger = logging.getLogger("kvsdk.lmcache")

SUPPORTED = ("0.5.6",)
"""Releases of lmcache whose client this was tested with. It is internal to lmcache, and was another one in 0.5.4."""

COMING_SECONDS = 10
"""How long word of a coming chunk is believed: it cannot be taken back. Twice that at most."""

REGISTER_TIMEOUT = 10.0
"""Most seconds for the server to map the slots, once it has said that it is well."""

STORED_TIMEOUT = 1.0
"""Most seconds until what the server has copied can be found; it puts it on its list in the background."""

_SLICE = 0.05  # seconds between two looks at whether the session has ended
_TOKENS = struct.Struct(">4I")


def require_lmcache() -> None:
    """Raises ConfigError, naming versions, unless a release of lmcache is installed that this client was made for."""
    wanted = f"the multi-process server is reached with lmcache {' or '.join(SUPPORTED)}"
    try:
        version = importlib.metadata.version("lmcache")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"{wanted}, which is not installed; install it, or set remote_url to an lm:// server"
        ) from error
    if version not in SUPPORTED:
        raise ConfigError(f"{wanted}, and {version} is installed; install it, or set remote_url to an lm:// server")
    try:
        importlib.import_module("lmcache.v1.multiprocess.transport.factory")
    except ImportError as error:
        raise ConfigError(f"lmcache {version} is installed without what its client needs: {error}") from error


class MPServer(Server):
    """A multi-process server on this host.

    Args:
        model: what the server is told that these chunks are of; without `@`.
        value_bytes: of each chunk.
        slots: connections at a time.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        model: str,
        value_bytes: int,
        slots: int,
        timeout: float,
        on_state: Callable[[bool], None] = lambda up: None,
    ):
        self._model, self._value_bytes, self._slots = model, value_bytes, slots
        self._bell = Bell()
        self._session: _Session | None = None
        self._forgotten: list[int] = []
        self.refused: ConfigError | None = None
        super().__init__(host, port, timeout=timeout, on_state=on_state)

    def _ask(self) -> None:
        if self._session is not None and self._session.ended:
            self._drop_session()
            self.lost()
        try:
            if self._session is None:
                self._session = _Session(
                    f"tcp://{self.address}", self._model, self._value_bytes, self._slots, self.timeout,
                    suspect=self._wake, stop=self._stop,
                )  # fmt: skip
                self._session.forget(self._forgotten)
                self._forgotten.clear()
            else:
                self._session.ping(0.8 * self.timeout)
        except ConfigError as error:
            self.refused = error
            self.lost()
            raise
        except KVError as error:
            self.lost()
            if self._session is not None:
                self._session.end(error)
                self._drop_session()
            raise

    def _drop_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._forgotten += session.instances
            session.close()

    def _pause(self, seconds: float) -> None:
        poller, session = zmq.Poller(), self._session
        poller.register(self._bell, zmq.POLLIN)
        if session is not None:
            poller.register(session.monitor, zmq.POLLIN)
        ready = dict(poller.poll(int(1000 * seconds)))
        self._bell.heed()
        if session is not None and session.monitor in ready:
            recv_monitor_message(session.monitor)
            session.end(PeerGone(f"{self.address} closed the connection"))

    def _wake(self) -> None:
        self._bell.ring()

    def down(self, reason: Exception) -> None:
        session = self._session
        if session is not None:
            session.end(reason)
        super().down(reason)

    def _connect(self, timeout: float) -> MPConnection:
        session = self._session
        if session is None or session.ended:
            raise PeerGone(f"the connection to {self.address} is lost")
        return MPConnection(session)

    def _disconnect(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            if not session.ended:
                session.unregister()
            session.close()
        self._bell.close()

    def _abort(self) -> None:
        """Questions under way are answered by their own deadlines, and those of closing are short."""


class _Session:
    """A registration with a server: slots that it has mapped, and LMCache's request client.

    Raises:
        ConfigError: the server is well and cannot do this; names what to set.
        DeadlineExceeded, PeerGone: it does not answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        value_bytes: int,
        slots: int,
        timeout: float,
        *,
        suspect: Callable[[], None],
        stop: threading.Event,
    ):
        from lmcache.utils import EngineType
        from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey
        from lmcache.v1.multiprocess.transport.factory import RequestClientFactory
        from lmcache.v1.platform.base.event_ipc import get_event_ipc_backend

        self.url, self.model, self._timeout, self._suspect, self._stop = url, model, timeout, suspect, stop
        self._new_key = IPCCacheServerKey
        self._why: Exception | None = None
        self._lock, self._closed = threading.Lock(), False
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._parked: dict[int, Any] = {}
        self.instances: list[int] = []
        self._context = zmq.Context()
        # What LMCache's threads send must not wait for a server that is away, nor this process's end for them.
        for option, value in ((zmq.LINGER, 0), (zmq.SNDTIMEO, 100)):
            self._context.setsockopt(option, value)
        self._watched = self._context.socket(zmq.DEALER)
        self.monitor = self._watched.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._client: Any = None
        try:
            self._watched.connect(url)
            self._client = RequestClientFactory.create(url, context=self._context)
            self.ping(timeout)
            self.chunk_tokens = self.call(self.ask("get_chunk_size"), time.monotonic() + timeout)
            if self.chunk_tokens < 4:
                raise ConfigError(f"{url} has chunks of {self.chunk_tokens} tokens; start it with --chunk-size 256")
            backend, device = get_event_ipc_backend(torch.device("cpu")), torch.device("cpu")
            event = backend.create_event(device)
            self.event = backend.export_event(event, device)
            self.values = self._register(EngineType.VLLM, model, value_bytes, slots)
            self._register(EngineType.VLLM, f"{model}-coming", 1, 1)
        except BaseException as error:
            self.close()
            if isinstance(error, zmq.ZMQError):
                raise PeerGone(f"{url} cannot be connected to ({error})") from error
            raise
        for slot in range(1, slots + 1):
            self._slots.put(slot)

    def _register(self, engine: Any, model: str, value_bytes: int, slots: int) -> np.ndarray:
        """Slots for values of up to so many bytes, each a row; `instances` grows by their number at the server.

        Row 0 is never used: to vLLM, block 0 is the one without content, and the server does not store it. The server
        copies element by element, which takes less than half the time with 8 bytes an element than with one.
        """
        from lmcache.v1.platform.devices.cpu.shm import CpuShmTensorWrapper

        words = -(-value_bytes // (8 * self.chunk_tokens))
        shape = (slots + 1, self.chunk_tokens, words)
        row_bytes, instance = 8 * self.chunk_tokens * words, secrets.randbits(62)
        name = f"kvsdk-{secrets.token_hex(8)}"
        memory = _shared_memory(name, shape[0] * row_bytes, first_used=row_bytes)
        try:
            tensor = torch.frombuffer(memory, dtype=torch.int64).view(shape)
            wrapper = CpuShmTensorWrapper(tensor, f"/{name}")
            future = self.ask("register_kv_cache", instance, [wrapper], model, 1, engine, {}, [])
            self.call(future, time.monotonic() + REGISTER_TIMEOUT)
        except DeadlineExceeded as error:
            self.ping(self._timeout)
            raise ConfigError(
                f"the LMCache server at {self.url} is well and does not map a worker's shared memory: it must run on "
                "this host, see the same /dev/shm, and have --supported-transfer-mode lmcache_driven or auto; if there "
                "are GPUs, start it with CUDA_VISIBLE_DEVICES set to nothing"
            ) from error
        finally:
            os.unlink(f"/dev/shm/{name}")
        self.instances.append(instance)
        return np.frombuffer(memory, np.uint8).reshape(shape[0], row_bytes)

    def ask(self, operation: str, *arguments: Any) -> Any:
        """A request of LMCache's client; its answer is for `call`.

        Raises:
            PeerGone: the session has ended. A client that was closed would write to a file descriptor that it no longer
                has.
        """
        with self._lock:
            if self._why is not None or self._closed:
                raise PeerGone(f"the connection to {self.url} is lost ({self._why})")
            return getattr(self._client, operation)(*arguments)

    @property
    def ended(self) -> bool:
        """Whether its connection is lost, or the server stalls."""
        return self._why is not None

    def end(self, why: Exception) -> None:
        """Fail everything under way. From any thread."""
        if self._why is None:
            self._why = why
        self._suspect()

    def call(self, future: Any, deadline: float, aborted: threading.Event | None = None) -> Any:
        """What the server answers. One that takes its time is asked whether it is well."""
        suspect_at = time.monotonic() + self._timeout / 10
        while not self._wait(future, deadline, aborted):
            if time.monotonic() >= suspect_at:
                suspect_at = deadline
                self._suspect()
        try:
            return future.result()
        except Exception as error:  # whatever LMCache's client has met
            raise PeerGone(f"{self.url}: {error}") from error

    def _wait(self, future: Any, deadline: float, aborted: threading.Event | None = None) -> bool:
        """Wait a little for an answer; whether it is there."""
        if future.wait(max(0.0, min(_SLICE, deadline - time.monotonic()))):
            return True
        if self._why is not None:
            raise PeerGone(f"the connection to {self.url} is lost ({self._why})")
        if self._stop.is_set() or (aborted is not None and aborted.is_set()):
            raise PeerGone(f"the connection to {self.url} is closed here")
        if time.monotonic() >= deadline:
            raise DeadlineExceeded(f"no answer from {self.url} in time")
        return False

    def ping(self, timeout: float) -> None:
        """Returns once the server has answered."""
        deadline = time.monotonic() + timeout
        for future in [self.ask("ping", instance) for instance in self.instances or [None]]:
            try:
                while not self._wait(future, deadline):
                    pass
            except DeadlineExceeded as error:
                raise Stalled(str(error)) from error

    def forget(self, instances: list[int]) -> None:
        """Have the server give up the slots of sessions that have ended, if it is still the same."""
        for instance in instances:
            self.ask("unregister_kv_cache", instance)

    def unregister(self) -> None:
        """Have the server give up the slots; a little time is given to it."""
        deadline = time.monotonic() + 0.5
        for future in [self.ask("unregister_kv_cache", instance) for instance in self.instances]:
            future.wait(max(0.0, deadline - time.monotonic()))

    def take_slot(self) -> int:
        """Raises PeerGone when requests that nobody waits for any more have used up all."""
        with self._lock:
            answered = [slot for slot, future in self._parked.items() if future.query()]
            for slot in answered:
                del self._parked[slot]
                self._slots.put(slot)
        try:
            return self._slots.get_nowait()
        except queue.Empty:
            raise PeerGone(f"every slot at {self.url} is in use") from None

    def give_back_slot(self, slot: int, request: Any = None) -> None:
        """It is another connection's from here on, or, if the server may still use it, once `request` is answered."""
        with self._lock:
            if request is not None:
                self._parked[slot] = request
                return
        self._slots.put(slot)

    def key(self, model: str, name: str, request: str, worker: int | None) -> Any:
        """LMCache's key for a prompt of one chunk whose tokens stand for `name`."""
        hashed = hashlib.blake2b(name.encode(), digest_size=_TOKENS.size).digest()
        tokens = _TOKENS.unpack(hashed) + (0,) * (self.chunk_tokens - 4)
        return self._new_key(model, 1, worker, tokens, 0, self.chunk_tokens, request_id=request, num_kv_readers=1)

    def close(self) -> None:
        """From the thread that watches."""
        with self._lock:
            self._closed = True
        if self._client is not None:
            self._client.close()
        self._watched.disable_monitor()
        self._context.destroy(0)


class MPConnection(Connection):
    """A slot of a session.

    Raises:
        PeerGone: there is none.
    """

    def __init__(self, session: _Session):
        self._session, self._slot = session, session.take_slot()
        self._using: Any = None  # a request that is not answered: the server may still read or write the slot
        self._aborted = threading.Event()

    def exists(self, name: str, deadline: float) -> bool:
        return self._exists(self._session.model, name, deadline)

    def _exists(self, model: str, name: str, deadline: float) -> bool:
        session, request = self._session, secrets.token_hex(12)
        key = session.key(model, name, request, None)
        if not self._look_up(key, deadline):
            return False
        self._call(session.ask("free_lookup_locks", key, 1), deadline)
        session.ask("end_session", request)
        return True

    def _look_up(self, key: Any, deadline: float) -> bool:
        """Whether the server has it; it is then locked, and the session is open."""
        session = self._session
        self._call(session.ask("lookup", key, 1), deadline)
        found = None
        while found is None:  # there are tiers behind the server's memory that take their time
            patience = max(0.0, min(1.0, deadline - time.monotonic()))
            found = self._call(session.ask("wait_prefetch_status", key.request_id, patience), deadline)
        if not found:
            session.ask("end_session", key.request_id)
        return bool(found)

    def get(self, chunk: Incoming, deadline: float) -> bool:
        session, request = self._session, secrets.token_hex(12)
        if not self._look_up(session.key(session.model, chunk.name, request, None), deadline):
            return False
        key = session.key(session.model, chunk.name, request, 0)
        self._using = session.ask("retrieve", key, session.instances[0], [[self._slot]], session.event, 0)
        handle, found = self._call(self._using, deadline)
        self._using = None
        session.ask("end_session", request)
        if not found:
            self._check_known(handle)
            return False
        row, start = session.values[self._slot], len(chunk.header)
        chunk.header[:] = row[:start].data
        chunk.open()
        for index, piece in enumerate(chunk.pieces):
            np.copyto(np.frombuffer(piece, np.uint8), row[start : start + len(piece)])
            chunk.check(index)
            start += len(piece)
        return True

    def put(self, chunk: Outgoing, deadline: float) -> bool:
        session = self._session
        row, start = session.values[self._slot], chunk.form.header_bytes
        for _, piece in chunk.pieces():
            np.copyto(row[start : start + len(piece)], np.frombuffer(piece, np.uint8))
            start += len(piece)
        row[: chunk.form.header_bytes] = np.frombuffer(chunk.header(), np.uint8)
        name, request = chunk.name, secrets.token_hex(12)
        key = session.key(session.model, name, request, 0)
        self._using = session.ask("store", key, session.instances[0], [[self._slot]], session.event)
        handle, stored = self._call(self._using, deadline)
        self._using = None
        session.ask("end_session", request)
        if not stored:
            self._check_known(handle)
            return False
        pause, until = 0.001, time.monotonic() + STORED_TIMEOUT
        while not self._exists(session.model, name, deadline):
            if time.monotonic() >= until:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return True

    def condemn(self, name: str, deadline: float) -> None:
        """Nothing can be done: see the module."""

    def announce(self, names: Sequence[str], deadline: float) -> None:
        session, bucket = self._session, int(time.time() // COMING_SECONDS)
        for name in names:
            request = secrets.token_hex(12)
            key = session.key(f"{session.model}-coming", f"{name} {bucket}", request, 0)
            # One row of zeros for all: that it is there is what it says.
            self._call(session.ask("store", key, session.instances[1], [[1]], session.event), deadline)
            session.ask("end_session", request)

    def is_announced(self, name: str, deadline: float) -> bool:
        model, bucket = f"{self._session.model}-coming", int(time.time() // COMING_SECONDS)
        return any(self._exists(model, f"{name} {one}", deadline) for one in (bucket, bucket - 1))

    def _check_known(self, handle: bytes) -> None:
        """A server that has been restarted answers without the handle of an event."""
        if not handle:
            error = PeerGone(f"{self._session.url} does not know this worker any more")
            self._session.end(error)
            raise error

    def _call(self, future: Any, deadline: float) -> Any:
        return self._session.call(future, deadline, self._aborted)

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        slot, self._slot = self._slot, 0
        if slot:
            self._session.give_back_slot(slot, self._using)


def _shared_memory(name: str, num_bytes: int, *, first_used: int) -> mmap.mmap:
    """Memory of this name, of which all but the beginning is really there.

    Raises:
        ConfigError: `/dev/shm` is too small. To find out by writing would kill the process.
    """
    handle = os.open(f"/dev/shm/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(handle, num_bytes)
        os.posix_fallocate(handle, first_used, num_bytes - first_used)
        return mmap.mmap(handle, num_bytes)
    except OSError as error:
        os.unlink(f"/dev/shm/{name}")
        raise ConfigError(
            f"/dev/shm has no room for {num_bytes} bytes, through which chunks go to LMCache's multi-process server "
            f"({error.strerror}); make it larger, or set a smaller chunk_size"
        ) from error
    finally:
        os.close(handle)
