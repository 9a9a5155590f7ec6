"""Request and error bodies, as pure functions of what the client sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of no use to a server that computes the prompt and one token: vLLM refuses some beside max_tokens=1 (min_tokens,
# stream_options without stream), others make it compute or send more (log probabilities, echo, several choices), and
# prompt_logprobs would keep it from using its own prefix cache.
_DROPPED = (
    "stream_options",
    "min_tokens",
    "min_completion_tokens",
    "best_of",
    "use_beam_search",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "echo",
)


def prefill_body(body: Mapping[str, Any], params: Mapping[str, Any] | None) -> dict[str, Any]:
    """The prefill server's copy of a request: the same prompt, one token, not streamed, and these
    `kv_transfer_params`.

    Everything that may change the tokens of the prompt (messages, tools, template arguments) stays.
    """
    prefill = {name: value for name, value in body.items() if name not in _DROPPED and name != "kv_transfer_params"}
    prefill.update(stream=False, max_tokens=1)
    if "max_completion_tokens" in body:
        prefill["max_completion_tokens"] = 1
    if "n" in body:
        prefill["n"] = 1
    if params is not None:
        prefill["kv_transfer_params"] = dict(params)
    return prefill


def decode_body(body: Mapping[str, Any], params: Mapping[str, Any] | None) -> dict[str, Any]:
    """The decode server's copy of a request. What a client says in `kv_transfer_params` never reaches a server."""
    decode = {name: value for name, value in body.items() if name != "kv_transfer_params"}
    if params is not None:
        decode["kv_transfer_params"] = dict(params)
    return decode


def is_one_sequence(body: Mapping[str, Any]) -> bool:
    """Whether the request is one prompt with one completion.

    `kv_transfer_params` belong to a whole HTTP request and name one transfer, so a request of several sequences cannot
    use them: its sequences are found by their prompts.
    """
    prompt = body.get("prompt")
    batched = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    several = any(body.get(name) not in (None, 1) for name in ("n", "best_of"))
    return not batched and not several and not body.get("use_beam_search")


def error_body(message: str, kind: str, status: int) -> dict[str, Any]:
    """An error in OpenAI's format, as vLLM writes it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def split_events(data: bytes) -> tuple[bytes, bytes]:
    """`data` of an SSE stream as whole events and the beginning of the next one.

    Only whole events are passed on, so that a stream that breaks off can still end in an event of its own.
    """
    end = max(data.rfind(end) + len(end) if end in data else 0 for end in (b"\n\n", b"\r\n\r\n"))
    return data[:end], data[end:]
