"""Promises of the package's surface and of the code that starts and ends servers, with small stand-ins for vLLM."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import kvsdk
from kvsdk import cli
from kvsdk.demo import run, servers
from kvsdk.errors import DeadlineExceeded

# Answers /health after a moment, /metrics and completions; `{before}` runs first.
STAND_IN = """
import http.server, json, os, signal, subprocess, sys, time
{before}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{"/health": b"", "/metrics": METRICS}}.get(self.path))
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(json.dumps(body).encode())
    def answer(self, data):
        self.send_response(404 if data is None else 200)
        self.end_headers()
        self.wfile.write(data or b"no such page")
    def log_message(self, *args): pass
METRICS = b'''# HELP vllm:hits_total Hits.
vllm:hits_total{{engine="0",source="near, or \\\\"here\\\\""}} 3.0
vllm:hits_total{{engine="1",source="far"}} 1.5e+01
vllm:hits_total{{engine="0",source="far"}} 1.0
up 1
'''
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def _run_python(*args: str) -> str:
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def start(tmp_path):
    """Starts stand-ins: `start(before="", **options)`; ends them after the test."""
    started = []

    def start(before: str = "", **options):
        port = servers.free_port()
        command = [sys.executable, "-c", STAND_IN.format(before=textwrap.dedent(before)), str(port)]
        server = servers.Server(command, name="stand-in", port=port, log=tmp_path / f"{len(started)}.log", **options)
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


def test_a_free_port_is_none_that_the_system_hands_out_and_none_given_twice():
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [servers.free_port() for _ in range(50)]
    assert max(ports) < ephemeral
    assert len(set(ports)) == 50


def test_a_port_that_somebody_listens_on_is_not_free(monkeypatch):
    with socket.create_server((servers.HOST, servers.free_port())) as busy:
        taken = busy.getsockname()[1]
        answers = iter([taken, taken + 1])
        monkeypatch.setattr(servers.random.SystemRandom, "randrange", lambda *_: next(answers))
        assert servers.free_port() == taken + 1


def test_importing_kvsdk_loads_neither_torch_nor_vllm_nor_zmq():
    heavy = "{'torch', 'vllm', 'zmq', 'numpy', 'msgpack', 'kvsdk.config'}"
    assert _run_python("-c", f"import sys, kvsdk, kvsdk.cli; print({heavy} & set(sys.modules))") == "set()\n"


def test_importing_kvsdk_takes_less_than_50_ms():
    code = "import time; t = time.perf_counter(); import kvsdk; print(time.perf_counter() - t)"
    # The quickest of several: the others measure what else the machine was doing.
    assert min(float(_run_python("-c", code)) for _ in range(5)) < 0.05


def test_the_version_is_the_packages_and_unknown_names_are_attribute_errors(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"kvsdk {kvsdk.__version__}\n"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = kvsdk.no_such_name
    assert callable(kvsdk.kv_transfer_config)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_each_command_answers_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert f"kvsdk {command}" in capsys.readouterr().out


def test_an_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["frobnicate"])
    assert "frobnicate" in capsys.readouterr().err


def test_a_command_gives_its_exit_status(capsys):
    assert cli.main(["config", "{"]) == 2
    assert capsys.readouterr().err.startswith("kvsdk config: ")


def test_a_server_becomes_healthy_and_progress_is_told(start):
    server = start("time.sleep(0.4)")
    told = []
    seconds = server.wait_healthy(30, lambda which, healthy: told.append((which, healthy)))
    assert told[0] == (server, False)
    assert told[-1] == (server, True)
    assert 0.4 <= seconds < 30


def test_several_servers_boot_together(start):
    both = [start("time.sleep(0.3)"), start()]
    servers.wait_all_healthy(both, 30)
    assert all(server.healthy() for server in both)


def test_a_server_that_dies_is_noticed_at_once_with_its_first_error(start):
    server = start(
        """
        print("ValueError: block size 17 is no good")
        print("\\\\n".join(f"line {i}" for i in range(100)))
        sys.exit(3)
        """
    )
    began = time.monotonic()
    with pytest.raises(servers.ServerFailed, match="status 3") as caught:
        server.wait_healthy(60)
    assert time.monotonic() - began < 20
    assert "first error: ValueError: block size 17 is no good\n" in str(caught.value)
    assert str(caught.value).endswith("line 99")


def test_a_server_that_is_never_healthy_ends_in_deadline_exceeded(start):
    server = start("time.sleep(60)")
    with pytest.raises(DeadlineExceeded, match="stand-in was not healthy after 1 s"):
        server.wait_healthy(0.6)


def test_a_command_that_does_not_exist_raises_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(servers.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        servers.Server([str(tmp_path / "absent")], name="absent", port=1, log=tmp_path / "logs" / "log")
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


GRANDCHILD = """
    child = subprocess.Popen([sys.executable, "-c", {code!r}], stdout=sys.stdout)
    print("child", child.pid, flush=True)
"""
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
)


