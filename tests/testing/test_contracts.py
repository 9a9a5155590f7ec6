"""The contracts pass what is right and find what is wrong: each kind of pipe, the lookup buffer and the layouts keep
every promise, and of many deliberately broken implementations each breaks the promise that names its fault.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from kvsdk.buffer import LookupBuffer
from kvsdk.errors import DeadlineExceeded, KVError, PeerGone, PipeClosed, ProtocolError
from kvsdk.kernels import BlockStore
from kvsdk.layout import layout_of
from kvsdk.pipe import PipeHost, in_process_pair, join, lockstep_pair
from kvsdk.pipe.in_process import InProcessPipe
from kvsdk.testing.contracts import (
    LAYOUT_PROMISES,
    LOOKUP_BUFFER_PROMISES,
    PIPE_PROMISES,
    BrokenPromise,
    Caches,
    check_layout,
    check_lookup_buffer,
    check_pipe,
    usual_caches,
)


def clogged_in_process_pair():
    a, b = in_process_pair()
    a.send(torch.zeros(8, dtype=torch.uint8), time.monotonic() + 1)
    return a, b


def pair_of_kind(kind):
    host = PipeHost(kind, "127.0.0.1", "cpu")
    invite = host.prepare()
    with ThreadPoolExecutor(1) as threads:
        consumer = threads.submit(join, invite, "cpu", "127.0.0.1", time.monotonic() + 20)
        return host.accept(invite, time.monotonic() + 20), consumer.result()


gloo_pair, shm_pair = (functools.partial(pair_of_kind, kind) for kind in ("gloo", "shm"))
PIPES = {
    "in-process": (in_process_pair, clogged_in_process_pair),
    "lockstep": (lockstep_pair, lockstep_pair),
    "gloo": (gloo_pair, gloo_pair),
    "shm": (shm_pair, shm_pair),
}


@pytest.mark.parametrize("promise", PIPE_PROMISES, ids=str)
@pytest.mark.parametrize("kind", PIPES)
def test_pipes_of_every_kind_keep(kind, promise):
    check_pipe(*PIPES[kind], promises=[promise])


@pytest.mark.parametrize("promise", LOOKUP_BUFFER_PROMISES, ids=str)
def test_the_lookup_buffer_keeps(promise):
    check_lookup_buffer(LookupBuffer, promises=[promise])


@pytest.mark.parametrize("promise", LAYOUT_PROMISES, ids=str)
def test_layouts_and_block_stores_keep(promise):
    check_layout(promises=[promise])


def test_promises_that_need_a_clogged_pair_are_left_out_without_one():
    clogged = [promise for promise in PIPE_PROMISES if promise.needs == "clogged"]
    assert clogged
    check_pipe(broken_pair(AbortWakesOnlyReceives), promises=clogged)
    with pytest.raises(BrokenPromise):
        check_pipe(
            broken_pair(AbortWakesOnlyReceives), clogged_pair(AbortWakesOnlyReceives), promises=clogged, patience=0.5
        )


def test_caches_of_an_authors_own_are_checked():
    tokens_last = {"mine": lambda: Caches({"layers.0": torch.zeros(6, 2, 8, 4).transpose(2, 3)}, 6, 4)}
    check_layout(caches=tokens_last)
    with pytest.raises(BrokenPromise, match=r"mine: .*segments"):
        check_layout(read=FirstSegmentOnly, caches={"mine": usual_caches()["one buffer, layers in a head"]})


# Broken pipes. Each changes what one end or both do; the name says what a user would notice.


class CutsSilently(InProcessPipe):
    def _recv(self, data, deadline):
        with self._changed:
            self._wait(lambda: bool(self._incoming.queue), deadline, drain=True)
            sent = self._incoming.queue.popleft()
            n = min(len(sent), len(data))
            data[:n] = sent[:n]
            self._incoming.received += 1
            self._changed.notify_all()


class SaysNothingOfAnotherSize(InProcessPipe):
    """The receiver raises, and neither end is broken afterwards."""

    def _recv(self, data, deadline):
        with self._changed:
            self._wait(lambda: bool(self._incoming.queue), deadline, drain=True)
            if self._incoming.queue[0].numel() != data.numel():
                self._incoming.queue.popleft()
                self._changed.notify_all()
                raise ProtocolError("another size")
        super()._recv(data, deadline)


class CloseWaitsForCalls(InProcessPipe):
    def close(self, deadline):
        with self._sending, self._receiving:
            pass
        super().close(deadline)


class ClosingTwiceRaises(InProcessPipe):
    def close(self, deadline):
        if self._closed:
            raise PipeClosed("closed before")
        super().close(deadline)


class AbortedPipesRaiseTheWrongType(InProcessPipe):
    def abort(self):
        self._fail(PeerGone("aborted"))


class WorksAfterAbort(InProcessPipe):
    def _raise_if_broken(self):
        if not isinstance(self._failure, PipeClosed) or self._closed:
            super()._raise_if_broken()

    def abort(self):
        super().abort()
        self._failure = None


class IgnoresDeadlines(InProcessPipe):
    def _recv(self, data, deadline):
        super()._recv(data, deadline + 3600)


class RaisesTimeoutError(InProcessPipe):
    def _recv(self, data, deadline):
        try:
            super()._recv(data, deadline)
        except DeadlineExceeded as error:
            raise TimeoutError from error


class GoesOnAfterADeadline(InProcessPipe):
    def _fail(self, error):
        return error if isinstance(error, DeadlineExceeded) else super()._fail(error)


class TriesOnceMoreAtAPastDeadline(InProcessPipe):
    def _enter(self, deadline):
        self._raise_if_broken()

    def _recv(self, data, deadline):
        super()._recv(data, max(deadline, time.monotonic() + 0.2))


class SendsTheTensorItself(InProcessPipe):
    """Keeps a reference where it should copy: what is written after the send arrives."""

    def _send(self, data, deadline):
        with self._changed:
            self._wait(lambda: len(self._outgoing.queue) < 1, deadline)
            self._outgoing.queue.append(data)
            self._changed.notify_all()


class LastComesFirst(InProcessPipe):
    def _send(self, data, deadline):
        with self._changed:
            self._outgoing.capacity = 10
            self._wait(lambda: len(self._outgoing.queue) < 10, deadline)
            self._outgoing.queue.appendleft(data.clone())
            self._changed.notify_all()


class QueuesTheSecondThread(InProcessPipe):
    def _direction(self, lock, name):
        return lock


class CloseDropsWhatWasSent(InProcessPipe):
    def close(self, deadline):
        self.abort()
        super().close(deadline)


class AbortIsNotHeardByThePeer(InProcessPipe):
    def _wait(self, ready, deadline, drain=False):
        peer, self._peer._failure = self._peer._failure, None
        try:
            super()._wait(ready, deadline, drain)
        finally:
            self._peer._failure = self._peer._failure or peer


class AbortWakesOnlyReceives(InProcessPipe):
    def _send(self, data, deadline):
        while not self._peer._failure and len(self._outgoing.queue) and time.monotonic() < deadline:
            time.sleep(0.01)
        super()._send(data, deadline)


class TakesStrides(InProcessPipe):
    def _check(self, tensor):
        if not tensor.is_contiguous():
            tensor.resize_(tensor.numel())


class LeavesAThread(InProcessPipe):
    def close(self, deadline):
        super().close(deadline)
        threading.Thread(target=time.sleep, args=(3,), name="forgotten", daemon=True).start()


class SharesItsFate(InProcessPipe):
    """Whoever breaks takes the other pairs along."""

    def _break(self):
        super()._break()
        for other in list(PAIRS):
            if other not in (self, self._peer) and not other.broken:
                other._fail(PeerGone("another pair broke"))


PAIRS = weakref.WeakSet()


class OneWay(InProcessPipe):
    def _recv(self, data, deadline):
        super()._recv(data, deadline)
        if self._sent == 0 and data.numel() == 1000:
            data.zero_()


class ChangesItsMind(InProcessPipe):
    def close(self, deadline):
        super().close(deadline)
        self._failure = PipeClosed("closed")


def broken_pair(kind):
    def make():
        ends = in_process_pair()
        for end in ends:
            end.__class__ = kind
            PAIRS.add(end)
        return ends

    return make


def clogged_pair(kind):
    def make():
        a, b = broken_pair(kind)()
        a.send(torch.zeros(8, dtype=torch.uint8), time.monotonic() + 1)
        return a, b

    return make


class FillsSlotsBeforeTheyWereSent(InProcessPipe):
    def _send_row(self, sizes, fill, deadline):
        parts = self._parts("send", sizes)
        for i, part in enumerate(parts):
            fill(i, part)
        for part in parts:
            self._send(part, deadline)


class DrainsInAnyOrder(InProcessPipe):
    def _recv_row(self, sizes, drain, deadline):
        parts = self._parts("recv", sizes)
        for part in parts:
            self._recv(part, deadline)
        for i, part in enumerate(parts):
            drain(i, part)


class WaitsForDrainsAtTheEnd(InProcessPipe):
    def _recv_row(self, sizes, drain, deadline):
        waits = []
        super()._recv_row(sizes, lambda i, part: waits.append(drain(i, part)), deadline)
        for wait in filter(None, waits):
            wait()


class SwallowsWhatFillRaises(InProcessPipe):
    def _send_row(self, sizes, fill, deadline):
        with contextlib.suppress(Exception):
            super()._send_row(sizes, fill, deadline)


class TakesAnyRow(InProcessPipe):
    def send_row(self, sizes, fill, deadline):
        with contextlib.suppress(ValueError):
            super().send_row(sizes, fill, deadline)


BROKEN_PIPES = {
    WaitsForDrainsAtTheEnd: "a message that drain leaves to others",
    FillsSlotsBeforeTheyWereSent: "a row arrives whole",
    DrainsInAnyOrder: "a row arrives whole",
    SwallowsWhatFillRaises: "what fill, drain or what it left raises",
    TakesAnyRow: "messages that do not fit",
    CutsSilently: "a tensor of another size",
    SaysNothingOfAnotherSize: "a tensor of another size",
    CloseWaitsForCalls: "abort and close wake this end",
    ClosingTwiceRaises: "abort and close wake this end",  # each pair is closed in the end
    AbortedPipesRaiseTheWrongType: "abort and close wake this end",
    WorksAfterAbort: "abort and close wake this end",
    IgnoresDeadlines: "a wait ends at its deadline",
    RaisesTimeoutError: "a wait ends at its deadline",
    GoesOnAfterADeadline: "a wait ends at its deadline",
    TriesOnceMoreAtAPastDeadline: "a deadline that has passed",
    SendsTheTensorItself: "a tensor may be written again",
    LastComesFirst: "tensors arrive whole and in order",
    QueuesTheSecondThread: "of two threads in one direction",
    CloseDropsWhatWasSent: "what was sent before a close",
    AbortIsNotHeardByThePeer: "after a deadline the peer learns",
    AbortWakesOnlyReceives: "abort and close wake this end",
    TakesStrides: "what cannot travel is refused",
    LeavesAThread: "a closed pair leaves no thread",
    SharesItsFate: "pairs do not share their fate",
    OneWay: "the second end sends as the first",
    ChangesItsMind: "an end that broke for one reason",
}


@pytest.mark.parametrize("kind", BROKEN_PIPES, ids=lambda kind: kind.__name__)
def test_a_broken_pipe_is_found(kind):
    with pytest.raises(BrokenPromise) as found:
        check_pipe(broken_pair(kind), clogged_pair(kind), patience=1.5)
    assert found.value.promise.startswith(BROKEN_PIPES[kind]), found.value
    assert found.value.promise in str(found.value)


# Broken lookup buffers


class ClaimsTwice(LookupBuffer):
    def drop_select(self, keys):
        claim = super().drop_select(keys) or self.select(keys)
        return claim and dataclasses.replace(claim, exclusive=True)


class RacesForOffers(LookupBuffer):
    """Looks and takes in two steps."""

    def drop_select(self, keys):
        with self._lock:
            free = [entry for entry in self._offers.values() if entry.keys == keys and not entry.claims]
        time.sleep(0.0005)
        if not free:
            return None
        with self._lock:
            return self._grant(free[0], keys.num_tokens, True, self.clock())


class LeaksTheLedger(LookupBuffer):
    _leaked = 0

    def take_ended(self):
        ended = super().take_ended()
        self._leaked += sum(len(offer.block_ids) for offer in ended if offer.reason == "expired")
        return ended

    @property
    def blocks_held(self):
        return super().blocks_held + self._leaked


class SubtractsTwice(LookupBuffer):
    """As vLLM's own once did: when an offer ends, and again when it is taken."""

    @property
    def blocks_held(self):
        return self._standing.blocks - sum(len(ids) for ids in self._distinct_ended)


