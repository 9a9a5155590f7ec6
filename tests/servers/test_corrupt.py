"""What a decode server makes of blocks that arrive with a flipped bit, checked and not."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import pytest
from fleet import BLOCK, SUPPORT, Count, Prompts, answer, consumer, met, offer, producer, stream

from kvsdk.demo.servers import Server, ServerFailed, free_port

pytestmark = [pytest.mark.servers, pytest.mark.timeout(400)]

FLIPPING = {"kv_connector": "under_test:FlippingConnector", "kv_connector_module_path": "kvsdk.vllm.connectors"}


@dataclass(frozen=True)
class Servers:
    prefill: Server
    unchecked: Server
    recompute: Server
    fail: Server


@pytest.fixture(scope="module")
def servers(new_fleet, tiny_llama):
    port = free_port()
    path = os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))
    policies = {
        "unchecked": {"kv_connector_extra_config": {"verify": False}},
        "recompute": {"kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"pipe": "shm"}},
        "fail": {"kv_load_failure_policy": "fail"},
    }
    with new_fleet(tiny_llama) as fleet:
        prefill = fleet.vllm("prefill", producer(port))
        flipping = {
            name: fleet.vllm(name, consumer(port, **FLIPPING, **options), env={"PYTHONPATH": path})
            for name, options in policies.items()
        }
        fleet.wait()
        for decode in flipping.values():
            met(decode, port)
        yield Servers(prefill, **flipping)


def test_with_checks_off_a_flipped_bit_changes_the_tokens(servers):
    """The tiny model depends on its context: equal tokens elsewhere mean equal KV."""
    prompts, changed = Prompts("unchecked"), 0
    for _ in range(6):
        prompt = prompts.of(2 * BLOCK)
        expected = answer(servers.prefill, prompt, 32)
        count = Count(servers.unchecked)
        changed += answer(servers.unchecked, prompt, 32) != expected
        assert count.adds_up_to(len(prompt))["external_kv_transfer"] == len(prompt)
    assert changed


def test_with_checks_on_and_recompute_the_tokens_are_right(servers):
    prompts = Prompts("recompute")
    before = servers.recompute.metrics().get("kvsdk_corrupt_blocks_total", 0)
    lengths = (2, BLOCK, 3 * BLOCK + 7, 500)
    for length in lengths:
        prompt = prompts.of(length)
        expected = answer(servers.prefill, prompt)
        assert answer(servers.recompute, prompt) == expected, f"{length} tokens"
    assert servers.recompute.metrics()["kvsdk_corrupt_blocks_total"] == before + len(lengths)


def test_with_checks_on_and_fail_the_request_ends_in_an_error_and_the_server_goes_on(servers):
    prompts = Prompts("fail")
    for length in (2, 3 * BLOCK + 7):
        prompt = prompts.of(length)
        offer(servers.prefill, prompt)
        with pytest.raises(ServerFailed, match="500"):
            answer(servers.fail, prompt)
        offer(servers.prefill, prompt)
        body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "return_token_ids": True}
        with pytest.raises(ServerFailed, match="error"):
            stream(servers.fail, "/v1/completions", body)
    alone = prompts.of(60)
    assert answer(servers.fail, alone) == answer(servers.prefill, alone)


def test_the_log_names_the_request_and_the_blocks(servers):
    prompt = Prompts("log").of(BLOCK + 3)
    offer(servers.prefill, prompt)
    reply = json.loads(servers.recompute.request("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 1}))
    lines = [line for line in servers.recompute.log.read_text().splitlines() if reply["id"] in line]
    assert any("1 of 2 blocks did not load" in line and "do not match their digests" in line for line in lines), lines
