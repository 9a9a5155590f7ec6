"""Connectors whose every move a test decides, and a store in the memory of the process."""

from __future__ import annotations

from typing import ClassVar

import torch

from kvsdk.connector import (
    ASK_AGAIN,
    Connector,
    ConsumerScheduler,
    ConsumerWorker,
    Hit,
    Keep,
    ProducerScheduler,
    ProducerWorker,
)
from kvsdk.kernels import BlockStore


class Script:
    """What the scripted connector does, and what was asked of it."""

    def __init__(self):
        self.answers = {}  # request id -> Hit, None or ASK_AGAIN
        self.keep = set()  # request ids whose blocks are kept, hold id = request id
        self.calls = []
        self.tasks = []
        self.holds = {}
        self.schedulers = []
        self.workers = []

    def named(self, name):
        return [args for called, *args in self.calls if called == name]


SCRIPT = Script()


def reset() -> Script:
    SCRIPT.__init__()
    STORE.clear()
    return SCRIPT


class ScriptedScheduler(ProducerScheduler, ConsumerScheduler):
    def __init__(self, context):
        super().__init__(context)
        SCRIPT.schedulers.append(self)

    def start(self, workers):
        SCRIPT.calls.append(("start", len(workers)))

    def find(self, request, num_local_tokens):
        SCRIPT.calls.append(("find", request.id, num_local_tokens))
        answer = SCRIPT.answers.get(request.id)
        return answer() if callable(answer) else answer

    def granted(self, request, hit, num_tokens):
        SCRIPT.calls.append(("granted", request.id, num_tokens))
        if hit.source == "raise":
            raise RuntimeError("granted failed on purpose")
        return hit.source

    def load_ended(self, request, hit, ok):
        SCRIPT.calls.append(("load_ended", request.id, ok))

    def forget(self, request):
        SCRIPT.calls.append(("forget", request.id))

    def finished(self, request, blocks):
        SCRIPT.calls.append(("finished", request.id, blocks[0].tolist()))
        if request.id in SCRIPT.keep:
            SCRIPT.holds[request.id] = blocks[0]
            return Keep(request.id, {"kept": request.id})
        return None

    def give_up(self, num_blocks):
        SCRIPT.calls.append(("give_up", num_blocks))
        freed = 0
        for hold_id in list(SCRIPT.holds):
            if freed >= num_blocks:
                break
            freed += len(SCRIPT.holds.pop(hold_id))
            self.holds.give_back(hold_id)


class ScriptedWorker(ProducerWorker, ConsumerWorker):
    def __init__(self, context):
        super().__init__(context)
        SCRIPT.workers.append(self)

    def register(self, kv_caches, layout):
        self.store = BlockStore(kv_caches, layout)

    def load(self, task):
        SCRIPT.calls.append(("load", task.request_id, self.context.rank, task.first_block, task.blocks[0].tolist()))
        if task.source == "raise in load":
            raise RuntimeError("load failed on purpose")
        SCRIPT.tasks.append(task)

    def kept(self, hold_id, blocks):
        SCRIPT.calls.append(("kept", hold_id))

    def let_go(self, hold_id):
        SCRIPT.calls.append(("let_go", hold_id))


class ScriptedConnector(Connector):
    scheduler_half = ScriptedScheduler
    worker_half = ScriptedWorker
    option_names = frozenset({"colour"})


STORE: dict[tuple[int, bytes], torch.Tensor] = {}
"""(rank, key) -> bytes of one block over all layers."""


class StoreScheduler(ProducerScheduler, ConsumerScheduler):
    """Saves every block of every prompt as it is computed, and finds them by key."""

    def find(self, request, num_local_tokens):
        keys = request.keys
        found = 0
        while found < keys.num_blocks and (0, keys.key(found)) in STORE:
            found += 1
        tokens = found * request.block_size
        if found == keys.num_blocks and keys.tail and (0, keys.tail) in STORE:
            tokens = request.num_prompt_tokens
        return Hit(tokens, keys.blocks + keys.tail) if tokens > num_local_tokens else None

    def save_from(self, request):
        return 0


class StoreWorker(ProducerWorker, ConsumerWorker):
    delay_saves = False
    waiting: ClassVar[list] = []

    def register(self, kv_caches, layout):
        self.store = BlockStore(kv_caches, layout)

    def load(self, task):
        ids = task.blocks[0]
        for i, block_id in enumerate(ids):
            key = task.source[16 * (task.first_block + i) : 16 * (task.first_block + i + 1)]
            with task.using():
                self.store.scatter(ids[i : i + 1], STORE[self.context.rank, key])
            assert block_id == ids[i]
        task.done()

    def save(self, task):
        if StoreWorker.delay_saves:
            StoreWorker.waiting.append((self, task))
        else:
            self.finish(task)

    def finish(self, task):
        ids = task.blocks[0]
        for i in range(len(ids)):
            staging = self.store.staging(1)
            with task.using():
                self.store.gather(ids[i : i + 1], staging)
            STORE[self.context.rank, task.keys[16 * i : 16 * i + 16]] = staging
        task.done()


class StoreConnector(Connector):
    scheduler_half = StoreScheduler
    worker_half = StoreWorker


class GreetsWorker(StoreWorker):
    def handshake(self):
        return {"address": "somewhere"}


class GreetsConnector(StoreConnector):
    worker_half = GreetsWorker


__all__ = ["ASK_AGAIN", "SCRIPT", "STORE", "ScriptedConnector", "StoreConnector", "StoreWorker", "reset"]
