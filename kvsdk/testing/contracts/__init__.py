"""Contracts of kvsdk's parts as functions: anyone can check an implementation of their own.

They import no test framework. Each raises `BrokenPromise`, an AssertionError that names the promise, and each has its
list of promises, so that a test framework can run them one by one:

    @pytest.mark.parametrize("promise", PIPE_PROMISES, ids=str)
    def test_my_pipe(promise):
        check_pipe(make_pair, promises=[promise])
"""

from kvsdk.testing.contracts.layout import LAYOUT_PROMISES, Caches, check_layout, usual_caches
from kvsdk.testing.contracts.lookup_buffer import LOOKUP_BUFFER_PROMISES, check_lookup_buffer
from kvsdk.testing.contracts.pipe import PIPE_PROMISES, check_pipe
from kvsdk.testing.contracts.promise import BrokenPromise, Contract, Promise

__all__ = [
    "LAYOUT_PROMISES",
    "LOOKUP_BUFFER_PROMISES",
    "PIPE_PROMISES",
    "BrokenPromise",
    "Caches",
    "Contract",
    "Promise",
    "check_layout",
    "check_lookup_buffer",
    "check_pipe",
    "usual_caches",
]
