"""An engine in a process of its own: what a connector keeps in its process's memory, another server does not see."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsdk.vllm.harness import Engine

ANSWER_TIMEOUT = 90.0
"""Most seconds that an engine's process takes to carry one operation out, its start included."""

END_TIMEOUT = 8.0
"""Most seconds that a process and the threads in it take to end once the engine is closed."""

_SEEN = (
    "answers",
    "at_rest",
    "finish_reasons",
    "hits",
    "loading",
    "num_blocks",
    "num_computed_tokens",
    "num_free_blocks",
    "outputs",
    "params",
    "stats",
    "written",
)


class EngineFailed(AssertionError):
    """What was raised in an engine's process, by name, with its traceback as a note."""


class EngineProcess:
    """A `kvsdk.vllm.harness.Engine` in a process of its own, with the part of its interface that a `World` uses.

    Attributes that tell what the engine's state is are those after its last operation.

    Args:
        kv_transfer_config: fields of vLLM's `KVTransferConfig`; must be picklable.
        ahead: seconds by which the engine's clock is ahead of `time.monotonic`.
        ready: called in the process with a list of the one engine; a function of a module that can be imported.
        engine: more arguments of `Engine`.

    Raises:
        EngineFailed: the engine's constructor raised; every method may.
    """

    def __init__(
        self,
        kv_transfer_config: Mapping[str, Any],
        *,
        ahead: float = 0.0,
        ready: Callable[[Sequence[Engine]], None] | None = None,
        **engine: Any,
    ):
        self.between: Callable[[], None] | None = None
        self._seen: dict[str, Any] = {}
        self._ready = ready
        self._process, self._connection = _idle.pop() if _idle else _new_process()
        self._closed = False
        try:
            self._call("start", dict(kv_transfer_config), ahead, engine)
        except BaseException:
            self.kill()
            raise

    def __getattr__(self, name: str) -> Any:
        if name in _SEEN:
            return self._seen[name]
        raise AttributeError(f"an engine in a process of its own has no {name!r}")

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        assert self._process.pid is not None
        return self._process.pid

    def wait_ready(self) -> None:
        """Have `ready` wait, in the engine's process."""
        if self._ready is not None:
            self._call("ready", self._ready)

    def add(self, request_id: str, prompt: Sequence[int], **more: Any) -> None:
        self._call("add", request_id, list(prompt), **more)

    def abort(self, request_id: str) -> None:
        self._call("abort", request_id)

    def step(self) -> bool:
        return bool(self._call("step"))

    def reset(self) -> bool:
        return bool(self._call("reset"))

    def advance(self, seconds: float) -> None:
        """Its clock jumps."""
        self._call("advance", seconds)

    def check_at_rest(self) -> None:
        self._call("check_at_rest")

    def kill(self) -> None:
        """The process dies where it stands."""
        if self._closed:
            return
        self._closed = True
        self._process.kill()
        self._process.join(END_TIMEOUT)
        self._connection.close()

    def close(self) -> None:
        """Shut the connectors down; another engine may have the process next. Twice is fine.

        Raises:
            EngineFailed: threads were left after `END_TIMEOUT` seconds, or the process does not answer.
        """
        if self._closed:
            return
        try:
            self._call("close", END_TIMEOUT)
        except BaseException:
            self.kill()
            raise
        self._closed = True
        _idle.append((self._process, self._connection))

    def _call(self, name: str, *args: Any, **more: Any) -> Any:
        try:
            self._connection.send((name, args, more))
            if not self._connection.poll(ANSWER_TIMEOUT):
                self.kill()  # or its answer would be taken for that of the next call
                raise EngineFailed(f"the engine's process has not answered for {ANSWER_TIMEOUT} s")
            failed, answer, seen = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(END_TIMEOUT)
            status = self._process.exitcode
            self.kill()
            raise EngineFailed(f"the engine's process died with {status}") from error
        except BaseException as error:
            if not isinstance(error, Exception):  # an interrupt, or a test's time is up: the answer is still to come
                self.kill()
            raise
        self._seen = seen or self._seen
        if failed:
            message, where = answer
            raised = EngineFailed(message)
            raised.add_note(f"in the engine's process:\n{where}")
            raise raised
        return answer


def threads_left(before: set[threading.Thread], timeout: float) -> list[str]:
    """The names of threads that began since and are there still after so many seconds.

    A pause of the whole machine counts for no more than one turn of this loop: the threads had no time either.
    """
    waited, at = 0.0, time.monotonic()
    while left := [one.name for one in set(threading.enumerate()) - before if one.is_alive()]:
        if waited >= timeout:
            break
        time.sleep(0.01)
        now = time.monotonic()
        waited, at = waited + min(now - at, 0.05), now
    return left


_idle: list[tuple[multiprocessing.process.BaseProcess, multiprocessing.connection.Connection]] = []
"""Processes without an engine: the next engine is quicker in one that has had one."""


def _new_process() -> tuple[multiprocessing.process.BaseProcess, multiprocessing.connection.Connection]:
    context = _context()
    near, far = context.Pipe()
    process = context.Process(target=_serve, args=(far,), name="kvsdk-engine", daemon=True)
    process.start()
    far.close()
    return process, near


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    """Processes are forked off one that has imported vLLM, which takes seconds, and has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kvsdk.vllm.harness"])
    return context


class _Server:
    """Carries operations out in the engine's process."""

    engine: Engine

    def start(self, kv_transfer_config: dict[str, Any], ahead: float, options: dict[str, Any]) -> None:
        from kvsdk.testing.world import Clock
        from kvsdk.vllm.harness import Engine

        self._threads = set(threading.enumerate())
        self._clock = Clock(real=True)
        self._clock.advance(ahead)
        self.engine = Engine(kv_transfer_config, clock=self._clock, **options)

    def advance(self, seconds: float) -> None:
        self._clock.advance(seconds)

    def ready(self, wait: Callable[[Sequence[Engine]], None]) -> None:
        wait([self.engine])

    def add(self, *args: Any, **more: Any) -> None:
        self.engine.add(*args, **more)

    def close(self, timeout: float) -> None:
        self.engine.close()
        left = threads_left(self._threads, timeout)
        assert not left, f"threads are left: {left}"

    def carry_out(self, name: str, args: tuple[Any, ...], more: dict[str, Any]) -> Any:
        operation = getattr(self, name, None) or getattr(self.engine, name)
        return operation(*args, **more)

    def seen(self) -> dict[str, Any]:
        return {name: getattr(self.engine, name) for name in _SEEN}


def _serve(connection: multiprocessing.connection.Connection) -> None:
    """The engine's process: one operation after the other, until whoever asks is gone."""
    server = _Server()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            name, args, more = connection.recv()
            try:
                answer = False, server.carry_out(name, args, more), server.seen()
            except Exception as error:  # noqa: BLE001 - the other process raises it
                answer = True, (f"{type(error).__name__}: {error}", traceback.format_exc()), {}
            connection.send(answer)
