"""Transfers that a proxy announces to both servers at once: the decode server loads while the prefill computes."""

import time

import pytest
from test_pynccl import (
    BS,
    at_rest,
    at_rest_without_offers,
    buffer,
    decode,
    half,
    pair,  # noqa: F401
    prefill,
    prompt,
    run_all,
)

from kvsdk.connectors.pynccl.fetching import Fetcher
from kvsdk.errors import ProtocolError
from kvsdk.transfer_params import announce_params

pytestmark = pytest.mark.compat


@pytest.fixture
def parts(monkeypatch):
    """How much of each load had come after each part, by request."""
    seen = {}
    damaged = Fetcher._go_on

    def watch(self, read):
        goes_on = damaged(self, read)
        seen.setdefault(read.task.request_id, []).append(read.received)
        return goes_on

    monkeypatch.setattr(Fetcher, "_go_on", watch)
    return seen


def announced(p, transfer_id="transfer-1"):
    return announce_params(transfer_id, "127.0.0.1", half(p)._server.port)


def offered(p, transfer_id):
    """Blocks of a transfer that the producer's worker has told of so far."""
    offers = p.workers[0].connector._half._offers._offers.items()
    return sum(len(offer.block_ids) for name, offer in offers if name.startswith(f"{transfer_id}/"))


def ask_both(p, d, tokens, name="r", max_tokens=8, prefill_tokens=1, **more):
    """Send a prompt to both servers at once, as the proxy does; returns the requests' names."""
    first, second = announced(p, f"transfer-{name}")
    d.add(f"d-{name}", tokens, max_tokens=max_tokens, params=second, **more)
    p.add(f"p-{name}", tokens, max_tokens=prefill_tokens, params=first, **more)
    return f"p-{name}", f"d-{name}"


