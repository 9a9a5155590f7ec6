"""What the workers of two servers say to each other beside the blocks themselves, and how servers compare before they
pair.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Mapping
from typing import Any

from kvsdk.buffer.wire import Field, Wire
from kvsdk.errors import ConfigError, MismatchError
from kvsdk.layout import check_same
from kvsdk.pipe import SLOTS

_ID = Field(str, limit=64)

WORKER_WIRE = Wire(
    "kvsdk.worker/6",
    {
        # consumer -> producer, to the worker's listener; answered once
        "open": {"pipe": _ID, "timeout": float, "chunk": int},
        "invited": {
            "invite": dict,
            "control": Field(str, limit=256),
            "chunk": int,
        },  # the invite: a window, or a pipe's
        "unavailable": {"reason": str},  # by this kind of pipe
        "refused": {"reason": str},
        # consumer -> producer, on the pair's own channel
        "read": {
            "read_id": int,
            "transfer_id": Field(str, limit=1024),
            "first": int,
            "count": int,
            "timeout": float,
            "wait": float,  # seconds for the first of these blocks to be computed
        },
        "stop": {"read_id": int},
        "bye": {},
        # the same with a window: mapped; may what was read count, which was not checked or differs; so many blocks were
        # read and are right
        "opened": {},
        "confirm": {"read_id": int},
        "took": {"read_id": int, "count": int},
        # producer -> consumer: none of these blocks is there yet, nor perhaps the offer itself
        "later": {"read_id": int, "known": bool},
        # so many blocks come now. `row` goes before a row of the pipe with so many of them, and has 8 bytes of digest a
        # block, little-endian; behind the row comes `sent`, or `failed`: then it is worth nothing. `failed`
        # may also come in place of a row
        "part": {"read_id": int, "count": int},
        "row": {"read_id": int, "count": int, "digests": bytes},
        "sent": {"read_id": int},
        "failed": {"read_id": int, "reason": str},
        # the same with a window: as many block ids as there are now, 4 bytes each, and digests; the offer still stands;
        # and, unasked, blocks of an offer as soon as they are digested
        "blocks": {"read_id": int, "ids": bytes, "digests": bytes},
        "stands": {"read_id": int},
        "digested": {
            "transfer_id": Field(str, limit=1024),
            "total": int,
            "first": int,
            "ids": bytes,
            "digests": bytes,
        },
    },
)

COMPARED = ("protocol", "model", "parallel", "layout", "digest")
"""What must be equal on two servers, in the order in which a difference is named."""

NO_DIGEST = "off"


STAGING_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""`staging_bytes` unless it is set, by the kind of device."""

ROW_CHUNKS, ROW_BYTES = 64, 2 << 30
"""Most messages of a row, and most bytes of one that has several: what is left of a row is sent on after a read has
failed. Between two rows everything stands still on both sides until the first one's last message is written."""


def row_blocks(chunk: int, block_bytes: int) -> int:
    """Most blocks of a row whose messages have `chunk` blocks each."""
    return chunk * max(1, min(ROW_CHUNKS, ROW_BYTES // (chunk * block_bytes)))


def chunk_blocks(staging_bytes: int, block_bytes: int) -> int:
    """Blocks of one message, if `staging_bytes` are to hold `SLOTS` messages."""
    return max(1, staging_bytes // (SLOTS * block_bytes))


def cut(count: int, chunk: int) -> list[int]:
    """Blocks of each message of a row of `count` blocks."""
    return [min(chunk, count - start) for start in range(0, count, chunk)]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a load's blocks are; travels from the consumer's scheduler half to its workers.

    Attributes:
        addresses: `host:port` of the producer's workers, by rank.
        transfer_id: names the offer, as `kvsdk.buffer.offer_name` does.
    """

    addresses: tuple[str, ...]
    transfer_id: str


def bind_address(kv_ip: str) -> str:
    """The IPv4 address that a producer binds, `kv_ip` itself or what that name resolves to.

    Raises:
        ConfigError: there is none.
    """
    try:
        return str(socket.getaddrinfo(kv_ip, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(f"kv_ip={kv_ip} has no IPv4 address ({error.strerror}); set it to one") from error


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raises MismatchError with the first field that differs, or with the pipes if there is none in common.

    A consumer that checks nothing takes blocks with any digest or none; one that checks refuses a producer that sends
    none.
    """
    names = [name for name in COMPARED if name != "digest" or ours["verify"]]
    check_same({name: ours[name] for name in names}, {name: theirs[name] for name in names if name in theirs})
    pipes = theirs.get("pipes")
    if not isinstance(pipes, list) or not any(kind in ours["pipes"] for kind in pipes):
        raise MismatchError("pipes", ours["pipes"], pipes)
