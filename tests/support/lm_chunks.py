"""Bytes as chunks of one block, put and got over any connection."""

from __future__ import annotations

import types

import torch

from kvsdk.connectors.lmcache.chunks import ChunkFormat, Incoming, Outgoing


def form_of(size):
    """Chunks of so many bytes, a multiple of 8."""
    return ChunkFormat(types.SimpleNamespace(block_bytes=size), 1)


def put(connection, name, payload, deadline):
    """Whether the server has kept it."""
    return connection.put(Outgoing(form_of(len(payload)), name, [1], tensor(payload)), deadline)


def get(connection, name, size, deadline):
    """What is there, or None; damaged pieces as they are."""
    payload = torch.zeros(size, dtype=torch.uint8)
    found = connection.get(Incoming(form_of(size), name, payload, verify=False), deadline)
    return payload.numpy().tobytes() if found else None


def tensor(payload):
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)
