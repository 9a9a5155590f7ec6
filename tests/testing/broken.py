"""Connectors that are broken on purpose, each in one way, and the test of the suite that finds it.

Those that the lifecycle of `kvsdk.connector` would protect from themselves are written against vLLM's own interface;
`NativeStore` is the one of them that is right.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.v1.request import RequestStatus

from kvsdk.buffer import offer_name
from kvsdk.buffer.keys import prefix_keys, separator
from kvsdk.connector import Connector, Hit
from kvsdk.testing.capabilities import IN_PROCESS_HANDOVER, IN_PROCESS_STORE, Capabilities
from kvsdk.testing.in_process import (
    HandOverConnector,
    HandOverScheduler,
    HandOverWorker,
    Network,
    Source,
    StoreConnector,
    StoreScheduler,
    StoreWorker,
)
from kvsdk.vllm.binding import bind

KEY = 16


@dataclasses.dataclass
class Meta(KVConnectorMetadata):
    """One step's loads and saves: (request id, block ids, names)."""

    loads: list[tuple[str, list[int], list[bytes]]] = dataclasses.field(default_factory=list)
    saves: list[tuple[str, list[int], list[bytes]]] = dataclasses.field(default_factory=list)


class NativeStore(KVConnectorBase_V1):
    """Saves finished prompts on the network's shelf, whole blocks only, with delayed frees; loads asynchronously."""

    by_hand = True

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        self.network = Network.named(vllm_config.kv_transfer_config.kv_connector_extra_config["network"])
        self.block_size = vllm_config.cache_config.block_size
        self.meta = Meta()
        self.loading: set[str] = set()
        self.matched: dict[str, tuple[int, list[bytes]]] = {}
        if role == KVConnectorRole.WORKER:
            self.rank = vllm_config.parallel_config.rank
            self.address = f"worker {self.rank} of {vllm_config.kv_transfer_config.engine_id}"
            self.received: set[str] = set()
            self.sent: set[str] = set()
            self.invalid: set[int] = set()
            self.network.join(self.address, self.receive)

    # ---- scheduler

    def root(self, request):
        return separator(cache_salt=request.cache_salt, lora=None, multimodal=())

    def names(self, request):
        tokens = np.asarray(request.prompt_token_ids, np.int32)
        keys = prefix_keys(tokens, self.block_size, self.root(request)).blocks
        return [keys[i : i + KEY] for i in range(0, len(keys), KEY)]

    def found(self, names):
        return sum(1 for _ in itertools.takewhile(lambda name: (0, 0, name) in self.network.shelf, names))

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        if request.num_preemptions or request.num_prompt_tokens < 2 or request.request_id in self.matched:
            num_tokens, _ = self.matched.get(request.request_id, (0, []))
        else:
            names = self.names(request)
            num_tokens = self.found(names) * self.block_size
            self.matched[request.request_id] = num_tokens, names
        count = 0 if request.num_preemptions else max(0, num_tokens - num_computed_tokens)
        return count, count > 0

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        if num_external_tokens:
            last, names = self.matched[request.request_id]
            last //= self.block_size
            first = last - num_external_tokens // self.block_size
            (block_ids,) = blocks.get_block_ids()
            self.meta.loads.append((request.request_id, block_ids[first:last], names[first:last]))
            self.loading.add(request.request_id)

    def build_connector_meta(self, scheduler_output):
        meta, self.meta = self.meta, Meta()
        return meta

    def update_connector_output(self, connector_output):
        self.loading -= set(connector_output.finished_recving or ())

    def request_finished(self, request, block_ids):
        self.matched.pop(request.request_id, None)
        well = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
        names = self.names(request)
        if not well or request.request_id in self.loading or not names or len(block_ids) < len(names):
            return False, None
        self.meta.saves.append((request.request_id, block_ids[: len(names)], names))
        return True, None

    # ---- worker

    def register_kv_caches(self, kv_caches):
        self.caches = list(kv_caches.values())

    def start_load_kv(self, forward_context, **kwargs):
        for load in self._get_connector_metadata().loads:
            self.network.send(self.address, "load", job=load)

    def wait_for_layer_load(self, layer_name):
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        pass

    def wait_for_save(self):
        pass

    def receive(self, message):
        request_id, block_ids, names = message.fields["job"]
        if message.kind == "load":
            self.read(block_ids, names)
            self.received.add(request_id)
        else:
            self.write(block_ids, names)
            self.sent.add(request_id)

    def read(self, block_ids, names):
        for block_id, name in zip(block_ids, names, strict=True):
            for cache, kept in zip(self.caches, self.network.shelf[0, 0, name][0], strict=True):
                cache[block_id] = kept

    def write(self, block_ids, names):
        for block_id, name in zip(block_ids, names, strict=True):
            self.network.shelf[0, 0, name] = [cache[block_id].clone() for cache in self.caches], 0

    def get_finished(self, finished_req_ids):
        for save in self._get_connector_metadata().saves:
            self.network.send(self.address, "save", job=save)
        sent, received = self.sent, self.received
        self.sent, self.received = set(), set()
        return sent or None, received or None

    def get_block_ids_with_load_errors(self):
        invalid, self.invalid = self.invalid, set()
        return invalid

    def shutdown(self):
        if self.role == KVConnectorRole.WORKER:
            self.network.leave(self.address)


