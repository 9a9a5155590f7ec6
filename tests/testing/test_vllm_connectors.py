"""vLLM's own connectors, and any other subclass of its base class, around the stand-in model.

Every byte that attention reads is checked, every block's owner after every step. What does not hold is a strict xfail
with its shortest history; docs/conformance.md tells them.
"""

import itertools
import pathlib
import random
import sys

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
for folder in ("testing", "contract"):
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / folder))

import connectors_on_cpu  # noqa: E402
import scripted  # noqa: E402

BS = 16
BLOCK_BYTES = 2 * BS * 2 * 4 * 4  # layers, tokens, heads, content, bytes of a float
RUNNERS = pytest.mark.parametrize("runner", [1, 2], ids=["runner-1", "runner-2"])
ASYNC = pytest.mark.parametrize("in_flight", [False, True], ids=["one-step", "two-in-flight"])
MODES = pytest.mark.parametrize(
    ("runner", "in_flight"),
    [
        pytest.param(1, False, id="runner-1-one-step"),
        pytest.param(2, True, id="runner-2-two-in-flight"),
        pytest.param(1, True, id="runner-1-two-in-flight", marks=pytest.mark.slow),
        pytest.param(2, False, id="runner-2-one-step", marks=pytest.mark.slow),
    ],
)


def prompt(n, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(1, 900) for _ in range(n)]


