"""Promises of the wire: what is declared gets through, anything else is a ProtocolError and nothing worse."""

from __future__ import annotations

import math

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvsdk.buffer import BUFFER_WIRE, Field, VersionError, Wire
from kvsdk.errors import ProtocolError

WIRE = Wire(
    "kvsdk.test/2",
    {
        "empty": {},
        "all": {
            "text": Field(str, limit=5),
            "data": bytes,
            "number": int,
            "time": float,
            "flag": bool,
            "names": Field(list, of=str),
            "extra": dict,
            "maybe": Field(int, optional=True),
            "nested": {"a": int, "b": Field({"c": bool}, optional=True)},
        },
    },
    max_bytes=1000,
)
ALL = {
    "text": "äöü",
    "data": b"\0\xff",
    "number": -(2**63),
    "time": 1.5,
    "flag": False,
    "names": ["a", ""],
    "extra": {"x": [1, None, {"y": b""}]},
    "maybe": None,
    "nested": {"a": 1, "b": {"c": True}},
}


def raw(kind, fields, protocol="kvsdk.test/2"):
    return msgpack.packb([protocol, kind, fields])


def test_what_is_declared_gets_through():
    assert WIRE.decode(WIRE.encode("all", **ALL)) == ("all", ALL)
    assert WIRE.decode(WIRE.encode("empty")) == ("empty", {})


def test_an_int_will_do_for_a_float():
    _, fields = WIRE.decode(raw("all", ALL | {"time": 30}))
    assert type(fields["time"]) is float
    assert fields["time"] == 30.0


BAD_FIELDS = [
    {"text": "sixsix"},
    {"text": b"bytes"},
    {"text": None},
    {"data": "text"},
    {"number": True},
    {"number": 1.0},
    {"time": math.nan},
    {"time": math.inf},
    {"time": True},
    {"flag": 1},
    {"names": "ab"},
    {"names": [1]},
    {"extra": []},
    {"maybe": "1"},
    {"nested": {"a": 1}},
    {"nested": {"a": 1, "b": {"c": None}}},
    {"nested": None},
    {"unknown": 1},
]


@pytest.mark.parametrize("change", BAD_FIELDS, ids=str)
def test_a_field_of_another_type_or_length_is_refused_on_both_sides(change):
    with pytest.raises(ProtocolError):
        WIRE.encode("all", **(ALL | change))
    with pytest.raises(ProtocolError):
        WIRE.decode(raw("all", ALL | change))


def test_a_missing_field_and_an_unknown_kind_are_refused_on_both_sides():
    missing = {name: value for name, value in ALL.items() if name != "flag"}
    for kind, fields in (("all", missing), ("unheard", {})):
        with pytest.raises(ProtocolError):
            WIRE.encode(kind, **fields)
        with pytest.raises(ProtocolError):
            WIRE.decode(raw(kind, fields))


def test_a_message_has_a_largest_size_on_both_sides():
    overhead = len(WIRE.encode("all", **ALL | {"data": b"x" * 300})) - 300
    WIRE.decode(WIRE.encode("all", **ALL | {"data": b"x" * (1000 - overhead)}))
    with pytest.raises(ProtocolError, match="1001 bytes are more than 1000"):
        WIRE.encode("all", **ALL | {"data": b"x" * (1001 - overhead)})
    with pytest.raises(ProtocolError, match="1001 bytes are more than 1000"):
        WIRE.decode(raw("all", ALL | {"data": b"x" * (1001 - overhead)}))


def test_another_version_is_told_from_another_protocol():
    with pytest.raises(VersionError) as caught:
        WIRE.decode(raw("hello", {"whatever": 1}, "kvsdk.test/3"))
    assert (caught.value.kind, caught.value.ours, caught.value.theirs) == ("hello", "kvsdk.test/2", "kvsdk.test/3")
    for protocol in ("kvsdk.buffer/2", "", "kvsdk.test/" + "9" * 100):
        with pytest.raises(ProtocolError) as other:
            WIRE.decode(raw("hello", {}, protocol))
        assert not isinstance(other.value, VersionError)


@given(st.binary(max_size=200))
@example(b"\xc1")  # never used by msgpack
@example(b"\xdd\x7f\xff\xff\xff")  # an array of two billion items
@example(b"\xdf\x7f\xff\xff\xff")  # a map as large
@example(b"\xdc\x0f\xff" * 60)  # arrays within arrays, each within the limit
@example(b"\x91" * 150)  # deep
@example(b"\xd6\xff\0\0\0\1")  # a timestamp
@example(b"\xc7\x03\x05abc")  # an extension
@example(raw("all", {1: 2}))
@example(raw("empty", {}) + b"\0")
@example(raw(b"empty", {}))
@example(msgpack.packb(["kvsdk.test/2", "empty"]))
@example(msgpack.packb(["kvsdk.test/2", "empty", {}, {}]))
@example(msgpack.packb({"protocol": "kvsdk.test/2"}))
@example(b"\x93\xackvsdk.test/2\xa1\xff\x80")  # not UTF-8
def test_bytes_of_a_stranger_are_a_protocol_error_and_nothing_worse(data):
    with pytest.raises(ProtocolError):
        WIRE.decode(data)


def test_what_cannot_travel_is_an_error_of_the_sender():
    for value in ({"x": object()}, {"x": 2**70}, {"x": "\ud800"}):
        with pytest.raises(ProtocolError):
            WIRE.encode("all", **ALL | {"extra": value})


def test_a_table_of_kinds_is_checked_when_it_is_made():
    with pytest.raises(TypeError):
        Wire("kvsdk.test/1", {"kind": {"field": set}})
    with pytest.raises(ValueError, match="name/version"):
        Wire("kvsdk", {})


def test_the_longest_prompt_fits_one_message():
    from kvsdk.buffer.keys import KEY_BYTES, MAX_BLOCKS

    keys = {"num_tokens": MAX_BLOCKS, "block_size": 1, "blocks": b"k" * (KEY_BYTES * MAX_BLOCKS), "tail": b""}
    data = BUFFER_WIRE.encode("find", ticket=1, keys=keys, min_tokens=0)
    assert BUFFER_WIRE.decode(data)[1]["keys"] == keys
