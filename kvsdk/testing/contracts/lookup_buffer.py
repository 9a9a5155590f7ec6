"""What every lookup buffer promises: each offer ends once, the ledger returns to zero, nobody waits for ever."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from kvsdk.buffer import BufferFull, LookupBuffer, PrefixKeys, prefix_keys
from kvsdk.errors import KVError, OfferTooLarge
from kvsdk.testing.contracts.promise import PATIENCE, Call, Contract, Promise, check_promises, demand, raises

LOOKUP_BUFFER_PROMISES = Contract()
"""In the order in which `check_lookup_buffer` checks them."""

_promise = LOOKUP_BUFFER_PROMISES.promise

_BLOCK_SIZE, _BLOCK_BYTES, _LEASE = 4, 100, 30.0
_TEN = tuple(range(10))  # two whole blocks and a tail


def check_lookup_buffer(
    make: Callable[..., LookupBuffer],
    *,
    patience: float = PATIENCE,
    promises: Iterable[Promise] = LOOKUP_BUFFER_PROMISES,
) -> None:
    """Checks that a lookup buffer keeps what `kvsdk.buffer.LookupBuffer` promises.

    Args:
        make: called with the keywords `limit_bytes`, `block_bytes`, `lease` and `clock`, as the class itself may be;
            returns an empty buffer that takes the time from `clock` alone. So a lease of 30 s takes no time here.
        patience: seconds that calls from several threads may take together.
        promises: those to check; for example one in each test.

    Raises:
        BrokenPromise: an AssertionError that names the first broken promise, and says what happened.
    """
    check_promises(promises, _Buffers(make, patience))


class _Buffers:
    """Makes buffers, and moves the time that they see."""

    def __init__(self, make: Callable[..., LookupBuffer], patience: float):
        self._make, self.patience = make, patience
        self.now = 1000.0

    def new(self, limit_blocks: int = 100) -> LookupBuffer:
        return self._make(
            limit_bytes=limit_blocks * _BLOCK_BYTES, block_bytes=_BLOCK_BYTES, lease=_LEASE, clock=lambda: self.now
        )

    def two(self) -> LookupBuffer:
        """Holds offer `a` of blocks 0 and 1, and the younger `b` of blocks 2 and 3."""
        buffer = self.new()
        for i, name in enumerate("ab"):
            buffer.insert(_keys([i] * 8), _ids(2 * i, 2 * i + 1), name)
        return buffer


def _keys(tokens: Iterable[int]) -> PrefixKeys:
    return prefix_keys(np.array(list(tokens), dtype=np.int32), _BLOCK_SIZE)


def _ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def _same(what: str, got: Any, wanted: Any) -> None:
    demand(got == wanted, f"{what} is {got!r}, not {wanted!r}")


def _ended(buffer: LookupBuffer, *wanted: tuple[str, str]) -> None:
    _same("what take_ended hands over", [(o.transfer_id, o.reason) for o in buffer.take_ended()], list(wanted))


def _at_rest(buffer: LookupBuffer) -> None:
    _same("bytes_held", buffer.bytes_held, 0)
    _same("num_offers", buffer.num_offers, 0)
    _same("num_claims", buffer.num_claims, 0)
    _same("next_deadline()", buffer.next_deadline(), None)


def _granted(claim: Any) -> Any:
    demand(claim is not None, "no claim was granted")
    return claim


@_promise("an offer is found by its prompt, and ends once its claim is released as used")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    offer = buffer.insert(_keys(_TEN), _ids(5, 6, 7))
    _same("expires_at", offer.expires_at, buffers.now + _LEASE)
    claim = _granted(buffer.drop_select(_keys(_TEN)))
    _same("the claim", (claim.transfer_id, claim.num_tokens, claim.exclusive), (offer.transfer_id, 10, True))
    _same("the claim's generation and end", (claim.generation, claim.expires_at), (offer.generation, buffers.now + 30))
    demand(buffer.standing(offer.transfer_id), "the offer ended with the claim")
    _ended(buffer)
    demand(buffer.release(claim.claim_id, used=True), "release says that the claim was not alive")
    demand(not buffer.standing(offer.transfer_id), "the offer stands although it was used")
    (gone,) = buffer.take_ended()
    _same("what ended", (gone.transfer_id, gone.block_ids.tolist()), (offer.transfer_id, [5, 6, 7]))
    _same("the reason", gone.reason, "released")
    _at_rest(buffer)


@_promise("an offer is claimed exclusively once")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    buffer.insert(_keys(_TEN), _ids(5, 6, 7))
    _granted(buffer.drop_select(_keys(_TEN)))
    _same("a second drop_select", buffer.drop_select(_keys(_TEN)), None)
    demand(not _granted(buffer.find(_keys(_TEN))).exclusive, "find claims a claimed offer exclusively")


@_promise("of many threads one gets an offer exclusively")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    prompts = [_keys([i, i]) for i in range(40)]
    for i, keys in enumerate(prompts):
        buffer.insert(keys, _ids(i))
    barrier = threading.Barrier(4)

    def consume() -> list[str]:
        barrier.wait(buffers.patience)
        claims = [buffer.drop_select(keys) for keys in prompts]
        for claim in claims:
            if claim is not None:
                buffer.release(claim.claim_id, used=True)
        return [claim.transfer_id for claim in claims if claim is not None]

    calls = [Call(consume, patience=buffers.patience) for _ in range(4)]
    claimed = [name for call in calls for name in call.result()]
    _same("exclusive claims", (len(claimed), len(set(claimed))), (40, 40))
    _same("ended offers", len(buffer.take_ended()), 40)
    _at_rest(buffer)


@_promise("drop_select takes no other prompt, be it longer, shorter or different")
def _(buffers: _Buffers) -> None:
    for other in (_TEN[:9], _TEN[:8], (*_TEN, 10), (*_TEN[:9], 0), (9, *_TEN[1:]), (0,)):
        buffer = buffers.new()
        buffer.insert(_keys(_TEN), _ids(5, 6, 7))
        _same(f"the claim of {other}", buffer.drop_select(_keys(other)), None)


@_promise("select shares whole blocks or the whole prompt, and never more than there is")
def _(buffers: _Buffers) -> None:
    cases = {
        _TEN: 10,
        (*_TEN, 10, 11): 8,
        _TEN[:9]: 8,
        _TEN[:8]: 8,
        (*_TEN[:7], 99, 8, 9): 4,
        _TEN[:5]: 4,
        _TEN[:3]: 0,
        (99, *_TEN[1:]): 0,
    }
    for prompt, num_tokens in cases.items():
        buffer = buffers.new()
        buffer.insert(_keys(_TEN), _ids(5, 6, 7))
        claim = buffer.select(_keys(prompt))
        _same(f"the match of {prompt}", claim.num_tokens if claim else 0, num_tokens)
        demand(claim is None or not claim.exclusive, "a shared claim is exclusive")
        _same(f"select beyond {num_tokens}", buffer.select(_keys(prompt), min_tokens=num_tokens), None)
        if num_tokens:
            _granted(buffer.select(_keys(prompt), min_tokens=num_tokens - 1))


@_promise("select takes the longest match, and the oldest of equals")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    buffer.insert(_keys(_TEN[:4]), _ids(0), "short")
    buffer.insert(_keys([*_TEN[:8], 50]), _ids(0, 1, 2), "long, old")
    buffer.insert(_keys([*_TEN[:8], 60]), _ids(0, 1, 3), "long, young")
    for prompt, wanted in (
        ([*_TEN[:8], 70], "long, old"),
        ([*_TEN[:8], 60], "long, young"),
        ([*_TEN[:4], 70], "short"),
    ):
        _same(f"the match of {prompt}", _granted(buffer.select(_keys(prompt))).transfer_id, wanted)


@_promise("a prompt shorter than a block is found by all of it")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    buffer.insert(_keys([1, 2]), _ids(3))
    _same("the claim of a longer prompt", buffer.select(_keys([1, 2, 3])), None)
    _same("the match", _granted(buffer.select(_keys([1, 2]))).num_tokens, 2)


@_promise("find is exclusive where it can be, and shares where it cannot")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    buffer.insert(_keys(_TEN), _ids(5, 6, 7))
    _same("find beyond the prompt", buffer.find(_keys(_TEN), min_tokens=10), None)
    found = [_granted(buffer.find(_keys(_TEN), min_tokens=9)).exclusive for _ in range(3)]
    _same("exclusive", found, [True, False, False])
    _same("the match of a longer prompt", _granted(buffer.find(_keys([*_TEN, 1]), min_tokens=7)).num_tokens, 8)


@_promise("two offers of one prompt are taken oldest first")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    for name, block in (("first", 1), ("second", 2)):
        buffer.insert(_keys([1, 2, 3, 4]), _ids(block), name)
    taken = [_granted(buffer.drop_select(_keys([1, 2, 3, 4]))).transfer_id for _ in range(2)]
    _same("the order", taken, ["first", "second"])


@_promise("an offer is claimed by its transfer id, as far as the prompts agree")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    buffer.insert(_keys(_TEN), _ids(5, 6, 7), "t")
    _same("the claim of an unknown id", buffer.claim("unknown", _keys(_TEN)), None)
    _same("a claim of no more than is there", buffer.claim("t", _keys(_TEN), min_tokens=10), None)
    other = _granted(buffer.claim("t", _keys([*_TEN[:6], 99, 98, 97])))
    _same("the claim by another prompt", (other.num_tokens, other.exclusive), (4, False))
    _same("the claim by a prompt with nothing in common", buffer.claim("t", _keys([99, 98])), None)
    buffer.release(other.claim_id, used=True)
    whole = _granted(buffer.claim("t", _keys(_TEN)))
    _same("the claim by the prompt itself", (whole.num_tokens, whole.exclusive), (10, True))
    again = _granted(buffer.claim("t", None))
    _same("a second claim", (again.num_tokens, again.exclusive), (10, False))


@_promise("what cannot be offered is a ValueError, and leaves nothing behind")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    raises(ValueError, buffer.insert, _keys([1]), _ids(1))  # vLLM computes the last prompt token itself
    for block_ids in (
        _ids(1, 2),
        _ids(1, 2, 3, 4),
        _ids(1, 2, 3).astype(np.int64),
        _ids(1, 2, 3).reshape(1, 3),
        _ids(1, -2, 3),
    ):
        raises(ValueError, buffer.insert, _keys(_TEN), block_ids)
    _at_rest(buffer)


@_promise("a transfer id is in use until its end was taken")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    buffer.insert(_keys(_TEN), _ids(1, 2, 3), "t")
    for _ in range(2):
        raises(ValueError, buffer.insert, _keys(_TEN), _ids(4, 5, 6), "t")
        buffer.evict_all_unclaimed()
    _ended(buffer, ("t", "evicted"))
    buffer.insert(_keys(_TEN), _ids(4, 5, 6), "t")


@_promise("an offer keeps its own copy of the block ids")
def _(buffers: _Buffers) -> None:
    buffer, block_ids = buffers.new(), _ids(1, 2, 3)
    offer = buffer.insert(_keys(_TEN), block_ids)
    block_ids[:] = 9
    _same("block_ids", offer.block_ids.tolist(), [1, 2, 3])
    demand(not offer.block_ids.flags.writeable, "the offer's block ids can be written")
    buffer.evict_all_unclaimed()
    _same("the ended offer's block_ids", buffer.take_ended()[0].block_ids.tolist(), [1, 2, 3])


# The ledger


@_promise("a block of two offers counts once, and is held until both have ended and were taken")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    buffer.insert(_keys(_TEN), _ids(1, 2, 3), "a")
    buffer.insert(_keys([*_TEN[:8], 77]), _ids(1, 2, 4), "b")
    _same("the ledger", (buffer.blocks_held, buffer.bytes_held), (4, 4 * _BLOCK_BYTES))
    _same("blocks that an eviction frees", buffer.evict(1), 1)
    _same("blocks held before the end was taken", buffer.blocks_held, 4)
    _ended(buffer, ("a", "evicted"))
    _same("blocks held after it", buffer.blocks_held, 3)
    _same("blocks that the second eviction frees", buffer.evict_all_unclaimed(), 3)
    _ended(buffer, ("b", "evicted"))
    _at_rest(buffer)


@_promise("an ended offer is handed over once")
def _(buffers: _Buffers) -> None:
    buffer = buffers.two()
    buffer.evict(1)
    _ended(buffer, ("a", "evicted"))
    _ended(buffer)
    buffers.now += _LEASE
    _ended_after_expiry(buffer, ("b", "expired"))


def _ended_after_expiry(buffer: LookupBuffer, *wanted: tuple[str, str]) -> None:
    buffer.expire()
    _ended(buffer, *wanted)
    _ended(buffer)


@_promise("at the limit the oldest unclaimed offers go, and claimed ones stay")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new(limit_blocks=6)
    for i, name in enumerate("abc"):
        buffer.insert(_keys([i] * 8), _ids(2 * i, 2 * i + 1), name)
    buffer.drop_select(_keys([0] * 8))
    buffer.insert(_keys([3] * 8), _ids(6, 7), "d")
    _ended(buffer, ("b", "evicted"))
    _same("bytes_held", buffer.bytes_held, buffer.limit_bytes)


@_promise("an offer that does not fit is refused by type, with the sizes, and costs no other")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new(limit_blocks=4)
    buffer.insert(_keys([0] * 8), _ids(0, 1), "claimed")
    buffer.drop_select(_keys([0] * 8))
    buffer.insert(_keys([1] * 8), _ids(2, 3), "unclaimed")
    too_large: Any = raises(OfferTooLarge, buffer.insert, _keys([2] * 20), _ids(4, 5, 6, 7, 8))
    _same("sizes of OfferTooLarge", (too_large.needed, too_large.limit), (5 * _BLOCK_BYTES, 4 * _BLOCK_BYTES))
    full: Any = raises(BufferFull, buffer.insert, _keys([2] * 12), _ids(4, 5, 6))
    _same("sizes of BufferFull", (full.needed, full.limit), (5 * _BLOCK_BYTES, 4 * _BLOCK_BYTES))
    _ended(buffer)
    _same("counters['refused']", buffer.counters["refused"], 2)
    # Blocks that it shares with the claimed offer need no room of their own.
    buffer.insert(_keys([0] * 8 + [9] * 8), _ids(0, 1, 4, 5))
    _ended(buffer, ("unclaimed", "evicted"))


@_promise("eviction stops when enough is free, and spares what is claimed")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    for i, name in enumerate("abcd"):
        buffer.insert(_keys([i] * 8), _ids(2 * i, 2 * i + 1), name)
    shared = _granted(buffer.select(_keys([0] * 8)))
    _same("evict(0)", buffer.evict(0), 0)
    _same("evict(3)", buffer.evict(3), 4)
    _ended(buffer, ("b", "evicted"), ("c", "evicted"))
    _same("evict(100)", buffer.evict(100), 2)
    _same("offers that stand", buffer.num_offers, 1)
    buffer.release(shared.claim_id, used=True)
    _same("evict(100) after the release", buffer.evict(100), 2)


# Claims and leases


@_promise("an offer that was not used is there again, as old as before and with a new lease")
def _(buffers: _Buffers) -> None:
    buffer = buffers.two()
    claim = _granted(buffer.find(_keys([0] * 8)))
    buffers.now += _LEASE - 1
    buffer.release(claim.claim_id, used=False)
    buffers.now += _LEASE - 1  # past the lease of the insertion, within that of the release
    demand(_granted(buffer.find(_keys([0] * 8))).exclusive, "the offer is not there again")
    demand(not buffer.release(claim.claim_id, used=False), "a claim was released twice")
    _same("claims alive", buffer.num_claims, 1)
    _ended(buffer, ("b", "expired"))
    buffer = buffers.two()
    buffer.release(_granted(buffer.find(_keys([0] * 8))).claim_id, used=False)
    buffer.evict(1)
    _ended(buffer, ("a", "evicted"))


@_promise("an offer that was used stays for those who still read it, and nobody new finds it")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    buffer.insert(_keys(_TEN), _ids(1, 2, 3), "t")
    exclusive, shared = _granted(buffer.find(_keys(_TEN))), _granted(buffer.find(_keys(_TEN)))
    buffer.release(exclusive.claim_id, used=True)
    demand(buffer.standing("t"), "the offer ended while it was read")
    _same("find", buffer.find(_keys(_TEN)), None)
    _same("claim", buffer.claim("t", None), None)
    _same("evict_all_unclaimed()", buffer.evict_all_unclaimed(), 0)
    demand(buffer.release(shared.claim_id, used=False), "the shared claim was not alive")
    _ended(buffer, ("t", "released"))


@_promise("shared claims end nothing, and are released once")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    buffer.insert(_keys(_TEN), _ids(1, 2, 3), "t")
    claim = _granted(buffer.select(_keys(_TEN)))
    demand(buffer.release(claim.claim_id, used=True), "the claim was not alive")
    demand(not buffer.release(claim.claim_id, used=True), "a claim was released twice")
    demand(_granted(buffer.drop_select(_keys(_TEN))).exclusive, "the offer is not there any more")


@_promise("a claim lasts as long as it is renewed, and takes its offer along")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    buffer.insert(_keys(_TEN), _ids(1, 2, 3), "t")
    claim = _granted(buffer.find(_keys(_TEN)))
    for _ in range(5):
        buffers.now += _LEASE - 1
        _same("renew", buffer.renew([claim.claim_id, "unknown"]), [claim.claim_id])
    _same("next_deadline()", buffer.next_deadline(), buffers.now + _LEASE)
    buffers.now += _LEASE
    _same("renew after the lease", buffer.renew([claim.claim_id]), [])
    _ended(buffer, ("t", "expired"))
    _at_rest(buffer)


@_promise("an unclaimed offer ends with its lease")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    buffer.insert(_keys(_TEN), _ids(1, 2, 3), "t")
    buffers.now += _LEASE - 0.001
    _same("what expires too early", buffer.expire(), 0)
    buffers.now += 0.001
    _same("find", buffer.find(_keys(_TEN)), None)
    _ended(buffer, ("t", "expired"))
    _at_rest(buffer)


@_promise("an offer that is shared outlives its lease until the claim is over")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    buffer.insert(_keys(_TEN), _ids(1, 2, 3), "t")
    buffers.now += 20
    claim = _granted(buffer.select(_keys(_TEN)))
    buffers.now += 20
    _same("expire() while it is read", buffer.expire(), 0)
    buffer.release(claim.claim_id, used=True)
    _same("expire() afterwards", buffer.expire(), 1)
    _ended(buffer, ("t", "expired"))


@_promise("the next deadline is the first lease to end")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    _same("with nothing in it", buffer.next_deadline(), None)
    buffer.insert(_keys(_TEN), _ids(1, 2, 3))
    buffers.now += 10
    buffer.insert(_keys(_TEN), _ids(4, 5, 6))
    _same("with two offers", buffer.next_deadline(), buffers.now + _LEASE - 10)
    claim = _granted(buffer.find(_keys(_TEN)))
    _same("with the older one claimed", buffer.next_deadline(), buffers.now + _LEASE)
    buffer.evict_all_unclaimed()
    buffer.release(claim.claim_id, used=True)
    _same("at the end", buffer.next_deadline(), None)


@_promise("counters add up: what was inserted stands, or ended for one reason")
def _(buffers: _Buffers) -> None:
    buffer = buffers.two()
    buffer.insert(_keys([7] * 8), _ids(4, 5), "c")
    buffer.release(_granted(buffer.find(_keys([0] * 8))).claim_id, used=True)
    buffer.evict(1)
    counters = buffer.counters
    ends = {name: counters[name] for name in ("released", "expired", "evicted", "closed")}
    _same("the ends", ends, {"released": 1, "expired": 0, "evicted": 1, "closed": 0})
    _same("inserted and claimed", (counters["inserted"], counters["claimed"]), (3, 1))


@_promise("closing ends everything once, and twice is fine")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    buffer.insert(_keys(_TEN), _ids(1, 2, 3), "unclaimed")
    buffer.insert(_keys([1, 2, 3]), _ids(4), "claimed")
    claim, shared = (_granted(buffer.find(_keys([1, 2, 3]))) for _ in range(2))
    buffer.release(claim.claim_id, used=True)
    buffer.close()
    buffer.close()
    _ended(buffer, ("unclaimed", "closed"), ("claimed", "closed"))
    demand(not buffer.release(shared.claim_id, used=True), "a claim outlived the buffer")
    _same("find", buffer.find(_keys(_TEN)), None)
    raises(KVError, buffer.insert, _keys(_TEN), _ids(1, 2, 3))
    _at_rest(buffer)


# Announced offers


@_promise("an announced offer is found by its transfer id, and by its prompt once that is computed")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    generation = buffer.announce(_keys(_TEN), "t")
    for what, found in (("drop_select", buffer.drop_select), ("select", buffer.select), ("find", buffer.find)):
        _same(f"{what} of a prompt that is announced", found(_keys(_TEN)), None)
    claim = _granted(buffer.claim("t", _keys(_TEN)))
    _same("the claim", (claim.num_tokens, claim.exclusive, claim.generation), (10, True, generation))
    _same("what it shares with another prompt", _granted(buffer.claim("t", _keys([*_TEN[:6], 99]))).num_tokens, 4)
    _same("the ledger", (buffer.num_offers, buffer.blocks_held), (1, 0))
    offer = _granted(buffer.complete("t", _ids(5, 6, 7)))
    _same("the offer", (offer.transfer_id, offer.num_tokens, offer.generation), ("t", 10, generation))
    _same("its blocks", (offer.block_ids.tolist(), buffer.blocks_held), ([5, 6, 7], 3))
    _same("the match", _granted(buffer.find(_keys(_TEN))).num_tokens, 10)
    _same("complete, a second time", buffer.complete("t", _ids(5, 6, 7)), None)
    _same("inserted", buffer.counters["inserted"], 1)


@_promise("an announced offer has no lease, and is not evicted, until it is complete")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    buffer.announce(_keys(_TEN), "t")
    _same("next_deadline()", buffer.next_deadline(), None)
    buffers.now += 10 * _LEASE
    _same("expire()", buffer.expire(), 0)
    _same("evict(9)", buffer.evict(9) + buffer.evict_all_unclaimed(), 0)
    buffer.release(_granted(buffer.claim("t", _keys(_TEN))).claim_id, used=False)
    demand(_granted(buffer.claim("t", _keys(_TEN))).exclusive, "an offer that was not used is not there again")
    buffer = buffers.new()
    buffer.announce(_keys(_TEN), "t")
    buffers.now += _LEASE
    _same("expires_at", _granted(buffer.complete("t", _ids(1, 2, 3))).expires_at, buffers.now + _LEASE)
    buffers.now += _LEASE
    _ended_after_expiry(buffer, ("t", "expired"))
    _at_rest(buffer)


@_promise("an announced offer has room, which others cannot take")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new(limit_blocks=5)
    buffer.insert(_keys([0] * 8), _ids(0, 1), "old")
    buffer.insert(_keys([1] * 8), _ids(2, 3), "young")
    raises(OfferTooLarge, buffer.announce, _keys([2] * 24), "too large")
    buffer.announce(_keys(_TEN), "t")
    _ended(buffer, ("old", "evicted"))
    full: Any = raises(BufferFull, buffer.insert, _keys([3] * 12), _ids(4, 5, 6))
    _same("sizes of BufferFull", (full.needed, full.limit), (6 * _BLOCK_BYTES, 5 * _BLOCK_BYTES))
    raises(BufferFull, buffer.announce, _keys([3] * 12), "also")
    _ended(buffer)
    _granted(buffer.complete("t", _ids(4, 5, 6)))
    _ended(buffer)
    buffer.insert(_keys([3] * 8), _ids(7, 8), "new")
    _ended(buffer, ("young", "evicted"))
    buffer = buffers.new(limit_blocks=3)
    for i in range(3):
        buffer.announce(_keys(_TEN), str(i))
        demand(buffer.break_off(str(i)), "break_off says that there was no such offer")


@_promise("an announced offer ends with its exclusive claim, for those who share it once they have it")
def _(buffers: _Buffers) -> None:
    for reason in ("released", "expired"):
        buffer = buffers.new()
        buffer.announce(_keys(_TEN), "t")
        claim = _granted(buffer.claim("t", _keys(_TEN)))
        if reason == "released":
            buffer.release(claim.claim_id, used=True)
        buffers.now += _LEASE
        buffer.expire()
        _same("complete", buffer.complete("t", _ids(1, 2, 3)), None)
        _ended(buffer, ("t", reason))
        _at_rest(buffer)
    buffer.announce(_keys(_TEN), "t")
    claim, shared = (_granted(buffer.claim("t", _keys(_TEN))) for _ in range(2))
    _same("exclusive", (claim.exclusive, shared.exclusive), (True, False))
    buffer.release(claim.claim_id, used=True)
    _same("a claim of an offer that ends", buffer.claim("t", None), None)
    _granted(buffer.complete("t", _ids(1, 2, 3)))
    _same("find", buffer.find(_keys(_TEN)), None)
    demand(buffer.standing("t"), "the offer ended while it was read")
    buffer.release(shared.claim_id, used=True)
    _ended(buffer, ("t", "released"))
    _at_rest(buffer)


@_promise("an announced offer that is broken off ends at once, with every claim on it")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    buffer.insert(_keys([1, 2]), _ids(9), "inserted")
    buffer.announce(_keys(_TEN), "t")
    claim = _granted(buffer.claim("t", _keys(_TEN)))
    demand(buffer.break_off("t"), "break_off says that there was no such offer")
    for name in ("t", "inserted", "unknown"):
        demand(not buffer.break_off(name), f"break_off ended {name}")
    demand(not buffer.standing("t"), "the offer stands")
    _same("the claim", (buffer.renew([claim.claim_id]), buffer.num_claims), ([], 0))
    _same("complete", buffer.complete("t", _ids(1, 2, 3)), None)
    _ended(buffer, ("t", "broken"))
    _same("counters['broken']", buffer.counters["broken"], 1)


@_promise("what is over is remembered, until its transfer id comes again")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    demand(not buffer.over("t"), "what never was is over")
    for again in range(2):
        buffer.announce(_keys(_TEN), "t")
        demand(not buffer.over("t"), "an offer that stands is over")
        if again:
            buffer.complete("t", _ids(1, 2, 3))
            claim, _shared = (_granted(buffer.claim("t", None)) for _ in range(2))
            buffer.release(claim.claim_id, used=True)
        else:
            buffer.break_off("t")
        demand(buffer.over("t"), "an offer that has ended, or ends with those who share it, is not over")
        buffer.take_ended()
    buffer.close()
    demand(buffer.over("t"), "an offer that was closed is not over")


@_promise("what cannot be announced or completed leaves nothing behind")
def _(buffers: _Buffers) -> None:
    buffer = buffers.new()
    raises(ValueError, buffer.announce, _keys([1]), "t")
    buffer.announce(_keys(_TEN), "t")
    raises(ValueError, buffer.announce, _keys(_TEN), "t")
    raises(ValueError, buffer.insert, _keys(_TEN), _ids(1, 2, 3), "t")
    for block_ids in (_ids(1, 2), _ids(1, -2, 3), _ids(1, 2, 3).astype(np.int64)):
        raises(ValueError, buffer.complete, "t", block_ids)
    _granted(buffer.complete("t", _ids(1, 2, 3)))
    buffer.evict_all_unclaimed()
    raises(ValueError, buffer.announce, _keys(_TEN), "t")  # its end was not taken
    _ended(buffer, ("t", "evicted"))
    buffer.announce(_keys(_TEN), "t")
    buffer.close()
    _ended(buffer, ("t", "closed"))
    raises(KVError, buffer.announce, _keys(_TEN), "u")
    _at_rest(buffer)


@_promise("whatever was done, once leases have ended the ledger is at zero and each offer was handed over once")
def _(buffers: _Buffers) -> None:
    for seed in range(20):
        _walk(buffers, random.Random(seed))


_STEPS = (
    *("insert", "insert", "announce", "complete", "break off"),
    *("find", "find", "by id", "release", "renew", "evict", "wait", "take"),
)


def _walk(buffers: _Buffers, chance: random.Random) -> None:
    buffer = buffers.new(limit_blocks=8)
    inserted: dict[str, list[int]] = {}
    taken: dict[str, list[int]] = {}
    claims = ["unknown"]
    announced: dict[str, PrefixKeys] = {}

    def take() -> None:
        for offer in buffer.take_ended():
            demand(offer.transfer_id not in taken, f"{offer.transfer_id} was handed over twice")
            taken[offer.transfer_id] = offer.block_ids.tolist()

    for step in range(60):
        keys = _keys(chance.choices((0, 1), k=chance.randint(2, 17)))
        what = chance.choice(_STEPS)
        if what == "insert":
            blocks = chance.sample(range(16), -(-keys.num_tokens // _BLOCK_SIZE))
            try:
                buffer.insert(keys, _ids(*blocks), str(step))
            except BufferFull:
                continue
            inserted[str(step)] = blocks
        elif what == "announce":
            try:
                buffer.announce(keys, str(step))
            except BufferFull:
                continue
            inserted[str(step)] = []
            announced[str(step)] = keys
        elif what in ("complete", "break off") and announced:
            name, keys = announced.popitem()
            if what == "break off":
                buffer.break_off(name)
            else:
                blocks = chance.sample(range(16), -(-keys.num_tokens // _BLOCK_SIZE))
                if buffer.complete(name, _ids(*blocks)) is not None:
                    inserted[name] = blocks
        elif what in ("find", "by id"):
            claim = buffer.find(keys) if what == "find" else buffer.claim(chance.choice([*inserted, "unknown"]), keys)
            if claim is not None:
                _same("a claimed offer's standing", buffer.standing(claim.transfer_id), True)
                claims.append(claim.claim_id)
        elif what == "release":
            buffer.release(chance.choice(claims), chance.random() < 0.5)
        elif what == "renew":
            buffer.renew(chance.sample(claims, min(2, len(claims))))
        elif what == "evict":
            buffer.evict(chance.randint(0, 6))
        elif what == "wait":
            buffers.now += chance.randint(1, int(_LEASE))
        else:
            take()
        standing = {block for name, blocks in inserted.items() if name not in taken for block in blocks}
        held = buffer.blocks_held
        _same("blocks_held", held, len(standing))
    for name in announced:
        buffer.break_off(name)
    for _ in range(2):
        # The end of an exclusive claim may leave an offer to those who share it.
        buffers.now += _LEASE
        buffer.expire()
    take()
    _same("what was handed over", taken, inserted)
    _at_rest(buffer)
