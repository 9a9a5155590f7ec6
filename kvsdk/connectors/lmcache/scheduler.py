"""The scheduler half: has the workers fetch what the server has of a prompt, and promises vLLM what has arrived."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

from kvsdk.buffer.keys import KEY_BYTES
from kvsdk.connector.interface import (
    ASK_AGAIN,
    AskAgain,
    ConsumerScheduler,
    Context,
    Hit,
    ProducerScheduler,
    RequestView,
)
from kvsdk.connectors.lmcache.keys import chunk_keys
from kvsdk.connectors.lmcache.lookup import LookupClient
from kvsdk.connectors.lmcache.mp_client import require_lmcache
from kvsdk.connectors.lmcache.settings import read_settings
from kvsdk.errors import ConfigError

logger = logging.getLogger("kvsdk.lmcache")


START_TIMEOUT = 5.0
"""Most seconds that the start waits for the workers."""


@dataclasses.dataclass(frozen=True)
class _Asked:
    ticket: int
    first: int  # chunk


class LMCacheScheduler(ProducerScheduler, ConsumerScheduler):
    """Saves every prompt of a chunk or more, and looks every prompt up."""

    def __init__(self, context: Context):
        super().__init__(context)
        self._settings = read_settings(context.options.extra, context.cache.block_size)
        self._settings.log()
        if self._settings.multi_process:
            require_lmcache()
        self._client: LookupClient | None = None
        self._asked: dict[str, _Asked] = {}

    def start(self, workers: list[dict[str, Any]]) -> None:
        if not all(workers):
            raise ConfigError(
                "no worker reported its KV cache: vLLM's MultiConnector passes on the first connector's report only; "
                "name this connector first"
            )
        if self.context.options.consumes:
            self._client = LookupClient([worker["address"] for worker in workers], self.context.options.lease)
            if not self._client.wait_heard(START_TIMEOUT):
                logger.warning("a worker has not said whether it reaches the LMCache server; prompts are computed here")

    # ---- consumer

    def find(self, request: RequestView, num_local_tokens: int) -> Hit | AskAgain | None:
        if self._client is None:
            return None
        size = self._settings.chunk_size
        asked = self._asked.get(request.id)
        if asked is None:
            first, end = num_local_tokens // size, request.num_prompt_tokens // size
            if first >= end or not self._client.up:
                return None
            if not request.keys_ready:
                return ASK_AGAIN
            keys = chunk_keys(request.keys.blocks, size // request.block_size)
            ticket = self._client.fetch(
                keys[first * KEY_BYTES : end * KEY_BYTES], first, self.context.options.lookup_timeout
            )
            self._asked[request.id] = _Asked(ticket, first)
            return ASK_AGAIN
        count = self._client.count(asked.ticket)
        if count is None:
            return ASK_AGAIN
        # Since it was asked vLLM may have lost local blocks, which were not fetched.
        if not count or num_local_tokens < asked.first * size:
            return None
        return Hit((asked.first + count) * size, asked.ticket)

    def load_ended(self, request: RequestView, hit: Hit, ok: bool) -> None:
        self.forget(request)

    def forget(self, request: RequestView) -> None:
        asked = self._asked.pop(request.id, None)
        if asked is not None and self._client is not None:
            self._client.release(asked.ticket)

    # ---- producer

    def save_from(self, request: RequestView) -> int | None:
        return 0 if request.num_prompt_tokens >= self._settings.chunk_size else None

    # ---- both

    def reset(self) -> bool:
        return False  # other servers share the store

    def close(self) -> None:
        if self._client is not None:
            self._client.close(time.monotonic() + self.context.options.close_timeout)