class HandsOverTwice(LookupBuffer):
    def take_ended(self):
        ended = super().take_ended()
        self._last, last = ended, getattr(self, "_last", [])
        return ended or last


class KeepsWhatWasRead(LookupBuffer):
    """As vLLM's own once did: an entry stays after its consumer has it."""

    def release(self, claim_id, used):
        return super().release(claim_id, used=False)


class NeverExpires(LookupBuffer):
    def _expire(self, now):
        return 0


class ExpiresWhatIsRead(LookupBuffer):
    def renew(self, claim_ids):
        return list(claim_ids)


class MatchesPartsOfBlocks(LookupBuffer):
    def select(self, keys, min_tokens=0):
        claim = super().select(keys, min_tokens)
        return claim and dataclasses.replace(claim, num_tokens=min(claim.num_tokens + 1, keys.num_tokens))


class TakesLongerPrompts(LookupBuffer):
    def drop_select(self, keys):
        return super().drop_select(keys) or self.find(keys)


class OffersOneToken(LookupBuffer):
    def insert(self, keys, block_ids, transfer_id=None):
        if keys.num_tokens == 1:
            return None
        return super().insert(keys, block_ids, transfer_id)


class AliasesTheCallersArray(LookupBuffer):
    def insert(self, keys, block_ids, transfer_id=None):
        offer = super().insert(keys, block_ids, transfer_id)
        return dataclasses.replace(offer, block_ids=block_ids)


