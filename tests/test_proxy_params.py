"""What other projects' proxies send, as recorded in docs/proxies.md, replayed through kvsdk's reading of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvsdk.errors import ProtocolError
from kvsdk.proxy.bodies import decode_body, prefill_body
from kvsdk.transfer_params import Role, TransferParams, classify, offer_params, prefill_params

OFFER = offer_params("t-1", "10.0.0.1", 14579, "engine-p", num_tokens=33, tp_size=2)

# What each proxy puts into a prefill request. llm-d writes it in Go, where a map has no order and null is null.
NIXL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
TO_PREFILL: dict[str, dict[str, Any]] = {
    "vLLM toy_proxy_server": NIXL,
    "vLLM disagg_epd_proxy": NIXL,
    "vLLM disagg_proxy_multiturn, first turn": NIXL,
    "vLLM disagg_proxy_multiturn, later turn": OFFER
    | {"do_remote_decode": True, "do_remote_prefill": False, "remote_host": "decode-host"},
    "llm-d nixlv2": NIXL,
    "Dynamo NixlConnectorProtocol": NIXL,
    "Dynamo unified engine, with a caller's own": NIXL | {"a_callers": "own"},
}
TO_PREFILL_WITH_ID = {
    "vLLM mooncake_connector_proxy": {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": "xfer-1"},
    "Dynamo MooncakeConnectorProtocol": {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": "xfer-1"},
    "vLLM moriio_toy_proxy_server": {
        "remote_dp_size": 1,
        "remote_tp_size": 1,
        "transfer_id": "xfer-1",
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
    },
}


def over_http(params: Any) -> Any:
    return json.loads(json.dumps(params))


def through_go(params: Any) -> Any:
    """As Go's `map[string]any` passes JSON on: every number becomes a double."""
    return json.loads(json.dumps(params), parse_int=lambda text: int(float(text)))


def moriio(answer: dict[str, Any]) -> dict[str, Any]:
    """Copies three keys out of the answer, each of which must be there, and tp_size if it is."""
    return {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "remote_engine_id": answer["remote_engine_id"],
        "remote_block_ids": answer["remote_block_ids"],
        "transfer_id": answer["transfer_id"],
        "tp_size": answer["tp_size"],
        "remote_dp_size": 1,
        "remote_tp_size": 1,
    }


def multiturn(answer: dict[str, Any]) -> dict[str, Any]:
    """Counts the blocks of the first group if there are any, and writes the host of the prefill server's URL."""
    assert not answer["remote_block_ids"] or len(answer["remote_block_ids"][0]) >= 0
    return answer | {"remote_host": "prefill-host"}


def only_nixl_keys(answer: dict[str, Any]) -> dict[str, Any]:
    names = (*NIXL, "remote_request_id", "tp_size", "remote_num_tokens")
    return {name: answer[name] for name in names}


# What each proxy makes of the prefill server's answer for the decode server.
TO_DECODE: dict[str, Callable[[dict], dict]] = {
    "vLLM toy_proxy_server": over_http,
    "vLLM disagg_proxy_multiturn": multiturn,
    "llm-d nixlv2": through_go,
    "Dynamo": over_http,
    "vLLM moriio_toy_proxy_server in READ mode": moriio,
    "a proxy that copies the keys it knows": only_nixl_keys,
}


# The parameters


def test_what_we_send_to_a_prefill_server_is_what_the_others_send():
    assert prefill_params() == NIXL
    assert prefill_params() is not prefill_params()


@pytest.mark.parametrize("params", TO_PREFILL.values(), ids=TO_PREFILL)
def test_a_prefill_request_of_a_nixl_proxy_asks_to_keep_the_blocks_and_names_no_address(params):
    seen = classify(over_http(params))
    assert (seen.role, seen.remote_host, seen.reason) == (Role.DECODE_ELSEWHERE, None, "")


@pytest.mark.parametrize("params", TO_PREFILL_WITH_ID.values(), ids=TO_PREFILL_WITH_ID)
def test_a_prefill_request_may_name_the_transfer_beforehand(params):
    assert classify(over_http(params)) == TransferParams(Role.DECODE_ELSEWHERE, "xfer-1")


def test_the_addresses_of_an_earlier_turn_say_nothing_about_this_prefill():
    later = classify(TO_PREFILL["vLLM disagg_proxy_multiturn, later turn"])
    assert (later.remote_host, later.remote_port, later.num_tokens) == (None, None, None)


@pytest.mark.parametrize("proxy", TO_DECODE.values(), ids=TO_DECODE)
def test_our_answer_reaches_the_decode_server_through_every_proxy(proxy):
    seen = classify(proxy(OFFER))
    assert (seen.role, seen.transfer_id, seen.remote_engine_id, seen.tp_size, seen.reason) == (
        Role.PREFILLED_ELSEWHERE,
        "t-1",
        "engine-p",
        2,
        "",
    )