def _wait_for_log(server: servers.Server, text: str) -> str:
    deadline = time.monotonic() + 20
    while text not in (log := server.log.read_text()):
        assert time.monotonic() < deadline, log
        time.sleep(0.02)
    return log


def test_stopping_leaves_no_child_even_one_that_ignores_sigterm(start, monkeypatch):
    monkeypatch.setattr(servers, "ORPHAN_GRACE", 0.3)
    server = start(GRANDCHILD.format(code=STUBBORN))
    server.wait_healthy(30)
    child = int(_wait_for_log(server, "deaf").split("child ")[1].split()[0])
    assert _alive(child)
    server.stop()
    assert not _alive(child)
    assert server.process.returncode == -signal.SIGTERM


def test_a_server_that_ignores_sigterm_is_killed_after_the_timeout(start):
    server = start("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    server.wait_healthy(30)
    began = time.monotonic()
    server.stop(timeout=0.4)
    assert 0.4 <= time.monotonic() - began < 10
    assert server.process.returncode == -signal.SIGKILL


def test_children_of_a_server_that_died_are_ended_too(start, monkeypatch):
    monkeypatch.setattr(servers, "ORPHAN_GRACE", 0.3)
    server = start(GRANDCHILD.format(code=STUBBORN) + "    sys.stdout.flush(); time.sleep(0.5); os._exit(1)")
    child = int(_wait_for_log(server, "deaf").split("child ")[1].split()[0])
    with pytest.raises(servers.ServerFailed):
        server.wait_healthy(30)
    server.stop()
    assert not _alive(child)


def test_stopping_twice_is_fine_and_ends_no_process_of_others(start):
    server, bystander = start(), start()
    servers.wait_all_healthy([server, bystander], 30)
    server.stop()
    server.stop()
    assert bystander.healthy()


def test_leaving_the_block_stops_the_server_and_removes_its_socket_folder(start):
    with start("print(os.environ['VLLM_RPC_BASE_PATH'], flush=True)") as server:
        server.wait_healthy(30)
        folder = Path(server.log.read_text().split()[0])
        assert folder.is_dir()
    assert not folder.exists()
    assert not _alive(server.process.pid)


def test_variables_are_added_and_removed(start, monkeypatch):
    monkeypatch.setenv("KVSDK_TEST_GONE", "1")
    before = "print(os.environ['KVSDK_TEST_NEW'], 'KVSDK_TEST_GONE' in os.environ, flush=True)"
    server = start(before, env={"KVSDK_TEST_NEW": "new", "KVSDK_TEST_GONE": None})
    server.wait_healthy(30)
    assert server.log.read_text().split() == ["new", "False"]


def test_metrics_are_summed_over_labels_or_split_by_one(start):
    server = start()
    server.wait_healthy(30)
    assert server.metrics() == {"vllm:hits_total": 19.0, "up": 1.0}
    assert server.metrics_by("vllm:hits_total", "source") == {r"near, or \"here\"": 3.0, "far": 16.0}
    assert server.metrics_by("up", "source") == {}


def test_a_completion_is_greedy_and_asks_for_token_ids(start):
    server = start()
    server.wait_healthy(30)
    sent = server.complete([1, 2], max_tokens=5)
    assert sent == {"prompt": [1, 2], "temperature": 0, "return_token_ids": True, "max_tokens": 5}


def test_an_answer_that_is_not_200_is_an_error_with_its_text(start):
    server = start()
    server.wait_healthy(30)
    with pytest.raises(servers.ServerFailed, match="GET /absent with 404: no such page"):
        server.request("GET", "/absent")


def _command(tmp_path: Path, monkeypatch, **options) -> tuple[list[str], dict[str, str]]:
    """The command and the environment with which `vllm_server` would start a process."""
    started = {}
    monkeypatch.setattr(servers, "Server", lambda command, **rest: started.update(command=command, **rest))
    servers.vllm_server(tmp_path, log=tmp_path / "log", **options)
    return started["command"], started["env"]


def test_on_a_cpu_a_server_is_float32_and_single_threaded(tmp_path, monkeypatch):
    command, env = _command(tmp_path, monkeypatch, port=1234, transfer_config={"kv_role": "kv_both"})
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    assert command[3:5] == ["serve", str(tmp_path)]
    pairs = dict(itertools.pairwise(command))
    assert (pairs["--port"], pairs["--host"], pairs["--dtype"]) == ("1234", "127.0.0.1", "float32")
    assert pairs["--kv-transfer-config"] == '{"kv_role": "kv_both"}'
    assert (env["HF_HUB_OFFLINE"], env["VLLM_CPU_OMP_THREADS_BIND"], env["OMP_NUM_THREADS"]) == ("1", "nobind", "1")
    assert "CUDA_VISIBLE_DEVICES" not in env


def test_on_a_gpu_a_server_sees_its_device_and_nothing_meant_for_cpus(tmp_path, monkeypatch):
    command, env = _command(tmp_path, monkeypatch, gpu="1", blocks=None, args=["--block-size", "16"])
    assert env["CUDA_VISIBLE_DEVICES"] == "1"
    assert not {"VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS"} & set(env)
    assert not {"--dtype", "--num-gpu-blocks-override", "--kv-transfer-config"} & set(command)
    assert command[-2:] == ["--block-size", "16"]


def _handover(**changes) -> run.Handover:
    values = {
        "prompt": "San Francisco is a",
        "alone": [1, 2, 3],
        "answer": [1, 2, 3],
        "tokens": {"external_kv_transfer": 4, "local_cache_hit": 0, "local_compute": 0},
        "seconds": 0.5,
        "loaded_bytes": 3e6,
        "load_seconds": 2.0,
    }
    return run.Handover(**values | changes)


def test_a_prompt_that_came_over_with_the_same_tokens_has_no_fault():
    assert _handover().fault is None


def test_a_differing_token_is_a_fault_and_names_where():
    assert "first at token 1" in _handover(answer=[1, 9, 3]).fault
    assert "first at token length" in _handover(answer=[1, 2]).fault


def test_a_prompt_of_which_nothing_came_over_is_a_fault():
    tokens = {"external_kv_transfer": 0, "local_cache_hit": 0, "local_compute": 4}
    assert "no token came over" in _handover(tokens=tokens).fault


def test_the_table_shows_tokens_by_source_and_the_rate():
    header, row, wrong = run._table([_handover(), _handover(answer=[9], load_seconds=0.0)]).splitlines()
    assert " ".join(header.split()) == "prompt tokens came over cached computed answer same seconds MB MB/s"
    assert row.split()[4:] == ["4", "4", "0", "0", "3", "yes", "0.50", "3.00", "1.5"]
    assert wrong.split()[4:] == ["4", "4", "0", "0", "1", "NO", "0.50", "3.00", "-"]


def test_a_signal_raises_but_not_while_servers_start_or_stop():
    reached = []

    def block(signals):
        with signals.held():
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("end of the held block")
        reached.append("after it")

    previous = signal.getsignal(signal.SIGTERM)
    with pytest.raises(run.Interrupted, match="SIGTERM") as caught, run.Signals() as signals:
        block(signals)
    assert reached == ["end of the held block"]
    assert caught.value.status == 143
    assert signal.getsignal(signal.SIGTERM) is previous


def test_the_demo_refuses_one_gpu_twice_and_a_model_that_is_not_there(capsys, tmp_path):
    for arguments, said in (
        (["--gpus", "0,0"], "two different devices"),
        (["--model", str(tmp_path / "x")], "not a folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run.main(arguments)
        assert said in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch):
    """The `transfer_config` of each vLLM server that a demo starts, by name; in place of the last one it fails."""
    configs = {}

    def stand_in(model, *, name, transfer_config, **rest):
        configs[name] = transfer_config
        if name == "decode":
            raise servers.ServerFailed("enough")
        return SimpleNamespace(name=name, stop=lambda: None)

    monkeypatch.setattr(run, "vllm_server", stand_in)
    return configs


def test_options_of_the_demo_reach_both_servers_of_the_connector(started, tmp_path, capsys):
    assert run.main(["--model", str(tmp_path), "--options", '{"verify": false, "load_timeout": 5}']) == 1
    assert "FAIL: enough" in capsys.readouterr().out
    assert started["alone"] is None
    for name, role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
        assert started[name]["kv_role"] == role
        extra = started[name]["kv_connector_extra_config"]
        assert (extra["verify"], extra["load_timeout"]) == (False, 5)
    assert started["prefill"]["kv_port"] == started["decode"]["kv_port"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--options", '{"verfy": false}'], "unknown option 'verfy' in kv_connector_extra_config"),
        (["--options", '{"load_timeout": 0}'], "load_timeout=0 is out of range"),
        (["--options", "{"], "is not valid JSON"),
        (["--options", "[1]"], "no object of options"),
        (["--connector", "none", "--options", '{"verify": false}'], "--options without a connector"),
    ],
)
def test_a_wrong_option_ends_the_demo_before_anything_is_made_or_started(started, tmp_path, arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["--model", str(tmp_path), *arguments])
    out, err = capsys.readouterr()
    assert said in err
    assert (out, started) == ("", {})


def test_a_demo_that_is_interrupted_while_servers_boot_ends_them_all(tmp_path):
    command = [sys.executable, "-m", "kvsdk.cli", "demo", "--connector", "none", "--keep-logs", str(tmp_path)]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = ""
        while "starting alone" not in line:
            line = demo.stdout.readline()
            assert line, "the demo ended before it started servers"
        children = _children(demo.pid)
        assert len(children) == 4
        demo.send_signal(signal.SIGTERM)
        assert "stopped by SIGTERM" in demo.communicate(timeout=60)[0]
        assert demo.returncode == 143
        assert [pid for pid in children if _alive(pid)] == []
    finally:
        # Not SIGKILL: the demo has servers to end.
        demo.terminate()
        demo.wait(timeout=60)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
