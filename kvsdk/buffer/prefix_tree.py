"""Which offers start with a prompt's blocks: a radix tree over prefix keys."""

from __future__ import annotations

from kvsdk.buffer.keys import KEY_BYTES, common_keys


class _Node:
    """A run of keys that all of `members` share, and what they go on with.

    Attributes:
        run: the keys, concatenated; never empty but in the tree's root.
        children: the next nodes, by the first key of their run.
        members: names of everything that goes through the whole run, oldest first (a dict for its order).
    """

    __slots__ = ("children", "members", "run")

    def __init__(self, run: bytes, children: dict[bytes, _Node], members: dict[str, None]):
        self.run, self.children, self.members = run, children, members


class PrefixTree:
    """Names of prompts, found by their first blocks. Not thread-safe.

    A run of blocks without a branch is one node, so an operation costs one dict look-up and one comparison of bytes a
    branching point, and no Python code runs for each block. Nodes number at most twice the names.
    """

    def __init__(self):
        self._root = _Node(b"", {}, {})

    def insert(self, blocks: bytes, name: str) -> None:
        """Add `name` under `blocks` (concatenated keys). It counts as younger than every name already there."""
        node, at = self._root, 0
        while at < len(blocks):
            first = blocks[at : at + KEY_BYTES]
            child = node.children.get(first)
            if child is None:
                node.children[first] = _Node(blocks[at:], {}, {name: None})
                return
            shared = common_keys(child.run, blocks, at) * KEY_BYTES
            if shared < len(child.run):
                upper = _Node(child.run[:shared], {child.run[shared : shared + KEY_BYTES]: child}, dict(child.members))
                child.run = child.run[shared:]
                node.children[first] = child = upper
            child.members[name] = None
            node, at = child, at + shared

    def remove(self, blocks: bytes, name: str) -> None:
        """Take `name` out again; `blocks` are those it was inserted under. Raises KeyError if it is not there."""
        node, at, path = self._root, 0, []
        while at < len(blocks):
            first = blocks[at : at + KEY_BYTES]
            child = node.children[first]
            del child.members[name]
            if not child.members:
                del node.children[first]
                break
            path.append(child)
            node, at = child, at + len(child.run)
        # Without merging, a long-lived name would be cut into one node for every short-lived one that branched off it.
        for node in reversed(path):
            if len(node.children) == 1:
                (child,) = node.children.values()
                if len(child.members) == len(node.members):
                    node.run, node.children, node.members = node.run + child.run, child.children, child.members

    def find(self, blocks: bytes) -> tuple[int, str] | None:
        """The most blocks that any name shares with the start of `blocks`, and the oldest name that shares them."""
        node, at = self._root, 0
        while True:
            child = node.children.get(blocks[at : at + KEY_BYTES])
            if child is None:
                break
            shared = common_keys(child.run, blocks, at) * KEY_BYTES
            node, at = child, at + shared
            if shared < len(child.run):
                break
        return (at // KEY_BYTES, next(iter(node.members))) if at else None