class EvictsWhatIsRead(LookupBuffer):
    def _unclaimed(self):
        return iter(list(self._offers.values()))


class EvictsBeforeItRefuses(LookupBuffer):
    def insert(self, keys, block_ids, transfer_id=None):
        try:
            return super().insert(keys, block_ids, transfer_id)
        except KVError:
            self.evict_all_unclaimed()
            raise


class ForgetsTheAge(LookupBuffer):
    def release(self, claim_id, used):
        entry = self._claims[claim_id].entry if claim_id in self._claims else None
        alive = super().release(claim_id, used)
        if not used and entry is not None and entry.transfer_id in self._offers:
            self._offers[entry.transfer_id] = self._offers.pop(entry.transfer_id)
        return alive


class EndsSharedOffers(LookupBuffer):
    def release(self, claim_id, used):
        entry = self._claims[claim_id].entry if claim_id in self._claims else None
        alive = super().release(claim_id, used)
        with self._lock:
            if used and entry is not None and entry.transfer_id in self._offers:
                for other in [name for name, held in self._claims.items() if held.entry is entry]:
                    del self._claims[other]
                self._end(entry, entry.ending or "released")
        return alive


class OpenAfterClose(LookupBuffer):
    def close(self):
        super().close()
        self._closed = False


class ClaimsUnknownIds(LookupBuffer):
    def claim(self, transfer_id, keys, min_tokens=0):
        return super().claim(transfer_id, keys, min_tokens) or super().claim("t", None)