def config(connector, module=None, **extra):
    found = {"kv_connector": connector, "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    found["kv_connector_extra_config"] = extra
    if module is not None:
        found["kv_connector_module_path"] = module
    return found


def ours():
    return config("scripted:StoreConnector", "kvsdk.vllm.connectors")


def example(folder):
    return config("ExampleConnector", shared_storage_path=str(folder))


def offloading(capacity=60, **extra):
    more = {"spec_name": "LateSpec", "spec_module_path": "connectors_on_cpu", "offload_prompt_only": False, **extra}
    return config("OffloadingConnector", cpu_bytes_to_use=capacity * 4096, **more)


def simple(capacity=60, **extra):
    return config("SimpleOffload", "connectors_on_cpu", cpu_bytes_to_use=capacity * BLOCK_BYTES, **extra)


def direct(**extra):
    return config("Direct", "connectors_on_cpu", **extra)


def multi(*connectors):
    return config("MultiConnector", connectors=list(connectors))


SOUND = {
    "OffloadingConnector": lambda folder: offloading(),
    "OffloadingConnector-small": lambda folder: offloading(9),
    "OffloadingConnector-chunks-of-two": lambda folder: offloading(blocks_per_chunk=2),
    "SimpleCPUOffloadConnector": lambda folder: simple(),
    "SimpleCPUOffloadConnector-small": lambda folder: simple(9),
    "SimpleCPUOffloadConnector-lazy": lambda folder: simple(lazy_offload=True),
    "Multi-ours-ours": lambda folder: multi(ours(), ours()),
    "Multi-ours-SimpleCPUOffload": lambda folder: multi(ours(), simple()),
    "Multi-SimpleCPUOffload-Offloading": lambda folder: multi(simple(), offloading()),
    "direct": lambda folder: direct(),
    "direct-synchronous": lambda folder: direct(synchronous=True),
    "direct-failing": lambda folder: direct(fail_every=2),
}
KINDS = pytest.mark.parametrize("kind", SOUND)
ROOMY = [kind for kind in SOUND if not kind.endswith(("small", "lazy"))]  # these load whatever was saved


@pytest.fixture
def engine(tmp_path):
    """Makes engines, audited after every step; closes them at the end."""
    from kvsdk.vllm.harness import Engine

    scripted.reset()
    connectors_on_cpu.Direct.stored.clear()
    connectors_on_cpu.Direct.hooks.clear()
    made = []

    def make(kind, audit=True, **options):
        chosen = SOUND[kind](tmp_path) if isinstance(kind, str) else kind
        one = Engine(chosen, audit=audit, **options)
        one.loads = 0
        allocated = one.connector.update_state_after_alloc

        def count(request, blocks, num_external_tokens):
            one.loads += num_external_tokens > 0
            return allocated(request, blocks, num_external_tokens)

        one.connector.update_state_after_alloc = count
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()


def forget(one):
    """Empty vLLM's own prefix cache, so that only the connector can know a prompt."""
    one.run()
    assert one.scheduler.kv_cache_manager.reset_prefix_cache()


def check(one, asked):
    one.run(max_steps=3000)
    for request_id, (tokens, count, salt) in asked.items():
        if one.finish_reasons[request_id] != "abort":
            assert one.outputs[request_id] == one.expected(tokens, count, salt), request_id
    one.check_at_rest()


# ---- the harness drives each hook when vLLM does


@RUNNERS
@pytest.mark.parametrize("synchronous", [True, False], ids=["synchronous", "asynchronous"])
def test_loads_that_attention_reads_start_before_it_and_others_after(engine, runner, synchronous):
    one = engine(direct(synchronous=synchronous), model_runner=runner)
    hooks = connectors_on_cpu.Direct.hooks
    one.add("a", prompt(40), max_tokens=1)
    forget(one)
    one.add("b", prompt(40), max_tokens=1)
    hooks.clear()
    layers = ["wait_for_layer_load", "save_kv_layer"] * 2
    one.run(until=lambda: "save_kv_layer" in hooks)
    forward = hooks[hooks.index("wait_for_layer_load") - 1 :] if synchronous else hooks[-6:]
    from vllm.v1.core.sched.output import SchedulerOutput

    before = synchronous or not hasattr(SchedulerOutput, "has_sync_kv_loads")
    assert one.loads == 1
    assert forward == [
        "start_load_kv" if before else layers[0],
        *(layers if before else [*layers[1:], "start_load_kv"]),
        "wait_for_save",
    ]
    check(one, {"b": (prompt(40), 1, None)})


# ---- what holds for all of these


@KINDS
@MODES
def test_prompts_in_chunks_are_answered_and_found_again(engine, kind, runner, in_flight):
    one = engine(kind, model_runner=runner, async_scheduling=in_flight)
    asked = {}
    for again in range(2):
        for n in (1, 2, 15, 16, 17, 48, 49, 200):
            asked[f"{again}-{n}"] = (prompt(n, n), 7, None)
            one.add(f"{again}-{n}", prompt(n, n), max_tokens=7)
        forget(one)
    check(one, asked)
    assert one.loads or kind not in ROOMY


@KINDS
@MODES
def test_prompts_that_begin_alike_share_what_was_saved(engine, kind, runner, in_flight):
    one = engine(kind, model_runner=runner, async_scheduling=in_flight)
    asked = {}
    for i, (n, own) in enumerate([(64, 0), (64, 9), (48, 30), (33, 1), (80, 20)]):
        tokens = prompt(80)[:n] + prompt(own, i)
        asked[f"r{i}"] = (tokens, 4, None)
        one.add(f"r{i}", tokens, max_tokens=4)
        forget(one)
    check(one, asked)
    assert one.loads or kind not in ROOMY


@KINDS
@MODES
def test_preempted_requests_resume(engine, kind, runner, in_flight):
    one = engine(kind, num_blocks=14, model_runner=runner, async_scheduling=in_flight)
    asked = {f"r{i}": (prompt(40, i), 40, None) for i in range(4)}
    for request_id, (tokens, count, _) in asked.items():
        one.add(request_id, tokens, max_tokens=count)
    preempted = 0
    while one.unfinished:
        one.step()
        preempted += sum(request.num_preemptions for request in one.scheduler.requests.values())
    assert preempted, "the pool was not small enough to preempt"
    check(one, asked)


@KINDS
@MODES
def test_an_abort_in_any_state_leaves_nothing(engine, kind, runner, in_flight):
    one = engine(kind, model_runner=runner, async_scheduling=in_flight)
    one.add("first", prompt(100), max_tokens=1)
    forget(one)
    for steps in range(12):
        one.add(f"r{steps}", prompt(100), max_tokens=5)
        for _ in range(steps):
            one.step()
        one.abort(f"r{steps}")
        forget(one)
        one.check_at_rest()
    one.add("last", prompt(100), max_tokens=5)
    check(one, {"last": (prompt(100), 5, None)})


@KINDS
@RUNNERS
def test_a_salt_keeps_requests_apart(engine, kind, runner):
    one = engine(kind, model_runner=runner)
    asked = {salt: (prompt(40), 3, salt) for salt in "xyz"}
    for salt in asked:
        one.add(salt, prompt(40), max_tokens=3, salt=salt)
        forget(one)
    check(one, asked)
    assert not one.loads


@KINDS
@ASYNC
def test_two_ranks(engine, kind, in_flight):
    one = engine(kind, world_size=2, async_scheduling=in_flight)
    for request_id in "ab":
        one.add(request_id, prompt(60), max_tokens=4)
        forget(one)
    check(one, {request_id: (prompt(60), 4, None) for request_id in "ab"})
    assert one.loads or kind not in ROOMY


def churn(one, seed):
    """A random history of 300 events: add, abort, step, forget."""
    rng = random.Random(seed)
    asked = {}
    for i in range(300):
        chance = rng.random()
        if chance < 0.15 and len(one.unfinished) < 6:
            tokens = prompt(120, rng.randrange(3))[: rng.choice([1, 15, 16, 17, 32, 33, 47, 48, 49, 64, 65, 100])]
            if rng.random() < 0.3:
                tokens += prompt(rng.randrange(1, 40), i)
            asked[f"r{i}"] = (tokens, rng.choice([1, 2, 5, 20, 40]), rng.choice([None, "x"]))
            one.add(f"r{i}", tokens, max_tokens=asked[f"r{i}"][1], salt=asked[f"r{i}"][2])
        elif chance < 0.18 and one.unfinished:
            one.abort(rng.choice(one.unfinished))
        elif chance < 0.22:
            one.scheduler.kv_cache_manager.reset_prefix_cache()
        else:
            one.step()
    check(one, asked)


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))]


