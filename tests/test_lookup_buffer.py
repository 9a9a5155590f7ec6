"""The lookup buffer against a model, and what lies below its contract (`kvsdk.testing.contracts`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvsdk.buffer import BufferFull, LookupBuffer, PrefixKeys, prefix_keys
from kvsdk.buffer.prefix_tree import PrefixTree
from kvsdk.errors import ConfigError

BLOCK_SIZE = 4


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def keys_of(tokens) -> PrefixKeys:
    return prefix_keys(np.array(tokens, dtype=np.int32), BLOCK_SIZE)


def ids(*values):
    return np.array(values, dtype=np.int32)


TEN = list(range(10))  # two whole blocks and a tail


def test_renewing_for_long_keeps_memory_bounded():
    clock = Clock()
    buffer = LookupBuffer(limit_bytes=10, block_bytes=1, lease=30.0, clock=clock)
    buffer.insert(keys_of(TEN), ids(1, 2, 3))
    claim = buffer.find(keys_of(TEN))
    for _ in range(1000):
        clock.now += 10
        buffer.renew([claim.claim_id])
    assert len(buffer._deadlines) < 10


@pytest.mark.parametrize("option", ["limit_bytes", "block_bytes", "lease"])
def test_a_limit_or_lease_of_nothing_is_an_error_that_names_it(option):
    name = {"limit_bytes": "kv_buffer_size"}.get(option, option)
    with pytest.raises(ConfigError, match=name):
        LookupBuffer(**({"limit_bytes": 1, "block_bytes": 1, "lease": 1.0} | {option: 0}))


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
    reserved: int = 0  # blocks of one that is announced
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
            leased = not offer.claims and not offer.reserved
            if offer.name in self.offers and leased and offer.deadline <= self.clock.now:
                self.end(offer, "expired")

    def blocks_of(self, offers):
        return {block for offer in offers for block in offer.blocks}

    def unclaimed(self):
        return [offer for offer in self.offers.values() if not offer.claims and not offer.reserved]

    @property
    def reserved(self):
        return sum(offer.reserved for offer in self.offers.values())

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
        if self.fits(set(blocks)):
            self.offers[name] = ModelOffer(name, prompt, blocks, self.clock.now + LEASE)
            self.buffer.insert(self.keys(prompt), ids(*blocks), name)
        else:
            with pytest.raises(BufferFull):
                self.buffer.insert(self.keys(prompt), ids(*blocks), name)

    def fits(self, blocks, unknown=0):
        """Make room for these blocks and some whose ids are not known."""
        limit = LIMIT - self.reserved - unknown
        claimed = self.blocks_of(offer for offer in self.offers.values() if offer.claims)
        if len(claimed | blocks) > limit:
            return False
        while len(self.blocks_of(self.offers.values()) | blocks) > limit:
            self.end(self.unclaimed()[0], "evicted")
        return True

    @rule(prompt=prompts)
    def announce(self, prompt):
        size = (len(prompt) + 1) // 2
        self.count += 1
        name = f"{self.count:03}"
        self.model_expire()
        if self.fits(set(), size):
            self.offers[name] = ModelOffer(name, prompt, (), 0, reserved=size)
            self.buffer.announce(self.keys(prompt), name)
        else:
            with pytest.raises(BufferFull):
                self.buffer.announce(self.keys(prompt), name)

    @rule(data=st.data())
    def complete(self, data):
        offer = self.some_announced(data)
        size = offer.reserved if offer else 1
        blocks = tuple(data.draw(st.lists(st.integers(0, 15), min_size=size, max_size=size, unique=True)))
        self.model_expire()
        completed = self.buffer.complete(offer.name if offer else "unknown", ids(*blocks))
        if offer is None or offer.name not in self.offers:
            assert completed is None
            return
        assert tuple(completed.block_ids) == blocks
        offer.blocks, offer.reserved, offer.deadline = blocks, 0, self.clock.now + LEASE
        self.offers[offer.name] = self.offers.pop(offer.name)

    @rule(data=st.data())
    def break_off(self, data):
        offer = self.some_announced(data)
        assert self.buffer.break_off(offer.name if offer else "unknown") == (offer is not None)
        if offer:
            self.end(offer, "broken")

    def some_announced(self, data):
        names = [name for name, offer in self.offers.items() if offer.reserved]
        return self.offers.get(data.draw(st.sampled_from([*names, "unknown"])))

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
        whole = [offer for offer in self.offers.values() if not offer.ending and not offer.reserved]
        found = [offer for offer in whole if offer.common(prompt) > min_tokens]
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
        for reason in ("released", "expired", "evicted", "broken"):
            assert counters[reason] == list(self.reasons.values()).count(reason)
        over = {name for name, offer in self.offers.items() if offer.ending} | self.reasons.keys()
        assert over == {name for name in (*self.offers, *self.reasons, "unknown") if self.buffer.over(name)}

    def teardown(self):
        # Prompts that are computed end somehow, and then nobody says a word any more: once leases have ended, nothing
        # is left.
        for offer in list(self.offers.values()):
            if offer.reserved:
                self.buffer.break_off(offer.name)
                self.end(offer, "broken")
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
