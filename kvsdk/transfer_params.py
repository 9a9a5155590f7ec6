"""`kv_transfer_params`: what a proxy tells a server of one handoff, and what the server answers.

The two sides agree on a *transfer id*, which the prefill server's answer carries (or the proxy chose beforehand), and
never on vLLM's request ids, which differ between two engines. The other keys have the names that vLLM's NIXL
connector gave them, because proxies written for it read, copy or overwrite them; docs/proxies.md lists which proxy
does what.

Everything here comes from HTTP clients: nothing is trusted, and nothing raises. What is malformed is a request
without a handoff, with a reason that the caller can log; such a request is still looked up by its prompt.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvsdk.errors import ProtocolError

_TRANSFER_ID = re.compile(r"[\x21-\x7e]{1,256}")
_HOST = re.compile(r"[A-Za-z0-9._:%\[\]-]{1,253}")
# Proxies written in Go read every JSON number as a double: a larger integer would come back as another one.
_MAX_INT = 2**53


class Role(enum.StrEnum):
    """What a request's `kv_transfer_params` make of the server that received it."""

    NONE = "none"
    """No handoff, or one that is malformed."""
    DECODE_ELSEWHERE = "decode_elsewhere"
    """This server is to prefill and to keep the blocks for another one."""
    PREFILLED_ELSEWHERE = "prefilled_elsewhere"
    """Another server has prefilled, or is prefilling, this prompt."""


@dataclass(frozen=True)
class TransferParams:
    """One request's `kv_transfer_params`, checked.

    Attributes:
        role: what they ask of this server.
        transfer_id: 1 to 256 printable ASCII characters. With `PREFILLED_ELSEWHERE` always there; with
            `DECODE_ELSEWHERE` only if the proxy chose it, and then the offer must be found under it.
        remote_host, remote_port: where the producer's lookup buffer listens, both or neither; neither means any known
            producer. This is what an HTTP client said: whoever connects there should first see that it is a known
            producer.
        remote_engine_id: the producer's engine id, for messages only.
        num_tokens: prompt tokens that the producer holds, or None if it did not say.
        tp_size: the producer's tensor-parallel size, or None if it did not say.
        announced: whether the proxy asked the other server at the same time, so that the id may be unknown there yet:
            the parameters name a transfer and lack what the other server's answer would have brought.
        reason: why the role is `NONE` although there were parameters; empty otherwise.
    """

    role: Role
    transfer_id: str | None = None
    remote_host: str | None = None
    remote_port: int | None = None
    remote_engine_id: str | None = None
    num_tokens: int | None = None
    tp_size: int | None = None
    announced: bool = False
    reason: str = ""


def prefill_params() -> dict[str, Any]:
    """The `kv_transfer_params` of a prefill request, in the shape that proxies send for vLLM's NIXL connector."""
    return {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }


