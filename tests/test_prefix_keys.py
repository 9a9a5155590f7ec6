"""Promises of prefix keys: equal keys mean equal prefixes, everywhere; whatever separates caches separates keys."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsdk.buffer import PrefixKeys, prefix_keys, separator
from kvsdk.buffer.keys import KEY_BYTES, MAX_BLOCKS
from kvsdk.errors import ProtocolError

tokens_lists = st.lists(st.integers(0, 1), min_size=1, max_size=24)


def keys_of(tokens, block_size=4, root=b""):
    return prefix_keys(np.array(tokens, dtype=np.int32), block_size, root)


@given(tokens_lists, tokens_lists, st.integers(1, 5))
def test_two_prompts_share_as_many_keys_as_whole_blocks(a, b, block_size):
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    keys_a, keys_b = keys_of(a, block_size), keys_of(b, block_size)
    expected = common // block_size
    assert keys_a.common_blocks(keys_b) == keys_b.common_blocks(keys_a) == expected
    assert [keys_a.key(i) == keys_b.key(i) for i in range(min(keys_a.num_blocks, keys_b.num_blocks))] == [
        i < expected for i in range(min(keys_a.num_blocks, keys_b.num_blocks))
    ]
    assert (keys_a.full_key == keys_b.full_key) == (a == b)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 12, 13])
def test_there_is_a_key_a_whole_block_and_a_tail_only_for_a_rest(length):
    keys = keys_of(range(length))
    assert (keys.num_tokens, keys.block_size, keys.num_blocks) == (length, 4, length // 4)
    assert len(keys.blocks) == KEY_BYTES * (length // 4)
    assert len(keys.tail) == (KEY_BYTES if length % 4 else 0)
    assert keys.full_key == (keys.tail or keys.key(length // 4 - 1))
    with pytest.raises(IndexError):
        keys.key(length // 4)


def test_a_tail_key_is_never_a_block_key():
    # The same three tokens: once as a whole block, once as the rest of a block of four; and as blocks of one.
    assert len({keys_of([1, 2, 3], 3).full_key, keys_of([1, 2, 3], 4).full_key, keys_of([1, 2, 3], 1).full_key}) == 3


def test_block_size_and_root_are_part_of_every_key():
    tokens = list(range(16))
    plain = keys_of(tokens, 4)
    assert plain.common_blocks(keys_of(tokens, 8)) == 0
    assert plain.common_blocks(keys_of(tokens, 4, b"other")) == 0
    # A root is not confused with tokens: these bytes are the first token's.
    assert keys_of([7, *tokens], 1).key(1) != keys_of(tokens, 1, b"\x07\0\0\0").key(0)
    assert not {plain.key(i) for i in range(4)} & {keys_of(tokens, 8).key(i) for i in range(2)}


DISTINCT = [
    {},
    {"cache_salt": ""},
    {"cache_salt": "a"},
    {"lora": "a"},
    {"lora": ""},
    {"extra": "a"},
    {"cache_salt": "a", "lora": "b"},
    {"cache_salt": "ab", "lora": ""},
    {"cache_salt": "", "lora": "ab"},
    {"multimodal": [("a", 0, 4)]},
    {"multimodal": [("a", 4, 0)]},
    {"multimodal": [("a", 0, 4), ("b", 4, 4)]},
    {"multimodal": [("b", 0, 4), ("a", 4, 4)]},
    {"multimodal": [("ab", 0, 4)]},
    {"cache_salt": "\ud800"},
]


def test_whatever_separates_caches_separates_roots():
    roots = [separator(**({"cache_salt": None, "lora": None, "multimodal": []} | given)) for given in DISTINCT]
    assert len(set(roots)) == len(DISTINCT)


def test_keys_are_the_same_in_every_process():
    code = (
        "import numpy as np; from kvsdk.buffer import prefix_keys, separator\n"
        "root = separator(cache_salt='s', lora=None, multimodal=[('i', 1, 2)])\n"
        "print(prefix_keys(np.arange(37, dtype=np.int32), 16, root).full_key.hex())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    # The literal pins the keys between releases: servers of two releases must find each other's prompts, or speak
    # another protocol.
    assert seen == {"5786736fdc275d8d5c2e88f88d89c37f"}


@given(tokens_lists, st.integers(1, 5))
def test_keys_survive_the_wire(tokens, block_size):
    keys = keys_of(tokens, block_size)
    assert PrefixKeys.from_wire(keys.to_wire()) == keys


GOOD = keys_of(range(9)).to_wire()


@pytest.mark.parametrize(
    "change",
    [
        {"num_tokens": 0},
        {"num_tokens": -1},
        {"num_tokens": 8},
        {"num_tokens": 12},
        {"num_tokens": True},
        {"num_tokens": 9.0},
        {"num_tokens": (MAX_BLOCKS + 1) * 4},
        {"block_size": 0},
        {"block_size": 2**20},
        {"block_size": 3},
        {"blocks": GOOD["blocks"][:-1]},
        {"blocks": "x" * 32},
        {"tail": b""},
        {"tail": None},
        {"more": 1},
    ],
    ids=str,
)
def test_keys_that_contradict_themselves_are_refused(change):
    with pytest.raises(ProtocolError):
        PrefixKeys.from_wire(GOOD | change)


@pytest.mark.parametrize("value", [None, [], {}, {"num_tokens": 1}], ids=str)
def test_what_is_not_keys_is_refused(value):
    with pytest.raises(ProtocolError):
        PrefixKeys.from_wire(value)


@pytest.mark.parametrize(
    ("tokens", "block_size"),
    [
        (np.zeros(0, np.int32), 4),
        (np.zeros(4, np.int64), 4),
        (np.zeros((2, 2), np.int32), 4),
        (np.zeros(4, np.int32), 0),
        (np.zeros(MAX_BLOCKS + 1, np.int32), 1),
    ],
    ids=["empty", "int64", "two-dimensional", "block_size 0", "too long"],
)
def test_what_has_no_keys_is_a_value_error(tokens, block_size):
    with pytest.raises(ValueError, match=r"tokens|block"):
        prefix_keys(tokens, block_size)