class FindsWhatIsAnnounced(LookupBuffer):
    def find(self, keys, min_tokens=0):
        return super().find(keys, min_tokens) or self.claim("t", keys, min_tokens)


class EvictsWhatIsAnnounced(LookupBuffer):
    def _unclaimed(self):
        return iter([entry for entry in self._offers.values() if not entry.claims])


class KeepsNoRoomForWhatIsAnnounced(LookupBuffer):
    def announce(self, keys, transfer_id):
        generation = super().announce(keys, transfer_id)
        self._reserved = 0
        return generation


class KeepsTheRoomOfWhatWasBrokenOff(LookupBuffer):
    def break_off(self, transfer_id):
        before = self._reserved
        broken = super().break_off(transfer_id)
        self._reserved = before
        return broken


class LeavesABrokenOfferToItsReaders(LookupBuffer):
    def break_off(self, transfer_id):
        entry = self._offers.get(transfer_id)
        if entry is None or not entry.claims:
            return super().break_off(transfer_id)
        entry.ending = "broken"
        return True


class ForgetsWhatIsOver(LookupBuffer):
    def over(self, transfer_id):
        return False


class CompletesWhatIsOver(LookupBuffer):
    def complete(self, transfer_id, block_ids):
        self._last = super().complete(transfer_id, block_ids) or self._last
        return self._last


