"""The lookup buffer: what a producer keeps for others, who may take it, and for how long.

No I/O and no threads: a scheduler inserts and takes what ended, a server finds, renews and releases for consumers.

    insert ─► unclaimed ──claim──► claimed ──release(used)──► ended ─► take_ended
                 │  ▲                 │ │
                 │  └─release(unused)─┘ └──lease over──► ended
                 └──lease over, evicted──► ended

An offer may be announced before its prompt is computed. Until `complete` it can be claimed by its transfer id alone, no
lease of its own runs, and it is not evicted: its request has those blocks anyway.
"""

from __future__ import annotations

import heapq
import itertools
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from kvsdk.buffer.keys import PrefixKeys
from kvsdk.buffer.prefix_tree import PrefixTree
from kvsdk.errors import ConfigError, KVError, OfferTooLarge

_OFFER, _CLAIM = 0, 1
_REMEMBERED = 4096  # transfer ids of offers that ended


class BufferFull(KVError):
    """An offer fits `kv_buffer_size`, but not beside the offers that consumers are reading now.

    Attributes:
        needed: bytes of the claimed offers and of this one, a shared block once.
        limit: the limit, in bytes.
    """

    def __init__(self, needed: int, limit: int):
        super().__init__(
            f"an offer beside those being read would hold {needed} bytes, kv_buffer_size={limit}; it is not offered"
        )
        self.needed, self.limit = needed, limit


@dataclass(frozen=True)
class Offer:
    """What `insert` put into the buffer.

    Attributes:
        transfer_id: its name; unique while the offer stands.
        num_tokens: length of its prompt.
        block_ids: shape (ceil(num_tokens / block_size),), int32, read-only.
        generation: differs from that of every other offer of this buffer.
        expires_at: when its lease is over unless it is claimed before, on the buffer's clock.
    """

    transfer_id: str
    num_tokens: int
    block_ids: np.ndarray
    generation: int
    expires_at: float


@dataclass(frozen=True)
class Claim:
    """A consumer's right to the first `num_tokens` tokens of an offer.

    Attributes:
        claim_id: its name; not to be guessed, so that knowing it is the right to renew and release it.
        transfer_id: the offer.
        num_tokens: how much of the asked prompt the offer holds: whole blocks, or the whole prompt with its tail.
        exclusive: whether the offer ends with this claim.
        generation: the offer's.
        expires_at: when its lease is over unless it is renewed before, on the buffer's clock.
    """

    claim_id: str
    transfer_id: str
    num_tokens: int
    exclusive: bool
    generation: int
    expires_at: float


@dataclass(frozen=True)
class EndedOffer:
    """An offer that is over; its blocks can be given back.

    Attributes:
        transfer_id, generation: the offer's.
        block_ids: all of the offer's blocks, as inserted. Other offers may hold some of them as well.
        reason: `released` (a consumer has it), `expired`, `evicted`, `broken` (announced, and never completed) or
            `closed`.
    """

    transfer_id: str
    generation: int
    block_ids: np.ndarray
    reason: str


def offer_name(transfer_id: str, generation: int) -> str:
    """Names an offer for good: whoever chooses transfer ids may choose one again, for another prompt, while a read of
    the first is on its way."""
    return f"{transfer_id}/{generation}"


def _prompt(keys: PrefixKeys) -> tuple[bytes, int]:
    return keys.full_key, keys.num_tokens


_NO_BLOCKS = np.zeros(0, np.int32)


