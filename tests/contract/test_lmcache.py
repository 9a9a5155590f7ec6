"""LMCacheConnector's promises: chunks, faults of the server, what the model's thread spends."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
from support.lm_server import EXIST, GET, PUT, LMServer
from support.lm_worker import Worker

from kvsdk.config import parse_options
from kvsdk.connector.interface import CacheGeometry, Context
from kvsdk.connectors.lmcache import LMCacheConnector
from kvsdk.connectors.lmcache.host_cache import HostMemory
from kvsdk.connectors.lmcache.keys import ChunkNames
from kvsdk.errors import ConfigError, DeadlineExceeded
from kvsdk.layout import layout_of
from kvsdk.testing import Prompt, Subject, World
from kvsdk.testing.capabilities import LMCACHE_LM

pytestmark = [pytest.mark.compat, pytest.mark.usefixtures("no_thread_left")]

BLOCK, CHUNK = 4, 8
TESTS = pathlib.Path(__file__).parent.parent


@pytest.fixture
def server(monkeypatch):
    # Chunks arrive in the order in which they were computed.
    monkeypatch.setattr("kvsdk.connectors.lmcache.worker.STORE_CONNECTIONS", 1)
    with LMServer() as one:
        yield one


def world(server, roles=("kv_producer", "kv_consumer"), *, policy="recompute", engine=None, **options):
    common = {
        "remote_url": server.url, "chunk_size": CHUNK, "max_local_cpu_size": 0.01, "lookup_timeout": 2.0,
        "close_timeout": 2.0,
    }  # fmt: skip
    subject = Subject(LMCacheConnector, LMCACHE_LM, options=common | options)
    return World(subject, roles, policy=policy, **(engine or {}))


def half_of(one, engine):
    """The engine's worker half."""
    return one.engines[engine].workers[0].connector._half


def store(one, prompt, engine=0):
    """Have an engine compute a prompt, and wait until the server has its chunks."""
    number = one.add(engine, prompt)
    one.run(number)
    wait_until(lambda: half_of(one, engine)._saver.drain(time.monotonic()))
    return number


def chunks(server):
    """What the server has under chunks' names, but for marks and words that chunks are coming, which are shorter."""
    return {key: one for key, one in list(server.stored.items()) if one[3][:8] == b"kvsdkLM1" and len(one[3]) > 64}


def pieces(server):
    """What it has of their blocks: a piece each, since they are small."""
    return {key: one for key, one in list(server.stored.items()) if one[3][:8] != b"kvsdkLM1"}


def load(one, prompt, engine=1):
    """Have an engine answer a prompt; returns how many tokens it did not compute."""
    number = one.add(engine, prompt, 4)
    one.run(number)
    return one.cached(number)


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


# ---- chunks