@pytest.mark.parametrize("seed", SEEDS)
@KINDS
def test_random_histories(engine, kind, seed):
    for i, (runner, in_flight) in enumerate(itertools.product((1, 2), (False, True))):
        one = engine(
            kind, num_blocks=14 + 6 * (seed % 3), max_num_seqs=4, model_runner=runner, async_scheduling=in_flight
        )
        churn(one, 4 * seed + i)


# ---- delayed frees and failed loads of a connector that is vLLM's own subclass


@ASYNC
def test_a_delayed_free_comes_back_when_the_last_connector_has_reported(engine, in_flight):
    one = engine(multi(direct(), direct(seed=3)), async_scheduling=in_flight)
    one.add("a", prompt(64), max_tokens=1)
    one.run(until=lambda: "a" in one.finish_reasons)
    assert "a" in one.scheduler.requests, "the free was not delayed"
    check(one, {"a": (prompt(64), 1, None)})


@RUNNERS
@ASYNC
def test_a_load_that_failed_as_a_whole_is_computed(engine, runner, in_flight):
    one = engine(direct(fail_every=1), model_runner=runner, async_scheduling=in_flight)
    for request_id in "ab":
        one.add(request_id, prompt(64), max_tokens=3)
        forget(one)
    assert one.loads == 1
    check(one, {request_id: (prompt(64), 3, None) for request_id in "ab"})


# ---- ExampleConnector


@RUNNERS
@ASYNC
@pytest.mark.parametrize("n", [18, 32, 34, 50])
def test_example_hands_over_prompts_computed_in_one_step(engine, tmp_path, runner, in_flight, n):
    one = engine(example(tmp_path), model_runner=runner, async_scheduling=in_flight)
    for request_id in "ab":
        one.add(request_id, prompt(n), max_tokens=4)
        forget(one)
    check(one, {request_id: (prompt(n), 4, None) for request_id in "ab"})
    assert one.hits["b"][0] == (n - 2) // BS * BS


@RUNNERS
@ASYNC
def test_example_behind_one_of_ours(engine, tmp_path, runner, in_flight):
    one = engine(multi(ours(), example(tmp_path)), model_runner=runner, async_scheduling=in_flight)
    for request_id in "ab":
        one.add(request_id, prompt(50), max_tokens=4)
        forget(one)
    check(one, {request_id: (prompt(50), 4, None) for request_id in "ab"})
    assert one.loads == 1


@RUNNERS
@pytest.mark.xfail(strict=True, raises=RuntimeError, reason="stores the first chunk under the whole prompt's key")
def test_example_with_chunked_prefill(engine, tmp_path, runner):
    one = engine(example(tmp_path), model_runner=runner, max_num_batched_tokens=16)
    for request_id in "ab":
        one.add(request_id, prompt(34), max_tokens=1)
        forget(one)
    check(one, {})


@RUNNERS
@pytest.mark.xfail(strict=True, reason="the key of a prompt is its tokens; the salt is not in it")
def test_example_with_salts(engine, tmp_path, runner):
    one = engine(example(tmp_path), model_runner=runner)
    for salt in "xy":
        one.add(salt, prompt(18), max_tokens=1, salt=salt)
        forget(one)
    check(one, {})


@RUNNERS
@pytest.mark.xfail(strict=True, reason="the file's name has the layer but not the rank: one overwrites the other")
def test_example_with_two_ranks(engine, tmp_path, runner):
    one = engine(example(tmp_path), model_runner=runner, world_size=2)
    for request_id in "ab":
        one.add(request_id, prompt(18), max_tokens=1)
        forget(one)
    check(one, {})


@RUNNERS
@pytest.mark.xfail(strict=True, reason="a prompt of one token matches -16 tokens once a prompt of up to 16 was stored")
def test_example_with_prompts_of_one_token(engine, tmp_path, runner):
    one = engine(example(tmp_path), audit=False, model_runner=runner)
    for request_id in "ab":
        one.add(request_id, prompt(1), max_tokens=1)
        forget(one)
    check(one, {})


@RUNNERS
@pytest.mark.xfail(strict=True, raises=FileNotFoundError, reason="looks up 16 tokens of a prompt of 33, loads 32")
def test_example_with_a_prompt_one_past_a_block(engine, tmp_path, runner):
    one = engine(example(tmp_path), model_runner=runner)
    for n in (18, 33):
        one.add(f"r{n}", prompt(33)[:n], max_tokens=1)
        forget(one)
    check(one, {})


@RUNNERS
@pytest.mark.xfail(
    strict=True, reason="matches -16 tokens when vLLM's own cache knows more of the prompt than the files"
)
def test_example_with_a_longer_hit_in_vllm(engine, tmp_path, runner):
    one = engine(example(tmp_path), model_runner=runner)
    for i, n in enumerate((33, 18, 33)):
        one.add(f"r{i}", prompt(33)[:n], max_tokens=1)
        one.run()
    check(one, {})
