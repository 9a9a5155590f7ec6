"""Two real servers with faults on purpose in every part of the way between them."""

from __future__ import annotations

import pytest
from fleet import Prompts, answer, consumer, holds_nothing, producer

from kvsdk.demo.servers import free_port
from kvsdk.testing.faults import FAULTS

pytestmark = [pytest.mark.servers, pytest.mark.slow, pytest.mark.timeout(400)]

FAULTY = {
    "kv_connector": "kvsdk.testing.faults:FaultyPyNcclConnector",
    "kv_connector_module_path": "kvsdk.vllm.connectors",
    "kv_load_failure_policy": "recompute",
}
EXTRA = {
    "faults": {"seed": 1, **dict.fromkeys(FAULTS, 0.05)},
    "lease": 3.0,
    "load_timeout": 1.0,
}


def test_every_answer_is_right_and_nothing_is_left(new_fleet, tiny_llama):
    port, prompts = free_port(), Prompts("faults")
    with new_fleet(tiny_llama) as fleet:
        prefill = fleet.vllm("prefill", producer(port, **FAULTY, kv_connector_extra_config=EXTRA))
        decode = fleet.vllm("decode", consumer(port, **FAULTY, kv_connector_extra_config=EXTRA))
        fleet.wait()
        for length in [*range(2, 32), *range(40, 400, 30)]:
            prompt = prompts.of(length)
            expected = answer(prefill, prompt)
            assert answer(decode, prompt) == expected, f"{length} tokens"
        assert decode.metrics()["kvsdk_loads_done_total"] > 5
        for server in (prefill, decode):
            assert "fault on purpose in" in server.log.read_text()
            holds_nothing(server, 20)
