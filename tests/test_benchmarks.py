"""The benchmarks run and report what they say, at sizes that measure nothing."""

import json
import os
import time
from xml.etree import ElementTree

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from benchmarks import cpu, idle, percentile, step, table


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
    assert ElementTree.parse(drawn).getroot().tag.endswith("svg")