NATIVE = Capabilities(saves=True, finds_by_prompt=True, shared_prefixes=True, survives_restart=True, restores=True)

BROKEN: list[Any] = []
"""(class, capabilities, class of the suite, test, its arguments, what it says)"""


def found_by(test: str, *arguments: Any, says: str, can: Capabilities | None = None):
    """Which test of the suite finds this connector."""

    def enter(connector):
        if can is not None:
            capabilities = can
        elif issubclass(connector, NativeStore):
            capabilities = NATIVE
        else:
            capabilities = IN_PROCESS_HANDOVER if issubclass(connector, HandOverConnector) else IN_PROCESS_STORE
        BROKEN.append((connector, capabilities, test, arguments, says))
        return connector

    return enter


def hand_over(scheduler: type = HandOverScheduler, worker: type = HandOverWorker) -> type[Connector]:
    return type("Halves", (HandOverConnector,), {"scheduler_half": scheduler, "worker_half": worker})


def store(scheduler: type = StoreScheduler, worker: type = StoreWorker) -> type[Connector]:
    return type("Halves", (StoreConnector,), {"scheduler_half": scheduler, "worker_half": worker})


# ---- blocks


@found_by("BaseBlocks.test_blocks_stay_until_they_were_read", says="wrong KV")
class FreesEarly(NativeStore):
    """Says that blocks were sent before they are. Producers that freed on a timeout did (vllm#21570)."""

    def get_finished(self, finished_req_ids):
        saves = self._get_connector_metadata().saves
        _, received = super().get_finished(finished_req_ids)
        self.sent.clear()
        return {save[0] for save in saves} or None, received

    def receive(self, message):
        super().receive(message)
        self.sent.clear()


@found_by("BaseAnswers.test_many_at_once", 1, 1, says="nobody waits for")
class FreesTwice(NativeStore):
    def get_finished(self, finished_req_ids):
        sent, received = super().get_finished(finished_req_ids)
        self.again, again = sent, getattr(self, "again", None)
        return (sent or again), received


@found_by("BaseAnswers.test_a_prompt_is_loaded_whole", 12, says="silence")
class NeverFrees(NativeStore):
    """`get_finished` never reported anything (fault 10)."""

    def get_finished(self, finished_req_ids):
        return None, super().get_finished(finished_req_ids)[1]


class _NoLease(HandOverScheduler):
    def tick(self):
        for ended in self.buffer.take_ended() if self.buffer is not None else ():
            self.holds.give_back(offer_name(ended.transfer_id, ended.generation))

    give_up = HandOverScheduler.give_up


