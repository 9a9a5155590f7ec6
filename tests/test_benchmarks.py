"""The benchmarks run and report what they say, at sizes that measure nothing."""

import ast
import http.client
import http.server
import itertools
import json
import os
import statistics
import threading
import time
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from benchmarks import cpu, handoff, handoff_report, hooks, idle, legs, percentile, plots, step, streams, table
from kvsdk.demo.servers import ServerFailed
from kvsdk.errors import DeadlineExceeded


def test_percentiles_are_samples():
    samples = [float(i) for i in range(1, 1001)]
    assert [percentile(samples, p) for p in (0, 50, 99, 99.9, 100)] == [1.0, 500.0, 990.0, 999.0, 1000.0]
    assert percentile([7.0], 99.9) == 7.0


def test_tables_have_aligned_columns():
    assert table([("a", "b"), ("long", 1.5)]) == "a         b\nlong  1.500"


def test_a_stopwatch_counts_the_outermost_call_of_each_step_once():
    class Connector:
        def outer(self):
            self.inner()

        def inner(self):
            time.sleep(0.01)

    connector, stopwatch = Connector(), step.Stopwatch()
    stopwatch.watch(connector, "scheduler")
    connector.outer()
    stopwatch.end_step()
    stopwatch.end_step()
    assert set(stopwatch.calls) == {("scheduler", "outer")}
    first, second = stopwatch.sums()
    assert first >= 10_000 and second == 0
    assert stopwatch.sums("worker") == [0, 0]