BROKEN_BUFFERS = {
    ClaimsTwice: "an offer is claimed exclusively once",
    RacesForOffers: "of many threads one gets",
    LeaksTheLedger: "a claim lasts as long as it is renewed",
    SubtractsTwice: "a block of two offers counts once",
    HandsOverTwice: "an ended offer is handed over once",
    KeepsWhatWasRead: "an offer is found by its prompt",
    NeverExpires: "an ended offer is handed over once",
    ExpiresWhatIsRead: "a claim lasts as long as it is renewed",
    MatchesPartsOfBlocks: "select shares whole blocks",
    TakesLongerPrompts: "an offer is claimed exclusively once",
    OffersOneToken: "what cannot be offered",
    AliasesTheCallersArray: "an offer keeps its own copy",
    EvictsWhatIsRead: "at the limit the oldest unclaimed",
    EvictsBeforeItRefuses: "an offer that does not fit",
    ForgetsTheAge: "an offer that was not used",
    EndsSharedOffers: "an offer is claimed by its transfer id",
    OpenAfterClose: "closing ends everything once",
    ClaimsUnknownIds: "an offer is claimed by its transfer id",
    FindsWhatIsAnnounced: "an announced offer is found by its transfer id",
    EvictsWhatIsAnnounced: "an announced offer has no lease",
    KeepsNoRoomForWhatIsAnnounced: "an announced offer has room",
    KeepsTheRoomOfWhatWasBrokenOff: "an announced offer has room",
    LeavesABrokenOfferToItsReaders: "an announced offer that is broken off",
    ForgetsWhatIsOver: "what is over is remembered",
    CompletesWhatIsOver: "an announced offer is found by its transfer id",
}


@pytest.mark.parametrize("kind", BROKEN_BUFFERS, ids=lambda kind: kind.__name__)
def test_a_broken_lookup_buffer_is_found(kind):
    with pytest.raises(BrokenPromise) as found:
        check_lookup_buffer(kind, patience=2)
    assert found.value.promise.startswith(BROKEN_BUFFERS[kind]), found.value


# Broken layouts


def with_layers(**change):
    """`layout_of`, each layer of which is changed by functions of the layer."""

    def read(tensors, **sizes):
        layout = layout_of(tensors, **sizes)
        layers = [
            dataclasses.replace(layer, **{name: make(layer) for name, make in change.items()})
            for layer in layout.layers
        ]
        return dataclasses.replace(layout, layers=tuple(layers))

    return read


FirstSegmentOnly = with_layers(segments=lambda layer: layer.segments[:1])
DenseBlocks = with_layers(block_stride=lambda layer: layer.block_bytes)
NoOffset = with_layers(storage_offset=lambda layer: 0)
AnyOrder = with_layers(order=lambda layer: "HNC", dims=lambda layer: (2, 4, 8))
NameInFingerprint = with_layers(dtype=lambda layer: layer.dtype + layer.name.split(".")[0])


def ReverseOrder(tensors, **sizes):
    layout = layout_of(tensors, **sizes)
    return dataclasses.replace(layout, layers=layout.layers[::-1])


