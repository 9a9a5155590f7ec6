"""A prefill server, a decode server and a proxy answer as one server alone does, and count where tokens come from."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from fleet import BLOCK, Count, Prompts, answer, consumer, holds, holds_nothing, leave, met, offer, stream, until

from kvsdk.demo.servers import Server, free_port

pytestmark = [pytest.mark.servers, pytest.mark.timeout(400)]

CHUNK = 64
"""Tokens of a prompt that one step computes."""
LEASE = 4.0
MODES = ("repeat", "params", "early")
MAX_MODEL_LEN = 640
POOL = 28
"""Blocks of the decode server: eight requests of nine blocks do not fit, so that some are preempted."""
LONGEST = 590
AT_ONCE = 8
ANSWER, LONG_ANSWER = 40, 5 * BLOCK


@dataclass(frozen=True)
class Servers:
    alone: Server
    prefill: Server
    decode: Server
    proxies: dict[str, Server]

    def hold_nothing(self) -> None:
        for server in (self.prefill, self.decode):
            holds_nothing(server, LEASE + 10)


@pytest.fixture(scope="module")
def servers(new_fleet, tiny_llama):
    """The prefill server is given what `kvsdk config` prints, the decode server loads the connector by its module."""
    port, proxy_ports = free_port(), [free_port() for _ in MODES]
    args = ("--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "16")
    with new_fleet(tiny_llama) as fleet:

        def start(name: str, config: dict | None = None, blocks: int = 64) -> Server:
            options = {"blocks": blocks, "max_model_len": MAX_MODEL_LEN, "env": {"VLLM_PLUGINS": None}}
            return fleet.vllm(name, config, args=args, **options)

        alone = start("alone")
        prefill = start("prefill", json.loads(_printed_config(port)))
        by_path = {"kv_connector_module_path": "kvsdk.vllm.connectors"}
        decode = start("decode", consumer(port, **by_path), POOL)
        proxies = {
            mode: fleet.proxy(mode, prefill, decode, at, kv_port=port)
            for mode, at in zip(MODES, proxy_ports, strict=True)
        }
        fleet.wait()
        met(decode, port)
        yield Servers(alone, prefill, decode, proxies)


def _printed_config(port: int) -> str:
    """What `kvsdk config` makes of the JSON in the form of vLLM's old examples."""
    old = {"kv_connector": "PyNcclConnector", "kv_role": "kv_producer", "kv_rank": 0, "kv_parallel_size": 2}
    old |= {"kv_ip": "127.0.0.1", "kv_port": port, "kv_buffer_size": 5e9, "lease": LEASE}
    command = [sys.executable, "-m", "kvsdk.cli", "config", json.dumps(old)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture(params=MODES)
def proxy(servers, request) -> Server:
    return servers.proxies[request.param]


LENGTHS = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * CHUNK + 7, LONGEST)


def test_one_at_a_time_every_prompt_of_two_tokens_or_more_comes_over_whole(servers, proxy):
    prompts = Prompts(f"one at a time {proxy.name}")
    for length in LENGTHS:
        prompt = prompts.of(length)
        expected = answer(servers.alone, prompt, 8)
        count = Count(servers.decode)
        assert answer(proxy, prompt, 8) == expected, f"{length} tokens"
        # vLLM computes the last token again, yet counts it as taken over.
        external = length if length > 1 else 0
        assert count.adds_up_to(length) == {
            "local_cache_hit": 0,
            "external_kv_transfer": external,
            "local_compute": length - external,
        }


def test_a_prompt_whose_beginning_is_here_already_takes_over_the_rest(servers, proxy):
    prompts = Prompts(f"beginning {proxy.name}")
    first = prompts.of(3 * BLOCK + 5)
    second = prompts.of(6 * BLOCK + 3, first[: 3 * BLOCK])
    for prompt, local in ((first, 0), (second, 3 * BLOCK)):
        expected = answer(servers.alone, prompt)
        count = Count(servers.decode)
        assert answer(proxy, prompt) == expected
        tokens = count.adds_up_to(len(prompt))
        assert tokens["local_cache_hit"] == local
        assert tokens["external_kv_transfer"] == len(prompt) - local


def test_streams_and_chats_give_the_same_tokens(servers, proxy):
    prompt = Prompts(f"streams {proxy.name}").of(70)
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    assert stream(proxy, "/v1/completions", body) == answer(servers.alone, prompt, 12)
    for text in ("What is fog?", "What is a valley? " * 12):
        chat = _chat(f"{proxy.name} {text}", 12)
        expected = _ask(servers.alone, _Ask("chat", 0, chat))
        assert _ask(proxy, _Ask("chat", 0, chat)) == expected
        assert stream(proxy, "/v1/chat/completions", chat) == expected