@pytest.mark.slow
def test_step_measures_every_state_and_loads_what_arrives(tmp_path, capsys):
    out = tmp_path / "step.json"
    assert step.main(["--steps", "30", "--running", "4", "--tokens", "200", "--count", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(result["steps"]) == ["4 decodes", "4 decodes, offers", "4 decodes, loads"]
    for figures in result["steps"].values():
        assert len(figures["sum_us"]) == 30 and min(figures["sum_us"]) > 0
    assert result["loads_done"] == 8
    assert len(result["calls"]["200"]["producer request_finished"]) == 2
    assert result["machine"]["cores"] >= 1
    assert "32 decodes" not in (printed := capsys.readouterr().out) and "4 decodes, loads: sum" in printed


def test_idle_reports_medians_by_process():
    samples = {
        "python 10": [0.1, 0.3], "VLLM::EngineCor 11": [0.2, 0.4], "VLLM::Worker 12": [0.5, 0.5],
        "cpu": [0.8, 1.2], "steps": [600.0, 602.0], "latency_ms": [10.0, 12.0, 11.0],
    }  # fmt: skip
    text = idle.report({"states": {"0": samples}, "offers": 0, "stop_seconds": 0.5})
    assert text.splitlines()[1].split() == ["0", "1.000", "0.200", "0.300", "0.500", "601", "11.000", "12.000"]


def test_idle_sees_the_cpu_time_of_a_process_group():
    before = sum(idle.cpu_seconds(os.getpgrp()).values())
    deadline = time.process_time() + 0.1
    while time.process_time() < deadline:
        pass
    assert sum(idle.cpu_seconds(os.getpgrp()).values()) - before >= 0.08


@pytest.mark.servers
@pytest.mark.slow
def test_idle_goes_through_its_states_and_the_engine_rests_in_each(tmp_path):
    result = idle.run(tmp_path, offers=2, windows=1, window=1.0, requests=2)
    assert list(result["states"]) == ["0", "1", "2"]
    assert max(max(samples["steps"]) for samples in result["states"].values()) < 50


# ---- handoff: what its samples say


def sample(way, handoff_ms, *, pools="aged", tokens=30000, fault=None):
    return {"pools": pools, "tokens": tokens, "way": way, "handoff_ms": handoff_ms, "fault": fault}


def test_handoffs_are_compared_by_their_medians_less_those_of_their_floors():
    samples = [sample("nixl", ms) for ms in (310, 320, 330)] + [sample("nixl floor", ms) for ms in (20, 20, 30)]
    samples += [sample("kvsdk", ms) for ms in (40, 50, 90)] + [sample("kvsdk floor", ms) for ms in (10, 20, 30)]
    samples += [sample("early", ms) for ms in (-5, 15, 24)] + [sample("nixl", 7.0, tokens=1024)]
    rows = {(row["tokens"], row["way"]): row for row in handoff_report.summarize(samples)}
    assert rows[30000, "nixl"]["above_floor_ms"] == 300 and rows[30000, "nixl"]["to_nixl"] is None
    assert (rows[30000, "kvsdk"]["median_ms"], rows[30000, "kvsdk"]["above_floor_ms"]) == (50, 30)
    assert rows[30000, "kvsdk"]["to_nixl"] == 0.1
    assert rows[30000, "early"]["above_floor_ms"] == -5
    assert rows[1024, "nixl"]["above_floor_ms"] is None, "it has no floor"


def test_a_sample_with_a_fault_is_shown_and_not_counted():
    samples = [
        sample("kvsdk", 10.0),
        sample("kvsdk", 1000.0, fault="not all came over"),
        sample("early", 1.0, fault="x"),
    ]
    kvsdk, early = handoff_report.summarize(samples)
    assert (kvsdk["samples"], kvsdk["faults"], kvsdk["median_ms"]) == (1, 1, 10.0)
    assert early["samples"] == 0 and "median_ms" not in early and early["above_floor_ms"] is None


def change(external=0, local=0, computed=0, **others):
    counted = dict(zip(legs.SOURCES, (external, local, computed), strict=True))
    return {f"{legs.BY_SOURCE} {source}": value for source, value in counted.items()} | others


@pytest.mark.parametrize(
    ("way", "counted", "fault"),
    [
        ("kvsdk", change(1024), None),
        ("nixl", change(1023, 0, 1), None),
        ("early", change(0, 0, 1024), "not all came over"),
        ("kvsdk", change(1008, 16, 0), "not all came over"),
        ("kvsdk", change(900, 0, 124), "not all came over"),
        ("kvsdk", change(2048), "2048 prompt tokens were counted, not 1024"),
        ("kvsdk", change(1024, kvsdk_corrupt_blocks_total=2.0), "kvsdk_corrupt_blocks_total rose by 2"),
        ("nixl", change(1024) | {"vllm:nixl_num_failed_transfers_total": 1.0}, "rose by 1"),
        ("kvsdk floor", change(0, 1008, 16), None),
        ("nixl floor", change(16, 1008, 0), "not from the decode server's cache"),
        ("nixl floor", change(0, 512, 512), "not from the decode server's cache"),
    ],
)
def test_a_sample_counts_if_its_tokens_came_from_where_they_should(way, counted, fault):
    found = handoff_report.fault_of(way, 1024, 16, counted)
    assert found is None if fault is None else fault in found


def test_mixed_requests_are_the_same_for_a_seed_and_spread_over_their_range():
    requests = handoff.mixed_requests(600, (100, 8000), (1, 64))
    assert (
        requests
        == handoff.mixed_requests(600, (100, 8000), (1, 64))
        != handoff.mixed_requests(600, (100, 8000), (1, 64), 1)
    )
    prompts, answers = zip(*requests, strict=True)
    assert 100 <= min(prompts) < 120 and 7000 < max(prompts) <= 8000
    assert 700 < statistics.median(prompts) < 1100, "half of the logarithms lie below that of 894"
    assert (min(answers), max(answers)) == (1, 64)


def test_intervals_count_only_while_all_streams_run():
    samples, window = handoff_report.intervals([[0.0, 1.0, 2.0, 3.0], [0.5, 1.5, 2.25]])
    assert window == (0.5, 2.25)
    assert samples == [1000.0, 1000.0, 750.0]


def test_intervals_between_tokens_are_compared_with_those_of_decodes_alone():
    def entry(state, interval, faults=()):
        return {"state": state, "intervals_ms": [10.0] * 98 + [interval] * 2, "step_intervals_ms": [interval],
                "window": [0.0, 2.0], "arrivals_inside": 6, "faults": list(faults)}  # fmt: skip

    figures = handoff_report.inter_token_figures(
        [entry("transfers", 15.0), entry("alone", 12.0), entry("alone", 99.0, ["x"])]
    )
    assert figures["alone"]["p99"] == 12.0 and figures["alone"]["rounds"] == 1
    assert figures["transfers"]["to_alone"] == 1.25 and figures["transfers"]["arrivals_per_second"] == 3.0
    assert "own cache" not in figures


def test_the_report_and_the_plot_are_made_of_whatever_there_is():
    empty = {
        "ended": "failed",
        "errors": ["no servers\nand more"],
        "timeline": [],
        "mixed": {},
        "steps": {},
        "cut_short": ["x"],
    }
    empty["summary"] = {"handoff": [], "inter_token": {}}
    assert "1 errors:\n- no servers\n" in handoff_report.report(empty) and handoff_report.plot(empty) is None
    samples = [
        sample(way, ms, tokens=n)
        for way, ms in (("nixl", 90), ("kvsdk", 30), ("kvsdk floor", 10))
        for n in (1024, 30000)
    ]
    samples += [sample("nixl floor", 10, tokens=30000)]
    summary = {"handoff": handoff_report.summarize(samples), "inter_token": {}}
    full = empty | {"ended": "complete", "errors": [], "summary": summary}
    assert "| aged | 30000 | kvsdk | 1 | 0 | 30.0 | 30.0 | 20.0 | 0.250 | ≤ 0.15 |" in handoff_report.report(full)
    drawn = xml.etree.ElementTree.fromstring(handoff_report.plot(full))
    texts = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"NIXL, aged", "kvsdk, aged", "1,024", "30,000"} <= set(texts)


def test_a_plot_places_points_by_the_scale():
    def heights(**scale):
        drawn = xml.etree.ElementTree.fromstring(
            plots.lines({"a": [(1, 1), (10, 10), (100, 100)]}, title="t", x="x", y="y", log_x=True, **scale)
        )
        return [float(circle.get("cy")) for circle in drawn.iter("{http://www.w3.org/2000/svg}circle")]

    low, middle, high = heights(log_y=True)
    assert middle - high == pytest.approx(low - middle, abs=0.2)
    low, middle, high = heights()
    assert middle - high == pytest.approx(10 * (low - middle), rel=0.02)
    with pytest.raises(ValueError, match="no point"):
        plots.lines({"a": [(0, 1)]}, title="t", x="x", y="y", log_x=True)


# ---- handoff: steps


class Hooked:
    def bind_connector_metadata(self, spend=0.0):
        time.sleep(spend)

    def get_finished(self):
        self.get_block_ids_with_load_errors()

    def get_block_ids_with_load_errors(self):
        time.sleep(0.004)

    def build_connector_meta(self):
        time.sleep(0.002)

    def save_kv_layer(self):
        pass


def test_a_step_holds_the_hooks_from_one_beginning_to_the_next(tmp_path):
    recorder = hooks.Recorder(str(tmp_path / "steps"))
    recorder.first_hook = "bind_connector_metadata"
    members = hooks.timed(Hooked, recorder)
    assert "save_kv_layer" not in members
    connector = type("Watched", (Hooked,), members)()
    began = time.monotonic()
    connector.bind_connector_metadata()
    connector.get_finished()
    connector.build_connector_meta()
    connector.bind_connector_metadata(0.008)
    connector.bind_connector_metadata()
    recorder.write()
    recorder.write()
    first, second = hooks.read_steps(tmp_path / "steps")
    assert began <= first.began < second.began <= time.monotonic()
    assert first.worker_us >= 4000 and 2000 <= first.scheduler_us < first.worker_us + 2000
    assert first.calls == 3 and hooks.HOOKS[int(first.longest)] == "get_finished"
    assert second.worker_us >= 8000 and second.scheduler_us == 0 and second.longest_us >= 8000


def test_hooks_that_are_not_timed_do_nothing_in_the_binding():
    tree = ast.parse(Path(step.__file__).parents[1].joinpath("kvsdk/vllm/binding.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found = [node for node in functions if node.name in ("wait_for_layer_load", "save_kv_layer")]
    assert [len(node.body) for node in found] == [1, 1] and all(map(ast.get_docstring, found))


def test_steps_are_picked_by_windows():
    steps = [hooks.Step(float(at), 0, 0, 1, 0, 0) for at in range(10)]
    picked = hooks.within(steps, [(0.5, 2.5), (2.5, 3.0), (7.0, 8.0)])
    assert [[step.began for step in inside] for inside in picked] == [[1.0, 2.0], [], [7.0]]


def test_a_histogram_names_bins_by_their_upper_end():
    found = hooks.histogram([0.01, 1.0, 99.0, 100.0, 1000.0])
    assert found == {"0.1": 1, "1": 1, "100": 2, "1000": 1}


def test_step_figures_keep_the_longest_call_of_the_slowest_step():
    names = [hooks.HOOKS.index("get_finished"), hooks.HOOKS.index("on_new_request")]
    steps = [hooks.Step(0.0, 10.0, 0.0, 5, 9.0, names[0]), hooks.Step(1.0, 20.0, 700.0, 6, 690.0, names[1])]
    figures = handoff_report.step_figures(steps)
    assert figures["worker"]["max"] == 20.0 and figures["worker and scheduler"]["max"] == 720.0
    assert figures["slowest"][0] == ("on_new_request", 690.0)
    assert handoff_report.step_figures([])["steps"] == 0


def test_timing_a_hook_costs_microseconds():
    assert 0 < hooks.cost_of_a_call(2000) < 100


# ---- handoff: requests


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_events_are_counted_however_the_stream_is_cut(cut):
    stream = b"HTTP/1.1 200 OK\r\n\r\n2f\r\n" + b'data: {"choices":[]}\n\n' * 7 + b"data: [DONE]\n\n"
    events = streams.Events()
    for i in range(0, len(stream), cut):
        events.feed(stream[i : i + cut], float(i))
    assert len(events.times) == 7 and events.times == sorted(events.times)
    assert events.fault is None
    for part in (b'data: {"err', b'or": "x"}\n\n'):
        events.feed(part, 0.0)
    assert events.fault == "an error in the stream"


def test_a_stream_that_is_refused_says_how():
    events = streams.Events()
    events.feed(b"HTTP/1.1 400 Bad Request\r\n\r\nno", 0.0)
    assert "400 Bad Request" in events.fault


def test_prompts_are_the_same_for_a_seed_and_share_no_beginning():
    bodies = [
        json.loads(legs.Prompt(seed, n, 1000).body(3, {"a": 1}, stream=True))
        for seed, n in (("x", 50), ("x", 50), ("x", 60))
    ]
    assert bodies[0] == bodies[1] and len(bodies[0]["prompt"]) == 50
    assert bodies[2]["prompt"][:16] != bodies[0]["prompt"][:16], "the length is part of the seed"
    assert (bodies[0]["max_tokens"], bodies[0]["kv_transfer_params"], bodies[0]["stream"]) == (3, {"a": 1}, True)


@pytest.fixture
def pair():
    """Two servers that answer as vLLM's do, whose requests are kept; `answer` and `lines` are what they say."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.say(f'{legs.BY_SOURCE}{{source="local_compute",x="1"}} {next(world.counted)}\n# no sample\n'.encode())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            world.asked.append((self.server.name, body))
            time.sleep(0.02)
            self.say(b"".join(world.lines) if body.get("stream") else json.dumps(world.answer).encode())

        def say(self, data):
            self.send_response(world.status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    world = SimpleNamespace(asked=[], status=200, answer={"kv_transfer_params": {"remote_block_ids": [[1, 2]]}})
    world.lines, world.counted = [b'data: {"choices": []}\n\n', b"data: [DONE]\n\n"], itertools.count()
    listening = []
    for name in ("prefill", "decode"):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.name, server.port = name, server.server_address[1]
        server.request = lambda method, path, timeout, port=server.port: _get(port, path)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        listening.append(server)
    world.pair = legs.Pair("kvsdk", *listening, kv_port=1234)
    yield world
    for server in listening:
        server.shutdown()
        server.server_close()


def _get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path)
    data = connection.getresponse().read()
    connection.close()
    return data


PROMPT = legs.Prompt("legs", 20, 1000)


def test_the_decode_leg_carries_what_the_prefill_leg_answered(pair):
    times = legs.hand_over(pair.pair, PROMPT, 5.0)
    (first, prefill), (second, decode) = pair.asked
    assert (first, second) == ("prefill", "decode") and prefill["prompt"] == decode["prompt"]
    assert prefill["kv_transfer_params"]["do_remote_decode"] and prefill["max_tokens"] == 1
    assert decode["kv_transfer_params"] == {"remote_block_ids": [[1, 2]]} and decode["stream"]
    assert times.sent + 0.02 <= times.answered and times.answered + 0.02 <= times.first


def test_early_asks_both_servers_at_once_by_one_transfer_id(pair):
    times = legs.hand_over_early(pair.pair, PROMPT, 5.0)
    asked = dict(pair.asked)
    ids = {body["kv_transfer_params"]["transfer_id"] for body in asked.values()}
    assert len(ids) == 1 and asked["decode"]["kv_transfer_params"]["remote_port"] == 1234
    assert times.first - times.sent < 0.04 + (times.answered - times.sent)
    assert abs(times.first - times.answered) < 0.2


def test_a_floor_names_nothing_that_could_be_transferred(pair):
    legs.answer_from_own_cache(pair.pair, PROMPT, 5.0)
    assert not any(body["kv_transfer_params"]["do_remote_prefill"] for _, body in pair.asked)
    pair.asked.clear()
    pair.pair.kv_port = None
    legs.answer_from_own_cache(pair.pair, PROMPT, 5.0)
    assert [name for name, _ in pair.asked] == ["prefill", "decode"]
    assert not any("kv_transfer_params" in body for _, body in pair.asked)


def test_what_servers_refuse_or_break_off_is_an_error_of_theirs(pair):
    pair.lines = [b'data: {"error": {"message": "a load failed"}}\n\n']
    with pytest.raises(ServerFailed, match="a load failed"):
        legs.hand_over(pair.pair, PROMPT, 5.0)
    pair.lines = []
    with pytest.raises(ServerFailed, match="without a token"):
        legs.hand_over_early(pair.pair, PROMPT, 5.0)
    pair.answer = {}
    with pytest.raises(ServerFailed, match="without kv_transfer_params"):
        legs.hand_over(pair.pair, PROMPT, 5.0)
    pair.status = 500
    with pytest.raises(ServerFailed, match="answered 500"):
        legs.answer_from_own_cache(pair.pair, PROMPT, 5.0)


def test_a_tally_waits_until_a_prompt_is_counted(pair, monkeypatch):
    tally = legs.Tally(pair.pair.decode)
    assert legs.by_source(tally.since(5)) == {"external_kv_transfer": 0, "local_cache_hit": 0, "local_compute": 5}
    pair.counted = itertools.repeat(0)
    monkeypatch.setattr(legs, "COUNT_TIMEOUT", 0.1)
    with pytest.raises(DeadlineExceeded, match="has not counted"):
        tally.since(1)


def test_the_shape_of_the_model_is_128_kib_of_kv_a_token_and_its_tokens_decode(tmp_path):
    from tokenizers import Tokenizer

    config = json.loads((handoff.make_llama_8b_shape(tmp_path) / "config.json").read_text())
    shape = [config[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim")]
    assert shape[0] * shape[1] * shape[2] * 2 * 2 == 128 << 10
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"] == 128256
    assert tokenizer.decode([128255]).startswith("token")


@pytest.mark.servers
@pytest.mark.slow
def test_handoff_goes_through_its_parts_and_everything_comes_over(tmp_path):
    out = tmp_path / "handoff.json"
    arguments = ["--cpu", "--seconds", "280", "--out", str(out), "--samples", "2", "--mixed", "8"]
    assert handoff.main(arguments) == 0
    result = json.loads(out.read_text())
    assert result["ended"] == "complete" and out.with_suffix(".svg").exists()
    assert {(s["pools"], s["way"]) for s in result["samples"]} >= {
        ("fresh", "early"),
        ("aged", "kvsdk"),
        ("aged", "kvsdk floor"),
    }
    assert all(s["fault"] is None for s in result["samples"])
    assert [entry["state"] for entry in result["inter_token"]] == list(handoff_report.STATES)
    assert result["steps"]["decode"]["all"]["worker"]["max"] > 0


def test_cpu_hands_blocks_over_by_every_way_and_draws_it(tmp_path, capsys):
    out, drawn = tmp_path / "cpu.json", tmp_path / "cpu.svg"
    few = ["--mib", "1", "2", "--kib", "1", "--rounds", "2", "--patience", "0"]
    assert cpu.main([*few, "--json", str(out), "--svg", str(drawn)]) == 0
    result = json.loads(out.read_text())
    for by in result["seconds"].values():
        assert {"memcpy", "raw gloo", "shm", "gloo"} <= set(by)
        assert all(len(samples) == 2 and min(samples) > 0 for samples in by.values())
    assert result["bytes"] == {"1": 1 << 20, "2": 2 << 20}
    assert "shm / memcpy, aim 0.5" in capsys.readouterr().out
    assert xml.etree.ElementTree.parse(drawn).getroot().tag.endswith("svg")