def PoolInFingerprint(tensors, **sizes):
    layout = layout_of(tensors, **sizes)
    layers = [dataclasses.replace(layer, order=f"{layer.order}{layout.num_blocks}") for layer in layout.layers]
    return dataclasses.replace(layout, layers=tuple(layers))


def TakesAnything(tensors, **sizes):
    try:
        return layout_of(tensors, **sizes)
    except ValueError:
        return layout_of({"model.layers.0.attn": torch.zeros(6, 2, 4, 8)}, num_blocks=6, block_size=4)


BROKEN_LAYOUTS = {
    "first segment only": (FirstSegmentOnly, "segments are where"),
    "dense blocks": (DenseBlocks, "segments are where"),
    "no offset": (NoOffset, "segments are where"),
    "reverse order": (ReverseOrder, "a layout has every layer once"),
    "any order": (AnyOrder, "fingerprints differ"),
    "name in fingerprint": (NameInFingerprint, "a layout has every layer once"),
    "pool in fingerprint": (PoolInFingerprint, "a fingerprint is plain values"),
    "takes anything": (TakesAnything, "tensors that are no attention cache"),
}


@pytest.mark.parametrize("name", BROKEN_LAYOUTS)
def test_a_broken_layout_is_found(name):
    read, promise = BROKEN_LAYOUTS[name]

    def store(tensors, layout):
        return BlockStore(tensors, layout_of(tensors, num_blocks=layout.num_blocks, block_size=layout.block_size))

    with pytest.raises(BrokenPromise) as found:
        check_layout(read, store)
    assert found.value.promise.startswith(promise), found.value


class DropsTheLastBlock(BlockStore):
    def scatter(self, block_ids, staging, select=None):
        super().scatter(block_ids, staging, np.arange(len(block_ids) - 1) if select is None else select)


class IgnoresTheSelection(BlockStore):
    def scatter(self, block_ids, staging, select=None):
        super().scatter(block_ids, staging)


class SortsBlocks(BlockStore):
    def gather(self, block_ids, staging):
        super().gather(np.sort(block_ids), staging)


class WrapsIds(BlockStore):
    def _check_ids(self, block_ids):
        if block_ids.size:
            block_ids %= self.layout.num_blocks


class WritesTwice(BlockStore):
    def scatter(self, block_ids, staging, select=None):
        unique = np.unique(block_ids)
        if len(unique) != len(block_ids):
            return super().scatter(unique, staging[: self.staging_bytes(len(unique))])
        return super().scatter(block_ids, staging, select)


class ShiftsByOneLayer(BlockStore):
    def scatter(self, block_ids, staging, select=None):
        size = len(block_ids) * self.layout.layers[0].block_bytes
        super().scatter(block_ids, torch.cat([staging[size:], staging[:size]]), select)


class SumsBytes(BlockStore):
    def digest(self, staging, num_blocks, positions):
        size = num_blocks * self.layout.layers[0].block_bytes
        parts = staging.view(-1, num_blocks, size // num_blocks)
        return parts.long().sum((0, 2)).numpy().astype(np.uint64)


class DigestsNothingOfTheEnd(BlockStore):
    def digest(self, staging, num_blocks, positions):
        cut = staging.clone()
        size = num_blocks * self.layout.layers[0].block_bytes
        cut[size - 1 :: size] = 0
        return super().digest(cut, num_blocks, positions)


BROKEN_STORES = {
    DropsTheLastBlock: "scatter writes",
    IgnoresTheSelection: "scatter writes",
    SortsBlocks: "gather copies",
    WrapsIds: "ids, selections",
    WritesTwice: "ids, selections",
    ShiftsByOneLayer: "scatter writes",
    SumsBytes: "a digest finds",
    DigestsNothingOfTheEnd: "a digest finds",
}


@pytest.mark.parametrize("kind", BROKEN_STORES, ids=lambda kind: kind.__name__)
def test_a_broken_block_store_is_found(kind):
    with pytest.raises(BrokenPromise) as found:
        check_layout(store=kind)
    assert found.value.promise.startswith(BROKEN_STORES[kind]), found.value