@dataclass(frozen=True)
class _Ask:
    """One client: how it asks, how many tokens its prompt has, what it sends, and after how many tokens it leaves."""

    how: str
    length: int
    body: dict
    leave_after: int | None = None


def _ask(server: Server, ask: _Ask) -> list[int]:
    path = "/v1/chat/completions" if ask.how == "chat" else "/v1/completions"
    if ask.how == "stream":
        return stream(server, path, ask.body, leave_after=ask.leave_after)
    return json.loads(server.request("POST", path, ask.body))["choices"][0]["token_ids"]


def _chat(text: str, max_tokens: int) -> dict:
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}


def _forty(prompts: Prompts, name: str) -> list[_Ask]:
    """Clients whose prompts have every length that matters, some with a common beginning; one in five leaves."""
    shared = prompts.of(2 * BLOCK)
    lengths = [*LENGTHS, *(2 * BLOCK + tail for tail in (0, 1, 20, BLOCK, 50, 2 * BLOCK, 70, 90))]
    lengths += [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK] * 4
    asks = []
    for i, length in enumerate(lengths):
        prompt = prompts.of(length, shared if 8 <= i < 16 else ())
        body = {"prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "return_token_ids": True}
        asks.append(_Ask("stream" if i % 2 else "whole", length, body, leave_after=5 if i % 5 == 1 and i % 2 else None))
    asks += [_Ask("chat", 0, _chat(f"{name}: tell me about city {i}. " * (i + 1), ANSWER)) for i in range(4)]
    return asks


def _growing(prompts: Prompts) -> list[_Ask]:
    """Clients that all start at once, and whose answers outgrow the pool while they are written."""
    bodies = [
        {"prompt": prompts.of(4 * BLOCK), "max_tokens": LONG_ANSWER, "temperature": 0, "return_token_ids": True}
        for _ in range(AT_ONCE)
    ]
    return [_Ask("whole", 4 * BLOCK, body) for body in bodies]


def test_forty_prompts_and_eight_that_are_preempted_eight_at_a_time(servers, proxy):
    prompts = Prompts(f"forty {proxy.name}")
    asks = [*_forty(prompts, proxy.name), *_growing(prompts)]
    assert len(asks) == 40 + AT_ONCE
    expected = [_ask(servers.alone, ask)[: ask.leave_after] for ask in asks]
    random.Random(proxy.name).shuffle(order := list(range(40)))
    order += range(40, len(asks))
    count, preempted = Count(servers.decode), servers.decode.metrics()["vllm:num_preemptions_total"]
    counted = servers.decode.metrics()["vllm:prompt_tokens_total"]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = dict(zip(order, pool.map(lambda i: _ask(proxy, asks[i]), order), strict=True))
    # Of a client that leaves, the tokens that it took count; a stream may bring several at once.
    wrong = [asks[i].length for i in order if answers[i][: asks[i].leave_after] != expected[i]]
    assert not wrong, f"prompts of these lengths were answered otherwise: {wrong}"
    servers.hold_nothing()
    tokens = count.since()
    assert sum(tokens.values()) == servers.decode.metrics()["vllm:prompt_tokens_total"] - counted
    assert sum(tokens.values()) > sum(ask.length for ask in asks)  # chats are not in the latter
    assert servers.decode.metrics()["vllm:num_preemptions_total"] > preempted, "nothing was preempted; shrink the pool"
    assert tokens["external_kv_transfer"] > sum(tokens.values()) / 2, tokens


def test_clients_that_leave_at_any_moment_leave_no_block_behind(servers, proxy):
    prompts = Prompts(f"leavers {proxy.name}")
    rng = random.Random(proxy.name)
    leavers = [(prompts.of(rng.choice((40, 200, LONGEST))), rng.uniform(0.0, 0.5)) for _ in range(24)]
    stayer = prompts.of(100)
    expected = answer(servers.alone, stayer)

    def come_and_go(prompt: list[int], seconds: float) -> None:
        leave(proxy, {"prompt": prompt, "max_tokens": ANSWER, "temperature": 0}, seconds)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        gone = [pool.submit(come_and_go, *leaver) for leaver in leavers]
        assert answer(proxy, stayer) == expected
        for future in gone:
            future.result()
    servers.hold_nothing()
    again = prompts.of(50)
    assert answer(proxy, again) == answer(servers.alone, again)


def test_an_offer_that_nobody_claims_is_held_for_its_lease(servers):
    servers.hold_nothing()
    began = time.monotonic()
    offer(servers.prefill, Prompts("nobody").of(100))
    until("the prefill server holds the offer", lambda: holds(servers.prefill), LEASE / 2)
    until("the lease ends", lambda: not holds(servers.prefill), LEASE + 5)
    assert time.monotonic() - began > LEASE
    holds_nothing(servers.prefill, 1.0)
