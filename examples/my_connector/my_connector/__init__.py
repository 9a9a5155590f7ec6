"""Keeps every prompt's KV in files: one for each block and tensor-parallel rank, named by the block's prefix key."""

import contextlib
import hashlib
import json
import logging
import pathlib
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from kvsdk.connector import (
    ASK_AGAIN,
    Connector,
    ConsumerScheduler,
    ConsumerWorker,
    Hit,
    ProducerScheduler,
    ProducerWorker,
)
from kvsdk.errors import ConfigError, TaskEnded
from kvsdk.kernels import DIGEST_ALGORITHM, BlockStore

logger = logging.getLogger("my_connector")

KEY_BYTES = 16
DIGEST_BYTES = 8


def names(keys):
    """The file name of each block."""
    return [keys[i : i + KEY_BYTES].hex() for i in range(0, len(keys), KEY_BYTES)]


class FileWorker(ProducerWorker, ConsumerWorker):
    """Copies blocks between one worker's KV cache and its folder."""

    def __init__(self, context):
        super().__init__(context)
        if "folder" not in context.options.extra:
            raise ConfigError("folder is not set; set it in kv_connector_extra_config to where blocks are kept")
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="files")

    def register(self, kv_caches, layout):
        self.store = BlockStore(kv_caches, layout)
        # Blocks mean the same only to workers that agree on all of this.
        context = self.context
        same = [dict(context.model), layout.fingerprint(), context.world_size, context.rank, DIGEST_ALGORITHM]
        name = hashlib.sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()
        self.folder = pathlib.Path(context.options.extra["folder"], name)
        self.folder.mkdir(parents=True, exist_ok=True)

    def handshake(self):
        return {"folder": str(self.folder)}

    def load(self, task):
        self.thread.submit(self.carry_out, self.read, task)

    def save(self, task):
        self.thread.submit(self.carry_out, self.write, task)

    def carry_out(self, work, task):
        try:
            work(task)
        except TaskEnded as ended:
            logger.info("%s", ended)
        except Exception as error:  # noqa: BLE001 - this thread's errors are nobody else's; they end the task
            with contextlib.suppress(TaskEnded):
                task.fail(error)

    def close(self):
        self.thread.shutdown(wait=False, cancel_futures=True)

    def write(self, task):
        (block_ids,) = task.blocks
        for i, name in enumerate(names(task.keys)):
            file = self.folder / name
            if file.exists():
                continue
            staging = self.store.staging(1)
            self.wait_for_model(task)
            with task.using():
                self.store.gather(block_ids[i : i + 1], staging)
                self.wait_for_copy()
            partial = file.with_suffix(f".{uuid.uuid4().hex}")
            try:
                partial.write_bytes(self.digest(staging, task.first_block + i) + staging.cpu().numpy().tobytes())
                partial.rename(file)
            finally:
                partial.unlink(missing_ok=True)
        task.done()

    def read(self, task):
        (block_ids,) = task.blocks
        failed = []
        for i, name in enumerate(names(task.source)[task.first_block :][: len(block_ids)]):
            try:
                staging = self.content(self.folder / name, task.first_block + i)
            except (OSError, ValueError) as error:
                logger.warning("a block of request %s cannot be loaded: %s", task.request_id, error)
                failed.append(i)
                continue
            self.wait_for_model(task)
            with task.using():
                self.store.scatter(block_ids[i : i + 1], staging)
                self.wait_for_copy()
        if failed:
            task.fail(ValueError(f"{len(failed)} files are missing or damaged"), np.array(failed))
        else:
            task.done()

    def content(self, file, position):
        """A file's KV, ready for `scatter`. Raises OSError or, if the file is damaged, ValueError."""
        content = file.read_bytes()
        digest, kv = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if len(kv) == self.store.staging_bytes(1):
            staging = torch.frombuffer(bytearray(kv), dtype=torch.uint8).to(self.store.device)
            if self.digest(staging, position) == digest:
                return staging
        file.unlink(missing_ok=True)  # so that it is saved again
        raise ValueError(f"{file} is damaged")

    def digest(self, staging, position):
        return self.store.digest(staging, 1, np.array([position])).astype("<u8").tobytes()

    def wait_for_model(self, task):
        """On a GPU, wait until the model has done what it was given before this task."""
        if task.fence is not None:
            task.fence.synchronize()

    def wait_for_copy(self):
        """On a GPU, wait until this thread's own copy has been made."""
        if self.store.device.type == "cuda":
            torch.cuda.current_stream(self.store.device).synchronize()


class FileScheduler(ProducerScheduler, ConsumerScheduler):
    """Saves every prompt, and looks every prompt up."""

    def __init__(self, context):
        super().__init__(context)
        self.lookups = {}  # request id -> future of a Hit or None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="lookup")

    def start(self, workers):
        self.folders = [pathlib.Path(worker["folder"]) for worker in workers]

    def save_from(self, request):
        return 0

    def find(self, request, num_local_tokens):
        if not request.keys_ready:
            return ASK_AGAIN
        if request.id not in self.lookups:
            self.lookups[request.id] = self.thread.submit(self.look, request)
        lookup = self.lookups[request.id]
        return lookup.result() if lookup.done() else ASK_AGAIN

    def look(self, request):
        keys = request.keys.blocks + request.keys.tail
        found = 0
        for name in names(keys):
            if not all((folder / name).exists() for folder in self.folders):
                break
            found += 1
        num_tokens = min(found * request.block_size, request.num_prompt_tokens)
        return Hit(num_tokens, source=keys) if num_tokens else None

    def load_ended(self, request, hit, ok):
        self.lookups.pop(request.id, None)

    def forget(self, request):
        self.lookups.pop(request.id, None)

    def reset(self):
        return False  # the files are other servers' too

    def close(self):
        self.thread.shutdown(wait=False, cancel_futures=True)


class FileConnector(Connector):
    """What users name: the two halves, and the options that are theirs."""

    scheduler_half = FileScheduler
    worker_half = FileWorker
    option_names = frozenset({"folder"})
