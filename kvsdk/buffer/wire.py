"""Messages between servers: versioned msgpack, with declared kinds, fields and limits. Nothing is unpickled.

A message is the list `[protocol, kind, fields]`. The protocol, such as `kvsdk.buffer/2`, goes first, so that every
later version can still tell an older one which version it speaks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from kvsdk.errors import ProtocolError

MAX_MESSAGE_BYTES = 8 * 2**20
# An array's header alone makes the decoder allocate its slots, and arrays nest up to 1,024 deep; with this limit a
# hostile message costs 32 MiB for a moment. Anything longer, such as block ids, travels as bytes.
MAX_ITEMS = 4096

_DEFAULT_LIMITS = {str: 4096, bytes: MAX_MESSAGE_BYTES, list: MAX_ITEMS, dict: MAX_ITEMS}
_TYPES = (str, bytes, int, float, bool, list, dict)


class VersionError(ProtocolError):
    """A message in another version of the same protocol.

    Attributes:
        kind: what the message says it is.
        ours: this side's protocol.
        theirs: the sender's protocol.
    """

    def __init__(self, kind: str, ours: str, theirs: str):
        super().__init__(f"the protocol differs: ours is {ours}, the peer's is {theirs}")
        self.kind, self.ours, self.theirs = kind, ours, theirs


@dataclass(frozen=True)
class Field:
    """One field of a message.

    Attributes:
        type: `str`, `bytes`, `int`, `float` (finite; an int will do), `bool`, `list`, `dict`, or a mapping of field
            names to types or `Field`s for a dict with exactly these fields.
        optional: whether None is allowed. The field is there in any case.
        limit: the longest value: characters, bytes or items. 4,096 unless given; for bytes, the message's limit.
        of: for a list, what each item is: `str`, `bytes`, `int`, `float` or `bool`.
    """

    type: type | Mapping[str, Any]
    optional: bool = False
    limit: int | None = None
    of: type | None = None

    def __post_init__(self):
        if isinstance(self.type, Mapping):
            object.__setattr__(self, "type", _fields(self.type))
        elif self.type not in _TYPES:
            raise TypeError(f"{self.type!r} is not a type of a field")

    def check(self, name: str, value: Any) -> Any:
        """The value, a float made of an int where a float is declared. Raises ProtocolError otherwise."""
        if value is None and self.optional:
            return None
        if isinstance(self.type, dict):
            return check_fields(name, self.type, value)
        return _check_plain(name, self.type, value, self.limit, self.of)


class Wire:
    """Encodes and decodes the messages of one protocol. Immutable; any thread may use it."""

    def __init__(
        self,
        protocol: str,
        kinds: Mapping[str, Mapping[str, type | Field]],
        max_bytes: int = MAX_MESSAGE_BYTES,
    ):
        """
        Args:
            protocol: name and version, such as `kvsdk.buffer/2`.
            kinds: the fields of each kind of message. Every message has exactly the fields of its kind.
            max_bytes: the longest encoded message.
        """
        self.protocol, self.max_bytes = protocol, max_bytes
        self.name, _, self.version = protocol.rpartition("/")
        if not self.name:
            raise ValueError(f"protocol {protocol!r} is not of the form name/version")
        self.kinds = {kind: _fields(fields) for kind, fields in kinds.items()}

    def encode(self, kind: str, **fields: Any) -> bytes:
        """Raises ProtocolError if the fields are not those of `kind`, or the message would be too large."""
        checked = self._check(kind, fields)
        try:
            data = msgpack.packb([self.protocol, kind, checked], use_bin_type=True)
        except (TypeError, ValueError, OverflowError) as e:
            raise ProtocolError(f"{kind}: {e}") from e
        if len(data) > self.max_bytes:
            raise ProtocolError(f"{kind}: {len(data)} bytes are more than {self.max_bytes}")
        return data

    def decode(self, data: bytes) -> tuple[str, dict[str, Any]]:
        """The kind and the fields of a message that anybody may have sent.

        Raises:
            VersionError: another version of this protocol.
            ProtocolError: anything else that is not a message of this protocol.
        """
        if len(data) > self.max_bytes:
            raise ProtocolError(f"{len(data)} bytes are more than {self.max_bytes}")
        try:
            message = msgpack.unpackb(
                data,
                raw=False,
                strict_map_key=True,
                max_str_len=self.max_bytes,
                max_bin_len=self.max_bytes,
                max_array_len=MAX_ITEMS,
                max_map_len=MAX_ITEMS,
                max_ext_len=0,
            )
        except (ValueError, msgpack.UnpackException) as e:
            raise ProtocolError(f"not msgpack within the limits: {type(e).__name__}: {e}"[:200]) from e
        if type(message) is not list or len(message) != 3 or type(message[0]) is not str or type(message[1]) is not str:
            raise ProtocolError("not a list of protocol, kind and fields")
        protocol, kind, fields = message
        if protocol != self.protocol:
            name, _, version = protocol.rpartition("/")
            if name == self.name and len(version) <= 16:
                raise VersionError(kind[:64], self.protocol, protocol)
            raise ProtocolError(f"protocol {protocol[:64]!r}, not {self.protocol!r}")
        return kind, self._check(kind, fields)

    def _check(self, kind: str, fields: Any) -> dict[str, Any]:
        spec = self.kinds.get(kind)
        if spec is None:
            raise ProtocolError(f"unknown kind {kind[:64]!r}")
        return check_fields(kind, spec, fields)


def check_fields(name: str, spec: Mapping[str, Field], value: Any) -> dict[str, Any]:
    """`value`, if it is a dict with exactly the fields of `spec`; raises ProtocolError otherwise."""
    if type(value) is not dict or value.keys() != spec.keys():
        given = sorted(map(str, value))[:32] if type(value) is dict else type(value).__name__
        raise ProtocolError(f"{name}: needs the fields {sorted(spec)}, not {given}"[:400])
    return {key: field.check(f"{name}.{key}", value[key]) for key, field in spec.items()}


def _fields(spec: Mapping[str, Any]) -> dict[str, Field]:
    return {name: field if isinstance(field, Field) else Field(field) for name, field in spec.items()}


def _check_plain(name: str, wanted: type, value: Any, limit: int | None, of: type | None) -> Any:
    if wanted is float and type(value) is int:
        # An int of msgpack has 64 bits at most, so this cannot overflow.
        value = float(value)
    if type(value) is not wanted:
        raise ProtocolError(f"{name}: {type(value).__name__}, not {wanted.__name__}")
    if wanted is float and not math.isfinite(value):
        raise ProtocolError(f"{name}: {value}")
    longest = _DEFAULT_LIMITS.get(wanted) if limit is None else limit
    if longest is not None and len(value) > longest:
        raise ProtocolError(f"{name}: length {len(value)} is more than {longest}")
    if of is not None:
        for item in value:
            _check_plain(f"{name}[]", of, item, None, None)
    return value


_ID = Field(str, limit=128)
_ENGINE = Field(str, limit=512)
_KEYS = {"num_tokens": int, "block_size": int, "blocks": bytes, "tail": Field(bytes, limit=16)}
_CLAIM = {
    "claim_id": _ID,
    "transfer_id": Field(str, limit=1024),
    "num_tokens": int,
    "exclusive": bool,
    "generation": int,
}

# The lookup protocol. The first half is what consumers send; each message that decodes gets exactly one reply.
BUFFER_WIRE = Wire(
    "kvsdk.buffer/2",
    {
        "hello": {"identity": dict},
        "find": {"ticket": int, "keys": _KEYS, "min_tokens": int},
        "find_by_id": {
            "ticket": int,
            "transfer_id": Field(str, limit=1024),
            "keys": Field(_KEYS, optional=True),
            "min_tokens": int,
        },
        "renew": {"claim_ids": Field(list, of=str)},
        "release": {"claim_id": _ID, "used": bool},
        "ping": {},
        # Replies, in the same order.
        "welcome": {"engine_id": _ENGINE, "identity": dict, "lease": float},
        "refused": {"engine_id": _ENGINE, "field": str, "ours": str, "theirs": str},
        # `heard` is false when no offer of the asked id has been here.
        "found": {"ticket": int, "claim": Field(_CLAIM, optional=True), "heard": bool},
        "renewed": {"alive": Field(list, of=str), "ended": Field(list, of=str)},
        "released": {"claim_id": _ID, "known": bool},
        "pong": {"engine_id": _ENGINE},
        # In place of any of them: say hello first; something went wrong here.
        "hello_first": {"engine_id": _ENGINE, "ticket": Field(int, optional=True)},
        "error": {"message": str, "ticket": Field(int, optional=True)},
    },
)