@found_by("BaseBlocks.test_kept_blocks_go_back_when_the_lease_is_over", says="lease of 480 s is over")
class IgnoresTheLease(hand_over(_NoLease)):
    """A request that the decode side refused stranded the producer's blocks (vllm#41269)."""


class _NeverYields(HandOverScheduler):
    def give_up(self, num_blocks):
        pass


@found_by("BaseBlocks.test_unread_blocks_yield_to_new_requests", says="silence")
class NeverYields(hand_over(_NeverYields)):
    """A large request blocked a smaller later one (vllm#10502)."""


class _GivesUpAll(HandOverScheduler):
    def give_up(self, num_blocks):
        if self.buffer is not None:
            for claim in list(self.buffer._claims):
                self.buffer.release(claim, True)
            self.buffer.evict_all_unclaimed()
            self.tick()


@found_by("BaseBlocks.test_blocks_that_are_being_read_do_not_yield", says="tokens were loaded|loads failed")
class GivesUpClaimedHolds(hand_over(_GivesUpAll)):
    pass


# ---- what is found


@found_by("BaseAnswers.test_a_prompt_is_loaded_whole", 12, says="0 of 12 tokens were loaded")
class KeysByRequestId(NativeStore):
    """vLLM suffixes request ids differently in each engine: no key ever matched (fault 1, vllm#42839)."""

    def names(self, request):
        return [request.request_id.encode().ljust(KEY) + name for name in super().names(request)]


@found_by("BaseMatching.test_another_salt_is_another_prompt", says="wrong KV|another")
class IgnoresTheSalt(NativeStore):
    def root(self, request):
        return b""


@found_by("BaseMatching.test_a_shared_beginning_and_no_more_is_loaded", says="wrong KV|cached")
class LoadsPastTheMatch(NativeStore):
    """Takes a block that follows the same tokens' number for one that follows the same tokens."""

    def names(self, request):
        return [i.to_bytes(1, "little") * KEY for i in range(len(super().names(request)))]


@found_by("BaseAnswers.test_a_prompt_is_loaded_whole", 12, says="matched")
class MatchesMoreThanThePrompt(NativeStore):
    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        count, asynchronous = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return (count + self.block_size if count else 0), asynchronous


@found_by("BaseMatching.test_a_request_that_waits_for_blocks_gets_the_same_answer_each_time", says="lookups answered")
class AnswersDifferentlyEachTime(NativeStore):
    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        count, asynchronous = super().get_num_new_matched_tokens(request, num_computed_tokens)
        self.asked = getattr(self, "asked", 0) + 1
        count -= self.block_size * (self.asked % 2) if count > self.block_size else 0
        if count:
            whole = num_computed_tokens + count
            self.matched[request.request_id] = self.matched[request.request_id]
            self.cut = whole
        return count, asynchronous

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        if num_external_tokens:
            last, names = self.matched[request.request_id]
            self.matched[request.request_id] = self.cut, names
            super().update_state_after_alloc(request, blocks, num_external_tokens)
            self.matched[request.request_id] = last, names


@found_by("BaseAnswers.test_a_prompt_of_one_token_is_answered", says="nothing ends|silence|1 of 1")
class OffersOneTokenPrompts(NativeStore):
    """vLLM steps back to zero for the last token, and asks again, for ever."""

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        if request.num_prompt_tokens == 1:
            return 1, True
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        if request.num_prompt_tokens > 1:
            super().update_state_after_alloc(request, blocks, num_external_tokens)
        elif num_external_tokens:
            self.meta.loads.append((request.request_id, [], []))
            self.loading.add(request.request_id)


@found_by("BaseAnswers.test_a_prompt_is_loaded_whole", 12, says="nothing ends|0 of 12|silence")
class LooksTheSameBadBlockUpAgain(NativeStore):
    """A load that failed is offered again, for ever (vllm#55297)."""

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        self.matched.pop(request.request_id, None)
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def read(self, block_ids, names):
        self.invalid |= set(block_ids)


# ---- what is loaded


