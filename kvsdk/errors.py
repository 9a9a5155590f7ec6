"""Errors that kvsdk raises. Every wait in the package ends in a result or in one of these."""

from __future__ import annotations

from typing import Any


class KVError(Exception):
    """Base of every error that kvsdk raises on purpose."""


class ConfigError(KVError, ValueError):
    """An option is unknown, out of range, or contradicts another; the message names it and what to change."""


class DeadlineExceeded(KVError, TimeoutError):
    """A wait reached its deadline. What was waited for is in an unknown state and its pipe is no longer usable."""


class PeerGone(KVError, ConnectionError):
    """The other side closed, died or was aborted."""


class PipeClosed(KVError):
    """This side was closed or aborted before the call, or while it ran."""


class PipeBusy(KVError):
    """Two threads used one direction of a pipe at the same time."""


class ProtocolError(KVError):
    """A message was malformed, too large, or of an unknown kind or version."""


class WindowUnavailable(KVError):
    """A worker's memory cannot be read in place by another one; the message says why. Another kind of pipe serves."""


class MismatchError(KVError):
    """Two servers cannot exchange KV: `field` is the first field that differs.

    Attributes:
        field: dotted name of the field, such as `layout.block_size`.
        ours: this side's value.
        theirs: the other side's value.
    """

    def __init__(self, field: str, ours: Any, theirs: Any):
        super().__init__(f"{field} differs: ours is {ours!r}, the peer's is {theirs!r}")
        self.field, self.ours, self.theirs = field, ours, theirs


class OfferTooLarge(KVError):
    """An offer needs more bytes than `kv_buffer_size` allows.

    Attributes:
        needed: bytes that the offer holds.
        limit: the limit, in bytes.
    """

    def __init__(self, needed: int, limit: int):
        super().__init__(
            f"an offer of {needed} bytes exceeds kv_buffer_size={limit}; set kv_buffer_size to at least {needed}"
        )
        self.needed, self.limit = needed, limit


class TaskEnded(KVError):
    """A task had already ended (done, failed or expired) when this was asked of it."""
