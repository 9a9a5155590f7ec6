"""Other shapes of KV cache: multi-head latent attention, and tensor parallelism, both on CPUs over gloo."""

from __future__ import annotations

import pytest
from fleet import BLOCK, Count, Prompts, answer, consumer, met, offer, producer

from kvsdk.demo.servers import Server, free_port

pytestmark = [pytest.mark.servers, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def pairs(new_fleet, tiny_llama, tiny_deepseek_v2) -> dict[str, tuple[Server, Server]]:
    models = {
        # Its kernel knows blocks of 16 tokens alone.
        "mla": (tiny_deepseek_v2, ("--attention-backend", "CPU_MLA", "--block-size", "16")),
        "tp2": (tiny_llama, ("--tensor-parallel-size", "2")),
    }
    ports = {name: free_port() for name in models}
    with new_fleet(tiny_llama) as fleet:
        found = {}
        for name, (model, args) in models.items():
            more = {"model": model, "args": args}
            prefill = fleet.vllm(f"{name}-prefill", producer(ports[name]), **more)
            found[name] = prefill, fleet.vllm(f"{name}-decode", consumer(ports[name]), **more)
        fleet.wait()
        for name, port in ports.items():
            met(found[name][1], port)
        yield found


@pytest.mark.parametrize(("name", "lengths"), [("mla", (1, 15, 16, 17, 127, 300)), ("tp2", (1, 31, 32, 150))])
def test_prompts_come_over_whole_with_the_same_tokens(pairs, name, lengths):
    """The prompt is what the prefill server answered first, added to what it was asked.

    vLLM computes the last token of a loaded prompt with the kernel that decodes. On CPUs, that of latent attention is
    less exact than the one that prefills, so that one vLLM alone answers differently according to which it used; here
    both servers use the same one for the same token.
    """
    prefill, decode = pairs[name]
    prompts = Prompts(name)
    for length in lengths:
        asked = prompts.of(length)
        first, *expected = answer(prefill, asked, 9)
        prompt = [*asked, first]
        offer(prefill, prompt)
        count = Count(decode)
        assert answer(decode, prompt, 8) == expected, f"{length} + 1 tokens"
        assert count.adds_up_to(length + 1)["external_kv_transfer"] == length + 1


def test_every_rank_of_two_loads_its_own_share(pairs):
    prefill, decode = pairs["tp2"]
    prompt = Prompts("share").of(3 * BLOCK)
    before = decode.metrics().get("kvsdk_loaded_blocks_total", 0)
    assert answer(prefill, prompt, 4) == answer(decode, prompt, 4)
    assert decode.metrics()["kvsdk_loaded_blocks_total"] - before == 2 * 3
