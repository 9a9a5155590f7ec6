"""PyNcclConnector between vLLM's real schedulers, over real ZMQ and real pipes; both servers live in this process."""

import logging
import time

import numpy as np
import pytest

from kvsdk.connectors.pynccl.fetching import Fetcher
from kvsdk.connectors.pynccl.worker import PyNcclWorker
from kvsdk.demo.servers import free_port
from kvsdk.errors import ConfigError
from kvsdk.kernels import torch_blocks

pytestmark = pytest.mark.compat

BS = 16


def prompt(n, seed=0):
    return np.random.default_rng(seed).integers(1, 900, n).tolist()


@pytest.fixture
def pair(engine):
    """A prefill and a decode engine that have found each other."""

    def make(
        prefill=None, decode=None, extra=None, policy="recompute", connector="PyNcclConnector", wait=True, **kwargs
    ):
        port = free_port()
        extra = {"kv_port": port, **(extra or {})}
        p = engine(connector, role="kv_producer", extra=extra, policy=policy, **{**kwargs, **(prefill or {})})
        d = engine(connector, role="kv_consumer", extra=extra, policy=policy, **{**kwargs, **(decode or {})})
        if wait:
            assert client(d).wait_ready(5.0), client(d).peers()
        return p, d

    return make


def half(engine):
    return engine.connector._scheduler._half


def client(engine):
    return half(engine)._client


def buffer(engine):
    return half(engine)._buffer


def prefill(engine, request_id, tokens, **more):
    engine.add(request_id, tokens, max_tokens=1, **more)
    engine.run(until=lambda: request_id in engine.finish_reasons)
    return engine.params[request_id]


def decode(engine, request_id, tokens, max_tokens=8, others=(), **more):
    engine.add(request_id, tokens, max_tokens=max_tokens, **more)
    run_all(engine, *others, until=lambda: request_id in engine.finish_reasons)
    assert engine.outputs[request_id] == engine.expected(tokens, max_tokens, more.get("salt"))
    return engine.hits[request_id][0]


