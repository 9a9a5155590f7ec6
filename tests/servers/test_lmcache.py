"""Three servers share an `lm://` server, also through a proxy; the server fails, and answers stay right."""

from __future__ import annotations

import pytest
from fleet import BLOCK, Count, Fleet, Prompts, answer, until
from support.lm_server import LMServer

from kvsdk.config import transfer_config
from kvsdk.demo.servers import free_port

# Four servers boot in over a minute on two cores.
pytestmark = [pytest.mark.servers, pytest.mark.slow, pytest.mark.timeout(400)]

CHUNK = 2 * BLOCK
LARGE = {"blocks": 128, "max_model_len": 1024}


@pytest.fixture(scope="module")
def store():
    with LMServer() as one:
        yield one


@pytest.fixture(scope="module")
def fleet(tiny_llama, tmp_path_factory, store):
    with Fleet(tiny_llama, tmp_path_factory.mktemp("lmcache")) as fleet:
        config = transfer_config(
            {
                "kv_connector": "LMCacheConnector",
                "kv_role": "kv_both",
                "remote_url": store.url,
                "chunk_size": CHUNK,
            }
        )
        shared = [fleet.vllm(f"server-{i}", config, **LARGE) for i in range(3)]
        alone = fleet.vllm("alone", **LARGE)
        proxy = fleet.proxy("repeat", shared[0], shared[1], free_port())
        fleet.wait()
        yield shared, alone, proxy


def chunks(store) -> int:
    """How many chunks the server holds; what says that a chunk is coming is shorter."""
    return sum(len(payload) > 1000 for *_, payload in list(store.stored.values()))


def stored(store, count):
    until(f"{count} chunks are stored", lambda: chunks(store) >= count)


def test_what_one_server_computed_the_others_load(fleet, store):
    shared, alone, _ = fleet
    prompts = Prompts("lmcache share")
    prefix = prompts.of(6 * CHUNK)
    for i, server in enumerate(shared):
        before = chunks(store)
        prompt = prompts.of(8 * CHUNK + 5, prefix)
        tokens = answer(server, prompt)
        new = 2 if i else 8
        stored(store, before + new)
        assert chunks(store) == before + new
        for other in shared[:i] + shared[i + 1 :]:
            count = Count(other)
            assert answer(other, prompt) == tokens
            # What it loaded of the first prompt is in its own prefix cache when the others come.
            found = count.adds_up_to(len(prompt))
            assert found["external_kv_transfer"] == new * CHUNK, found
            assert found["local_cache_hit"] == (8 - new) * CHUNK, found
        assert tokens == answer(alone, prompt)


def test_through_a_proxy_whole_chunks_come_from_the_server(fleet, store):
    shared, alone, proxy = fleet
    prompts = Prompts("lmcache proxy")
    prefix = prompts.of(3 * CHUNK)
    for _ in range(2):
        prompt = prompts.of(770, prefix)
        count = Count(shared[1])
        tokens = answer(proxy, prompt)
        found = count.adds_up_to(len(prompt))
        assert found["external_kv_transfer"] + found["local_cache_hit"] == 770 // CHUNK * CHUNK, found
        assert tokens == answer(alone, prompt)


def test_a_server_that_freezes_or_dies_costs_time_not_tokens(fleet, store):
    shared, alone, _ = fleet
    prompts = Prompts("lmcache faults")
    before = chunks(store)
    prompt = prompts.of(5 * CHUNK)
    expected = answer(alone, prompt)
    assert answer(shared[0], prompt) == expected
    stored(store, before + 5)
    store.frozen.set()
    assert answer(shared[1], prompt) == expected
    assert answer(shared[2], prompts.of(3 * CHUNK, prompt)) is not None
    store.frozen.clear()
    until("the servers are used again", lambda: _loads(shared, prompts, store))
    store.close()
    other = prompts.of(4 * CHUNK)
    assert answer(shared[0], other) == answer(alone, other)
    store.start()
    until("the servers use the new one", lambda: _loads(shared, prompts, store), 10.0)


def _loads(shared, prompts, store) -> bool:
    """Whether a new prompt that one server computes is loaded by another."""
    before, prompt = chunks(store), prompts.of(2 * CHUNK + 1)
    answer(shared[0], prompt, 1)
    try:
        until("it is stored", lambda: chunks(store) >= before + 2, 1.0)
    except AssertionError:
        return False
    count = Count(shared[2])
    answer(shared[2], prompt, 1)
    return count.adds_up_to(len(prompt))["external_kv_transfer"] == 2 * CHUNK