@pytest.mark.parametrize("proxy", ["vLLM toy_proxy_server", "llm-d nixlv2", "Dynamo"])
def test_a_proxy_that_passes_everything_on_passes_the_address_and_the_length(proxy):
    seen = classify(TO_DECODE[proxy](OFFER))
    assert (seen.remote_host, seen.remote_port, seen.num_tokens) == ("10.0.0.1", 14579, 33)


def test_a_decode_request_of_a_mooncake_proxy_names_the_transfer_but_no_address_of_ours():
    params = {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "remote_bootstrap_addr": "http://10.0.0.1:8998",
        "remote_engine_id": "engine-p",
        "transfer_id": "xfer-1",
    }
    expected = TransferParams(Role.PREFILLED_ELSEWHERE, "xfer-1", remote_engine_id="engine-p", announced=True)
    assert classify(params) == expected


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": False}, {"do_remote_prefill": None}, {"other": 1}])
def test_a_request_without_a_handoff_is_none_without_a_reason(params):
    assert classify(params) == TransferParams(Role.NONE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"do_remote_decode": True}, "both true"),
        ({"do_remote_prefill": 1}, "do_remote_prefill is int"),
        ({"do_remote_prefill": "false"}, "do_remote_prefill is str"),
        ({"transfer_id": None, "remote_request_id": None}, "neither transfer_id nor remote_request_id"),
        ({"transfer_id": ""}, "transfer_id"),
        ({"transfer_id": 7}, "transfer_id"),
        ({"transfer_id": "a b"}, "transfer_id"),
        ({"transfer_id": "é"}, "transfer_id"),
        ({"transfer_id": "x" * 257}, "transfer_id"),
        ({"transfer_id": ["t-1"]}, "transfer_id"),
        ({"remote_host": None}, "without the other"),
        ({"remote_port": None}, "without the other"),
        ({"remote_host": "a b"}, "remote_host"),
        ({"remote_host": "tcp://a"}, "remote_host"),
        ({"remote_host": 1}, "remote_host"),
        ({"remote_host": "a" * 254}, "remote_host"),
        ({"remote_port": 0}, "remote_port"),
        ({"remote_port": 65536}, "remote_port"),
        ({"remote_port": "14579"}, "remote_port"),
        ({"remote_port": True}, "remote_port"),
        ({"remote_port": 1.0}, "remote_port"),
        ({"remote_engine_id": {}}, "remote_engine_id"),
        ({"remote_num_tokens": -1}, "remote_num_tokens"),
        ({"remote_num_tokens": "3"}, "remote_num_tokens"),
        ({"remote_num_tokens": 2**53 + 1}, "remote_num_tokens"),
        ({"tp_size": 0}, "tp_size"),
        ({"tp_size": True}, "tp_size"),
    ],
)
def test_malformed_parameters_are_no_handoff_with_a_reason(change, named):
    seen = classify(OFFER | change)
    assert seen.role is Role.NONE
    assert named in seen.reason


@pytest.mark.parametrize("params", [[], "x", 3, True])
def test_parameters_that_are_no_object_are_no_handoff_with_a_reason(params):
    assert classify(params).reason.startswith("kv_transfer_params is")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


# The first draw builds tables of Unicode, which is slow on a busy machine.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(sorted(OFFER)), json_values))
def test_nothing_that_a_client_sends_raises(change):
    seen = classify({**OFFER, **change})
    assert isinstance(seen.role, Role)
    assert bool(seen.reason) <= (seen.role is Role.NONE)


@pytest.mark.parametrize(
    "wrong", [{"transfer_id": ""}, {"host": ""}, {"port": 0}, {"engine_id": "a b"}, {"num_tokens": -1}, {"tp_size": 0}]
)
def test_a_producer_cannot_make_an_offer_that_no_consumer_accepts(wrong):
    good = {"transfer_id": "t", "host": "h", "port": 1, "engine_id": "e", "num_tokens": 1, "tp_size": 1}
    assert classify(offer_params(**good)).role is Role.PREFILLED_ELSEWHERE
    with pytest.raises(ProtocolError):
        offer_params(**good | wrong)


def test_an_offer_has_the_keys_that_proxies_read_and_its_block_ids_only_if_asked():
    assert OFFER["remote_block_ids"] == []
    shown = offer_params("t", "::1", 1, "e", num_tokens=1, block_ids=[(3, 1), (2,)])
    assert shown["remote_block_ids"] == [[3, 1], [2]]
    assert {"remote_engine_id", "remote_block_ids", "remote_host", "remote_port", "transfer_id", "tp_size"} <= set(
        OFFER
    )
    assert over_http(shown) == shown


# Our proxy's bodies


def test_our_proxy_hands_our_servers_answer_on_unchanged():
    body = {"prompt": "a", "max_tokens": 3}
    assert classify(prefill_body(body, prefill_params())["kv_transfer_params"]).role is Role.DECODE_ELSEWHERE
    assert decode_body(body, OFFER) == body | {"kv_transfer_params": OFFER}
    assert classify(decode_body(body, OFFER)["kv_transfer_params"]).transfer_id == "t-1"