def run_all(*engines, until, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not until():
        for one in engines:
            one.step()
        time.sleep(0.0005)
        assert time.monotonic() < deadline, [list(one.scheduler.requests) for one in engines]


def at_rest(*engines, seconds=10.0):
    run_all(
        *engines,
        until=lambda: not any(one.scheduler.has_requests() or one._in_flight for one in engines),
        seconds=seconds,
    )
    for one in engines:
        one.check_at_rest()
        if buffer(one) is not None:
            assert buffer(one).blocks_held == 0


def at_rest_without_offers(*engines):
    """As `at_rest`, but for offers that nobody was to load."""
    buffers = [buffer(one) for one in engines if buffer(one) is not None]

    def all_evicted():
        for one in buffers:
            one.evict_all_unclaimed()
        return not any(one.num_offers for one in buffers)

    # Again and again: what a consumer has given up is claimed until the producer hears of it, and unclaimed from then.
    run_all(*engines, until=all_evicted, seconds=10.0)
    at_rest(*engines)


@pytest.mark.parametrize("n", [2, BS - 1, BS, BS + 1, 3 * BS, 333])
@pytest.mark.parametrize("by", ["prompt", "params"])
def test_a_prompt_comes_over_whole(pair, n, by):
    p, d = pair()
    params = prefill(p, "cmpl-a-0-xyz", prompt(n), params={"do_remote_decode": True} if by == "params" else None)
    assert params["do_remote_prefill"] is True
    loaded = decode(d, "cmpl-b-1-uvw", prompt(n), others=[p], params=params if by == "params" else None)
    assert loaded == n - 1  # vLLM computes the last token again, to sample from it
    at_rest(p, d)


@pytest.mark.parametrize("kind", ["peer", "shm", "gloo"])
def test_prompts_come_over_whichever_pipe_carries_them(pair, kind):
    """Many messages."""
    p, d = pair(layers=2, extra={"pipe": kind, "staging_bytes": 1})
    for i in range(3):
        prefill(p, f"a{i}", prompt(333, i))
        assert decode(d, f"b{i}", prompt(333, i), others=[p]) == 332
    assert worker_kinds(d) == {kind}
    at_rest(p, d)


def worker_kinds(engine):
    fetchers = engine.workers[0].connector._half._fetchers.values()
    return {"peer" if fetcher._window is not None else fetcher._pipe.kind for fetcher in fetchers}


def test_a_one_token_prompt_is_computed_where_it_is_asked(pair):
    p, d = pair()
    assert prefill(p, "a", [5]) is None
    assert decode(d, "b", [5]) == 0
    at_rest(p, d)


@pytest.mark.parametrize("in_flight", [False, True], ids=["one-step", "two-in-flight"])
@pytest.mark.parametrize("runner", [1, 2], ids=["runner-1", "runner-2"])
def test_many_at_once_in_small_pools(pair, in_flight, runner):
    p, d = pair(
        prefill={"num_blocks": 60},
        decode={"num_blocks": 24, "max_num_seqs": 4},
        async_scheduling=in_flight,
        model_runner=runner,
    )
    shared = prompt(40, 99)
    prompts = {f"r{i}": (shared if i % 3 == 0 else []) + prompt(1 + 17 * i % 120, i) for i in range(20)}
    for name, tokens in prompts.items():
        p.add(name, tokens, max_tokens=1)
    sent = set()

    def pump():
        for name in prompts:
            if name in p.finish_reasons and name not in sent:
                sent.add(name)
                d.add(f"d-{name}", prompts[name], max_tokens=20)
        return len(sent) == len(prompts) and all(f"d-{name}" in d.finish_reasons for name in prompts)

    run_all(p, d, until=pump, seconds=60)
    for name, tokens in prompts.items():
        assert d.outputs[f"d-{name}"] == d.expected(tokens, 20)
    assert sum(d.hits[f"d-{name}"][0] for name in prompts) > 0.5 * sum(map(len, prompts.values()))
    at_rest_without_offers(p, d)


def test_only_what_is_missing_comes_over(pair):
    p, d = pair()
    decode(d, "warm", prompt(64))
    prefill(p, "a", prompt(64) + prompt(50, 1))
    assert decode(d, "b", prompt(64) + prompt(50, 1), others=[p]) == 113
    assert d.stats["loaded_blocks"] == 4
    at_rest(p, d)


def test_a_hit_in_the_prefill_servers_own_cache_comes_over_as_well(pair):
    p, d = pair()
    prefill(p, "a", prompt(64))
    prefill(p, "b", prompt(64) + prompt(20, 1))
    assert decode(d, "c", prompt(64) + prompt(20, 1), others=[p]) == 83
    assert decode(d, "d", prompt(64), others=[p]) == 63
    at_rest(p, d)


def test_a_shorter_prefix_of_an_offer_is_shared_and_leaves_it(pair):
    p, d = pair()
    prefill(p, "a", prompt(100))
    assert decode(d, "b", prompt(48) + prompt(30, 5), others=[p]) == 48
    assert buffer(p).num_offers == 1
    assert decode(d, "c", prompt(100), others=[p]) == 99
    at_rest(p, d)


def test_salted_prompts_are_found_by_their_salt_only(pair):
    p, d = pair()
    prefill(p, "a", prompt(48), salt="one")
    assert decode(d, "b", prompt(48), salt="two", others=[p]) == 0
    assert decode(d, "c", prompt(48), salt="one", others=[p]) == 47
    at_rest(p, d)


def test_two_tensor_parallel_ranks(pair):
    p, d = pair(world_size=2)
    prefill(p, "a", prompt(75))
    assert decode(d, "b", prompt(75), others=[p]) == 74
    at_rest(p, d)


def test_two_producers_and_two_consumers(engine):
    ports = [free_port(), free_port()]
    producers = [f"127.0.0.1:{port}" for port in ports]
    ps = [engine("PyNcclConnector", role="kv_producer", extra={"kv_port": port}) for port in ports]
    ds = [engine("PyNcclConnector", role="kv_consumer", extra={"producers": producers}) for _ in range(2)]
    for d in ds:
        assert client(d).wait_ready(5.0)
    for i in range(8):
        prefill(ps[i % 2], f"a{i}", prompt(40 + i, i))
        assert decode(ds[(i // 2) % 2], f"b{i}", prompt(40 + i, i), others=ps) == 39 + i
    at_rest(*ps, *ds)


def test_kv_ip_may_be_a_name(pair):
    p, d = pair(extra={"kv_ip": "localhost"})
    prefill(p, "a", prompt(50))
    assert decode(d, "b", prompt(50), others=[p]) == 49
    at_rest(p, d)


def test_a_server_that_is_both(engine):
    port = free_port()
    one = engine("PyNcclConnector", role="kv_both", extra={"kv_port": port})
    two = engine("PyNcclConnector", role="kv_both", extra={"kv_port": 0, "producers": [f"127.0.0.1:{port}"]})
    assert client(two).wait_ready(5.0)
    params = prefill(one, "a", prompt(50), params={"do_remote_decode": True})
    assert decode(two, "b", prompt(50), params=params, others=[one]) == 49
    params = prefill(two, "c", prompt(50, 3), params={"do_remote_decode": True})
    assert decode(one, "d", prompt(50, 3), params=params, others=[two]) == 49  # no list of producers: any address goes
    at_rest_without_offers(one, two)


# ---- what goes wrong


def test_an_offer_nobody_claims_ends_with_its_lease(pair):
    p, _ = pair(extra={"lease": 0.3})
    prefill(p, "a", prompt(100))
    assert buffer(p).blocks_held == 7 and p.num_free_blocks == 63 - 7
    at_rest(p, seconds=3)


def test_unclaimed_offers_yield_before_vllm_preempts_or_stalls(pair):
    p, d = pair(prefill={"num_blocks": 20})
    for i in range(12):
        prefill(p, f"a{i}", prompt(100, i))  # each takes 7 of 19 blocks and leaves them as an offer
        assert not any(r.num_preemptions for r in p.scheduler.requests.values())
    assert buffer(p).num_offers == 2
    assert decode(d, "last", prompt(100, 11), others=[p]) == 99
    assert decode(d, "first", prompt(100, 0), others=[p]) == 0
    at_rest_without_offers(p, d)


def test_an_offer_past_kv_buffer_size_is_refused_with_the_size_it_needs(pair, caplog):
    block = 2 * 2 * BS * 4 * 4  # layers x heads x tokens x content x float32
    p, d = pair(extra={"kv_buffer_size": 3 * block})
    with caplog.at_level(logging.WARNING):
        assert prefill(p, "a", prompt(100)) is None
    assert f"kv_buffer_size to at least {7 * block}" in caplog.text
    assert decode(d, "b", prompt(100), others=[p]) == 0
    prefill(p, "c", prompt(48, 1))
    assert decode(d, "d", prompt(48, 1), others=[p]) == 47
    at_rest(p, d)


def test_a_client_that_goes_away_while_loading_leaves_nothing(pair, monkeypatch):
    p, d = pair()
    slow = Fetcher._go_on
    monkeypatch.setattr(Fetcher, "_go_on", lambda self, read: (time.sleep(0.3), slow(self, read))[1])
    prefill(p, "a", prompt(100))
    d.add("b", prompt(100), max_tokens=5)
    run_all(p, d, until=lambda: d.workers[0].connector._worker.num_open)
    d.abort("b")
    at_rest(p, d)


class Flipped:
    """A pipe that flips one bit of the first bytes it receives."""

    def __init__(self, pipe, times):
        self._pipe, self._times = pipe, times

    def recv_row(self, sizes, drain, deadline):
        def flip(i, part):
            if self._times:
                self._times.pop()
                part[part.numel() // 3] ^= 4
            return drain(i, part)

        self._pipe.recv_row(sizes, flip, deadline)

    def __getattr__(self, name):
        return getattr(self._pipe, name)


@pytest.fixture(params=["peer", "shm"])
def flipped(request, monkeypatch):
    """Flips a bit of what is read first; also of what is read next, where the producer had told of the blocks ahead: a
    difference has it asked then, and they are read again."""
    times = [1, 1] if request.param == "peer" else [1]
    join, read = PyNcclWorker.join, torch_blocks.read_process

    def read_process(pid, places, nbytes, into):
        read(pid, places, nbytes, into)
        if times:
            times.pop()
            into[into.numel() // 3] ^= 4

    monkeypatch.setattr(torch_blocks, "read_process", read_process)
    monkeypatch.setattr(PyNcclWorker, "join", lambda *args: Flipped(join(*args), times))
    return request.param, times


def test_a_flipped_bit_is_a_failed_block_and_never_a_token(pair, flipped):
    kind, times = flipped
    p, d = pair(extra={"pipe": kind})
    prefill(p, "a", prompt(100))
    decode(d, "b", prompt(100), others=[p])
    assert not times[1:] if kind == "peer" else not times, "nothing was flipped"
    assert d.stats["corrupt_blocks"] == 1 and d.stats["loads_failed"] == 1
    at_rest(p, d)


def test_a_flipped_bit_under_the_policy_fail_is_an_error(pair, flipped):
    p, d = pair(policy="fail", extra={"pipe": flipped[0]})
    prefill(p, "a", prompt(100))
    d.add("b", prompt(100), max_tokens=5)
    run_all(p, d, until=lambda: "b" in d.finish_reasons)
    assert d.finish_reasons["b"] == "error" and not d.outputs["b"]
    at_rest(p, d)


def test_with_checks_off_a_flipped_bit_reaches_the_model(pair, flipped):
    from kvsdk.vllm.harness import WrongBytes

    p, d = pair(extra={"verify": False, "pipe": flipped[0]})
    prefill(p, "a", prompt(100))
    with pytest.raises(WrongBytes):
        decode(d, "b", prompt(100), others=[p])


def test_blocks_written_again_while_they_are_read_do_not_count(pair, monkeypatch):
    """The lease ends between gathering and sending: whatever was gathered is thrown away."""
    p, d = pair(extra={"pipe": "shm"})
    prefill(p, "a", prompt(100))
    p.step()  # the worker hears of the offer
    store = type(p.workers[0].connector._half._store)
    gather = store.gather
    gathered = []

    def slow(self, block_ids, *args):
        buffer(p).close()  # ends every offer at once, claimed ones too
        while p.scheduler.has_requests():
            p.step()
        for words in p.workers[0].words:
            words[block_ids] = -1
        gather(self, block_ids, *args)
        gathered.append(len(block_ids))

    monkeypatch.setattr(store, "gather", slow)
    assert decode(d, "b", prompt(100)) == 0
    assert gathered == [7] and d.stats["loads_failed"] == 1


def test_a_producer_that_dies_costs_time_not_answers(pair):
    p, d = pair()
    prefill(p, "a", prompt(100))
    prefill(p, "a2", prompt(60, 4))
    p.close()
    began = time.monotonic()
    assert decode(d, "b", prompt(100)) == 0
    assert time.monotonic() - began < 10
    assert decode(d, "c", prompt(60, 4)) == 0


def test_a_producer_that_is_replaced_is_found_again(pair, engine):
    p, d = pair()
    port = p.connector.options.kv_port
    prefill(p, "a", prompt(100))
    assert decode(d, "b", prompt(100), others=[p]) == 99
    at_rest(p)
    p.close()
    new = engine("PyNcclConnector", role="kv_producer", extra={"kv_port": port})
    deadline = time.monotonic() + 15
    while True:
        prefill(new, f"n{time.monotonic()}", prompt(50, 7))
        if decode(d, f"d{time.monotonic()}", [*prompt(50, 7), 1], others=[new]) == 48:
            break
        d.scheduler.reset_prefix_cache()
        assert time.monotonic() < deadline, client(d).peers()
    at_rest_without_offers(new, d)


def test_a_consumer_without_a_producer_computes(engine):
    d = engine("PyNcclConnector", role="kv_consumer", extra={"kv_port": free_port()})
    began = time.monotonic()
    assert decode(d, "a", prompt(100)) == 0
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("field", "prefill_args"),
    [("layout.block_size", {"block_size": 32}), ("layout", {"layers": 3}), ("model.id", {})],
    ids=["block-size", "layers", "model"],
)
def test_servers_that_differ_refuse_each_other_by_name(pair, engine, caplog, field, prefill_args):
    port = free_port()
    model = {"model_id": "another"} if field == "model.id" else {}
    with caplog.at_level(logging.WARNING):
        p = engine("PyNcclConnector", role="kv_producer", extra={"kv_port": port, **model}, **prefill_args)
        d = engine("PyNcclConnector", role="kv_consumer", extra={"kv_port": port})
        deadline = time.monotonic() + 5
        while not any(state.state == "refused" for state in client(d).peers().values()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
    assert sum(field in record.getMessage() for record in caplog.records if record.name == "kvsdk.buffer") >= 1, (
        caplog.text
    )
    prefill(p, "a", prompt(100))
    assert decode(d, "b", prompt(100)) == 0
    at_rest_without_offers(p, d)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"kv_buffer_size": 12}, "kv_buffer_size"),
        ({"kv_buffer_size": 0}, "kv_buffer_size"),
        ({"kv_bufer_size": 1e9}, "kv_buffer_size"),
        ({"kv_port": -1}, "kv_port"),
        ({"pipe": "nccl"}, "nccl"),
        ({"kv_ip": "::1"}, "kv_ip"),
        ({"kv_ip": "no-such-host.invalid"}, "kv_ip"),
        ({"kv_ip": "203.0.113.7"}, "kv_ip"),
    ],
)
def test_bad_options_end_the_start_with_one_line(engine, extra, says):
    with pytest.raises(ConfigError, match=says) as error:
        engine("PyNcclConnector", role="kv_producer", extra=extra)
    assert "\n" not in str(error.value)


def test_a_port_in_use_is_named(engine):
    port = free_port()
    engine("PyNcclConnector", role="kv_producer", extra={"kv_port": port})
    with pytest.raises(ConfigError, match=str(port)):
        engine("PyNcclConnector", role="kv_producer", extra={"kv_port": port})


def test_closing_twice_is_fine_and_bounded(pair):
    p, d = pair()
    prefill(p, "a", prompt(100))
    decode(d, "b", prompt(100), others=[p])
    began = time.monotonic()
    for one in (p, d, p, d):
        one.close()
    assert time.monotonic() - began < 10
