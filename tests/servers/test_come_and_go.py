"""Prefill servers come, freeze, die and are replaced, while one decode server serves and is never restarted."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest
from fleet import Count, Fleet, Prompts, answer, consumer, frozen, kill, producer, until

from kvsdk.demo.servers import Server, free_port

pytestmark = [pytest.mark.servers, pytest.mark.timeout(400)]

BOUND = 15.0
"""Seconds for an answer when the producer is gone: a lookup's deadline, a load's, and the prompt computed here."""


@dataclass
class Servers:
    fleet: Fleet
    decode: Server
    early: tuple[list[int], list[int]]
    ports: dict[str, int]
    prefill: dict[str, Server] = field(default_factory=dict)

    def start(self, name: str) -> Server:
        self.prefill[name] = self.fleet.vllm(f"prefill-{name}", producer(self.ports[name]))
        return self.prefill[name]


@pytest.fixture(scope="module")
def servers(new_fleet, tiny_llama):
    """The decode server serves before the first prefill server is started."""
    ports = {name: free_port() for name in "ab"}
    timeouts = {"kv_connector_extra_config": {"lookup_timeout": 1.0, "load_timeout": 5.0}}
    with new_fleet(tiny_llama) as fleet:
        decode = fleet.vllm("decode", consumer(*ports.values(), **timeouts))
        fleet.wait()
        early = Prompts("early").of(80)
        servers = Servers(fleet, decode, (early, answer(decode, early)), ports)
        for name in ports:
            servers.start(name)
        fleet.wait()
        yield servers


def comes_over(servers: Servers, name: str, prompt: list[int]) -> bool:
    """Whether the prompt, prefilled on one server, came over whole; the tokens must be right either way."""
    expected = answer(servers.prefill[name], prompt)
    count = Count(servers.decode)
    assert answer(servers.decode, prompt) == expected
    return count.adds_up_to(len(prompt))["external_kv_transfer"] == len(prompt)


def soon_comes_over(servers: Servers, name: str, prompts: Prompts) -> None:
    until(f"prompts come over from {name}", lambda: comes_over(servers, name, prompts.of(90)), 15.0)


def test_a_decode_server_without_a_prefill_server_answers_and_says_who_is_missing(servers):
    prompt, tokens = servers.early
    assert answer(servers.prefill["a"], prompt) == tokens
    log = servers.decode.log.read_text()
    for port in servers.ports.values():
        assert sum(f"the producer on 127.0.0.1:{port} is down" in line for line in log.splitlines()) >= 1


def test_prompts_of_either_prefill_server_come_over(servers):
    prompts = Prompts("either")
    for name in "abab":
        soon_comes_over(servers, name, prompts)


def test_a_prefill_server_that_freezes_costs_time_not_tokens_and_is_used_again(servers):
    prompts = Prompts("frozen")
    prompt = prompts.of(100)
    expected = answer(servers.prefill["b"], prompt)
    with frozen(servers.prefill["b"]):
        began = time.monotonic()
        assert answer(servers.decode, prompt) == expected
        assert time.monotonic() - began < BOUND
        soon_comes_over(servers, "a", prompts)
    soon_comes_over(servers, "b", prompts)


def test_a_prefill_server_that_dies_before_the_decode_is_replaced_without_a_restart(servers):
    prompts = Prompts("killed")
    soon_comes_over(servers, "a", prompts)
    prompt = prompts.of(100)
    expected = answer(servers.prefill["a"], prompt)
    kill(servers.prefill["a"])
    count, began = Count(servers.decode), time.monotonic()
    assert answer(servers.decode, prompt) == expected
    assert time.monotonic() - began < BOUND
    assert count.adds_up_to(len(prompt))["local_compute"] == len(prompt)
    soon_comes_over(servers, "b", prompts)
    servers.start("a").wait_healthy()
    soon_comes_over(servers, "a", prompts)