@pytest.mark.parametrize("length", [7, 8, 9, 16, 30, 40])
def test_every_whole_chunk_is_stored_and_loaded(server, length):
    with world(server) as one:
        store(one, Prompt(length))
        assert len(chunks(server)) == length // CHUNK
        # Of a prompt of whole chunks vLLM computes the last token itself.
        assert load(one, Prompt(length)) == min(length // CHUNK * CHUNK, length - 1)


@pytest.mark.parametrize("budget", [4, 12, 20, 28])
def test_chunks_that_are_computed_in_several_steps_are_whole(server, budget):
    with world(server, engine={"max_num_batched_tokens": budget, "max_num_seqs": 4}) as one:
        prompts = [Prompt(43, family) for family in range(1, 4)]
        for number in [one.add(0, prompt) for prompt in prompts]:
            one.run(number)
        half_of(one, 0)._saver.drain(time.monotonic() + 5.0)
        assert len(chunks(server)) == 15
        assert [load(one, prompt) for prompt in prompts] == [40, 40, 40]


def test_the_beginning_that_vllm_has_itself_is_not_loaded(server):
    with world(server, ("kv_both", "kv_both")) as one:
        one.run(one.add(1, Prompt(12)))  # three blocks: a chunk and a half
        store(one, Prompt(40))
        asked = server.count(GET)
        assert load(one, Prompt(40)) == 39
        assert server.count(GET) - asked == 2 * 4, "a chunk was fetched that vLLM has"
        assert one.stats("loaded_blocks", 1) == 7


def test_what_the_server_has_is_neither_copied_nor_sent_again(server):
    with world(server, ("kv_both", "kv_both")) as one:
        store(one, Prompt(40))
        assert load(one, Prompt(40)) == 39
        assert half_of(one, 1)._saver.drain(time.monotonic() + 5.0)
        assert sum(1 for command, key in server.requests if command == PUT and key in chunks(server)) == 5
        assert one.stats("stored_chunks") == 5


def test_prompts_that_begin_alike_share_chunks_and_fetch_each_once(server):
    with world(server) as one:
        store(one, Prompt(40, 1, shared=32))
        server.delay = 0.02
        asked = server.count(GET)
        numbers = [one.add(1, Prompt(40, family, shared=32), 2) for family in (2, 3, 4)]
        one.run(*numbers)
        # The four shared ones, two values each, and each prompt's own last one: it is missing, and is it coming?
        assert server.count(GET) - asked <= 14
        assert [one.cached(number) for number in numbers] == [32, 32, 32]


def test_a_prompt_without_a_whole_chunk_asks_nobody(server):
    with world(server) as one:
        store(one, Prompt(CHUNK - 1))
        load(one, Prompt(CHUNK - 1))
        assert {server.count(GET), server.count(PUT), server.count(EXIST)} == {0}


@pytest.mark.parametrize(
    "difference",
    [{"model_id": "other"}, {"chunk_size": 4}, {"engine": {"mla": True}}, {"engine": {"block_size": 8}}],
    ids=str,
)
def test_servers_that_differ_share_nothing(server, difference):
    with world(server, ("kv_both",)) as one:
        store(one, Prompt(40))
    before = set(chunks(server))
    with world(server, ("kv_both",), **difference) as other:
        assert load(other, Prompt(40), 0) == 0
        half_of(other, 0)._saver.drain(time.monotonic() + 5.0)
    assert len(chunks(server)) > len(before)


def test_adapters_of_one_name_share_nothing():
    from kvsdk.vllm.binding import _root

    def root(lora):
        return _root(types.SimpleNamespace(lora_request=lora, mm_features=None, cache_salt=None))

    def adapter(name, path):
        return types.SimpleNamespace(lora_name=name, lora_path=path)

    roots = [root(None), *(root(adapter(*one)) for one in (("sql", "/v1"), ("sql", "/v2"), ("other", "/v1")))]
    assert len(set(roots)) == 4
    assert root(adapter("sql", "/v1")) == roots[1]


def test_models_of_one_last_name_share_nothing_unless_model_id_says_so():
    context = Context(
        options=parse_options({"kv_role": "kv_both"}), engine_id="", rank=0, world_size=1, model={"id": "same"},
        cache=CacheGeometry(BLOCK, 8, 64),
    )  # fmt: skip
    layout = layout_of({"0": torch.zeros(8, 2, BLOCK, 8)}, num_blocks=8, block_size=BLOCK)

    def name(model_path, **options):
        one = dataclasses.replace(
            context, model_path=model_path, options=dataclasses.replace(context.options, **options)
        )
        return ChunkNames(one, layout, CHUNK).name(bytes(16))

    assert name("/run1/checkpoint-500") == name("/run1/checkpoint-500")
    assert name("/run1/checkpoint-500") != name("/run2/checkpoint-500")
    assert name("/run1/checkpoint-500", model_id="a") == name("/run2/checkpoint-500", model_id="a")
    assert len(name("/run1/checkpoint-500", model_id="x" * 300)) <= 150


def test_three_servers_share_one(server):
    with world(server, ("kv_both", "kv_both", "kv_both")) as one:
        for engine in range(3):
            store(one, Prompt(40, family=1 + engine), engine)
        for engine in range(3):
            for family in range(1, 4):
                assert load(one, Prompt(40, family), engine) >= 36


# ---- the end of a producer

ENDS_WITHOUT_CLOSING = """
import multiprocessing, sys
import numpy as np
from support.lm_worker import Worker

def run():
    worker = Worker(sys.argv[1], "kv_producer")
    worker.save(np.arange(1, 21, dtype=np.int32), bytes(range(256)) + bytes(range(64, 0, -1)))

"""


def test_a_producer_that_ends_right_away_loses_no_chunk(server):
    server.delay = 0.02
    one = world(server, ("kv_producer",))
    saver = half_of(one, 0)._saver
    copy = saver._copy

    def copy_slowly(*arguments):
        time.sleep(0.03)
        copy(*arguments)

    saver._copy = copy_slowly
    one.run(one.add(0, Prompt(80)))
    assert saver._open, "the last blocks were copied before the end"
    one.close()
    assert len(chunks(server)) == 10


@pytest.mark.parametrize("how", ["run()", "multiprocessing.get_context('fork').Process(target=run).start()"])
def test_a_process_that_nobody_closes_loses_no_chunk(server, how):
    server.delay = 0.02
    script = ENDS_WITHOUT_CLOSING + how
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = [sys.executable, "-c", script, server.url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environ)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(chunks(server)) == 10


def test_closing_waits_no_longer_than_close_timeout_for_a_slow_server(server, caplog):
    one = world(server, ("kv_producer",), close_timeout=0.2, lookup_timeout=5.0)
    server.delay = 1.0
    one.run(one.add(0, Prompt(80)))
    began = time.monotonic()
    one.close()
    assert time.monotonic() - began < 2.0
    assert "some were not stored before the end" in caplog.text


# ---- a prompt that is handed over at once


def test_chunks_that_are_still_being_stored_are_waited_for(server):
    with world(server, lookup_timeout=5.0) as one:
        saver = half_of(one, 0)._saver
        store_now = saver.store

        def store_slowly(*arguments):
            time.sleep(0.1)
            store_now(*arguments)

        saver.store = store_slowly
        one.run(one.add(0, Prompt(40)))
        assert len(chunks(server)) < 5, "all were stored before anybody asked"
        assert load(one, Prompt(40)) == 39


def test_chunks_that_never_come_are_waited_for_no_longer_than_lookup_timeout(server):
    with world(server, lookup_timeout=0.5) as one:
        half_of(one, 0)._saver._submit = lambda name, partial: None
        one.run(one.add(0, Prompt(40)))
        wait_until(lambda: server.stored)
        began = time.monotonic()
        assert load(one, Prompt(40)) == 0
        assert 0.4 < time.monotonic() - began < 1.5


def test_word_of_a_coming_chunk_is_not_believed_for_ever(server, monkeypatch):
    monkeypatch.setattr("kvsdk.connectors.lmcache.chunks.COMING_SECONDS", -1.0)
    with world(server, lookup_timeout=5.0) as one:
        half_of(one, 0)._saver._submit = lambda name, partial: None
        one.run(one.add(0, Prompt(40)))
        wait_until(lambda: server.stored)
        began = time.monotonic()
        assert load(one, Prompt(40)) == 0
        assert time.monotonic() - began < 2.0


# ---- faults of the server


def test_a_server_that_is_not_there_costs_nothing(server, caplog):
    server.close()
    with world(server, ("kv_both",), lookup_timeout=5.0) as one:
        began = time.monotonic()
        assert load(one, Prompt(40), 0) == 0
        assert time.monotonic() - began < 2.0
    assert "is down: nobody answers" in caplog.text


def test_a_server_that_is_killed_and_restarted_gives_hits_again(server):
    with world(server, ("kv_both", "kv_both")) as one:
        store(one, Prompt(40))
        assert load(one, Prompt(40)) == 39
        server.close()
        assert load(one, Prompt(40, family=2)) == 0
        with LMServer(server.port) as again:
            began, family = time.monotonic(), 2
            while True:
                family += 1
                one.run(one.add(0, Prompt(40, family)))
                half_of(one, 0)._saver.drain(time.monotonic() + 5.0)
                if load(one, Prompt(40, family)) == 39:
                    break
                assert time.monotonic() - began < 10.0, "no hit within 10 s"
                time.sleep(0.1)
            assert len(chunks(again)) >= 5
            # What the old server had is not taken for something that the new one has.
            one.engines[0].reset()
            store(one, Prompt(40))
            wait_until(lambda: load(one, Prompt(48, family=1), 1) >= 40)


def test_a_frozen_server_is_waited_for_once(server):
    with world(server, ("kv_both", "kv_both"), lookup_timeout=0.5) as one:
        store(one, Prompt(40))
        server.frozen.set()
        seconds = []
        for family in range(10, 16):
            began = time.monotonic()
            load(one, Prompt(40, family))
            seconds.append(time.monotonic() - began)
        server.frozen.clear()
        assert seconds[0] < 2.0
        assert max(seconds[1:]) < 0.3, f"it was waited for again: {seconds}"
        wait_until(lambda: half_of(one, 1)._server.up)
        wait_until(lambda: one.engines[1].connector._scheduler._half._client.up)
        assert load(one, Prompt(40)) == 39


def test_a_server_that_is_well_and_answers_nothing_else_is_left_alone(server):
    with world(server, ("kv_both", "kv_both"), lookup_timeout=0.4) as one:
        store(one, Prompt(40))
        server.mute = {GET}
        seconds = []
        for family in range(10, 20):
            began = time.monotonic()
            load(one, Prompt(40, family))
            seconds.append(time.monotonic() - began)
        assert sum(one > 0.3 for one in seconds) <= 2, f"it was waited for again and again: {seconds}"
        server.mute = set()
        wait_until(lambda: one.engines[1].connector._scheduler._half._client.up)
        assert load(one, Prompt(40)) == 39


def test_a_worker_that_does_not_answer_lookups_is_waited_for_once(server, monkeypatch):
    monkeypatch.setattr("kvsdk.connectors.lmcache.lookup.HELLO", 0.2)
    with world(server) as one:
        store(one, Prompt(40))
        store(one, Prompt(40, 2))
        half = half_of(one, 1)
        take, half._lookups._take = half._lookups._take, lambda frames: None
        seconds = []
        for family in range(10, 14):
            began = time.monotonic()
            load(one, Prompt(40, family))
            seconds.append(time.monotonic() - began)
        assert max(seconds[1:]) < 0.3, f"it was waited for again: {seconds}"
        half._lookups._take = take
        wait_until(lambda: one.engines[1].connector._scheduler._half._client.up)
        assert load(one, Prompt(40)) == 39


def test_a_server_that_freezes_while_a_prompt_is_fetched(server):
    with world(server, lookup_timeout=0.3) as one:
        store(one, Prompt(40))
        number = one.add(1, Prompt(40), 4)
        server.delay = 0.02
        one.step(1)
        server.frozen.set()
        began = time.monotonic()
        one.run(number)
        assert time.monotonic() - began < 2.0


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize("cut_after", [0, 50, 300])
def test_a_connection_that_is_cut_inside_a_payload_is_a_chunk_computed(server, cut_after, policy):
    with world(server, policy=policy) as one:
        store(one, Prompt(40))
        server.cut_after = cut_after
        assert load(one, Prompt(40)) == 0
        server.cut_after = None
        assert load(one, Prompt(48)) >= 40
        assert one.stats("loads_failed") == 0


def test_a_connection_that_is_cut_once_costs_nothing(server):
    with world(server) as one:
        store(one, Prompt(40))
        store(one, Prompt(40, 2))
        assert load(one, Prompt(40, 2)) == 39  # the connections are there, and not new
        server.cut_after, server.cuts = 100, 1
        assert load(one, Prompt(40)) == 39


def damaged(server, how):
    """Change what the server has of the chunk that was stored last but one; `how` begins with what of it."""
    of, _, how = how.partition(": ")
    values = chunks(server) if of == "header" else pieces(server)
    key = list(values)[-2]
    form, dtype, shape, payload = server.stored[key]
    content = bytearray(payload)
    if how == "cut":
        del content[len(content) // 2 :]
        shape = (len(content), 0, 0, 0)
    elif how == "another chunk's":
        content[:] = next(iter(values.values()))[3]
    elif how == "kind":
        form = 1
    elif how == "missing":
        del server.stored[key]
        return
    else:
        content[-1 if how == "last byte" else len(content) // 2] ^= 0x80
    server.stored[key] = (form, dtype, shape, bytes(content))


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize(
    "how",
    [f"{of}: {how}" for of in ("header", "piece") for how in ("last byte", "middle", "another chunk's", "cut", "kind")]
    + ["piece: missing"],
)
def test_a_damaged_payload_is_found_counted_and_computed(server, how, policy):
    with world(server, policy=policy) as one:
        store(one, Prompt(40))
        damaged(server, how)
        assert load(one, Prompt(40)) == 24, "the chunks before the damaged one, and no more"
        assert one.stats("loads_failed") == 0
        assert one.stats("corrupt_blocks", 1) > 0


def test_a_damaged_chunk_is_stored_anew_by_the_server_that_computed_it(server):
    with world(server, ("kv_both", "kv_both")) as one:
        store(one, Prompt(40))
        damaged(server, "piece: middle")
        assert load(one, Prompt(40)) == 24
        assert half_of(one, 1)._saver.drain(time.monotonic() + 5.0)
        one.restart(0)
        assert load(one, Prompt(40), 0) == 39


@pytest.mark.parametrize("how", ["piece: middle", "piece: cut", "piece: missing", "header: cut"])
def test_a_damaged_chunk_is_stored_anew_by_the_producer_which_has_not_met_it(server, how, monkeypatch):
    monkeypatch.setattr("kvsdk.connectors.lmcache.keys.KNOWN_SECONDS", 0.0)
    with world(server) as one:
        store(one, Prompt(40))
        damaged(server, how)
        assert load(one, Prompt(40)) == 24
        one.engines[0].reset()
        store(one, Prompt(40))
        one.engines[1].reset()
        assert load(one, Prompt(40)) == 39


def test_without_verification_a_chunk_is_taken_as_it_is(server):
    from kvsdk.vllm.harness import WrongBytes

    one = world(server, verify=False)
    try:
        store(one, Prompt(40))
        damaged(server, "piece: middle")
        with pytest.raises(WrongBytes):
            load(one, Prompt(40))
    finally:
        one.close()


def test_a_full_server_is_said_and_not_asked_for_ever(server, caplog):
    server.capacity = 0
    with world(server, ("kv_both", "kv_both")) as one:
        for family in range(1, 8):
            load(one, Prompt(40, family), 0)
        assert half_of(one, 0)._saver.drain(time.monotonic() + 5.0)
        assert not chunks(server)
        assert 1 <= server.count(PUT) <= 12, "a server that keeps nothing is sent everything"
        assert one.stats("store_failures", 0) >= 1
        assert "nothing is stored for" in caplog.text
        # What it has can still be loaded, and once there is room chunks are stored again.
        server.capacity = None
        wait_until(lambda: time.monotonic() > half_of(one, 0)._saver._paused_until)
        store(one, Prompt(40, family=20))
        assert load(one, Prompt(40, family=20)) == 39


def test_two_producers_store_the_same_chunks_at_once(server):
    with world(server, ("kv_both", "kv_both", "kv_both")) as one:
        server.delay = 0.01
        numbers = [one.add(engine, Prompt(40)) for engine in (0, 1)]
        one.run(*numbers)
        for engine in (0, 1):
            assert half_of(one, engine)._saver.drain(time.monotonic() + 5.0)
        assert len(chunks(server)) == 5
        assert load(one, Prompt(40), 2) == 39


# ---- bounds


def test_host_memory_is_bounded(server):
    chunk = 512  # two blocks of four tokens, in two layers of two heads of four float32 each
    with world(server) as one:
        store(one, Prompt(80))
    with world(server, max_local_cpu_size=3 * chunk / 2**30) as one:
        assert load(one, Prompt(80)) in (CHUNK, 2 * CHUNK, 3 * CHUNK)
        server.delay = 0.05
        one.run(one.add(0, Prompt(80, family=2)))
        assert half_of(one, 0)._saver._memory.num_used <= 3


def test_host_memory_for_a_gpu_is_pinned_in_one_piece_and_let_go(monkeypatch):
    calls = []

    class Runtime:
        cudaHostRegister = staticmethod(lambda *arguments: calls.append(arguments) or 0)
        cudaHostUnregister = staticmethod(lambda *arguments: calls.append(arguments) or 0)

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda result: None)
    memory = HostMemory(1000, 3, pinned=True)
    buffers = [memory.take() for _ in range(4)]
    first = buffers[0].data_ptr()
    assert buffers[3] is None
    assert [one.data_ptr() - first for one in buffers[:3]] == [0, 1000, 2000]
    memory.close()
    memory.close()
    assert calls == [(first, 3000, 0), (first,)]


def test_host_memory_that_a_device_which_has_failed_does_not_let_go_stays(monkeypatch, caplog):
    class Runtime:
        cudaHostRegister = staticmethod(lambda *arguments: 0)
        cudaHostUnregister = staticmethod(lambda *arguments: 719)

    def check(result):
        if result:
            raise RuntimeError(f"CUDA error {result}")

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    HostMemory(1000, 3, pinned=True).close()
    assert "stays pinned until this process ends: CUDA error 719" in caplog.text


def test_host_memory_is_not_let_go_while_a_thread_may_copy_to_it(server, monkeypatch, caplog):
    one = world(server, ("kv_both", "kv_both"), lookup_timeout=5.0)
    closed, copying, go_on = [], threading.Event(), threading.Event()
    loader = half_of(one, 1)._loader
    monkeypatch.setattr(HostMemory, "close", lambda memory: closed.append(memory))

    def stuck(*arguments):
        copying.set()
        assert go_on.wait(30)
        return 0

    monkeypatch.setattr(loader, "_load_chunk", stuck)
    prompt = Prompt(40, 3)
    with one:
        store(one, prompt)
        try:
            one.add(1, prompt, 2)
            while not copying.is_set():
                one.step(0)
                one.step(1)
            half_of(one, 1).close()
            assert closed == []
            assert "the thread that loads chunks has not ended in time" in caplog.text
        finally:
            go_on.set()


def test_host_memory_that_cannot_be_had_ends_the_start_by_name():
    with pytest.raises(ConfigError, match="set a smaller max_local_cpu_size"):
        HostMemory(2**40, 2**20, pinned=False)


def test_prompts_that_come_at_once_take_turns_in_host_memory(server):
    with world(server, ("kv_both", "kv_both"), lookup_timeout=5.0, engine={"num_blocks": 256}) as one:
        prompts = [Prompt(40, family) for family in range(1, 9)]
        for prompt in prompts:
            store(one, prompt)
        half_of(one, 1)._loader._chunks._memory.limit = 10  # two prompts
        numbers = [one.add(1, prompt, 2) for prompt in prompts]
        one.run(*numbers)
        assert [one.cached(number) for number in numbers] == [39] * 8


def test_thousands_of_prompts_may_wait_at_once(server):
    with world(server) as one:
        client = one.engines[1].connector._scheduler._half._client
        tickets = [client.fetch(bytes(16), 0, 5.0) for _ in range(5000)]
        wait_until(lambda: all(client.count(ticket) is not None for ticket in tickets))
        assert client.up
        for ticket in tickets:
            client.release(ticket)
        store(one, Prompt(40))
        assert load(one, Prompt(40)) == 39


def test_blocks_before_a_sliding_window_are_neither_stored_nor_loaded(server, monkeypatch):
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    def spec(block_size, num_kv_heads, head_size, dtype):
        return SlidingWindowSpec(
            block_size=block_size, num_kv_heads=num_kv_heads, head_size=head_size, dtype=dtype, sliding_window=12
        )

    monkeypatch.setattr("kvsdk.vllm.harness.FullAttentionSpec", spec)
    # The stand-in for the model looks at every position, also at those that vLLM has no blocks of any more.
    monkeypatch.setattr("kvsdk.vllm.harness.Worker._check", lambda *_: None)
    with world(server, ("kv_both", "kv_both"), engine={"num_blocks": 64}) as one:
        half, saved = half_of(one, 0), []
        save, server_of = half.save, half._server
        half.save = lambda task: (saved.append(task.blocks[0].tolist()), save(task))
        with monkeypatch.context() as down:
            # What vLLM has of the prompt's beginning then, it has no blocks of when it is asked again.
            down.setattr(type(server_of), "up", property(lambda self: False))
            one.run(one.add(0, Prompt(40)))
        one.run(one.add(0, Prompt(40)))
        half._saver.drain(time.monotonic() + 5.0)
        assert saved
        assert not any(0 in ids for ids in saved[1:]), f"vLLM's null block was saved: {saved}"
        for length in (9, 24, 40):
            one.engines[1].reset()
            load(one, Prompt(length))
        assert one.stats("loads_failed", 1) == 0
        store(one, Prompt(40, 2))
        assert load(one, Prompt(40, 2)) == 39
        assert one.stats("loads_failed", 1) == 0


def test_a_gpu_that_does_not_come_to_it_is_waited_for_until_the_tasks_end(server):
    class Never:
        def query(self):
            return False

    worker = Worker(server.url)
    try:
        ids = np.arange(1, 5, dtype=np.int32)
        task = worker.save(ids, bytes(range(64)), fence=Never())
        assert worker.half._saver.drain(time.monotonic() + 0.1) is False
        task.expire(DeadlineExceeded("its time is up"))
        worker.save(ids, bytes(range(64)))
        assert worker.stored()
        assert worker.fetch(bytes(range(64))) == 2
        assert isinstance(worker.load(ids, fence=Never(), expire_after=0.1).error, DeadlineExceeded)
        assert worker.load(ids).error is None
    finally:
        worker.close()


@pytest.mark.parametrize("length", [12, 13, 44])
def test_nothing_is_kept_of_a_chunk_that_the_prompt_does_not_fill(server, length):
    with world(server, engine={"max_num_batched_tokens": 4, "max_num_seqs": 4}) as one:
        store(one, Prompt(length))
        assert len(chunks(server)) == length // CHUNK
        assert half_of(one, 0)._saver._memory.num_used == 0


def test_fetched_chunks_go_when_they_were_loaded(server):
    with world(server) as one:
        store(one, Prompt(40))
        assert load(one, Prompt(40)) == 39
        chunks = half_of(one, 1)._loader._chunks
        wait_until(lambda: chunks.num_tickets == 0)
        assert chunks._memory.num_used == 0


def test_fetched_chunks_go_when_the_request_is_aborted(server):
    with world(server) as one:
        store(one, Prompt(40))
        number = one.add(1, Prompt(40), 4)
        one.step(1)
        one.abort(number)
        chunks = half_of(one, 1)._loader._chunks
        wait_until(lambda: chunks.num_tickets == 0 and chunks._memory.num_used == 0)


def test_the_models_thread_spends_less_than_half_a_millisecond_on_a_save(server):
    server.delay = 0.05
    with world(server, ("kv_producer",), engine={"num_blocks": 512, "max_model_len": 512}) as one:
        half = half_of(one, 0)
        save, seconds = half.save, []

        def timed(task):
            # The thread's own time: on a busy machine others take its core in between.
            began = time.thread_time()
            save(task)
            seconds.append(time.thread_time() - began)

        half.save = timed
        for family in range(1, 5):
            one.run(one.add(0, Prompt(200, family)))
        assert len(seconds) >= 32
        assert sorted(seconds)[int(0.9 * len(seconds))] < 0.0005


# ---- settings


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"chunk_size": 6}, "chunk_size=6 is not a multiple of vLLM's block size of 4; set chunk_size to 8"),
        ({"chunk_size": 0}, "chunk_size=0 is out of range"),
        ({"remote_url": "redis://127.0.0.1:6379"}, "redis"),
        ({"remote_url": "lm://127.0.0.1"}, "is not lm://host:port"),
        ({"max_local_cpu_size": 1e-9}, "max_local_cpu_size holds 0 chunks"),
        ({"chunk_sizes": 8}, "the nearest known option is 'chunk_size'"),
    ],
)
def test_a_setting_that_cannot_be_used_ends_the_start_by_name(server, options, named):
    with pytest.raises(ConfigError, match=named.replace("(", r"\(")):
        world(server, ("kv_both",), **options)
