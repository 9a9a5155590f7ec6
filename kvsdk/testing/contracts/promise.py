"""How a contract is written down and checked: promises in words, each with a function that finds it broken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

PATIENCE = 10.0
"""Seconds that anything which should happen at once may take on a machine that has much else to do."""


class BrokenPromise(AssertionError):
    """An implementation does not do what its contract says.

    Attributes:
        promise: the promise in words, as it stands in the contract's list.
        detail: what happened instead.
    """

    def __init__(self, promise: str, detail: str):
        super().__init__(f"broken promise: {promise}: {detail}")
        self.promise, self.detail = promise, detail


class Promise:
    """One promise of a contract.

    Attributes:
        name: the promise in words.
        check: called with the contract's subject; raises when the promise is broken.
        needs: name of an attribute of the subject without which the promise is not checked; empty if none.
    """

    def __init__(self, name: str, check: Callable[[Any], None], needs: str = ""):
        self.name, self.check, self.needs = name, check, needs

    def __str__(self) -> str:
        return self.name


class Contract(list[Promise]):
    """Promises in the order in which they are checked; later ones rely on earlier ones."""

    def promise(self, name: str, needs: str = "") -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
        """Decorates a check; adds it to the contract."""

        def add(check: Callable[[Any], None]) -> Callable[[Any], None]:
            self.append(Promise(name, check, needs))
            return check

        return add


def check_promises(promises: Iterable[Promise], subject: Any) -> None:
    """Checks one promise after the other.

    Raises:
        BrokenPromise: the first that is broken.
    """
    for promise in promises:
        if promise.needs and not getattr(subject, promise.needs):
            continue
        try:
            promise.check(subject)
        except AssertionError as error:
            raise BrokenPromise(promise.name, str(error)) from error
        except Exception as error:
            raise BrokenPromise(promise.name, f"unexpectedly raised {type(error).__name__}: {error}") from error


def demand(kept: bool, detail: str) -> None:
    """Raises AssertionError with `detail` unless `kept`; unlike `assert`, also under `python -O`."""
    if not kept:
        raise AssertionError(detail)


class Call:
    """A call in a thread of its own, since what is under test may never come back from it."""

    def __init__(self, call: Callable[..., Any], *args: Any, patience: float, **kwargs: Any):
        self._name = getattr(call, "__name__", "a call")
        self._patience = patience
        self._future: Future[Any] = Future()
        self._started = threading.Event()
        threading.Thread(
            target=self._run, args=(call, args, kwargs), name=f"kvsdk-contract-{self._name}", daemon=True
        ).start()

    def _run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._started.set()
        try:
            self._future.set_result(call(*args, **kwargs))
        except BaseException as error:
            self._future.set_exception(error)
            if not isinstance(error, Exception):
                raise

    @property
    def over(self) -> bool:
        return self._future.done()

    def settle(self, seconds: float) -> Call:
        """Lets the call get to where it waits; returns itself."""
        self._started.wait(self._patience)
        time.sleep(seconds)
        return self

    def result(self) -> Any:
        """What the call returned or raised; AssertionError when it does not end."""
        error = self.error()
        if error is not None:
            raise error
        return self._future.result()

    def error(self) -> BaseException | None:
        """What the call raised, or None; AssertionError when it does not end."""
        try:
            return self._future.exception(self._patience)
        except TimeoutError:
            raise AssertionError(f"{self._name} did not end within {self._patience:g} s") from None

    def raises(self, *wanted: type[BaseException]) -> BaseException:
        """The error, which must be of one of these types."""
        names = " or ".join(kind.__name__ for kind in wanted)
        error = self.error()
        demand(error is not None, f"{self._name} returned where {names} was due")
        demand(isinstance(error, wanted), f"{self._name} raised {type(error).__name__} ({error}) where {names} was due")
        assert error is not None
        return error


def raises(wanted: type[BaseException], call: Callable[..., Any], *args: Any, **kwargs: Any) -> BaseException:
    """Calls what cannot hang; returns the error, which must be of this type."""
    name = getattr(call, "__name__", "a call")
    try:
        call(*args, **kwargs)
    except wanted as error:
        return error
    except Exception as error:
        raise AssertionError(
            f"{name} raised {type(error).__name__} ({error}) where {wanted.__name__} was due"
        ) from error
    raise AssertionError(f"{name} returned where {wanted.__name__} was due")
