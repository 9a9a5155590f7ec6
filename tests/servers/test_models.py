"""Other shapes of KV cache: multi-head latent attention, and tensor parallelism, both on CPUs."""

from __future__ import annotations

import pytest
from fleet import BLOCK, Count, Prompts, answer, consumer, met, offer, producer, said

from kvsdk.demo.servers import Server, free_port

pytestmark = [pytest.mark.servers, pytest.mark.timeout(400)]

# vLLM's ranks on CPUs spin while they wait for each other. Four of them on two cores now and then leave a connector's
# threads without a core for longer than any deadline allows. Without servers, two ranks are tested in tests/contract
# and by the suite.
four_ranks = pytest.mark.slow

MLA_BLOCK = 16
"""Tokens a block: the only size that vLLM's kernel for latent attention on CPUs knows."""


def pair(fleet, name: str, **more) -> tuple[Server, Server]:
    """A prefill and a decode server that have met."""
    port = free_port()
    # Ranks of a server on CPUs spin while they wait for each other: answers and signs of life may come late.
    patient = consumer(port, kv_connector_extra_config={"heartbeat": 10.0, "lookup_timeout": 15.0})
    prefill = fleet.vllm(f"{name}-prefill", producer(port), **more)
    decode = fleet.vllm(f"{name}-decode", patient, **more)
    fleet.wait()
    met(decode, port)
    return prefill, decode


@pytest.fixture(scope="module")
def mla(new_fleet, tiny_deepseek_v2):
    with new_fleet(tiny_deepseek_v2) as fleet:
        yield pair(fleet, "mla", args=("--attention-backend", "CPU_MLA", "--block-size", str(MLA_BLOCK)))


@pytest.fixture(scope="module")
def tp2(new_fleet, tiny_llama):
    with new_fleet(tiny_llama) as fleet:
        yield pair(fleet, "tp2", args=("--tensor-parallel-size", "2"))


@four_ranks
def test_two_ranks_hand_over_to_two_ranks_with_the_same_tokens(tp2):
    prefill, decode = tp2
    prompts = Prompts("two ranks")
    for length in (2, BLOCK, BLOCK + 1, 150):
        prompt = prompts.of(length)
        expected = answer(prefill, prompt, 8)
        count = Count(decode)
        assert answer(decode, prompt, 8) == expected, f"{length} tokens"
        assert count.adds_up_to(length)["external_kv_transfer"] == length


def test_latent_attention_goes_on_from_a_loaded_prompt_with_the_same_tokens(mla):
    """The decode server is asked for what follows the prefill server's first token.

    vLLM's kernels for latent attention on CPUs do not agree with each other: one vLLM alone answers a prompt otherwise
    than its own answer to all but the prompt's last tokens. Here both servers compute every token by the same kernel
    over the same KV: the prompt, whole blocks, on the prefill server, and each later token by itself.
    """
    prefill, decode = mla
    prompts = Prompts("latent")
    for blocks in (1, 2, 5, 19):
        prompt = prompts.of(blocks * MLA_BLOCK)
        first, *expected = answer(prefill, prompt, 17)
        count = Count(decode)
        assert answer(decode, [*prompt, first], 16) == expected, f"{blocks} blocks"
        assert count.adds_up_to(len(prompt) + 1)["external_kv_transfer"] == len(prompt)


def test_latent_attention_hands_over_prompts_of_any_length_whole(mla):
    """No tokens are compared, see above; every block's digest is."""
    prefill, decode = mla
    prompts, before = Prompts("lengths"), decode.metrics()
    lengths = (2, MLA_BLOCK - 1, MLA_BLOCK + 1, 300)
    for length in lengths:
        prompt = prompts.of(length)
        offer(prefill, prompt)
        count = Count(decode)
        answer(decode, prompt, 2)
        assert count.adds_up_to(length)["external_kv_transfer"] == length
    after = decode.metrics()
    assert after["kvsdk_loads_done_total"] - before.get("kvsdk_loads_done_total", 0) == len(lengths)
    assert not after.get("kvsdk_loads_failed_total") and not after.get("kvsdk_corrupt_blocks_total")


@four_ranks
def test_every_rank_of_two_loads_its_own_share(tp2):
    prefill, decode = tp2
    prompt = Prompts("share").of(3 * BLOCK)
    expected = answer(prefill, prompt, 4)
    before, count = decode.metrics().get("kvsdk_loaded_blocks_total", 0), Count(decode)
    assert answer(decode, prompt, 4) == expected
    assert count.adds_up_to(len(prompt))["external_kv_transfer"] == len(prompt), said(decode)
    assert decode.metrics()["kvsdk_loaded_blocks_total"] - before == 2 * 3
