"""The lifecycle of requests and blocks, seen through vLLM's real scheduler and block manager.

The stand-in model checks every byte of KV that it reads, so "the answer is right" also means that every load was right.
"""

import numpy as np
import pytest
from scripted import ASK_AGAIN, STORE, StoreWorker
from vllm.v1.core.sched.scheduler import Scheduler

from kvsdk.connector import Hit

pytestmark = pytest.mark.compat

HOLDERS_FIRST = hasattr(Scheduler, "_holds_kv_blocks")
"""Whether this vLLM itself schedules requests that hold blocks before all others, room or not."""

BS = 16
RUNNERS = pytest.mark.parametrize("runner", [1, 2], ids=["runner-1", "runner-2"])
ASYNC = pytest.mark.parametrize("in_flight", [False, True], ids=["one-step", "two-in-flight"])


def prompt(n, seed=0):
    return np.random.default_rng(seed).integers(1, 900, n).tolist()


def fill(engine, task, tokens, rank=0):
    """Do a load by hand: write what the model would have computed into the task's blocks."""
    from kvsdk.vllm.harness import chain, content

    states = chain(tokens)
    for i, block in enumerate(task.blocks[0]):
        start = (task.first_block + i) * BS
        part = states[start : min(start + BS, task.num_tokens)]
        for layer, words in enumerate(engine.workers[rank].words):
            words[block, :, : len(part), :] = content(part, layer, rank).transpose(1, 0, 2)


# ---- the harness itself


def test_the_stand_in_finds_a_flipped_byte(engine, script):
    from kvsdk.vllm.harness import WrongBytes

    one = engine()
    one.add("a", prompt(40), max_tokens=5)
    one.step()
    one.workers[0].words[1][one.scheduler.kv_cache_manager.get_block_ids("a")[0][1], 0, 3, 0] ^= 1
    with pytest.raises(WrongBytes, match="position 19"):
        one.run()


@RUNNERS
@ASYNC
def test_answers_are_right_without_a_hit(engine, script, runner, in_flight):
    one = engine(model_runner=runner, async_scheduling=in_flight)
    for i, n in enumerate((1, 15, 16, 17, 48, 200)):
        one.add(f"r{i}", prompt(n, i), max_tokens=7)
    one.run()
    for i, n in enumerate((1, 15, 16, 17, 48, 200)):
        assert one.outputs[f"r{i}"] == one.expected(prompt(n, i), 7)
    one.check_at_rest()


@RUNNERS
@ASYNC
def test_answers_are_right_under_preemption(engine, script, runner, in_flight):
    one = engine(num_blocks=14, model_runner=runner, async_scheduling=in_flight)
    for i in range(4):
        one.add(f"r{i}", prompt(40, i), max_tokens=40)
    preempted = 0
    while one.scheduler.has_requests() or one._in_flight:
        one.step()
        preempted += sum(r.num_preemptions for r in one.scheduler.requests.values())
    assert preempted, "the pool was not small enough to preempt"
    for i in range(4):
        assert one.outputs[f"r{i}"] == one.expected(prompt(40, i), 40)
    one.check_at_rest()


# ---- asynchronous loads