def _num_blocks(keys: PrefixKeys) -> int:
    if keys.num_tokens < 2:
        # vLLM computes the last prompt token itself, so nothing of this prompt can be loaded; told that something
        # can, it asks again in every step, for ever.
        raise ValueError("a prompt of one token is never offered")
    return -(-keys.num_tokens // keys.block_size)


def _checked(keys: PrefixKeys, block_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy of a prompt's block ids, and the distinct ones among them."""
    expected = _num_blocks(keys)
    if block_ids.dtype != np.int32 or block_ids.shape != (expected,):
        raise ValueError(f"block_ids: {block_ids.dtype} {block_ids.shape}; the prompt needs int32 ({expected},)")
    # As good as always they are distinct, and then sorting tells so in a tenth of what `np.unique` takes.
    distinct = np.sort(block_ids)
    if (distinct[1:] == distinct[:-1]).any():
        distinct = np.unique(distinct)
    if distinct[0] < 0:
        raise ValueError(f"block_ids hold {distinct[0]}")
    block_ids = block_ids.copy()
    block_ids.flags.writeable = False
    return block_ids, distinct


class _References:
    """How many offers hold each block id. Arguments are arrays of distinct ids."""

    def __init__(self):
        self._counts = np.zeros(0, dtype=np.int32)
        self.blocks = 0

    def missing(self, ids: np.ndarray) -> int:
        """How many of `ids` nobody holds."""
        self._grow(ids)
        return int(np.count_nonzero(self._counts[ids] == 0))

    def add(self, ids: np.ndarray) -> None:
        self.blocks += self.missing(ids)
        self._counts[ids] += 1

    def drop(self, ids: np.ndarray) -> int:
        """Returns how many of `ids` nobody holds any longer."""
        self._counts[ids] -= 1
        freed = self.missing(ids)
        self.blocks -= freed
        return freed

    def _grow(self, ids: np.ndarray) -> None:
        if not ids.size:
            return
        size = int(ids[-1]) + 1
        if size > len(self._counts):
            grown = np.zeros(max(size, 2 * len(self._counts)), dtype=np.int32)
            grown[: len(self._counts)] = self._counts
            self._counts = grown


@dataclass(slots=True)
class _Entry:
    """An offer that stands. `ending` is set once its exclusive claim is over but shared ones still read it.

    `reserved` counts the blocks of an announced offer, whose ids are not known; 0 once it is complete.
    """

    transfer_id: str
    keys: PrefixKeys
    block_ids: np.ndarray
    distinct: np.ndarray
    generation: int
    deadline: float
    claims: set[str] = field(default_factory=set)
    exclusive: str | None = None
    ending: str | None = None
    reserved: int = 0

    @property
    def indexed(self) -> bool:
        return not self.reserved and self.ending is None


@dataclass(slots=True)
class _Held:
    """A claim that is alive."""

    entry: _Entry
    deadline: float


class LookupBuffer:
    """Offers by prompt and by transfer id, with leases and a limit in bytes. Thread-safe.

    The limit counts the distinct blocks of the offers that stand. `bytes_held` counts those that ended, too, until
    `take_ended` has handed them over, because vLLM does not have them back before; right after an eviction it may
    exceed the limit by what was evicted.
    """

    def __init__(
        self,
        *,
        limit_bytes: int,
        block_bytes: int,
        lease: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            limit_bytes: the most that the offers may hold (`kv_buffer_size`).
            block_bytes: bytes of one block id over all layers and ranks that `limit_bytes` is meant for.
            lease: seconds that a claim or an unclaimed offer lasts without word from its holder.
            clock: the time in seconds; never goes back.

        Raises:
            ConfigError: a number is not above 0.
        """
        for name, value in (("kv_buffer_size", limit_bytes), ("block_bytes", block_bytes), ("lease", lease)):
            if not value > 0:
                raise ConfigError(f"{name}={value!r} is not above 0")
        self.limit_bytes, self.block_bytes, self.lease = limit_bytes, block_bytes, lease
        self.clock = clock
        self._lock = threading.Lock()
        self._offers: dict[str, _Entry] = {}  # oldest first: entries are added at the end and never moved
        self._claims: dict[str, _Held] = {}
        self._ended: dict[str, EndedOffer] = {}
        self._distinct_ended: list[np.ndarray] = []
        self._standing = _References()
        self._by_blocks = PrefixTree()
        self._by_prompt: dict[tuple[bytes, int], dict[str, None]] = {}
        # Entries are never taken out of the middle; one whose deadline has moved is skipped when its time comes.
        self._deadlines: list[tuple[float, int, str]] = []
        self._generations = itertools.count(1)
        self._reserved = 0
        self._over: OrderedDict[str, None] = OrderedDict()
        self._closed = False
        counted = ("inserted", "refused", "claimed", "released", "expired", "evicted", "broken", "closed")
        self._counters = dict.fromkeys(counted, 0)

    # -- what a scheduler calls

    def insert(self, keys: PrefixKeys, block_ids: np.ndarray, transfer_id: str | None = None) -> Offer:
        """Offer a prompt's blocks. The oldest unclaimed offers are evicted if they are in the way of the limit.

        Args:
            keys: of the whole prompt.
            block_ids: shape (ceil(num_tokens / block_size),), int32, in the prompt's order; copied.
            transfer_id: a name chosen by a proxy; made here when None.

        Raises:
            OfferTooLarge: it exceeds the limit on its own. Nothing was evicted.
            BufferFull: it does not fit beside the claimed offers. Nothing was evicted.
            ValueError: the prompt has one token; `block_ids` do not fit the prompt; the transfer id is in use.
            KVError: the buffer is closed.
        """
        block_ids, distinct = _checked(keys, block_ids)
        with self._lock:
            now = self._begin_insert()
            if transfer_id is None:
                transfer_id = secrets.token_hex(16)
            elif transfer_id in self._offers or transfer_id in self._ended:
                raise ValueError(f"transfer id {transfer_id!r} is in use")
            self._make_room(distinct)
            return self._add(_Entry(transfer_id, keys, block_ids, distinct, next(self._generations), now), now)

    def announce(self, keys: PrefixKeys, transfer_id: str) -> int:
        """Offer a prompt that is about to be computed; `complete` or `break_off` must follow.

        Args:
            keys: of the whole prompt.
            transfer_id: its name, chosen by a proxy.

        Returns:
            the offer's generation.

        Raises:
            OfferTooLarge, BufferFull, ValueError, KVError: as `insert`.
        """
        num_blocks = _num_blocks(keys)
        with self._lock:
            now = self._begin_insert()
            if transfer_id in self._offers or transfer_id in self._ended:
                raise ValueError(f"transfer id {transfer_id!r} is in use")
            self._make_room(_NO_BLOCKS, num_blocks)
            self._reserved += num_blocks
            self._over.pop(transfer_id, None)
            generation = next(self._generations)
            self._offers[transfer_id] = _Entry(
                transfer_id, keys, _NO_BLOCKS, _NO_BLOCKS, generation, now, reserved=num_blocks
            )
            self._counters["inserted"] += 1
            return generation

    def complete(self, transfer_id: str, block_ids: np.ndarray) -> Offer | None:
        """The prompt of an announced offer is computed: from now on the offer is as if inserted now, or, if its
        exclusive claim is over, ends with the last of those who share it.

        Args:
            block_ids: as for `insert`.

        Returns:
            The offer; None when it has ended, because nobody wants it any more or it was broken off.

        Raises:
            ValueError: `block_ids` do not fit the prompt.
        """
        with self._lock:
            now = self.clock()
            self._expire(now)
            entry = self._offers.get(transfer_id)
            if entry is None or not entry.reserved:
                return None
            entry.block_ids, entry.distinct = _checked(entry.keys, block_ids)
            self._reserved -= entry.reserved
            entry.reserved = 0
            self._counters["inserted"] -= 1
            del self._offers[transfer_id]
            return self._add(entry, now)

    def break_off(self, transfer_id: str) -> bool:
        """The prompt of an announced offer will not be completed: the offer ends, and every claim on it.

        Returns:
            whether there was such an offer.
        """
        with self._lock:
            entry = self._offers.get(transfer_id)
            if entry is None or not entry.reserved:
                return False
            self._end(entry, "broken")
            return True

    def evict(self, num_blocks: int) -> int:
        """End unclaimed offers, oldest first, until `num_blocks` blocks are in no standing offer any longer.

        Returns:
            how many such blocks there are; fewer than asked for once every unclaimed offer has ended.
        """
        freed = 0
        with self._lock:
            self._expire(self.clock())
            for entry in self._unclaimed():
                if freed >= num_blocks:
                    break
                freed += self._end(entry, "evicted")
        return freed

    def evict_all_unclaimed(self) -> int:
        """End every unclaimed offer; returns how many blocks are in no standing offer any longer."""
        with self._lock:
            self._expire(self.clock())
            return sum(self._end(entry, "evicted") for entry in self._unclaimed())

    def take_ended(self) -> list[EndedOffer]:
        """Every offer that ended since the last call, each once. From here on their blocks are the caller's to free."""
        with self._lock:
            ended = list(self._ended.values())
            self._ended.clear()
            self._distinct_ended.clear()
            return ended

    def standing(self, transfer_id: str) -> bool:
        """Whether the offer has not ended, so that its blocks are safe to read."""
        with self._lock:
            return transfer_id in self._offers

    def over(self, transfer_id: str) -> bool:
        """Whether there was such an offer and it has ended or is ending; of the last `4096` that did."""
        with self._lock:
            entry = self._offers.get(transfer_id)
            return transfer_id in self._over if entry is None else entry.ending is not None

    def close(self) -> None:
        """End every claim and offer. `take_ended` still hands them over. Twice is fine."""
        with self._lock:
            self._closed = True
            for entry in list(self._offers.values()):
                self._end(entry, "closed")
            self._deadlines.clear()

    # -- what a server calls for consumers

    def drop_select(self, keys: PrefixKeys) -> Claim | None:
        """Claim the oldest unclaimed offer of exactly this prompt. The offer ends with the claim."""
        with self._lock:
            now = self.clock()
            self._expire(now)
            return self._drop_select(keys, now)

    def select(self, keys: PrefixKeys, min_tokens: int = 0) -> Claim | None:
        """Share the offer that holds most of this prompt: the whole prompt, or whole blocks of it.

        Claimed offers are shared as well. Among equals the oldest is taken.

        Args:
            min_tokens: tokens that the consumer has already; an offer without more is not claimed.
        """
        with self._lock:
            now = self.clock()
            self._expire(now)
            return self._select(keys, min_tokens, now)

    def find(self, keys: PrefixKeys, min_tokens: int = 0) -> Claim | None:
        """`drop_select` if an offer has exactly this prompt, else `select`; always more than `min_tokens`."""
        with self._lock:
            now = self.clock()
            self._expire(now)
            claim = self._drop_select(keys, now) if keys.num_tokens > min_tokens else None
            return claim or self._select(keys, min_tokens, now)

    def claim(self, transfer_id: str, keys: PrefixKeys | None, min_tokens: int = 0) -> Claim | None:
        """Claim an offer by its name.

        The claim is exclusive when the offer is unclaimed and `keys` are None or exactly its prompt's. An offer that
        someone has claimed is shared; of an offer with another prompt, the whole blocks in common are shared.
        """
        with self._lock:
            now = self.clock()
            self._expire(now)
            entry = self._offers.get(transfer_id)
            if entry is None or entry.ending:
                return None
            whole = keys is None or _prompt(keys) == _prompt(entry.keys)
            num_tokens = entry.keys.num_tokens if whole else keys.common_blocks(entry.keys) * keys.block_size
            if num_tokens <= min_tokens:
                return None
            return self._grant(entry, num_tokens, whole and not entry.claims, now)

    def renew(self, claim_ids: Iterable[str]) -> list[str]:
        """Restart the lease of each claim; returns those that are alive."""
        with self._lock:
            now = self.clock()
            self._expire(now)
            alive = [claim_id for claim_id in claim_ids if claim_id in self._claims]
            for claim_id in alive:
                self._claims[claim_id].deadline = self._schedule(now, _CLAIM, claim_id)
            return alive

    def release(self, claim_id: str, used: bool) -> bool:
        """End a claim.

        Args:
            used: for an exclusive claim, whether the consumer has the KV: the offer then ends, as soon as nobody else
                shares it. If not, the offer is unclaimed again with a new lease, and as old as before.

        Returns:
            whether the claim was alive.
        """
        with self._lock:
            now = self.clock()
            self._expire(now)
            if claim_id not in self._claims:
                return False
            self._drop_claim(claim_id, "released" if used else None, now)
            return True

    # -- time and figures

    def expire(self) -> int:
        """End claims and unclaimed offers whose lease is over; returns how many.

        Inserts, lookups, renewals and releases do so first; `take_ended` and `standing` tell what has ended so far.

        An exclusive claim that expires takes its offer along.
        """
        with self._lock:
            return self._expire(self.clock())

    def next_deadline(self) -> float | None:
        """When the next lease is over, on the buffer's clock; None when nothing has one."""
        with self._lock:
            while self._deadlines and not self._due(*self._deadlines[0]):
                heapq.heappop(self._deadlines)
            return self._deadlines[0][0] if self._deadlines else None

    @property
    def blocks_held(self) -> int:
        """Distinct blocks of offers that stand, or that ended and were not taken."""
        with self._lock:
            ended = np.unique(np.concatenate([_NO_BLOCKS, *self._distinct_ended]))
            return self._standing.blocks + self._standing.missing(ended)

    @property
    def bytes_held(self) -> int:
        """`blocks_held` in bytes; the blocks of announced offers are not counted."""
        return self.blocks_held * self.block_bytes

    @property
    def num_offers(self) -> int:
        """Offers that stand."""
        with self._lock:
            return len(self._offers)

    @property
    def num_claims(self) -> int:
        """Claims that are alive."""
        with self._lock:
            return len(self._claims)

    @property
    def counters(self) -> dict[str, int]:
        """Offers inserted, refused, and ended by reason; claims granted (`claimed`). All since the start.

        `inserted` is `num_offers` plus `released`, `expired`, `evicted`, `broken` and `closed`.
        """
        with self._lock:
            return dict(self._counters)

    # -- under the lock

    def _begin_insert(self) -> float:
        if self._closed:
            raise KVError("the lookup buffer is closed")
        now = self.clock()
        self._expire(now)
        return now

    def _add(self, entry: _Entry, now: float) -> Offer:
        entry.deadline = self._schedule(now, _OFFER, entry.transfer_id)
        self._offers[entry.transfer_id] = entry
        self._over.pop(entry.transfer_id, None)
        self._standing.add(entry.distinct)
        if entry.indexed:
            self._by_blocks.insert(entry.keys.blocks, entry.transfer_id)
            self._by_prompt.setdefault(_prompt(entry.keys), {})[entry.transfer_id] = None
        self._counters["inserted"] += 1
        return Offer(entry.transfer_id, entry.keys.num_tokens, entry.block_ids, entry.generation, entry.deadline)

    def _unclaimed(self) -> Iterator[_Entry]:
        return (entry for entry in list(self._offers.values()) if not entry.claims and not entry.reserved)

    def _make_room(self, distinct: np.ndarray, unknown: int = 0) -> None:
        """For blocks whose ids are known, and for others, of which none is shared."""
        limit = self.limit_bytes // self.block_bytes
        if len(distinct) + unknown > limit:
            self._counters["refused"] += 1
            raise OfferTooLarge((len(distinct) + unknown) * self.block_bytes, self.limit_bytes)
        limit -= self._reserved + unknown
        if self._standing.blocks + self._standing.missing(distinct) <= limit:
            return
        # Counted before anything is evicted: an offer that is refused anyway must not cost the others.
        staying = [entry.distinct for entry in self._offers.values() if entry.claims]
        at_least = len(np.unique(np.concatenate([distinct, *staying])))
        if at_least > limit:
            self._counters["refused"] += 1
            raise BufferFull((at_least + self._reserved + unknown) * self.block_bytes, self.limit_bytes)
        for entry in self._unclaimed():
            if self._standing.blocks + self._standing.missing(distinct) <= limit:
                break
            self._end(entry, "evicted")

    def _drop_select(self, keys: PrefixKeys, now: float) -> Claim | None:
        for transfer_id in self._by_prompt.get(_prompt(keys), ()):
            entry = self._offers[transfer_id]
            if not entry.claims:
                return self._grant(entry, keys.num_tokens, True, now)
        return None

    def _select(self, keys: PrefixKeys, min_tokens: int, now: float) -> Claim | None:
        same_prompt = self._by_prompt.get(_prompt(keys))
        if keys.tail and same_prompt:
            entry = self._offers[next(iter(same_prompt))]
            num_tokens = keys.num_tokens
        else:
            found = self._by_blocks.find(keys.blocks)
            if found is None:
                return None
            entry = self._offers[found[1]]
            # The offer's block size, not the one that a stranger's keys claim to have.
            num_tokens = found[0] * entry.keys.block_size
        return self._grant(entry, num_tokens, False, now) if num_tokens > min_tokens else None

    def _grant(self, entry: _Entry, num_tokens: int, exclusive: bool, now: float) -> Claim:
        claim_id = secrets.token_hex(16)
        deadline = self._schedule(now, _CLAIM, claim_id)
        self._claims[claim_id] = _Held(entry, deadline)
        entry.claims.add(claim_id)
        if exclusive:
            entry.exclusive = claim_id
        self._counters["claimed"] += 1
        return Claim(claim_id, entry.transfer_id, num_tokens, exclusive, entry.generation, deadline)

    def _drop_claim(self, claim_id: str, reason: str | None, now: float) -> None:
        """End a claim; if it is the offer's exclusive one, end the offer for `reason`, or restart its lease if None."""
        entry = self._claims.pop(claim_id).entry
        entry.claims.remove(claim_id)
        if entry.exclusive == claim_id:
            entry.exclusive = None
            if reason:
                # Others may still read it. It ends with the last of them, and nobody new finds it meanwhile.
                self._unindex(entry)
                entry.ending = reason
            else:
                entry.deadline = now + self.lease
        if not entry.claims:
            if entry.ending:
                self._end(entry, entry.ending)
            elif not entry.reserved:
                heapq.heappush(self._deadlines, (entry.deadline, _OFFER, entry.transfer_id))

    def _end(self, entry: _Entry, reason: str) -> int:
        """Returns how many of its blocks are in no standing offer any longer."""
        del self._offers[entry.transfer_id]
        for claim_id in entry.claims:
            del self._claims[claim_id]
        self._unindex(entry)
        self._reserved -= entry.reserved
        self._over[entry.transfer_id] = None
        if len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)
        self._ended[entry.transfer_id] = EndedOffer(entry.transfer_id, entry.generation, entry.block_ids, reason)
        self._distinct_ended.append(entry.distinct)
        self._counters[reason] += 1
        return self._standing.drop(entry.distinct)

    def _unindex(self, entry: _Entry) -> None:
        if not entry.indexed:
            return
        self._by_blocks.remove(entry.keys.blocks, entry.transfer_id)
        same_prompt = self._by_prompt[_prompt(entry.keys)]
        del same_prompt[entry.transfer_id]
        if not same_prompt:
            del self._by_prompt[_prompt(entry.keys)]

    def _schedule(self, now: float, kind: int, name: str) -> float:
        heapq.heappush(self._deadlines, (now + self.lease, kind, name))
        return now + self.lease

    def _due(self, deadline: float, kind: int, name: str) -> bool:
        """Whether this entry of the heap still says when `name` ends."""
        if kind == _CLAIM:
            held = self._claims.get(name)
            return held is not None and held.deadline == deadline
        entry = self._offers.get(name)
        return entry is not None and not entry.claims and not entry.reserved and entry.deadline == deadline

    def _expire(self, now: float) -> int:
        count = 0
        while self._deadlines and self._deadlines[0][0] <= now:
            item = heapq.heappop(self._deadlines)
            if not self._due(*item):
                continue
            count += 1
            _, kind, name = item
            if kind == _CLAIM:
                self._drop_claim(name, "expired", now)
            else:
                self._end(self._offers[name], "expired")
        return count