def blocks_of(task, at, digests):
    """The part of a load's blocks that came."""
    return task.blocks[0][at : at + len(digests)]


class _DropsTheTail(HandOverWorker):
    def write(self, task, at, kv, digests):
        with task.using():
            self.store.scatter(blocks_of(task, at, digests), kv, np.arange(len(digests) - 1))
        return np.zeros(len(digests), bool)


@found_by("BaseAnswers.test_a_prompt_is_loaded_whole", 15, says="wrong KV")
class DropsTheTail(hand_over(worker=_DropsTheTail)):
    """What did not fit was cut short, with a warning (fault 12)."""


class _SwapsTwoBlocks(HandOverWorker):
    def write(self, task, at, kv, digests):
        with task.using():
            self.store.scatter(np.ascontiguousarray(blocks_of(task, at, digests)[::-1]), kv)
        return np.zeros(len(digests), bool)


@found_by("BaseAnswers.test_a_prompt_is_loaded_whole", 12, says="wrong KV")
class SwapsTwoBlocks(hand_over(worker=_SwapsTwoBlocks)):
    pass


class _ShiftsByOneLayer(HandOverWorker):
    def write(self, task, at, kv, digests):
        with task.using():
            self.store.scatter(blocks_of(task, at, digests), kv.roll(len(kv) // len(self.store.layout.layers)))
        return np.zeros(len(digests), bool)


@found_by("BaseAnswers.test_a_prompt_is_loaded_whole", 12, says="wrong KV")
class ShiftsByOneLayer(hand_over(worker=_ShiftsByOneLayer)):
    pass


class _DoneBeforeItIs(HandOverWorker):
    def load(self, task):
        super().load(task)
        task.done()


@found_by("BaseAnswers.test_a_prompt_is_loaded_whole", 12, says="wrong KV")
class ReportsDoneBeforeItIs(hand_over(worker=_DoneBeforeItIs)):
    """Success was acknowledged before the send (fault 8)."""


class _NoDigest(HandOverWorker):
    def write(self, task, at, kv, digests):
        with task.using():
            self.store.scatter(blocks_of(task, at, digests), kv)
        return np.zeros(len(digests), bool)


@found_by("BaseFailures.test_a_damaged_message", 3, says="wrong KV")
class ChecksNoDigest(hand_over(worker=_NoDigest)):
    pass


class _UsesFailedKV(HandOverWorker):
    def end(self, task, wrong):
        task.done()


@found_by("BaseFailures.test_a_damaged_message", 3, says="wrong KV")
class UsesFailedKV(hand_over(worker=_UsesFailedKV)):
    """Out of memory while receiving stored `None`, and decoding went on (fault 3)."""


class _WritesAfterTheEnd(HandOverWorker):
    def write(self, task, at, kv, digests):
        self.store.scatter(blocks_of(task, at, digests), kv)
        return np.zeros(len(digests), bool)


@found_by("BaseFailures.test_an_answer_that_comes_too_late_is_left_alone", 3, says="no open load was granted|wrong KV")
class WritesAfterTheTaskEnded(hand_over(worker=_WritesAfterTheEnd)):
    """Freed blocks were used again while an older step still wrote them (vllm#45357)."""


PARAMS_ONLY = dataclasses.replace(IN_PROCESS_HANDOVER, finds_by_prompt=False)


class _TrustsTheId(HandOverScheduler):
    """Whoever knows a transfer's id gets its KV."""

    def __init__(self, context):
        super().__init__(context)
        self.offered = {}

    def finished(self, request, blocks):
        keep = super().finished(request, blocks)
        if keep is not None:
            self.offered[keep.params["transfer_id"]] = request.keys.to_wire()
        return keep

    def on_find(self, *, keys, transfer_id, **more):
        super().on_find(keys=self.offered.get(transfer_id, keys), transfer_id=transfer_id, **more)


@found_by("BaseMatching.test_another_prompt_loads_nothing", says="wrong KV|another", can=PARAMS_ONLY)
class TrustsTheId(hand_over(_TrustsTheId)):
    pass


class _NeverReleases(HandOverScheduler):
    """The consumer never says that it has the blocks: only the lease ends what it read."""

    def load_ended(self, request, hit, ok):
        del self._lookups[request.id]


@found_by("BaseBlocks.test_kept_blocks_go_back_once_they_were_read", says="although a consumer has them")
class NeverReleases(hand_over(_NeverReleases)):
    pass


class _KeepsOffers(HandOverWorker):
    def let_go(self, hold_id):
        self._ended.append(hold_id)

    write = _NoDigest.write


# ---- announced transfers


class GrowsOneStepTooEarly(bind(HandOverConnector)):
    """Tells the worker half of blocks before the step that computes them."""

    by_hand = True

    def bind_connector_metadata(self, connector_metadata):
        super().bind_connector_metadata(connector_metadata)
        self._worker.start_saves()


found_by(
    "BaseEarlyAnnouncement.test_a_part_is_there_before_the_prompt_is_computed",
    1,
    1,
    says="wrong KV",
    can=IN_PROCESS_HANDOVER,
)(GrowsOneStepTooEarly)


class _ReadsPastTheEnd(HandOverWorker):
    def ready(self, offer, first, count):
        ready = super().ready(offer, first, count)
        return np.concatenate([ready, np.repeat(offer.blocks[-1:], count - len(ready))])


@found_by("BaseEarlyAnnouncement.test_a_part_is_there_before_the_prompt_is_computed", 1, 1, says="wrong KV")
class ReadsPastWhatIsThere(hand_over(worker=_ReadsPastTheEnd)):
    pass


class _WaitsForTheEnd(HandOverWorker):
    def ready(self, offer, first, count):
        ready = super().ready(offer, first, count)
        return ready if len(ready) == count else ready[:0]


@found_by("BaseEarlyAnnouncement.test_a_part_is_there_before_the_prompt_is_computed", 1, 1, says="nothing comes over")
class SendsNothingBeforeTheEnd(hand_over(worker=_WaitsForTheEnd)):
    pass


class _EndsWithTheFirstPart(HandOverWorker):
    def on_blocks(self, *, read, **more):
        if read in self._loads:
            self._loads[read].came[:] = True
        super().on_blocks(read=read, **more)


@found_by("BaseEarlyAnnouncement.test_a_part_is_there_before_the_prompt_is_computed", 2, 2, says="wrong KV")
class IsDoneWithTheFirstPart(hand_over(worker=_EndsWithTheFirstPart)):
    pass


class _AsksOnce(HandOverScheduler):
    def _ask(self, lookup, request, num_local_tokens):
        super()._ask(lookup, request, num_local_tokens)
        lookup.until = 0.0


@found_by("BaseEarlyAnnouncement.test_the_decode_server_may_be_the_first_to_know", says="0 of 50 tokens were loaded")
class DoesNotWaitForATransfer(hand_over(_AsksOnce)):
    pass


class _NeverBreaksOff(HandOverScheduler):
    def broken_off(self, request, hold_id):
        pass


@found_by(
    "BaseEarlyAnnouncement.test_a_transfer_that_was_broken_off_is_neither_found_nor_waited_for",
    says="a lookup answered",
)
class NeverEndsABrokenOffer(hand_over(_NeverBreaksOff)):
    pass


class _WaitsForWhatIsOver(HandOverScheduler):
    def on_found(self, *, heard, **more):
        super().on_found(heard=False, **more)


@found_by(
    "BaseEarlyAnnouncement.test_a_transfer_that_was_broken_off_is_neither_found_nor_waited_for",
    says="waited for",
)
class WaitsForATransferThatIsOver(hand_over(_WaitsForWhatIsOver)):
    pass


class _NeverLetsGo(HandOverWorker):
    def let_go(self, hold_id):
        pass


@found_by(
    "BaseEarlyAnnouncement.test_what_is_read_after_the_prefill_was_aborted_does_not_count", False, says="wrong KV"
)
class ReadsWhatWasBrokenOff(hand_over(worker=_NeverLetsGo)):
    pass


class _NamesHoldsByTransfer(HandOverScheduler):
    """The hold has the transfer's id, which may come again."""

    def announced(self, request):
        hold_id = super().announced(request)
        return hold_id and hold_id.rpartition("/")[0]

    def on_find(self, **more):
        super().on_find(**more)
        claim = self.network.pending[-1].fields["claim"]
        if claim is not None:
            claim["offer"] = claim["offer"].rpartition("/")[0]

    def finished(self, request, blocks):
        keep = super().finished(request, blocks)
        return keep and dataclasses.replace(keep, hold_id=keep.hold_id.rpartition("/")[0])

    def tick(self):
        for ended in self.buffer.take_ended() if self.buffer is not None else ():
            self._announced.pop(ended.transfer_id, None)
            self.holds.give_back(ended.transfer_id)


@found_by("BaseEarlyAnnouncement.test_what_is_read_after_the_prefill_was_aborted_does_not_count", True, says="wrong KV")
class TakesOneTransferForAnother(hand_over(_NamesHoldsByTransfer)):
    pass


class _RenamesItsHold(HandOverScheduler):
    def finished(self, request, blocks):
        keep = super().finished(request, blocks)
        return keep and dataclasses.replace(keep, hold_id=f"{keep.hold_id} finished")


@found_by("BaseEarlyAnnouncement.test_a_prompt_is_loaded_whole", 5, says="loads failed|tokens were loaded")
class EndsTheAnnouncedHold(hand_over(_RenamesItsHold)):
    """`finished` answers with another hold than `announced` did."""


# ---- reports


@found_by("BaseAnswers.test_a_prompt_is_loaded_whole", 12, says="no such load is open")
class ReportsAnUnknownId(NativeStore):
    def get_finished(self, finished_req_ids):
        sent, received = super().get_finished(finished_req_ids)
        return sent, (received or set()) | {"nobody"}


@found_by("BaseAnswers.test_a_prompt_is_loaded_whole", 12, says="took")
class BlocksInGetFinished(NativeStore):
    """`recv_tensor` waited in the thread that runs the model (fault 2)."""

    def get_finished(self, finished_req_ids):
        time.sleep(0.55)
        return super().get_finished(finished_req_ids)


@found_by("BaseAnswers.test_a_prompt_is_loaded_whole", 12, says="silence")
class NeverEndsALoad(NativeStore):
    """The consumer hung (faults 1 and 2)."""

    def get_finished(self, finished_req_ids):
        return super().get_finished(finished_req_ids)[0], None


@found_by("BaseAnswers.test_pools_so_small_that_vllm_preempts", 1, 1, says="silence|loads were never|round")
class ForgetsOnPreemption(NativeStore):
    """Promises a preempted request its KV again, and then does not load it."""

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        if request.num_preemptions:
            count = request.num_prompt_tokens // self.block_size * self.block_size - num_computed_tokens
            return max(0, count), count > 0
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        if not request.num_preemptions:
            super().update_state_after_alloc(request, blocks, num_external_tokens)


@found_by("BaseAborts.test_an_aborted_prompt_is_never_loaded", says="wrong KV")
class KeepsAbortedPrompts(NativeStore):
    """Offers the whole prompt, whatever was computed of it."""

    def request_finished(self, request, block_ids):
        self.matched.pop(request.request_id, None)
        names = self.names(request)
        if request.request_id in self.loading or not names or not block_ids:
            return False, None
        block_ids = [*block_ids, *[block_ids[0]] * len(names)][: len(names)]
        self.meta.saves.append((request.request_id, block_ids, names))
        return True, None


@found_by("BaseAborts.test_a_request_is_aborted_after_any_step", 1, says="freed twice|while it loads|free them twice")
class DelaysTheFreeOfALoad(NativeStore):
    """vLLM holds the blocks of an aborted load itself: a second free kills the engine."""

    def request_finished(self, request, block_ids):
        if request.request_id in self.loading:
            self.meta.saves.append((request.request_id, [], []))
            return True, None
        return super().request_finished(request, block_ids)


# ---- threads and closing


class _LeaksTasks(StoreWorker):
    def put(self, task):
        done, task.done = task.done, lambda: None
        super().put(task)
        task.done = done


@found_by("BaseAnswers.test_a_prompt_is_loaded_whole", 12, says="saves expired")
class LeaksTasks(store(worker=_LeaksTasks)):
    """Entries were kept after they were read (vllm#8724)."""


class _RaisesInAThread(HandOverWorker):
    def load(self, task):
        def listen():
            try:
                raise RuntimeError("the listener met what it had not expected")
            except RuntimeError:
                return

        threading.Thread(target=listen, name="listener", daemon=True).start()


@found_by("BaseAnswers.test_a_prompt_is_loaded_whole", 12, says="0 of 12 tokens|loads expired")
class RaisesInAThreadSilently(hand_over(worker=_RaisesInAThread)):
    """The listener caught one type of exception; any other killed the thread, and everything hung (fault 4)."""


class _NeverJoins(HandOverWorker):
    def __init__(self, context):
        super().__init__(context)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.stop.wait, args=(3.5,), name="loops for ever", daemon=True)
        self.thread.start()


@found_by("BaseEnding.test_closing_twice_is_fine_and_bounded", says="threads are left")
class LeavesItsThread(hand_over(worker=_NeverJoins)):
    pass


class _JoinsForEver(_NeverJoins):
    def close(self):
        super().close()
        self.thread.join()


@found_by("BaseEnding.test_closing_twice_is_fine_and_bounded", says="closing took")
class ClosesForEver(hand_over(worker=_JoinsForEver)):
    """`close()` joined threads that loop for ever (fault 5)."""


class _ClosesOnce(HandOverScheduler):
    def close(self):
        assert self.address in self.network._receivers, "closed twice"
        super().close()


@found_by("BaseEnding.test_closing_twice_is_fine_and_bounded", says="closed twice")
class ClosesOnlyOnce(hand_over(_ClosesOnce)):
    pass


# ---- peers


class _RemembersPeers(HandOverScheduler):
    def granted(self, request, hit, num_tokens):
        self.workers = getattr(self, "workers", None) or tuple(hit.source["workers"])
        return Source(self.workers, hit.source["offer"])


@found_by("BasePeers.test_a_producer_that_died_is_replaced", says="nothing is loaded since")
class RemembersADeadPeer(hand_over(_RemembersPeers)):
    """A decode server stalled once its prefill server was replaced (sglang#34289)."""


class _LateRead(HandOverWorker):
    """Reads what was let go, and checks nothing."""

    let_go = _KeepsOffers.let_go
    write = _NoDigest.write


@found_by("BaseBlocks.test_what_is_read_after_the_lease_does_not_count", says="wrong KV")
class ReadsBlocksThatWereLetGo(hand_over(worker=_LateRead)):
    """Wrong text was served with status 200 (vllm#21570)."""


class _NoKeyForTheTail(StoreScheduler):
    def find(self, request, num_local_tokens):
        hit = super().find(request, num_local_tokens)
        if hit is None or not 0 < request.num_prompt_tokens - hit.num_tokens < request.block_size:
            return hit
        whole = hit.num_tokens // request.block_size * KEY
        return Hit(request.num_prompt_tokens, hit.source[:whole] + hit.source[whole - KEY : whole])


class _StoreWithoutDigest(StoreWorker):
    write = _NoDigest.write


@found_by("BaseMatching.test_a_longer_prompt_is_not_the_one_that_was_computed", 3, says="wrong KV")
class TakesTheTailForGranted(store(_NoKeyForTheTail, _StoreWithoutDigest)):
    """A prompt a few tokens longer than what was saved is answered as if those had been saved, too."""
