"""Promises of the lookup buffer: each offer ends once, the ledger returns to zero, nobody waits for ever."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvsdk.buffer import BufferFull, LookupBuffer, PrefixKeys, prefix_keys
from kvsdk.buffer.prefix_tree import PrefixTree
from kvsdk.errors import ConfigError, KVError, OfferTooLarge

BLOCK_SIZE = 4
BLOCK_BYTES = 100


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(clock):
    def make(limit_blocks=100, lease=30.0):
        return LookupBuffer(limit_bytes=limit_blocks * BLOCK_BYTES, block_bytes=BLOCK_BYTES, lease=lease, clock=clock)

    return make


def keys_of(tokens) -> PrefixKeys:
    return prefix_keys(np.array(tokens, dtype=np.int32), BLOCK_SIZE)


def ids(*values):
    return np.array(values, dtype=np.int32)


def ended(buffer):
    return [(offer.transfer_id, offer.reason) for offer in buffer.take_ended()]


TEN = list(range(10))  # two whole blocks and a tail


def test_an_offer_is_found_by_exactly_its_prompt_and_ends_with_the_claim(make, clock):
    buffer = make()
    offer = buffer.insert(keys_of(TEN), ids(5, 6, 7))
    claim = buffer.drop_select(keys_of(TEN))
    assert (claim.transfer_id, claim.num_tokens, claim.exclusive) == (offer.transfer_id, 10, True)
    assert (claim.generation, claim.expires_at) == (offer.generation, clock.now + 30)
    assert buffer.drop_select(keys_of(TEN)) is None
    assert buffer.standing(offer.transfer_id)
    assert buffer.release(claim.claim_id, used=True)
    assert not buffer.standing(offer.transfer_id)
    (gone,) = buffer.take_ended()
    assert (gone.transfer_id, gone.block_ids.tolist(), gone.reason) == (offer.transfer_id, [5, 6, 7], "released")
    assert buffer.take_ended() == []
    assert buffer.blocks_held == buffer.num_offers == buffer.num_claims == 0


@pytest.mark.parametrize("prompt", [TEN[:9], TEN[:8], [*TEN, 10], [*TEN[:9], 0], [9, *TEN[1:]], [0]], ids=str)
def test_drop_select_takes_no_other_prompt(make, prompt):
    buffer = make()
    buffer.insert(keys_of(TEN), ids(5, 6, 7))
    assert buffer.drop_select(keys_of(prompt)) is None


@pytest.mark.parametrize(
    ("prompt", "num_tokens"),
    [
        (TEN, 10),
        ([*TEN, 10, 11], 8),
        (TEN[:9], 8),
        (TEN[:8], 8),
        ([*TEN[:7], 99, 8, 9], 4),
        (TEN[:5], 4),
        (TEN[:3], 0),
        ([99, *TEN[1:]], 0),
    ],
    ids=str,
)
def test_select_shares_whole_blocks_or_the_whole_prompt(make, prompt, num_tokens):
    buffer = make()
    buffer.insert(keys_of(TEN), ids(5, 6, 7))
    claim = buffer.select(keys_of(prompt))
    assert (claim.num_tokens if claim else 0) == num_tokens
    assert claim is None or not claim.exclusive
    assert buffer.select(keys_of(prompt), min_tokens=num_tokens) is None
    assert num_tokens == 0 or buffer.select(keys_of(prompt), min_tokens=num_tokens - 1).num_tokens == num_tokens


def test_select_takes_the_longest_match_and_the_oldest_of_equals(make):
    buffer = make()
    buffer.insert(keys_of(TEN[:4]), ids(0), "short")
    buffer.insert(keys_of([*TEN[:8], 50]), ids(0, 1, 2), "long, old")
    buffer.insert(keys_of([*TEN[:8], 60]), ids(0, 1, 3), "long, young")
    assert buffer.select(keys_of([*TEN[:8], 70])).transfer_id == "long, old"
    assert buffer.select(keys_of([*TEN[:8], 60])).transfer_id == "long, young"
    assert buffer.select(keys_of([*TEN[:4], 70])).transfer_id == "short"


def test_a_prompt_shorter_than_a_block_is_found_by_its_tail(make):
    buffer = make()
    buffer.insert(keys_of([1, 2]), ids(3))
    assert buffer.select(keys_of([1, 2, 3])) is None
    assert buffer.select(keys_of([1, 2])).num_tokens == 2


def test_find_is_exclusive_when_it_can_be(make):
    buffer = make()
    buffer.insert(keys_of(TEN), ids(5, 6, 7))
    assert buffer.find(keys_of(TEN), min_tokens=10) is None
    assert [buffer.find(keys_of(TEN), min_tokens=9).exclusive for _ in range(3)] == [True, False, False]
    assert buffer.find(keys_of([*TEN, 1]), min_tokens=7).num_tokens == 8


def test_two_offers_of_a_prompt_are_dropped_oldest_first(make):
    buffer = make()
    for name, block in (("first", 1), ("second", 2)):
        buffer.insert(keys_of([1, 2, 3, 4]), ids(block), name)
    assert [buffer.drop_select(keys_of([1, 2, 3, 4])).transfer_id for _ in range(2)] == ["first", "second"]


def test_an_offer_is_claimed_by_its_transfer_id(make):
    buffer = make()
    buffer.insert(keys_of(TEN), ids(5, 6, 7), "t")
    assert buffer.claim("unknown", keys_of(TEN)) is None
    assert buffer.claim("t", keys_of(TEN), min_tokens=10) is None
    other = buffer.claim("t", keys_of([*TEN[:6], 99, 98, 97]))
    assert (other.num_tokens, other.exclusive) == (4, False)
    assert buffer.claim("t", keys_of([99, 98])) is None
    assert buffer.release(other.claim_id, used=True)
    whole = buffer.claim("t", keys_of(TEN))
    assert (whole.num_tokens, whole.exclusive) == (10, True)
    again = buffer.claim("t", None)
    assert (again.num_tokens, again.exclusive) == (10, False)


def test_a_prompt_of_one_token_is_never_offered(make):
    with pytest.raises(ValueError, match="one token"):
        make().insert(keys_of([1]), ids(1))


@pytest.mark.parametrize(
    "block_ids",
    [ids(1, 2), ids(1, 2, 3, 4), ids(1, 2, 3).astype(np.int64), ids(1, 2, 3).reshape(1, 3), ids(1, -2, 3)],
    ids=["few", "many", "int64", "two-dimensional", "negative"],
)
def test_blocks_that_do_not_fit_the_prompt_are_an_error(make, block_ids):
    buffer = make()
    with pytest.raises(ValueError, match="block_ids"):
        buffer.insert(keys_of(TEN), block_ids)
    assert buffer.blocks_held == buffer.num_offers == 0


def test_a_transfer_id_is_free_again_once_its_end_was_taken(make):
    buffer = make()
    buffer.insert(keys_of(TEN), ids(1, 2, 3), "t")
    for _ in range(2):
        with pytest.raises(ValueError, match="in use"):
            buffer.insert(keys_of(TEN), ids(4, 5, 6), "t")
        buffer.evict_all_unclaimed()
    assert ended(buffer) == [("t", "evicted")]
    buffer.insert(keys_of(TEN), ids(4, 5, 6), "t")


def test_an_offer_keeps_its_own_copy_of_the_block_ids(make):
    buffer = make()
    block_ids = ids(1, 2, 3)
    offer = buffer.insert(keys_of(TEN), block_ids)
    block_ids[:] = 9
    assert offer.block_ids.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        offer.block_ids[0] = 9


# -- the ledger


def test_a_block_of_two_offers_counts_once_until_both_have_ended(make):
    buffer = make()
    buffer.insert(keys_of(TEN), ids(1, 2, 3), "a")
    buffer.insert(keys_of([*TEN[:8], 77]), ids(1, 2, 4), "b")
    assert (buffer.blocks_held, buffer.bytes_held) == (4, 4 * BLOCK_BYTES)
    assert buffer.evict(1) == 1  # only block 3 is in no other offer
    assert buffer.blocks_held == 4
    assert ended(buffer) == [("a", "evicted")]
    assert buffer.blocks_held == 3
    assert buffer.evict_all_unclaimed() == 3
    assert ended(buffer) == [("b", "evicted")]
    assert buffer.bytes_held == 0


def test_the_oldest_unclaimed_offers_go_when_the_limit_is_reached(make):
    buffer = make(limit_blocks=6)
    for i, name in enumerate("abc"):
        buffer.insert(keys_of([i] * 8), ids(2 * i, 2 * i + 1), name)
    buffer.drop_select(keys_of([0] * 8))
    buffer.insert(keys_of([3] * 8), ids(6, 7), "d")
    assert ended(buffer) == [("b", "evicted")]
    assert buffer.bytes_held == buffer.limit_bytes


def test_an_offer_that_is_refused_costs_no_other(make):
    buffer = make(limit_blocks=4)
    buffer.insert(keys_of([0] * 8), ids(0, 1), "claimed")
    buffer.drop_select(keys_of([0] * 8))
    buffer.insert(keys_of([1] * 8), ids(2, 3), "unclaimed")
    with pytest.raises(OfferTooLarge) as too_large:
        buffer.insert(keys_of([2] * 20), ids(4, 5, 6, 7, 8))
    assert (too_large.value.needed, too_large.value.limit) == (5 * BLOCK_BYTES, 4 * BLOCK_BYTES)
    with pytest.raises(BufferFull) as full:
        buffer.insert(keys_of([2] * 12), ids(4, 5, 6))
    assert (full.value.needed, full.value.limit) == (5 * BLOCK_BYTES, 4 * BLOCK_BYTES)
    assert ended(buffer) == []
    assert buffer.counters["refused"] == 2
    # Blocks that it shares with the claimed offer need no room of their own.
    buffer.insert(keys_of([0] * 8 + [9] * 8), ids(0, 1, 4, 5))
    assert ended(buffer) == [("unclaimed", "evicted")]


def test_eviction_stops_when_enough_is_free_and_spares_what_is_claimed(make):
    buffer = make()
    for i, name in enumerate("abcd"):
        buffer.insert(keys_of([i] * 8), ids(2 * i, 2 * i + 1), name)
    shared = buffer.select(keys_of([0] * 8))
    assert buffer.evict(0) == 0
    assert buffer.evict(3) == 4
    assert ended(buffer) == [("b", "evicted"), ("c", "evicted")]
    assert buffer.evict(100) == 2
    assert buffer.num_offers == 1
    buffer.release(shared.claim_id, used=True)
    assert buffer.evict(100) == 2


# -- claims and leases


def test_what_was_not_used_is_there_again_as_old_as_before(make, clock):
    buffer = make()
    for i, name in enumerate("ab"):
        buffer.insert(keys_of([i] * 8), ids(2 * i, 2 * i + 1), name)
    claim = buffer.find(keys_of([0] * 8))
    clock.now += 29
    buffer.release(claim.claim_id, used=False)
    clock.now += 29  # past the lease of the insertion, within that of the release
    assert buffer.find(keys_of([0] * 8)).exclusive
    buffer.release(claim.claim_id, used=False)  # over; must not touch the new claim
    assert buffer.num_claims == 1
    assert ended(buffer) == [("b", "expired")]


def test_age_survives_a_claim_that_was_not_used(make):
    buffer = make()
    for i, name in enumerate("ab"):
        buffer.insert(keys_of([i] * 8), ids(2 * i, 2 * i + 1), name)
    buffer.release(buffer.find(keys_of([0] * 8)).claim_id, used=False)
    buffer.evict(1)
    assert ended(buffer) == [("a", "evicted")]


def test_an_offer_outlives_its_exclusive_claim_while_others_read_it_but_is_not_found(make):
    buffer = make()
    buffer.insert(keys_of(TEN), ids(1, 2, 3), "t")
    exclusive, shared = buffer.find(keys_of(TEN)), buffer.find(keys_of(TEN))
    buffer.release(exclusive.claim_id, used=True)
    assert buffer.standing("t")
    assert buffer.find(keys_of(TEN)) is None
    assert buffer.claim("t", None) is None
    assert buffer.evict_all_unclaimed() == 0
    assert buffer.release(shared.claim_id, used=False)
    assert ended(buffer) == [("t", "released")]


def test_shared_claims_end_nothing(make):
    buffer = make()
    buffer.insert(keys_of(TEN), ids(1, 2, 3), "t")
    claim = buffer.select(keys_of(TEN))
    assert buffer.release(claim.claim_id, used=True)
    assert not buffer.release(claim.claim_id, used=True)
    assert buffer.drop_select(keys_of(TEN)).exclusive


def test_a_claim_lasts_as_long_as_it_is_renewed_and_takes_its_offer_along(make, clock):
    buffer = make()
    buffer.insert(keys_of(TEN), ids(1, 2, 3), "t")
    claim = buffer.find(keys_of(TEN))
    for _ in range(5):
        clock.now += 20
        assert buffer.renew([claim.claim_id, "unknown"]) == [claim.claim_id]
    assert buffer.next_deadline() == clock.now + 30
    clock.now += 30
    assert buffer.renew([claim.claim_id]) == []
    assert ended(buffer) == [("t", "expired")]


def test_an_offer_with_a_shared_claim_expires_with_the_claim(make, clock):
    buffer = make()
    buffer.insert(keys_of(TEN), ids(1, 2, 3), "t")
    clock.now += 20
    claim = buffer.select(keys_of(TEN))
    clock.now += 20
    assert buffer.expire() == 0
    buffer.release(claim.claim_id, used=True)
    assert buffer.expire() == 1
    assert ended(buffer) == [("t", "expired")]


def test_the_next_deadline_is_the_first_lease_to_end(make, clock):
    buffer = make()
    assert buffer.next_deadline() is None
    buffer.insert(keys_of(TEN), ids(1, 2, 3))
    clock.now += 10
    buffer.insert(keys_of(TEN), ids(4, 5, 6))
    assert buffer.next_deadline() == clock.now + 20
    claim = buffer.find(keys_of(TEN))
    assert buffer.next_deadline() == clock.now + 30
    buffer.evict_all_unclaimed()
    buffer.release(claim.claim_id, used=True)
    assert buffer.next_deadline() is None


def test_renewing_for_long_keeps_memory_bounded(make, clock):
    buffer = make()
    buffer.insert(keys_of(TEN), ids(1, 2, 3))
    claim = buffer.find(keys_of(TEN))
    for _ in range(1000):
        clock.now += 10
        buffer.renew([claim.claim_id])
    assert len(buffer._deadlines) < 10


def test_closing_ends_everything_once(make):
    buffer = make()
    buffer.insert(keys_of(TEN), ids(1, 2, 3), "unclaimed")
    buffer.insert(keys_of([1, 2, 3]), ids(4), "claimed")
    claim = buffer.find(keys_of([1, 2, 3]))
    shared = buffer.find(keys_of([1, 2, 3]))
    buffer.release(claim.claim_id, used=True)
    buffer.close()
    buffer.close()
    assert ended(buffer) == [("unclaimed", "closed"), ("claimed", "closed")]
    assert not buffer.release(shared.claim_id, used=True)
    assert buffer.find(keys_of(TEN)) is None
    assert (buffer.bytes_held, buffer.num_claims, buffer.next_deadline()) == (0, 0, None)
    with pytest.raises(KVError, match="closed"):
        buffer.insert(keys_of(TEN), ids(1, 2, 3))


@pytest.mark.parametrize("option", ["limit_bytes", "block_bytes", "lease"])
def test_a_limit_or_lease_of_nothing_is_an_error_that_names_it(option):
    name = {"limit_bytes": "kv_buffer_size"}.get(option, option)
    with pytest.raises(ConfigError, match=name):
        LookupBuffer(**({"limit_bytes": 1, "block_bytes": 1, "lease": 1.0} | {option: 0}))


def test_an_offer_is_claimed_exclusively_by_one_of_many_threads():
    buffer = LookupBuffer(limit_bytes=10**6, block_bytes=1)
    prompts = [keys_of([i, i]) for i in range(50)]
    for i, keys in enumerate(prompts):
        buffer.insert(keys, ids(i))
    claims, barrier = [], threading.Barrier(4)

    def consume():
        barrier.wait(5)
        for keys in prompts:
            claims.append(buffer.drop_select(keys))

    threads = [threading.Thread(target=consume) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(claim.transfer_id for claim in claims if claim) == sorted(
        {claim.transfer_id for claim in claims if claim}
    )
    assert sum(claim is not None for claim in claims) == 50


# -- the tree


@hypothesis.given(st.data())
def test_the_tree_finds_what_a_scan_finds(data):
    tree, names = PrefixTree(), {}
    prompts = st.lists(st.integers(0, 1), max_size=20)
    for step in range(data.draw(st.integers(1, 25))):
        if names and data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(names)))
            tree.remove(names.pop(name).blocks, name)
        else:
            names[f"{step:02}"] = keys = keys_of([9, *data.draw(prompts)])
            tree.insert(keys.blocks, f"{step:02}")
        asked = keys_of([9, *data.draw(prompts)])
        longest = max((keys.common_blocks(asked) for keys in names.values()), default=0)
        oldest = next((name for name, keys in names.items() if longest and keys.common_blocks(asked) == longest), None)
        assert tree.find(asked.blocks) == ((longest, oldest) if longest else None)
    assert count_nodes(tree._root) <= 2 * len(names) + 1


def test_short_lived_branches_leave_the_tree_as_it_was():
    tree, trunk = PrefixTree(), list(range(80))
    tree.insert(keys_of(trunk).blocks, "trunk")
    for blocks in range(1, 20):
        branch = keys_of([*trunk[: blocks * BLOCK_SIZE], 99, 99, 99, 99])
        tree.insert(branch.blocks, "branch")
        assert count_nodes(tree._root) == 4
        tree.remove(branch.blocks, "branch")
        assert count_nodes(tree._root) == 2
    assert tree.find(keys_of(trunk).blocks) == (20, "trunk")


def count_nodes(node):
    return 1 + sum(count_nodes(child) for child in node.children.values())


# -- against a model that knows nothing of numpy, trees or heaps


@dataclass
class ModelOffer:
    name: str
    prompt: tuple[int, ...]
    blocks: tuple[int, ...]
    deadline: float
    exclusive: str | None = None
    ending: str | None = None
    claims: dict[str, float] = field(default_factory=dict)

    def common(self, prompt):
        if prompt == self.prompt:
            return len(prompt)
        same = 0
        while same < min(len(prompt), len(self.prompt)) and prompt[same] == self.prompt[same]:
            same += 1
        return same // 2 * 2


LEASE, LIMIT = 10, 8
prompts = st.lists(st.integers(0, 1), min_size=2, max_size=9).map(tuple)


class BufferMachine(RuleBasedStateMachine):
    """Blocks of two tokens, a limit of eight blocks, a lease of ten seconds."""

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.buffer = LookupBuffer(limit_bytes=LIMIT, block_bytes=1, lease=LEASE, clock=self.clock)
        self.offers: dict[str, ModelOffer] = {}
        self.to_take: list[ModelOffer] = []
        self.reasons: dict[str, str] = {}
        self.all_claims: list[str] = []
        self.count = 0

    def keys(self, prompt):
        return prefix_keys(np.array(prompt, dtype=np.int32), 2)

    # the model

    def end(self, offer, reason):
        del self.offers[offer.name]
        self.to_take.append(offer)
        assert offer.name not in self.reasons
        self.reasons[offer.name] = reason

    def end_claim(self, offer, claim_id, reason):
        del offer.claims[claim_id]
        if offer.exclusive == claim_id:
            offer.exclusive = None
            if reason:
                offer.ending = reason
            else:
                offer.deadline = self.clock.now + LEASE
        if offer.ending and not offer.claims:
            self.end(offer, offer.ending)

    def model_expire(self):
        for offer in list(self.offers.values()):
            for claim_id, deadline in list(offer.claims.items()):
                if deadline <= self.clock.now:
                    self.end_claim(offer, claim_id, "expired")
            if offer.name in self.offers and not offer.claims and offer.deadline <= self.clock.now:
                self.end(offer, "expired")

    def blocks_of(self, offers):
        return {block for offer in offers for block in offer.blocks}

    def unclaimed(self):
        return [offer for offer in self.offers.values() if not offer.claims]

    def granted(self, claim, offer, num_tokens, exclusive):
        assert (claim.transfer_id, claim.num_tokens, claim.exclusive) == (offer.name, num_tokens, exclusive)
        assert claim.expires_at == self.clock.now + LEASE
        assert claim.claim_id not in self.all_claims
        if exclusive:
            assert offer.exclusive is None
            offer.exclusive = claim.claim_id
        offer.claims[claim.claim_id] = claim.expires_at
        self.all_claims.append(claim.claim_id)

    # what may happen

    @rule(prompt=prompts, data=st.data())
    def insert(self, prompt, data):
        size = (len(prompt) + 1) // 2
        blocks = tuple(data.draw(st.lists(st.integers(0, 15), min_size=size, max_size=size, unique=True)))
        self.count += 1
        name = f"{self.count:03}"
        self.model_expire()
        claimed = self.blocks_of(offer for offer in self.offers.values() if offer.claims)
        if len(claimed | set(blocks)) > LIMIT:
            with pytest.raises(BufferFull):
                self.buffer.insert(self.keys(prompt), ids(*blocks), name)
            return
        while len(self.blocks_of(self.offers.values()) | set(blocks)) > LIMIT:
            self.end(self.unclaimed()[0], "evicted")
        self.offers[name] = ModelOffer(name, prompt, blocks, self.clock.now + LEASE)
        self.buffer.insert(self.keys(prompt), ids(*blocks), name)

    @rule(prompt=prompts, min_tokens=st.integers(0, 3), exact=st.booleans())
    def find(self, prompt, min_tokens, exact):
        self.model_expire()
        if exact:
            claim, wanted, min_tokens = self.buffer.drop_select(self.keys(prompt)), True, 0
        else:
            claim, wanted = self.buffer.find(self.keys(prompt), min_tokens), False
        same = [offer for offer in self.unclaimed() if offer.prompt == prompt and len(prompt) > min_tokens]
        if same:
            self.granted(claim, same[0], len(prompt), True)
            return
        if wanted:
            assert claim is None
            return
        self.shared(claim, prompt, min_tokens)

    @rule(prompt=prompts, min_tokens=st.integers(0, 3))
    def select(self, prompt, min_tokens):
        self.model_expire()
        self.shared(self.buffer.select(self.keys(prompt), min_tokens), prompt, min_tokens)

    def shared(self, claim, prompt, min_tokens):
        found = [offer for offer in self.offers.values() if not offer.ending and offer.common(prompt) > min_tokens]
        if found:
            # `max` takes the first of equals, the oldest.
            best = max(found, key=lambda offer: offer.common(prompt))
            self.granted(claim, best, best.common(prompt), False)
        else:
            assert claim is None

    @rule(data=st.data(), prompt=st.none() | prompts)
    def claim_by_id(self, data, prompt):
        name = data.draw(st.sampled_from([*self.offers, "unknown"]))
        self.model_expire()
        claim = self.buffer.claim(name, None if prompt is None else self.keys(prompt))
        offer = self.offers.get(name)
        tokens = 0 if offer is None or offer.ending else offer.common(offer.prompt if prompt is None else prompt)
        if tokens:
            self.granted(claim, offer, tokens, prompt in (None, offer.prompt) and not offer.claims)
        else:
            assert claim is None

    def of_claim(self, claim_id):
        return next((offer for offer in self.offers.values() if claim_id in offer.claims), None)

    @rule(data=st.data(), used=st.booleans())
    def release(self, data, used):
        claim_id = data.draw(st.sampled_from([*self.all_claims, "unknown"]))
        self.model_expire()
        offer = self.of_claim(claim_id)
        if offer:
            self.end_claim(offer, claim_id, "released" if used else None)
        assert self.buffer.release(claim_id, used) == (offer is not None)

    @rule(data=st.data())
    def renew(self, data):
        chosen = data.draw(st.lists(st.sampled_from([*self.all_claims, "unknown"]), unique=True))
        self.model_expire()
        alive = [claim_id for claim_id in chosen if self.of_claim(claim_id)]
        for claim_id in alive:
            self.of_claim(claim_id).claims[claim_id] = self.clock.now + LEASE
        assert self.buffer.renew(chosen) == alive

    @rule(num_blocks=st.integers(0, 6))
    def evict(self, num_blocks):
        self.model_expire()
        before = self.blocks_of(self.offers.values())
        for offer in self.unclaimed():
            if len(before - self.blocks_of(self.offers.values())) >= num_blocks:
                break
            self.end(offer, "evicted")
        assert self.buffer.evict(num_blocks) == len(before - self.blocks_of(self.offers.values()))

    @rule(seconds=st.integers(1, LEASE))
    def pass_time(self, seconds):
        self.clock.now += seconds

    @rule()
    def expire(self):
        self.model_expire()
        self.buffer.expire()
        deadlines = [offer.deadline for offer in self.unclaimed()]
        deadlines += [deadline for offer in self.offers.values() for deadline in offer.claims.values()]
        assert self.buffer.next_deadline() == min(deadlines, default=None)

    @rule()
    def take(self):
        taken = {offer.transfer_id: (tuple(offer.block_ids), offer.reason) for offer in self.buffer.take_ended()}
        assert taken == {offer.name: (offer.blocks, self.reasons[offer.name]) for offer in self.to_take}
        self.to_take.clear()

    # what always holds

    @invariant()
    def the_ledger_is_the_models(self):
        assert self.buffer.blocks_held == len(self.blocks_of([*self.offers.values(), *self.to_take]))
        assert self.buffer.num_offers == len(self.offers)
        assert self.buffer.num_claims == sum(len(offer.claims) for offer in self.offers.values())
        assert all(self.buffer.standing(name) for name in self.offers)
        counters = self.buffer.counters
        assert counters["inserted"] == len(self.offers) + len(self.reasons)
        for reason in ("released", "expired", "evicted"):
            assert counters[reason] == list(self.reasons.values()).count(reason)

    def teardown(self):
        # Nobody says a word any more: once leases have ended, nothing is left.
        for _ in range(2):
            self.clock.now += LEASE
            self.buffer.expire()
        self.model_expire()
        self.take()
        assert (self.buffer.bytes_held, self.buffer.num_offers, self.buffer.num_claims) == (0, 0, 0)
        assert self.buffer.next_deadline() is None
        assert not self.buffer._by_prompt
        assert count_nodes(self.buffer._by_blocks._root) == 1


TestBufferMachine = BufferMachine.TestCase
TestBufferMachine.settings = hypothesis.settings(max_examples=80, stateful_step_count=40, deadline=None)
