"""Three vLLM servers share LMCache's own `lm://` server, and two its multi-process server, also through a proxy. The
first one fails, and answers stay right: they are compared with those of a server that computed the whole prompt.
"""

from __future__ import annotations

import time

import pytest
from fleet import BLOCK, Count, Prompts, answer, until
from support.lmcache_servers import LMServer, MPServer, needs_lmcache

from kvsdk.config import transfer_config
from kvsdk.demo.servers import free_port

pytestmark = [needs_lmcache, pytest.mark.servers]

CHUNK = 2 * BLOCK
LOOKUP_TIMEOUT = 5.0
LARGE = {"blocks": 128, "max_model_len": 1024}


@pytest.fixture(scope="module")
def store():
    with LMServer() as one:
        yield one


@pytest.fixture(scope="module")
def mp_store():
    with MPServer(wait=False) as one:
        yield one


def config(url, role="kv_both"):
    options = {"remote_url": url, "chunk_size": CHUNK, "lookup_timeout": LOOKUP_TIMEOUT}
    return transfer_config({"kv_connector": "LMCacheConnector", "kv_role": role, **options})


@pytest.fixture(scope="module")
def fleet(tiny_llama, new_fleet, store):
    with new_fleet(tiny_llama) as fleet:
        shared = [fleet.vllm(f"server-{i}", config(store.url), **LARGE) for i in range(3)]
        proxy = fleet.proxy("repeat", shared[0], shared[1], free_port())
        fleet.wait()
        yield shared, proxy


@pytest.fixture(scope="module")
def mp_fleet(tiny_llama, new_fleet, mp_store):
    with new_fleet(tiny_llama) as fleet:
        alone = fleet.vllm("alone", None, **LARGE)
        mp_store.wait()
        roles = ("kv_producer", "kv_consumer")
        pair = [fleet.vllm(f"mp-{role}", config(mp_store.url, role), **LARGE) for role in roles]
        proxy = fleet.proxy("repeat", *pair, free_port())
        fleet.wait()
        yield alone, pair, proxy


def test_what_one_server_computed_the_others_load(fleet):
    shared, _ = fleet
    prompts = Prompts("lmcache share")
    prefix = prompts.of(6 * CHUNK)
    for i, server in enumerate(shared):
        prompt = prompts.of(8 * CHUNK + 5, prefix)
        count = Count(server)
        tokens = answer(server, prompt)
        assert i or count.adds_up_to(len(prompt))["local_compute"] == len(prompt)
        new = 2 if i else 8
        for other in shared[:i] + shared[i + 1 :]:
            count = Count(other)
            # At once: the last chunks may still be on their way.
            assert answer(other, prompt) == tokens
            found = count.adds_up_to(len(prompt))
            # What it loaded of the first prompt is in its own prefix cache when the others come.
            assert found["external_kv_transfer"] == new * CHUNK, found
            assert found["local_cache_hit"] == (8 - new) * CHUNK, found


def test_through_a_proxy_whole_chunks_come_from_the_server(fleet):
    shared, proxy = fleet
    prompts = Prompts("lmcache proxy")
    prefix = prompts.of(3 * CHUNK)
    for _ in range(2):
        prompt = prompts.of(770, prefix)
        expected, count = answer(shared[0], prompt), Count(shared[1])
        tokens = answer(proxy, prompt)
        found = count.adds_up_to(len(prompt))
        assert found["external_kv_transfer"] + found["local_cache_hit"] == 770 // CHUNK * CHUNK, found
        assert tokens == expected


@pytest.mark.slow
def test_through_the_multi_process_server_whole_chunks_come_over(mp_fleet):
    alone, pair, proxy = mp_fleet
    prompts = Prompts("lmcache mp proxy")
    prefix = prompts.of(3 * CHUNK)
    for length in (770, 3 * CHUNK + 40):
        prompt = prompts.of(length, prefix)
        expected, counts = answer(alone, prompt), [Count(server) for server in pair]
        assert answer(proxy, prompt) == expected
        computed, found = (count.adds_up_to(len(prompt)) for count in counts)
        whole = length // CHUNK * CHUNK
        assert found["external_kv_transfer"] + found["local_cache_hit"] == whole, found
        assert computed["external_kv_transfer"] == 0, "it only stores"
    # All of the first prompt's chunks came from the server; the second one's first ones were in the cache by then.
    loaded = pair[1].metrics_by("vllm:prompt_tokens_by_source_total", "source")["external_kv_transfer"]
    assert int(loaded) == 770 // CHUNK * CHUNK + length // CHUNK * CHUNK - 3 * CHUNK


def timed(server, prompt):
    began = time.monotonic()
    tokens = answer(server, prompt)
    return time.monotonic() - began, tokens


def test_a_server_that_freezes_is_waited_for_once_and_used_again(fleet, store):
    shared, _ = fleet
    prompts = Prompts("lmcache freeze")
    prompt = prompts.of(5 * CHUNK)
    expected = answer(shared[0], prompt)
    store.freeze()
    try:
        seconds, tokens = timed(shared[1], prompt)
        assert tokens == expected
        assert seconds < LOOKUP_TIMEOUT + 5.0
        for _ in range(3):
            other = prompts.of(3 * CHUNK)
            seconds, tokens = timed(shared[1], other)
            assert tokens == answer(shared[2], other)
            assert seconds < 0.6 * LOOKUP_TIMEOUT, "it was waited for again"
    finally:
        store.thaw()
    until("the servers use it again", lambda: _loads(shared, prompts))


def test_a_server_that_is_killed_and_started_again_gives_hits_within_ten_seconds(fleet, store):
    shared, _ = fleet
    prompts = Prompts("lmcache kill")
    prompt = prompts.of(4 * CHUNK)
    expected = answer(shared[0], prompt)
    store.kill()
    seconds, tokens = timed(shared[1], prompt)
    assert tokens == expected
    assert seconds < LOOKUP_TIMEOUT
    store.start()
    until("the servers use the new one", lambda: _loads(shared, prompts), 10.0)


def _loads(shared, prompts) -> bool:
    """Whether new prompts that one server computes are loaded by the others, and one of another's by it."""
    return all(
        _loads_one(computes, loads, prompts.of(2 * CHUNK + 1))
        for computes, loads in ((shared[0], shared[1]), (shared[0], shared[2]), (shared[1], shared[0]))
    )


def _loads_one(computes, loads, prompt) -> bool:
    answer(computes, prompt, 1)
    count = Count(loads)
    answer(loads, prompt, 1)
    return count.adds_up_to(len(prompt))["external_kv_transfer"] == 2 * CHUNK
