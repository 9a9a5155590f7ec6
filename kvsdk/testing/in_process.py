"""Two connectors that move KV within one process, and the network between them, which a test drives by hand.

`HandOverConnector` keeps a finished prompt's blocks for a consumer, as `PyNcclConnector` does; `StoreConnector` copies
blocks out as they are computed. Nothing runs in a thread: a message waits in `Network.pending` until the test delivers,
drops, duplicates, postpones or corrupts it, so every history can be played again exactly. They are the reference that
passes the conformance kit, and what its deliberately broken connectors are made of.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kvsdk.buffer import BufferFull, LookupBuffer, offer_name
from kvsdk.buffer.keys import PrefixKeys
from kvsdk.connector import (
    ASK_AGAIN,
    AskAgain,
    BlockIds,
    Connector,
    ConsumerScheduler,
    ConsumerWorker,
    Context,
    Hit,
    Keep,
    LoadTask,
    ProducerScheduler,
    ProducerWorker,
    RequestView,
    SaveTask,
)
from kvsdk.errors import ConfigError, KVError, OfferTooLarge, TaskEnded
from kvsdk.kernels import BlockStore
from kvsdk.layout import CacheLayout
from kvsdk.transfer_params import Role, classify

logger = logging.getLogger("kvsdk.testing")

KEY_BYTES = 16

ASK_EVERY = 0.004
"""Seconds between two questions for an announced transfer that no producer has heard of."""

_networks: weakref.WeakValueDictionary[str, Network] = weakref.WeakValueDictionary()
_names = itertools.count(1)


@dataclasses.dataclass
class Message:
    """One message on its way.

    Attributes:
        fields: plain values.
        kv: blocks' bytes, 1-D uint8; the sender's copy.
        damaged: set by `Network.corrupt` on a message without `kv`; its receiver drops it, as a wire format would.
    """

    to: str
    kind: str
    fields: dict[str, Any]
    kv: torch.Tensor | None = None
    damaged: bool = False


class Network:
    """Carries messages between the connectors of one process; a test decides about each.

    Attributes:
        name: what connectors are given as the option `network`.
        pending: messages that were sent and not delivered, the oldest first.
        producers: addresses of the schedulers that offer KV.
        shelf: what `StoreConnector` saved: (world size, rank, prefix key) to (bytes, digest).
        counters: messages delivered, dropped and so on, by name.
        armed: what happens to the next messages that carry blocks, one each: `drop`, `duplicate` or `corrupt`.
    """

    def __init__(self) -> None:
        self.name = f"network-{next(_names)}"
        self.pending: list[Message] = []
        self.producers: dict[str, None] = {}
        self.shelf: dict[tuple[int, int, bytes], tuple[torch.Tensor, int]] = {}
        self.counters: collections.Counter[str] = collections.Counter()
        self.armed: list[str] = []
        self._receivers: dict[str, Callable[[Message], None]] = {}
        _networks[self.name] = self

    @staticmethod
    def named(name: Any) -> Network:
        """Raises ConfigError when there is no such network (any more)."""
        try:
            return _networks[name]
        except (KeyError, TypeError):
            raise ConfigError(f"network={name!r} does not exist; make a kvsdk.testing.Network first") from None

    # ---- connectors

    def join(self, address: str, receive: Callable[[Message], None]) -> None:
        self._receivers[address] = receive

    def leave(self, address: str) -> None:
        """Messages to this address are lost from now on. Twice is fine."""
        self._receivers.pop(address, None)
        self.producers.pop(address, None)

    def send(self, to: str, kind: str, kv: torch.Tensor | None = None, **fields: Any) -> None:
        self.pending.append(Message(to, kind, fields, kv))
        if kv is not None and self.armed:
            getattr(self, self.armed.pop(0))(len(self.pending) - 1)

    # ---- the test

    def deliver(self, index: int = 0) -> bool:
        """Hand a message over; any but the first overtakes others. False when there is none."""
        if not self.pending:
            return False
        message = self.pending.pop(index % len(self.pending))
        receive = self._receivers.get(message.to)
        if receive is None or message.damaged:
            self.counters["lost" if receive is None else "refused"] += 1
            return True
        self.counters["delivered"] += 1
        receive(message)
        return True

    def deliver_all(self, limit: int = 10_000) -> int:
        """Deliver until nothing is pending, answers included; returns how many."""
        count = 0
        while self.deliver():
            count += 1
            if count > limit:
                raise AssertionError(f"still {len(self.pending)} messages after {limit}: connectors answer for ever")
        return count

    def drop(self, index: int = 0) -> None:
        if self.pending:
            self.counters["dropped"] += 1
            self.pending.pop(index % len(self.pending))

    def duplicate(self, index: int = 0) -> None:
        """The copy goes to the end of the queue."""
        if self.pending:
            self.counters["duplicated"] += 1
            one = self.pending[index % len(self.pending)]
            copied = one.kv.clone() if one.kv is not None else None
            self.pending.append(dataclasses.replace(one, fields=dict(one.fields), kv=copied))

    def postpone(self, index: int = 0) -> None:
        """The message goes to the end of the queue."""
        if self.pending:
            self.counters["postponed"] += 1
            self.pending.append(self.pending.pop(index % len(self.pending)))

    def corrupt(self, index: int = 0) -> None:
        """Flip a bit of the message's blocks, or damage a message that carries none."""
        if self.pending:
            self.counters["corrupted"] += 1
            message = self.pending[index % len(self.pending)]
            if message.kv is not None and len(message.kv):
                message.kv[len(message.kv) // 3] ^= 4
            else:
                message.damaged = True


class _Moves:
    """What workers of both connectors have in common."""

    context: Context

    def register(self, kv_caches: dict[str, torch.Tensor], layout: CacheLayout) -> None:
        self.store = BlockStore(kv_caches, layout)

    def pack(self, block_ids: np.ndarray, first: int) -> tuple[torch.Tensor, np.ndarray]:
        """Blocks' bytes and their digests, (n,) uint64; `first` is the first one's index in the prompt."""
        staging = self.store.staging(len(block_ids))
        self.store.gather(block_ids, staging)
        return staging, self.store.digest(staging, len(block_ids), np.arange(first, first + len(block_ids)))

    def write(self, task: LoadTask, at: int, kv: torch.Tensor, digests: np.ndarray) -> np.ndarray:
        """Check blocks, and write what is right into the cache.

        Args:
            at: index of the first of them in the task's blocks.

        Returns:
            which of them are damaged, (n,) bool.

        Raises:
            KVError: `kv` has not the size of so many blocks.
            TaskEnded: nothing was written.
        """
        count, first = len(digests), task.first_block + at
        if len(kv) != self.store.staging_bytes(count):
            raise KVError(f"{len(kv)} bytes for {count} blocks")
        right = self.store.digest(kv, count, np.arange(first, first + count)) == digests
        with task.using():
            self.store.scatter(task.blocks[0][at : at + count], kv, np.flatnonzero(right))
        return ~right

    def end(self, task: LoadTask, wrong: np.ndarray) -> None:
        """All blocks of a load have come, of which some are damaged, (n,) bool."""
        if wrong.any():
            task.fail(KVError(f"{wrong.sum()} of {len(wrong)} blocks are damaged"), np.flatnonzero(wrong))
        else:
            task.done()


def _failed(task: LoadTask | SaveTask, error: Exception) -> None:
    try:
        task.fail(error)
    except TaskEnded as ended:
        logger.debug("%s", ended)


# ---- hand-over


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a load's blocks are: picklable."""

    workers: tuple[str, ...]
    offer: str


@dataclasses.dataclass
class _Lookup:
    """A question to producers.

    Attributes:
        waiting: producers that have not answered; for them until `deadline`.
        best: the best answer so far.
        heard: whether a producer knows the transfer, or knew it: one that is over is not waited for.
        again_at: when an announced transfer may be asked for again.
        until: when it is not asked for any more.
    """

    ask: str = ""
    waiting: set[str] = dataclasses.field(default_factory=set)
    deadline: float = 0.0
    best: dict[str, Any] | None = None
    heard: bool = False
    again_at: float = 0.0
    until: float = 0.0


class HandOverScheduler(ProducerScheduler, ConsumerScheduler):
    """Offers prompts in a `LookupBuffer`, when they are finished or as they are computed, and asks the other schedulers
    of the network for theirs.
    """

    def __init__(self, context: Context):
        super().__init__(context)
        options, cache = context.options, context.cache
        self.network = Network.named(options.extra.get("network"))
        self.address = f"scheduler {context.engine_id}"
        self._lookups: dict[str, _Lookup] = {}  # by request id
        self._asks = itertools.count(1)
        self._announced: dict[str, str] = {}  # transfer id -> request id, while the offer stands
        self.buffer: LookupBuffer | None = None
        if options.produces:
            self.buffer = LookupBuffer(
                limit_bytes=int(options.kv_buffer_size),
                block_bytes=cache.block_bytes,
                lease=options.lease,
                clock=context.clock,
            )

    def start(self, workers: list[dict[str, Any]]) -> None:
        self._workers = tuple(worker["address"] for worker in workers)
        self.network.join(self.address, self._receive)
        if self.buffer is not None:
            self.network.producers[self.address] = None

    def _receive(self, message: Message) -> None:
        getattr(self, f"on_{message.kind}")(**message.fields)

    # ---- consumer

    def find(self, request: RequestView, num_local_tokens: int) -> Hit | AskAgain | None:
        now, lookup = self.context.clock(), self._lookups.get(request.id)
        if lookup is None:
            lookup = self._lookups[request.id] = _Lookup()
            if classify(request.kv_transfer_params).announced:
                lookup.until = now + self.context.options.announce_wait
            self._ask(lookup, request, num_local_tokens)
        if lookup.waiting and now < lookup.deadline:
            return ASK_AGAIN
        lookup.waiting.clear()
        if lookup.best is not None:
            return Hit(lookup.best["num_tokens"], lookup.best)
        if lookup.heard or now >= lookup.until:
            return None
        if now >= lookup.again_at:
            self._ask(lookup, request, num_local_tokens)
        return ASK_AGAIN

    def _ask(self, lookup: _Lookup, request: RequestView, num_local_tokens: int) -> None:
        params = request.kv_transfer_params or {}
        told = classify(params)
        producers, transfer_id = set(self.network.producers) - {self.address}, None
        if told.role is Role.DECODE_ELSEWHERE:
            producers = set()
        elif told.announced or isinstance(params.get("producer"), str):
            # The proxy names a producer by host and port, which nobody has here; the id is known to one of them only.
            producers &= {params.get("producer")} if "producer" in params else producers
            transfer_id = told.transfer_id
        now = self.context.clock()
        lookup.ask, lookup.waiting = f"{self.address}/{next(self._asks)}", producers
        lookup.deadline, lookup.again_at = now + self.context.options.lookup_timeout, now + ASK_EVERY
        for address in sorted(producers):
            self.network.send(
                address,
                "find",
                ask=lookup.ask,
                reply_to=self.address,
                keys=request.keys.to_wire(),
                transfer_id=transfer_id,
                min_tokens=num_local_tokens,
            )

    def on_found(self, *, ask: str, producer: str, claim: dict[str, Any] | None, heard: bool) -> None:
        for lookup in self._lookups.values():
            if lookup.ask == ask and producer in lookup.waiting:
                lookup.waiting.discard(producer)
                lookup.heard = lookup.heard or heard
                if claim is not None:
                    worse = claim
                    if lookup.best is None or claim["num_tokens"] > lookup.best["num_tokens"]:
                        lookup.best, worse = claim, lookup.best
                    self._release(worse, used=False)
                return
        self._release(claim, used=False)  # too late, or once too often

    def _release(self, claim: dict[str, Any] | None, *, used: bool) -> None:
        if claim is not None:
            self.network.send(claim["producer"], "release", claim_id=claim["claim_id"], used=used)

    def granted(self, request: RequestView, hit: Hit, num_tokens: int) -> Source:
        return Source(tuple(hit.source["workers"]), hit.source["offer"])

    def load_ended(self, request: RequestView, hit: Hit, ok: bool) -> None:
        del self._lookups[request.id]
        self._release(hit.source, used=True)

    def forget(self, request: RequestView) -> None:
        lookup = self._lookups.pop(request.id, None)
        if lookup is not None:
            self._release(lookup.best, used=True)

    # ---- producer

    def finished(self, request: RequestView, blocks: BlockIds) -> Keep | None:
        assert self.buffer is not None
        transfer_id = self._chosen_id(request)
        try:
            if transfer_id is not None and self._announced.get(transfer_id) == request.id:
                offer = self.buffer.complete(transfer_id, blocks[0])
            elif transfer_id is not None and self.buffer.over(transfer_id):
                offer = None
            else:
                offer = self.buffer.insert(request.keys, blocks[0], transfer_id)
        except (OfferTooLarge, BufferFull, ValueError) as error:
            logger.info("request %s is not offered: %s", request.id, error)
            return None
        if offer is None:
            return None  # a consumer has all of it already, or nobody waits for it any more
        params = {
            "do_remote_prefill": True,
            "producer": self.address,
            "transfer_id": offer.transfer_id,
            "remote_block_ids": [],  # there already, unlike an announced transfer's
        }
        return Keep(offer_name(offer.transfer_id, offer.generation), params)

    def announced(self, request: RequestView) -> str | None:
        transfer_id = self._chosen_id(request)
        if self.buffer is None or transfer_id is None:
            return None
        try:
            generation = self.buffer.announce(request.keys, transfer_id)
        except (OfferTooLarge, BufferFull, ValueError) as error:
            logger.info("request %s is not announced: %s", request.id, error)
            return None
        self._announced[transfer_id] = request.id
        return offer_name(transfer_id, generation)

    def broken_off(self, request: RequestView, hold_id: str) -> None:
        transfer_id = self._chosen_id(request)
        if self.buffer is not None and transfer_id is not None:
            self.buffer.break_off(transfer_id)

    @staticmethod
    def _chosen_id(request: RequestView) -> str | None:
        """The transfer id that a proxy has chosen for this prefill."""
        params = classify(request.kv_transfer_params)
        return params.transfer_id if params.role is Role.DECODE_ELSEWHERE else None

    def on_find(
        self, *, ask: str, reply_to: str, keys: dict[str, Any], transfer_id: str | None, min_tokens: int
    ) -> None:
        assert self.buffer is not None
        prompt = PrefixKeys.from_wire(keys)
        if transfer_id is not None:
            claim = self.buffer.claim(transfer_id, prompt, min_tokens)
        else:
            claim = self.buffer.find(prompt, min_tokens)
        found = None
        if claim is not None:
            found = {
                "producer": self.address,
                "claim_id": claim.claim_id,
                "offer": offer_name(claim.transfer_id, claim.generation),
                "num_tokens": claim.num_tokens,
                "workers": self._workers,
            }
        # An announced transfer that nobody has heard of is still to come.
        heard = transfer_id is None or self.buffer.standing(transfer_id) or self.buffer.over(transfer_id)
        self.network.send(reply_to, "found", ask=ask, producer=self.address, claim=found, heard=heard)

    def on_release(self, *, claim_id: str, used: bool) -> None:
        assert self.buffer is not None
        self.buffer.release(claim_id, used)

    def give_up(self, num_blocks: int) -> None:
        if self.buffer is not None:
            self.buffer.evict(num_blocks)
            self.tick()

    # ---- both

    def tick(self) -> None:
        if self.buffer is not None:
            self.buffer.expire()
            for ended in self.buffer.take_ended():
                self._announced.pop(ended.transfer_id, None)
                self.holds.give_back(offer_name(ended.transfer_id, ended.generation))

    def reset(self) -> bool:
        if self.buffer is not None:
            self.buffer.evict_all_unclaimed()
            # What is claimed or still computed can be found by others.
            return self.buffer.num_offers == 0
        return True

    def close(self) -> None:
        self.network.leave(self.address)
        if self.buffer is not None:
            self.buffer.close()


@dataclasses.dataclass
class Offered:
    """A hold's blocks.

    Attributes:
        blocks: those that are computed, int32.
        num_blocks: of the whole prompt.
    """

    blocks: np.ndarray
    num_blocks: int


@dataclasses.dataclass
class _Asked:
    """What a consumer still wants of an offer: `count` blocks from the prompt's block `first` on."""

    read: int
    reply_to: str
    offer: str
    first: int
    count: int
    deadline: float


@dataclasses.dataclass
class _Load:
    """A load under way: which of the task's blocks have come, and which of these are damaged, (n,) bool."""

    task: LoadTask
    came: np.ndarray
    wrong: np.ndarray


class HandOverWorker(_Moves, ProducerWorker, ConsumerWorker):
    """Reads kept blocks for others, and asks for theirs."""

    def __init__(self, context: Context):
        super().__init__(context)
        self.network = Network.named(context.options.extra.get("network"))
        self.address = f"worker {context.rank} of {context.engine_id}"
        self._offers: dict[str, Offered] = {}
        self._ended: collections.deque[str] = collections.deque(maxlen=1000)
        self._asked: list[_Asked] = []
        self._loads: dict[int, _Load] = {}
        self._read_ids = itertools.count(1)
        self.network.join(self.address, self._receive)

    def handshake(self) -> dict[str, Any]:
        return {"address": self.address}

    def _receive(self, message: Message) -> None:
        more = {} if message.kv is None else {"kv": message.kv}
        getattr(self, f"on_{message.kind}")(**message.fields, **more)

    # ---- producer

    def kept(self, hold_id: str, blocks: BlockIds) -> None:
        self._offers[hold_id] = Offered(blocks[0], len(blocks[0]))
        self._answer()

    def grew(self, hold_id: str, first_block: int, blocks: BlockIds, num_blocks: int, fence: Any) -> None:
        offer = self._offers.setdefault(hold_id, Offered(np.zeros(0, np.int32), num_blocks))
        offer.blocks = np.concatenate([offer.blocks, blocks[0]])
        self._answer()

    def let_go(self, hold_id: str) -> None:
        self._offers.pop(hold_id, None)
        self._ended.append(hold_id)
        self._answer()

    def on_read(self, *, read: int, reply_to: str, offer: str, first: int, count: int) -> None:
        deadline = self.context.clock() + self.context.options.load_timeout
        self._asked.append(_Asked(read, reply_to, offer, first, count, deadline))
        self._answer()

    def _answer(self) -> None:
        """Send to everybody what there is of what was asked for."""
        now = self.context.clock()
        self._asked = [asked for asked in self._asked if now < asked.deadline and self._waits(asked)]

    def _waits(self, asked: _Asked) -> bool:
        """Send what there is; whether there is more to come."""
        offer, first, count = self._offers.get(asked.offer), asked.first, asked.count
        if offer is None and asked.offer not in self._ended:
            return True  # the consumer may hear of an offer a step before this worker does
        if offer is None or not 0 <= first < first + count <= offer.num_blocks:
            reason = f"offer {asked.offer} has no such blocks"
            self.network.send(asked.reply_to, "refused", read=asked.read, reason=reason)
            return False
        ready = self.ready(offer, first, count)
        if len(ready):
            kv, digests = self.pack(ready, first)
            self.network.send(asked.reply_to, "blocks", kv, read=asked.read, first=first, digests=digests)
        asked.first, asked.count = first + len(ready), count - len(ready)
        return asked.count > 0

    def ready(self, offer: Offered, first: int, count: int) -> np.ndarray:
        """Those of `count` blocks from the prompt's block `first` on that can be read now."""
        return offer.blocks[first : first + count]

    # ---- consumer

    def load(self, task: LoadTask) -> None:
        self._loads = {name: one for name, one in self._loads.items() if not one.task.ended}
        read, count = next(self._read_ids), len(task.blocks[0])
        self._loads[read] = _Load(task, np.zeros(count, bool), np.zeros(count, bool))
        self.network.send(
            task.source.workers[self.context.rank],
            "read",
            read=read,
            reply_to=self.address,
            offer=task.source.offer,
            first=task.first_block,
            count=count,
        )

    def on_blocks(self, *, read: int, first: int, digests: np.ndarray, kv: torch.Tensor) -> None:
        load = self._loads.get(read)
        if load is None:
            return
        at = first - load.task.first_block
        part = slice(at, at + len(digests))
        try:
            load.wrong[part] = self.write(load.task, at, kv, digests)
            load.came[part] = True
            if load.came.all():
                self.end(load.task, load.wrong)
        except TaskEnded as ended:
            logger.debug("%s", ended)
        except KVError as error:
            _failed(load.task, error)
        if load.task.ended:
            del self._loads[read]

    def on_refused(self, *, read: int, reason: str) -> None:
        load = self._loads.pop(read, None)
        if load is not None:
            _failed(load.task, KVError(reason))

    def close(self) -> None:
        self.network.leave(self.address)


class HandOverConnector(Connector):
    """Hands prompts over within one process. The option `network` names a `Network`."""

    scheduler_half = HandOverScheduler
    worker_half = HandOverWorker
    option_names = frozenset({"network"})
    by_hand = True


# ---- store


class StoreScheduler(ProducerScheduler, ConsumerScheduler):
    """Finds prompts on the network's shelf and has every prompt saved there."""

    def __init__(self, context: Context):
        super().__init__(context)
        self.network = Network.named(context.options.extra.get("network"))

    def find(self, request: RequestView, num_local_tokens: int) -> Hit | None:
        names = request.keys.blocks + request.keys.tail
        found = 0
        while found * KEY_BYTES < len(names) and all(
            (self.context.world_size, rank, names[found * KEY_BYTES : (found + 1) * KEY_BYTES]) in self.network.shelf
            for rank in range(self.context.world_size)
        ):
            found += 1
        return Hit(min(found * request.block_size, request.num_prompt_tokens), names) if found else None

    def save_from(self, request: RequestView) -> int:
        return 0

    def reset(self) -> bool:
        self.network.shelf.clear()
        return True


class StoreWorker(_Moves, ProducerWorker, ConsumerWorker):
    """Copies blocks to the network's shelf and back. Each load and save is a message to itself."""

    def __init__(self, context: Context):
        super().__init__(context)
        self.network = Network.named(context.options.extra.get("network"))
        self.address = f"worker {context.rank} of {context.engine_id}"
        self._tasks: dict[int, LoadTask | SaveTask] = {}
        self._task_ids = itertools.count(1)
        self.network.join(self.address, self._receive)

    def _name(self, names: bytes, i: int) -> tuple[int, int, bytes]:
        return self.context.world_size, self.context.rank, names[i * KEY_BYTES : (i + 1) * KEY_BYTES]

    def _enter(self, task: LoadTask | SaveTask) -> int:
        self._tasks = {name: one for name, one in self._tasks.items() if not one.ended}
        task_id = next(self._task_ids)
        self._tasks[task_id] = task
        return task_id

    def load(self, task: LoadTask) -> None:
        names = [self._name(task.source, task.first_block + i) for i in range(len(task.blocks[0]))]
        taken = [self.network.shelf[name] for name in names]
        staging = self.store.staging(len(taken))
        # Staging is layer-major: each block's bytes lie in one piece for each layer.
        sizes = [layer.block_bytes for layer in self.store.layout.layers]
        pieces = [kv.split(sizes) for kv, _ in taken]
        torch.cat([piece[layer] for layer in range(len(sizes)) for piece in pieces], out=staging)
        digests = np.array([digest for _, digest in taken], np.uint64)
        self.network.send(self.address, "load", staging, task=self._enter(task), digests=digests)

    def save(self, task: SaveTask) -> None:
        self.network.send(self.address, "save", task=self._enter(task))

    def _receive(self, message: Message) -> None:
        task = self._tasks.pop(message.fields["task"], None)
        try:
            if isinstance(task, LoadTask) and message.kv is not None:
                self.end(task, self.write(task, 0, message.kv, message.fields["digests"]))
            elif isinstance(task, SaveTask):
                self.put(task)
        except TaskEnded as ended:
            logger.debug("%s", ended)

    def put(self, task: SaveTask) -> None:
        (block_ids,) = task.blocks
        for i in range(len(block_ids)):
            with task.using():
                kv, digests = self.pack(block_ids[i : i + 1], task.first_block + i)
            self.network.shelf[self._name(task.keys, i)] = kv, int(digests[0])
        task.done()

    def close(self) -> None:
        self.network.leave(self.address)


class StoreConnector(Connector):
    """Keeps copies of every prompt's blocks in the process's memory. The option `network` names a `Network`."""

    scheduler_half = StoreScheduler
    worker_half = StoreWorker
    option_names = frozenset({"network"})
    by_hand = True