def announce_params(transfer_id: str, host: str, port: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `kv_transfer_params` with which a proxy sends one prompt to both servers at once.

    Args:
        transfer_id: 1 to 256 printable ASCII characters, never used before.
        host, port: where the producer's lookup buffer listens (`kv_ip`, `kv_port`).

    Returns:
        Those of the prefill request and those of the decode request.

    Raises:
        ProtocolError: no server would accept them; the message says which value is wrong.
    """
    prefill = prefill_params() | {"transfer_id": transfer_id}
    decode = {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": transfer_id,
        "remote_host": host,
        "remote_port": port,
    }
    for params in (prefill, decode):
        if reason := classify(params).reason:
            raise ProtocolError(f"an announcement that no server would accept: {reason}")
    return prefill, decode


def classify(params: Mapping[str, Any] | None) -> TransferParams:
    """Reads one request's `kv_transfer_params`. Never raises: see `TransferParams.reason`.

    Unknown keys are ignored, since every connector adds its own; keys that kvsdk reads must have their exact type (a
    port of `"14579"` or `True` is malformed). The addresses in a `do_remote_decode` request are ignored: proxies for
    conversations put the last turn's there.
    """
    if params is None:
        return TransferParams(Role.NONE)
    if not isinstance(params, Mapping):
        return _malformed(f"kv_transfer_params is {type(params).__name__}, not an object")
    for name in ("do_remote_decode", "do_remote_prefill"):
        if not isinstance(params.get(name, False), (bool, type(None))):
            return _malformed(f"{name} is {type(params[name]).__name__}, not a boolean")
    decode, prefill = bool(params.get("do_remote_decode")), bool(params.get("do_remote_prefill"))
    if decode and prefill:
        return _malformed("do_remote_decode and do_remote_prefill are both true")
    if not decode and not prefill:
        return TransferParams(Role.NONE)

    transfer_id = params.get("transfer_id")
    if transfer_id is None and prefill:
        # Our offers carry their id under this name too, for proxies that copy only the keys that NIXL knows.
        transfer_id = params.get("remote_request_id")
    if transfer_id is not None and not (isinstance(transfer_id, str) and _TRANSFER_ID.fullmatch(transfer_id)):
        return _malformed("transfer_id is not a string of 1 to 256 printable ASCII characters")
    if decode:
        return TransferParams(Role.DECODE_ELSEWHERE, transfer_id)
    if transfer_id is None:
        return _malformed("do_remote_prefill is true, but there is neither transfer_id nor remote_request_id")

    host, port = params.get("remote_host"), params.get("remote_port")
    if (host is None) != (port is None):
        return _malformed("remote_host and remote_port: one is given without the other")
    if host is not None and not (isinstance(host, str) and _HOST.fullmatch(host)):
        return _malformed("remote_host is not a host name or an address")
    if port is not None and not _is_int(port, 1, 65535):
        return _malformed("remote_port is not an integer in 1..65535")
    engine_id = params.get("remote_engine_id")
    if engine_id is not None and not (isinstance(engine_id, str) and _TRANSFER_ID.fullmatch(engine_id)):
        return _malformed("remote_engine_id is not a string of 1 to 256 printable ASCII characters")
    num_tokens, tp_size = params.get("remote_num_tokens"), params.get("tp_size")
    if num_tokens is not None and not _is_int(num_tokens, 0, _MAX_INT):
        return _malformed("remote_num_tokens is not an integer of at least 0")
    if tp_size is not None and not _is_int(tp_size, 1, _MAX_INT):
        return _malformed("tp_size is not an integer of at least 1")
    announced = "transfer_id" in params and not params.keys() & {"remote_block_ids", "remote_num_tokens"}
    return TransferParams(Role.PREFILLED_ELSEWHERE, transfer_id, host, port, engine_id, num_tokens, tp_size, announced)


def offer_params(
    transfer_id: str,
    host: str,
    port: int,
    engine_id: str,
    *,
    num_tokens: int,
    tp_size: int = 1,
    block_ids: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    """What a producer's `request_finished` returns: the decode server's `kv_transfer_params`, passed on by the proxy.

    Args:
        transfer_id: the offer's id.
        host, port: where consumers reach the producer's lookup buffer: an address they can connect to, not a wildcard.
        engine_id: the producer's engine id.
        num_tokens: prompt tokens that the offer holds.
        tp_size: the producer's tensor-parallel size.
        block_ids: the producer's block ids, a list for each KV cache group. kvsdk reads them from the offer and needs
            none here; a proxy that counts them finds an empty list. Leave it out for long prompts: it crosses two
            HTTP hops.

    Raises:
        ProtocolError: no consumer would accept the result; the message says which value is wrong.
    """
    params = {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": transfer_id,
        "remote_request_id": transfer_id,
        "remote_engine_id": engine_id,
        "remote_host": host,
        "remote_port": port,
        "remote_block_ids": [list(group) for group in block_ids],
        "remote_num_tokens": num_tokens,
        "tp_size": tp_size,
    }
    seen = classify(params)
    if seen.role is not Role.PREFILLED_ELSEWHERE:
        raise ProtocolError(f"an offer that no consumer would accept: {seen.reason}")
    return params


def _malformed(reason: str) -> TransferParams:
    return TransferParams(Role.NONE, reason=reason)


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