@RUNNERS
@ASYNC
@pytest.mark.parametrize("tokens", [16, 48, 50], ids=["one-block", "blocks", "with-tail"])
def test_a_load_fills_exactly_the_blocks_it_was_granted(engine, script, runner, in_flight, tokens):
    one = engine(model_runner=runner, async_scheduling=in_flight)
    script.answers["a"] = Hit(tokens, "here")
    one.add("a", prompt(50), max_tokens=6)
    one.run(until=lambda: script.tasks)
    (task,) = script.tasks
    assert (task.first_block, len(task.blocks[0]), task.num_tokens, task.source) == (
        0,
        -(-tokens // BS),
        tokens,
        "here",
    )
    assert task.blocks[0].dtype == np.int32
    assert not one.outputs["a"]
    fill(one, task, prompt(50))
    task.done()
    one.run()
    assert one.outputs["a"] == one.expected(prompt(50), 6)
    assert script.named("load_ended") == [["a", True]]
    assert one.hits["a"][0] == min(tokens, 49)
    one.check_at_rest()


def test_other_requests_run_while_one_loads(engine, script):
    one = engine()
    script.answers["a"] = Hit(48, None)
    one.add("a", prompt(48), max_tokens=3)
    one.add("b", prompt(30, 1), max_tokens=3)
    one.run(until=lambda: "b" in one.finish_reasons)
    assert "a" not in one.finish_reasons
    fill(one, script.tasks[0], prompt(48))
    script.tasks[0].done()
    one.run()
    assert one.outputs["a"] == one.expected(prompt(48), 3)


def test_asking_again_holds_up_nobody_and_ends(engine, script):
    now = [0.0]
    one = engine()
    one.connector._scheduler._clock = lambda: now[0]
    script.answers["a"] = ASK_AGAIN
    one.add("a", prompt(40), max_tokens=2)
    one.add("b", prompt(40, 1), max_tokens=2)
    one.run(until=lambda: "b" in one.finish_reasons)
    asked = len(script.named("find"))
    for _ in range(20):
        one.step()
    assert len([args for args in script.named("find") if args[0] == "a"]) >= asked // 2 + 19
    assert "a" in one.unfinished
    now[0] = 1000.0  # past the deadline of the lookup
    one.run()
    assert one.outputs["a"] == one.expected(prompt(40), 2)
    assert ["a"] in script.named("forget")


@pytest.mark.parametrize("ends", ["done", "fail"])
@pytest.mark.parametrize("num_ahead", [1, 3])
def test_what_has_loaded_passes_those_that_find_no_room_before_it(engine, script, num_ahead, ends):
    """vllm#45388: in 0.26 requests wait in one line, and those behind have the blocks that the first one waits for."""
    one = engine(num_blocks=16)
    ahead = [f"ahead {i}" for i in range(num_ahead)]
    for i, name in enumerate(ahead):
        script.answers[name] = ASK_AGAIN
        one.add(name, prompt(130, 2 + i), max_tokens=2)
    script.answers["loads"] = Hit(160, None)
    one.add("loads", prompt(161), max_tokens=3)
    one.run(until=lambda: script.tasks)
    for name in ahead:
        script.answers[name] = None
    one.step()
    assert not one.scheduler.running, "there was room"
    fill(one, script.tasks[0], prompt(161))
    if ends == "done":
        script.tasks[0].done()
    else:
        script.tasks[0].fail(RuntimeError("on purpose"))
    one.run(until=lambda: "loads" in one.finish_reasons)
    one.run()
    for i, name in enumerate(ahead):
        assert one.outputs[name] == one.expected(prompt(130, 2 + i), 2)
    assert one.outputs["loads"] == one.expected(prompt(161), 3)
    one.check_at_rest()


def test_nobody_else_passes_one_that_finds_no_room(engine, script):
    """Small requests that vLLM has not asked for yet would take what the one before them waits for, again and again."""
    one = engine(num_blocks=16)
    taken = one.scheduler.kv_cache_manager.block_pool.get_new_blocks(8)
    script.answers["big"] = ASK_AGAIN
    one.add("big", prompt(130, 2), max_tokens=2)  # 9 blocks; 7 are free
    one.step()
    script.answers["big"] = None
    for i in range(12):
        script.answers[f"small {i}"] = Hit(16, None)
        one.add(f"small {i}", prompt(17, 10 + i), max_tokens=2)
    one.add("loads", prompt(33, 3), max_tokens=2)
    tracked = one.connector._scheduler
    tracked._loaded.add("of another request")
    for _ in range(10):
        one.step()
    assert not script.tasks, "a later request has got blocks"
    tracked._loaded.clear()
    one.scheduler.kv_cache_manager.block_pool.free_blocks(taken)
    one.run(until=lambda: "big" in one.finish_reasons)
    for _ in range(40):
        one.step()
        for task in script.tasks:
            if not task.ended:
                fill(one, task, prompt(17, 10 + int(task.request_id.split()[1])))
                task.done()
    one.run()
    assert one.outputs["big"] == one.expected(prompt(130, 2), 2)
    one.check_at_rest()


def test_what_has_loaded_and_finds_no_room_keeps_nobody_waiting(engine, script):
    one = engine(num_blocks=20)
    pool = one.scheduler.kv_cache_manager.block_pool
    script.answers["waits"] = ASK_AGAIN
    one.add("waits", prompt(100, 2), max_tokens=2)
    script.answers["loads"] = Hit(64, None)
    one.add("loads", prompt(200), max_tokens=3)
    one.run(until=lambda: script.tasks)
    taken = pool.get_new_blocks(10)
    script.answers["waits"] = None
    fill(one, script.tasks[0], prompt(200))
    script.tasks[0].done()
    for _ in range(6):
        one.step()
    assert not one.scheduler.running, "there was room"
    pool.free_blocks(taken[:3])  # for `waits`; not for all of `loads`
    for _ in range(8):
        one.step()
    assert "waits" in one.finish_reasons or HOLDERS_FIRST
    pool.free_blocks(taken[3:])
    one.run()
    assert one.outputs["waits"] == one.expected(prompt(100, 2), 2)
    assert one.outputs["loads"] == one.expected(prompt(200), 3)
    one.check_at_rest()


def test_what_the_local_prefix_cache_has_is_not_loaded(engine, script):
    one = engine()
    one.add("first", prompt(64), max_tokens=1)
    one.run()
    script.answers["a"] = Hit(80, None)
    one.add("a", prompt(64) + prompt(30, 5), max_tokens=2)
    one.run(until=lambda: script.tasks)
    task = script.tasks[0]
    assert (task.first_block, len(task.blocks[0])) == (4, 1)
    fill(one, task, prompt(64) + prompt(30, 5))
    task.done()
    one.run()
    assert one.outputs["a"] == one.expected(prompt(64) + prompt(30, 5), 2)
    one.check_at_rest()


def test_a_hit_that_the_local_cache_covers_is_given_up(engine, script):
    one = engine()
    one.add("first", prompt(64), max_tokens=1)
    one.run()
    script.answers["a"] = Hit(32, None)
    one.add("a", prompt(64) + prompt(30, 5), max_tokens=2)
    one.run()
    assert ["a"] in script.named("forget") and not script.tasks
    assert one.outputs["a"] == one.expected(prompt(64) + prompt(30, 5), 2)


@pytest.mark.parametrize("bad", [Hit(51), Hit(17), Hit(10**9)], ids=["past-the-prompt", "within-a-block", "absurd"])
def test_a_hit_that_cannot_be_is_ignored(engine, script, bad):
    one = engine()
    script.answers["a"] = bad
    one.add("a", prompt(50), max_tokens=2)
    one.run()
    assert not script.tasks and one.outputs["a"] == one.expected(prompt(50), 2)


def test_a_prompt_of_one_token_is_never_asked_for(engine, script):
    one = engine()
    script.answers["a"] = Hit(1)
    one.add("a", [5], max_tokens=3)
    one.run()
    assert not script.named("find") and one.outputs["a"] == one.expected([5], 3)


def test_a_request_that_must_compute_its_prompt_is_not_loaded(engine, script):
    one = engine()
    script.answers["a"] = Hit(48)
    one.add("a", prompt(50), max_tokens=2, prompt_logprobs=1)
    one.step()
    assert not script.tasks


# ---- failed loads


@RUNNERS
@pytest.mark.parametrize("failed", [None, [0], [1], [2], [3], [0, 3], [1, 2]])
def test_failed_blocks_are_computed_again(engine, script, failed, runner):
    one = engine(model_runner=runner)
    script.answers["a"] = Hit(50, None)
    one.add("a", prompt(50), max_tokens=6)
    one.run(until=lambda: script.tasks)
    task = script.tasks[0]
    fill(one, task, prompt(50))
    for i in range(4) if failed is None else failed:
        for words in one.workers[0].words:
            words[task.blocks[0][i]] = -1
    task.fail(RuntimeError("on purpose"), None if failed is None else np.asarray(failed))
    one.run()
    assert one.outputs["a"] == one.expected(prompt(50), 6)
    assert script.named("load_ended") == [["a", False]]
    assert len(script.tasks) == 1, "a failed load was tried again"
    one.check_at_rest()


def test_under_the_policy_fail_the_request_ends_in_an_error(engine, script):
    one = engine(policy="fail")
    script.answers["a"] = Hit(50, None)
    one.add("a", prompt(50), max_tokens=6)
    one.run(until=lambda: script.tasks)
    script.tasks[0].fail(RuntimeError("on purpose"), np.asarray([2]))
    one.run()
    assert one.finish_reasons["a"] == "error" and one.outputs["a"] == []
    one.check_at_rest()


@pytest.mark.parametrize("where", ["raise", "raise in load"])
def test_an_authors_exception_fails_the_load_not_the_engine(engine, script, where):
    one = engine()
    script.answers["a"] = Hit(48, where)
    one.add("a", prompt(50), max_tokens=6)
    one.run()
    assert one.outputs["a"] == one.expected(prompt(50), 6)
    one.check_at_rest()


def test_a_find_that_raises_costs_only_the_hit(engine, script):
    one = engine()
    script.answers["a"] = lambda: 1 / 0
    one.add("a", prompt(50), max_tokens=2)
    one.run()
    assert one.outputs["a"] == one.expected(prompt(50), 2)


def test_a_load_past_its_deadline_expires_and_can_write_no_more(engine, script):
    from kvsdk.errors import TaskEnded

    now = [0.0]
    one = engine()
    one.workers[0].connector._worker._clock = lambda: now[0]
    script.answers["a"] = Hit(48, None)
    one.add("a", prompt(50), max_tokens=3)
    one.run(until=lambda: script.tasks)
    now[0] = 1000.0
    one.run()
    assert one.outputs["a"] == one.expected(prompt(50), 3)
    with pytest.raises(TaskEnded), script.tasks[0].using():
        pass
    with pytest.raises(TaskEnded):
        script.tasks[0].done()
    one.check_at_rest()


# ---- tensor parallelism


def test_a_load_ends_when_every_rank_has_it(engine, script):
    one = engine(world_size=2)
    script.answers["a"] = Hit(48, None)
    one.add("a", prompt(50), max_tokens=4)
    one.run(until=lambda: len(script.tasks) == 2)
    for rank, task in enumerate(script.tasks):
        for _ in range(5):
            one.step()
        assert not one.outputs["a"] and not script.named("load_ended")
        fill(one, task, prompt(50), rank)
        task.done()
    one.run()
    assert one.outputs["a"] == one.expected(prompt(50), 4)
    assert script.named("load_ended") == [["a", True]]
    one.check_at_rest()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_one_rank_that_fails_fails_the_block_on_all(engine, script, first, policy):
    one = engine(world_size=2, policy=policy)
    script.answers["a"] = Hit(48, None)
    one.add("a", prompt(50), max_tokens=4)
    one.run(until=lambda: len(script.tasks) == 2)
    for rank in (first, 1 - first):
        if script.tasks[rank].ended:  # the request ended with the first failure, and its loads with it
            assert policy == "fail" and rank == 1
            continue
        fill(one, script.tasks[rank], prompt(50), rank)
        if rank == 0:
            script.tasks[0].fail(RuntimeError("on purpose"), np.asarray([1]))
        else:
            script.tasks[1].done()
        for _ in range(3):
            one.step()
    one.run()
    if policy == "recompute":
        assert one.outputs["a"] == one.expected(prompt(50), 4)
        assert script.named("load_ended") == [["a", False]]
    else:
        assert one.finish_reasons["a"] == "error"
    one.check_at_rest()


# ---- aborts


@ASYNC
@pytest.mark.parametrize("ends", ["done", "fail", "nothing"])
def test_abort_while_loading_gives_the_blocks_back_once(engine, script, ends, in_flight):
    one = engine(async_scheduling=in_flight)
    script.answers["a"] = Hit(48, None)
    one.add("a", prompt(50), max_tokens=4)
    one.run(until=lambda: script.tasks)
    task = script.tasks[0]
    one.abort("a")
    if ends == "done":
        task.done()
    elif ends == "fail":
        task.fail(RuntimeError("on purpose"))
    one.run()
    assert task.ended and script.named("load_ended") == [["a", False]]
    one.check_at_rest()


def test_abort_while_asking_forgets(engine, script):
    one = engine()
    script.answers["a"] = ASK_AGAIN
    one.add("a", prompt(50), max_tokens=4)
    one.step()
    one.abort("a")
    one.run()
    assert script.named("forget") == [["a"]]
    one.check_at_rest()


def test_abort_before_blocks_are_there_forgets(engine, script):
    one = engine(num_blocks=6)
    one.add("big", prompt(60, 3), max_tokens=10)
    one.step()
    script.answers["a"] = Hit(48, None)
    one.add("a", prompt(50), max_tokens=4)
    one.step()
    assert script.named("find") and not script.tasks
    one.abort("a")
    one.run()
    assert ["a"] in script.named("forget")
    one.check_at_rest()


@RUNNERS
def test_abort_while_running(engine, script, runner):
    one = engine(model_runner=runner)
    script.keep.add("a")
    one.add("a", prompt(200), max_tokens=50)
    for _ in range(6):
        one.step()
    one.abort("a")
    one.run()
    assert not script.named("finished"), "an aborted prompt was offered"
    one.check_at_rest()


def test_preempted_requests_are_not_looked_up_again(engine, script):
    one = engine(num_blocks=10)
    for i in range(3):
        script.answers[f"r{i}"] = None
        one.add(f"r{i}", prompt(40, i), max_tokens=40)
    one.run()
    assert len(script.named("find")) <= 3
    for i in range(3):
        assert one.outputs[f"r{i}"] == one.expected(prompt(40, i), 40)


# ---- kept blocks


@RUNNERS
@ASYNC
def test_kept_blocks_stay_until_given_back(engine, script, runner, in_flight):
    one = engine(model_runner=runner, async_scheduling=in_flight, max_num_batched_tokens=32)
    script.keep.add("a")
    free = one.num_free_blocks
    one.add("a", prompt(150), max_tokens=1)
    one.run(until=lambda: "a" in one.finish_reasons)
    assert one.params["a"] == {"kept": "a"}
    kept = script.holds["a"]
    assert len(kept) == 10
    for i in range(30):  # the rest of the pool is written over and over
        one.add(f"other{i}", prompt(100, 100 + i), max_tokens=2)
    one.run(until=lambda: not one.unfinished)
    assert one.num_free_blocks == free - 10
    from kvsdk.vllm.harness import chain, content

    states = chain(prompt(150))
    for index, block in enumerate(kept):
        part = states[index * BS : index * BS + BS]
        assert np.array_equal(one.workers[0].words[0][block, :, : len(part), :], content(part, 0, 0).transpose(1, 0, 2))
    assert one.scheduler.has_requests(), "the engine would sleep while blocks are held"
    script.schedulers[0].holds.give_back("a")
    one.run()
    assert script.named("let_go") == [["a"]]
    one.check_at_rest()


def test_a_hold_ends_once(engine, script):
    one = engine()
    script.keep.add("a")
    one.add("a", prompt(50), max_tokens=1)
    one.run(until=lambda: "a" in one.finish_reasons)
    for _ in range(3):
        script.schedulers[0].holds.give_back("a")
    script.schedulers[0].holds.give_back("never")
    one.run()
    assert script.named("let_go") == [["a"]]
    one.check_at_rest()


def test_a_block_that_two_holds_share_counts_once_and_stays_for_both(engine, script):
    one = engine()
    script.keep |= {"a", "b"}
    one.add("a", prompt(64), max_tokens=1)
    one.run(until=lambda: "a" in one.finish_reasons)
    one.add("b", prompt(64) + prompt(16, 9), max_tokens=1)
    one.run(until=lambda: "b" in one.finish_reasons)
    assert one.connector._scheduler.num_held_blocks == 5
    holds = script.schedulers[0].holds
    holds.give_back("a")
    one.step()
    assert one.connector._scheduler.num_held_blocks == 5
    holds.give_back("b")
    one.run()
    assert one.connector._scheduler.num_held_blocks == 0
    one.check_at_rest()


def test_holds_yield_before_a_new_request_must_wait(engine, script):
    one = engine(num_blocks=16)
    for i in range(3):
        script.keep.add(f"k{i}")
        one.add(f"k{i}", prompt(64, i), max_tokens=1)
        one.run(until=lambda i=i: f"k{i}" in one.finish_reasons)
    assert one.num_free_blocks == 15 - 12
    one.add("a", prompt(100, 50), max_tokens=1)
    one.step()
    assert [r.request_id for r in one.scheduler.running] == ["a"], "the request had to wait for held blocks"
    assert "k2" in script.holds, "more was given up than needed"
    script.schedulers[0].give_up(99)
    one.run()
    one.check_at_rest()


def test_holds_yield_before_a_running_request_is_preempted(engine, script):
    one = engine(num_blocks=16)
    script.keep |= {"k0", "k1"}
    for i in range(2):
        one.add(f"k{i}", prompt(64, i), max_tokens=1)
        one.run(until=lambda i=i: f"k{i}" in one.finish_reasons)
    for i in range(2):
        one.add(f"a{i}", prompt(40, 10 + i), max_tokens=60)
    preemptions = 0
    while one.unfinished:
        one.step()
        preemptions += sum(r.num_preemptions for r in one.scheduler.requests.values())
    assert not preemptions, "vLLM preempted a request while nobody read the held blocks"
    for i in range(2):
        assert one.outputs[f"a{i}"] == one.expected(prompt(40, 10 + i), 60)
    script.schedulers[0].give_up(99)
    one.run()
    one.check_at_rest()


def test_a_one_token_prompt_is_never_kept(engine, script):
    one = engine()
    script.keep.add("a")
    one.add("a", [7], max_tokens=1)
    one.run()
    assert not script.named("finished")


def test_reset_prefix_cache_asks_the_connector(engine, script):
    one = engine()
    assert one.scheduler.reset_prefix_cache(reset_connector=True)


# ---- saves


@RUNNERS
@ASYNC
def test_blocks_are_saved_chunk_by_chunk_and_found_by_another_engine(engine, script, runner, in_flight):
    one = engine("StoreConnector", model_runner=runner, async_scheduling=in_flight, max_num_batched_tokens=40)
    one.add("a", prompt(150), max_tokens=3)
    one.run()
    assert len(STORE) == 10
    other = engine("StoreConnector", num_blocks=32, model_runner=runner)
    other.add("x", prompt(150), max_tokens=3)
    other.run()
    assert other.outputs["x"] == other.expected(prompt(150), 3) == one.outputs["a"]
    assert other.hits["x"][0] == 149
    for e in (one, other):
        e.check_at_rest()


@RUNNERS
@ASYNC
def test_saves_outlive_preemption_and_the_request(engine, script, runner, in_flight):
    one = engine("StoreConnector", num_blocks=20, model_runner=runner, async_scheduling=in_flight)
    StoreWorker.delay_saves = True
    for i in range(3):
        one.add(f"r{i}", prompt(60, i), max_tokens=40)
    steps = 0
    while one.unfinished and steps < 3000:
        one.step()
        steps += 1
        if steps % 7 == 0 and StoreWorker.waiting:
            worker, task = StoreWorker.waiting.pop(0)
            worker.finish(task)
    while StoreWorker.waiting:
        worker, task = StoreWorker.waiting.pop(0)
        worker.finish(task)
        one.step()
    one.run()
    one.check_at_rest()
    StoreWorker.delay_saves = False
    other = engine("StoreConnector", num_blocks=64)
    for i in range(3):
        other.add(f"x{i}", prompt(60, i), max_tokens=5)
    other.run()
    for i in range(3):
        assert other.outputs[f"x{i}"] == other.expected(prompt(60, i), 5)
        assert other.hits[f"x{i}"][0] == 59


def test_salted_prompts_do_not_share(engine, script):
    one = engine("StoreConnector")
    one.add("a", prompt(64), max_tokens=1, salt="one")
    one.run()
    other = engine("StoreConnector")
    other.add("b", prompt(64), max_tokens=1, salt="two")
    other.add("c", prompt(64), max_tokens=1, salt="one")
    other.run()
    assert other.hits["b"][0] == 0 and other.hits["c"][0] == 63


def test_saves_are_counted_over_ranks(engine, script):
    one = engine("StoreConnector", world_size=2)
    one.add("a", prompt(50), max_tokens=1)
    one.run()
    assert len(STORE) == 8
    one.check_at_rest()
    other = engine("StoreConnector", world_size=2)
    other.add("b", prompt(50), max_tokens=4)
    other.run()
    assert other.outputs["b"] == other.expected(prompt(50), 4) and other.hits["b"][0] == 49