@pytest.mark.parametrize("in_flight", [False, True], ids=["one-step", "two-in-flight"])
@pytest.mark.parametrize("runner", [1, 2], ids=["runner-1", "runner-2"])
@pytest.mark.parametrize("n", [2, BS, 64, 333])
def test_a_prompt_comes_over_while_it_is_computed(pair, parts, n, runner, in_flight):  # noqa: F811
    p, d = pair(async_scheduling=in_flight, model_runner=runner)
    pr, dr = ask_both(p, d, prompt(n))

    while dr not in d.finish_reasons or pr not in p.finish_reasons:
        p.step()
        # What a step computed comes over before the next one.
        run_all(d, until=lambda: dr in d.finish_reasons or parts.get(dr, [0])[-1] >= offered(p, "transfer-r"))
        d.step()
    assert d.outputs[dr] == d.expected(prompt(n), 8)
    assert d.hits[dr][0] == n - 1
    blocks = [received for received in parts[dr] if received]
    assert blocks[-1] == -(-n // BS)
    assert len(set(blocks)) == -(-n // 64)  # tokens of a step
    at_rest(p, d)


def test_the_tail_waits_for_the_end_where_the_answer_goes_on(pair, parts):  # noqa: F811
    p, d = pair()
    pr, dr = ask_both(p, d, prompt(100), prefill_tokens=12)
    for _ in range(5):
        p.step()
    assert offered(p, "transfer-r") == 6
    assert pr not in p.finish_reasons
    run_all(p, d, until=lambda: dr in d.finish_reasons and pr in p.finish_reasons)
    assert p.outputs[pr] == p.expected(prompt(100), 12)
    assert d.outputs[dr] == d.expected(prompt(100), 8)
    assert d.hits[dr][0] == 99
    assert parts[dr][-1] == 7
    at_rest(p, d)


@pytest.mark.parametrize("side", ["producer", "consumer", "both"])
def test_a_prefix_that_is_here_already_is_not_moved(pair, parts, side):  # noqa: F811
    p, d = pair()
    shared = prompt(128, 5)
    if side != "consumer":
        prefill(p, "warm-p", shared)
    if side != "producer":
        decode(d, "warm-d", shared, others=[p])
    tokens = [*shared, *prompt(150, 6)]
    pr, dr = ask_both(p, d, tokens)
    run_all(p, d, until=lambda: dr in d.finish_reasons and pr in p.finish_reasons)
    assert d.outputs[dr] == d.expected(tokens, 8)
    assert d.hits[dr][0] == len(tokens) - 1
    assert parts[dr][-1] == -(-len(tokens) // BS) - (8 if side != "producer" else 0)
    at_rest_without_offers(p, d)


def test_two_ranks(pair, parts):  # noqa: F811
    p, d = pair(world_size=2)
    pr, dr = ask_both(p, d, prompt(300))
    run_all(p, d, until=lambda: dr in d.finish_reasons and pr in p.finish_reasons)
    assert d.outputs[dr] == d.expected(prompt(300), 8)
    assert d.hits[dr][0] == 299
    at_rest(p, d)


def test_many_at_once_in_small_pools_with_preemption(pair):  # noqa: F811
    p, d = pair(
        prefill={"num_blocks": 40, "max_num_seqs": 4},
        decode={"num_blocks": 24, "max_num_seqs": 4},
        extra={"load_timeout": 5.0},
    )
    prompts = {f"r{i}": prompt(1 + 37 * i % 250, i) for i in range(16)}
    names = [
        ask_both(p, d, tokens, name, prefill_tokens=1 if i % 2 else 40)
        for i, (name, tokens) in enumerate(prompts.items())
    ]
    run_all(p, d, until=lambda: all(pr in p.finish_reasons and dr in d.finish_reasons for pr, dr in names), seconds=60)
    for (_, dr), tokens in zip(names, prompts.values(), strict=True):
        assert d.outputs[dr] == d.expected(tokens, 8)
    at_rest(p, d)


@pytest.mark.parametrize("steps", range(7))
def test_a_prefill_that_is_aborted_costs_a_computation(pair, steps):  # noqa: F811
    p, d = pair()
    pr, dr = ask_both(p, d, prompt(333))
    for _ in range(steps):
        p.step()
        d.step()
    p.abort(pr)
    began = time.monotonic()
    # Before its first step nobody has heard of the transfer, and a proxy that gives up says so to both.
    if steps == 0:
        d.abort(dr)
    run_all(p, d, until=lambda: dr in d.finish_reasons or steps == 0)
    assert time.monotonic() - began < 3.0
    if steps:
        assert d.outputs[dr] == d.expected(prompt(333), 8)
    at_rest(p, d)
    assert buffer(p).num_claims == 0


@pytest.mark.parametrize("steps", range(1, 7))
def test_a_decode_that_is_aborted_leaves_nothing(pair, steps):  # noqa: F811
    p, d = pair(extra={"lease": 0.5})
    pr, dr = ask_both(p, d, prompt(333))
    for _ in range(steps):
        p.step()
        time.sleep(0.01)
        d.step()
    d.abort(dr)
    run_all(p, d, until=lambda: pr in p.finish_reasons)
    at_rest(p, d)


def test_a_preempted_prefill_is_offered_on(pair, parts):  # noqa: F811
    p, d = pair(prefill={"num_blocks": 33})
    p.add("other", prompt(200, 9), max_tokens=200)
    p.run(
        until=lambda: p.num_computed_tokens["other"] > 200 if isinstance(p.num_computed_tokens, dict) else True,
        max_steps=10,
    )
    pr, dr = ask_both(p, d, prompt(230))
    run_all(
        p,
        d,
        until=lambda: dr in d.finish_reasons and pr in p.finish_reasons and "other" in p.finish_reasons,
        seconds=40,
    )
    assert d.outputs[dr] == d.expected(prompt(230), 8)
    assert p.outputs["other"] == p.expected(prompt(200, 9), 200)
    at_rest_without_offers(p, d)


def test_a_transfer_that_never_begins_is_waited_for_until_announce_wait(pair):  # noqa: F811
    p, d = pair(extra={"announce_wait": 0.5})
    _, second = announced(p, "never")
    began = time.monotonic()
    assert decode(d, "d", prompt(50), others=[p], params=second) == 0
    assert 0.5 <= time.monotonic() - began < 3.0
    at_rest(p, d)


def test_a_transfer_that_has_ended_is_not_waited_for(pair):  # noqa: F811
    p, d = pair()
    first, second = announced(p)
    prefill(p, "p", prompt(50), params=first)
    assert buffer(p).evict_all_unclaimed()
    began = time.monotonic()
    assert decode(d, "d", prompt(50), others=[p], params=second) == 0
    assert time.monotonic() - began < 2.0
    at_rest(p, d)


def test_a_prompt_without_an_id_is_waited_for_only_if_asked_to(pair):  # noqa: F811
    p, d = pair(extra={"lookup_wait": 5.0})
    d.add("d", prompt(90), max_tokens=8)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        d.step()
    p.add("p", prompt(90), max_tokens=1)
    run_all(p, d, until=lambda: "d" in d.finish_reasons)
    assert d.hits["d"][0] == 89
    assert d.outputs["d"] == d.expected(prompt(90), 8)
    at_rest(p, d)


def test_a_short_prompt_does_not_wait_for_a_long_one_of_the_same_producer(pair):  # noqa: F811
    p, d = pair(prefill={"num_blocks": 200, "max_num_seqs": 1}, decode={"num_blocks": 200})
    short = prefill(p, "short", prompt(40, 3))
    _, long_d = ask_both(p, d, prompt(1000))
    p.step()
    p.step()
    run_all(d, until=lambda: d.workers[0].connector._worker.num_open)
    assert decode(d, "d-short", prompt(40, 3), params=short) == 39  # `p` stands still meanwhile
    assert long_d not in d.finish_reasons
    run_all(p, d, until=lambda: long_d in d.finish_reasons)
    assert d.hits[long_d][0] == 999
    at_rest(p, d)


def test_an_announcement_that_no_server_would_accept():
    with pytest.raises(ProtocolError, match="transfer_id"):
        announce_params("two words", "127.0.0.1", 14579)
    with pytest.raises(ProtocolError, match="remote_port"):
        announce_params("one", "127.0.0.1", 0)
