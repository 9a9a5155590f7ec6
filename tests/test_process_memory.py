"""Reading another process's memory: what is copied, and what is said when it cannot be."""

import ctypes
import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest
import torch

from kvsdk.errors import KVError, PeerGone
from kvsdk.kernels import process_memory
from kvsdk.kernels.process_memory import read_process

SIZE = 1 << 20


def serve(connection):
    memory = (np.arange(SIZE, dtype=np.uint64) * 7919 >> 3).astype(np.uint8)
    connection.send(memory.ctypes.data)
    connection.recv()


@pytest.fixture
def other():
    """Another process: its number, and where its memory lies."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    yield process, ours.recv()
    process.kill()
    process.join()


EXPECTED = (np.arange(SIZE, dtype=np.uint64) * 7919 >> 3).astype(np.uint8)


@pytest.mark.parametrize("count", [1, 1024, 1025, 3000])
def test_pieces_come_one_behind_the_other(other, count):
    process, start = other
    offsets = np.random.default_rng(count).integers(0, SIZE - 100, count)
    into = torch.zeros(count * 100 + 1, dtype=torch.uint8)
    read_process(process.pid, start + offsets.astype(np.uint64), 100, into)
    np.testing.assert_array_equal(into[:-1].view(count, 100).numpy(), EXPECTED[offsets[:, None] + np.arange(100)])
    assert into[-1] == 0


def test_nothing_is_nothing(other):
    read_process(other[0].pid, np.empty(0, np.uint64), 100, torch.empty(0, dtype=torch.uint8))


def read_until_it_fails(pid, places, into):
    while True:
        read_process(pid, places, SIZE, into)


def test_a_process_that_is_killed_meanwhile_ends_in_an_error(other):
    process, start = other
    into, places = torch.empty(100 * SIZE, dtype=torch.uint8), np.full(100, start, np.uint64)
    timer = threading.Timer(0.1, os.kill, [process.pid, signal.SIGKILL])
    timer.start()
    with pytest.raises(KVError, match=r"is gone|has no memory there"):
        read_until_it_fails(process.pid, places, into)
    process.join()
    with pytest.raises(PeerGone, match=f"process {process.pid} is gone"):
        read_process(process.pid, places, SIZE, into)


@pytest.mark.parametrize("places", [[8], [None, 8], [8, None]], ids=["none", "the first alone", "the last alone"])
def test_memory_that_is_not_there_is_an_error(other, places):
    process, start = other
    with pytest.raises(KVError, match="has no memory there"):
        read_process(
            process.pid,
            np.array([start if at is None else at for at in places], np.uint64),
            16,
            torch.empty(16 * len(places), dtype=torch.uint8),
        )


def refused(pid, start, connection):
    os.setgid(65534)
    os.setuid(65534)
    try:
        read_process(pid, np.array([start], np.uint64), 16, torch.empty(16, dtype=torch.uint8))
    except KVError as error:
        connection.send(str(error))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_users_process_is_not_read():
    memory = ctypes.create_string_buffer(16)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=refused, args=(os.getpid(), ctypes.addressof(memory), theirs))
    process.start()
    assert ours.poll(30) and ours.recv() == f"process {os.getpid()} cannot be read: Operation not permitted"
    process.join()


def test_a_system_that_cannot_says_so(monkeypatch):
    monkeypatch.setattr(process_memory, "_readv", None)
    with pytest.raises(KVError, match="no process_vm_readv"):
        read_process(os.getpid(), np.array([8], np.uint64), 1, torch.empty(1, dtype=torch.uint8))
