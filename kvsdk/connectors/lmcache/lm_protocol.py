"""The messages of LMCache's `lm://` server (`python -m lmcache.v1.server`), as bytes. Pure functions.

Native-endian int32 fields over TCP, without a version or a checksum. A request has 186 bytes; a PUT's is followed by
the payload and has **no reply**. A reply has 36 bytes; that of a GET which found something is followed by the payload.
The server answers the requests of one connection in order, and closes the connection on what it cannot read.
"""

from __future__ import annotations

import enum
import struct

from kvsdk.errors import ProtocolError

MAX_KEY_BYTES = 150

_REQUEST = struct.Struct(f"=9i{MAX_KEY_BYTES}s")
_REPLY = struct.Struct("=9i")
REQUEST_BYTES = _REQUEST.size
REPLY_BYTES = _REPLY.size

MAX_PAYLOAD_BYTES = 2**31 - 1
"""Lengths are signed 32-bit numbers."""

_BINARY, _UINT8 = 4, 6  # LMCache's numbers for bytes without a shape of their own
_SUCCESS, _FAIL = 200, 400


class Command(enum.IntEnum):
    """What a request asks for."""

    PUT = 1
    GET = 2
    EXIST = 3
    HEALTH = 5


def encode_request(command: Command, key: str, length: int = 0) -> bytes:
    """The 186 bytes of a request.

    Args:
        key: `model@world@worker@hash@dtype`; the server parses it, and closes the connection if it cannot.
        length: bytes of the payload that follows; 0 unless it is a PUT.

    Raises:
        ProtocolError: the key or the length does not fit.
    """
    encoded = key.encode("ascii", "replace")
    if len(encoded) > MAX_KEY_BYTES or b" " in encoded or b"?" in encoded:
        raise ProtocolError(f"{key!r} is no key: at most {MAX_KEY_BYTES} ASCII characters without blanks")
    if not 0 <= length <= MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"a payload of {length} bytes cannot be announced, {MAX_PAYLOAD_BYTES} is the most")
    return _REQUEST.pack(command, length, _BINARY, _UINT8, 0, length, 0, 0, 0, encoded.ljust(MAX_KEY_BYTES))


def decode_reply(data: bytes | bytearray) -> int | None:
    """The length of the payload that follows a reply, 0 for one without; None if the answer is *no*.

    Raises:
        ProtocolError: this is no reply, or the payload is of another kind than what `encode_request` announces.
    """
    if len(data) != REPLY_BYTES:
        raise ProtocolError(f"a reply of {len(data)} bytes, not {REPLY_BYTES}")
    code, length, kind, dtype, *shape, _ = _REPLY.unpack(data)
    if code == _FAIL:
        return None
    if code != _SUCCESS:
        raise ProtocolError(f"a reply with the code {code}")
    if length < 0:
        raise ProtocolError(f"a payload of {length} bytes")
    if length and (kind, dtype, *shape) != (_BINARY, _UINT8, length, 0, 0, 0):
        raise ProtocolError(f"a payload of kind {kind}, dtype {dtype} and shape {shape}, which kvsdk does not store")
    return length
