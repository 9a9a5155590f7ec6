"""What an operator may write, what it becomes, and the one line that names each mistake."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import kvsdk
from kvsdk import config
from kvsdk.config import Options, Producers, options_table, parse_options, split_address, transfer_config
from kvsdk.errors import ConfigError

OLD_JSON = (
    '{"kv_connector":"PyNcclConnector","kv_role":"kv_producer","kv_rank":0,"kv_parallel_size":2,"kv_buffer_size":5e9}'
)
OLD_FIELDS = config.NEWEST_VLLM_FIELDS | {"kv_rank", "kv_parallel_size", "kv_ip", "kv_buffer_size"}


def options(role: str = "kv_producer", **extra) -> Options:
    return parse_options({"kv_role": role}, extra=extra)


def old_vllm(**fields) -> SimpleNamespace:
    """A KVTransferConfig of vLLM 0.31 or older, which fills in every field."""
    defaults = {
        "kv_connector": "PyNcclConnector",
        "engine_id": "an-engine",
        "kv_role": "kv_producer",
        "kv_rank": None,
        "kv_parallel_size": 1,
        "kv_ip": "127.0.0.1",
        "kv_port": 14579,
        "kv_buffer_size": 1e9,
        "kv_connector_extra_config": {},
    }
    return SimpleNamespace(**{**defaults, **fields})


def new_vllm(**fields) -> SimpleNamespace:
    """A KVTransferConfig of vLLM 0.32 or newer."""
    old = vars(old_vllm())
    new = {name: value for name, value in old.items() if name in config.NEWEST_VLLM_FIELDS}
    return SimpleNamespace(**{**new, **fields})


# Sources


@pytest.mark.parametrize("make", [old_vllm, new_vllm])
def test_an_untouched_vllm_config_gives_every_documented_default(make):
    assert parse_options(make()) == Options(kv_role="kv_producer", engine_id="an-engine")


def test_an_option_means_the_same_as_a_field_of_old_vllm_and_as_an_extra_of_new_vllm():
    values = {"kv_rank": 1, "kv_parallel_size": 3, "kv_ip": "10.0.0.1", "kv_buffer_size": 5e9, "kv_port": 7}
    from_fields = parse_options(old_vllm(kv_role="kv_consumer", **values))
    port = {"kv_port": values["kv_port"]}
    extra = {name: value for name, value in values.items() if name not in port}
    assert parse_options(new_vllm(kv_role="kv_consumer", **port, kv_connector_extra_config=extra)) == from_fields
    assert (from_fields.kv_rank, from_fields.kv_parallel_size, from_fields.kv_ip) == (1, 3, "10.0.0.1")
    assert (from_fields.kv_buffer_size, from_fields.kv_port) == (5_000_000_000, 7)


def test_the_same_value_in_both_places_is_fine():
    assert (
        parse_options(old_vllm(kv_buffer_size=5e9), extra={"kv_buffer_size": 5_000_000_000}).kv_buffer_size == 5 * 10**9
    )


def test_two_values_for_one_option_are_refused_naming_both():
    with pytest.raises(ConfigError, match=r"kv_buffer_size is 5000000000\.0, but 7 in kv_connector_extra_config"):
        parse_options(old_vllm(kv_buffer_size=5e9), extra={"kv_buffer_size": 7})


def test_a_field_that_vllm_filled_in_itself_contradicts_nothing():
    assert parse_options(old_vllm(), extra={"kv_buffer_size": 7, "kv_ip": "127.0.0.2"}).kv_buffer_size == 7


def test_true_is_not_vllms_default_of_one():
    with pytest.raises(ConfigError, match=r"kv_parallel_size=True is a boolean"):
        parse_options(old_vllm(kv_parallel_size=True))


def test_an_unknown_option_is_refused_naming_the_nearest_known():
    with pytest.raises(ConfigError, match=r"'lookup_timout'.*nearest known option is 'lookup_timeout'"):
        options(lookup_timout=1)


def test_options_that_a_connector_declares_itself_are_kept_unchecked():
    parsed = parse_options({"kv_role": "kv_both"}, extra={"path": "/tmp/kv", "lease": 5}, also=frozenset({"path"}))
    assert parsed.extra == {"path": "/tmp/kv"}
    assert parsed.lease == 5.0
    with pytest.raises(ConfigError, match=r"'pth'.*'path'"):
        parse_options({"kv_role": "kv_both"}, extra={"pth": 1}, also=frozenset({"path"}))


def test_extra_config_that_is_no_object_is_refused():
    with pytest.raises(ConfigError, match="kv_connector_extra_config is a list"):
        parse_options(new_vllm(kv_connector_extra_config=["lease"]))


# Values


@pytest.mark.parametrize("role", ["kv_prod", "", 1, None])
def test_an_unknown_role_is_refused_listing_the_known(role):
    with pytest.raises(ConfigError, match=r"kv_role.*kv_producer, kv_consumer, kv_both"):
        parse_options({"kv_role": role})


@pytest.mark.parametrize("size", [1e9, 5e9, 12, 10**18])
def test_a_buffer_size_may_be_written_as_a_float(size):
    parsed = options(kv_buffer_size=size).kv_buffer_size
    assert parsed == size
    assert type(parsed) is int


@pytest.mark.parametrize("size", [0, -1, -1e9, 0.5, math.nan, math.inf, True, "1e9", [1]])
def test_a_buffer_size_that_holds_nothing_is_refused_saying_what_to_set(size):
    with pytest.raises(ConfigError, match=r"kv_buffer_size=.*set it to a whole number of bytes"):
        options(kv_buffer_size=size)


@pytest.mark.parametrize("name", ["lease", "lookup_timeout", "heartbeat", "load_timeout", "close_timeout"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, False, "30"])
def test_a_deadline_is_a_finite_number_of_seconds_above_zero(name, value):
    with pytest.raises(ConfigError, match=f"{name}=.*seconds above 0"):
        options(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_port", 65536),
        ("kv_port", -1),
        ("kv_port", 1.5),
        ("kv_port", "14579"),
        ("kv_port", True),
        ("nccl_max_ctas", 0),
        ("nccl_max_ctas", 33),
        ("staging_bytes", 0),
        ("verify", 1),
        ("verify", "true"),
        ("pipe", "rdma"),
        ("pipe", ["gloo"]),
        ("model_id", 7),
        ("model_id", ""),
        ("model_id", "a\nb"),
        ("kv_ip", "http://a"),
        ("kv_ip", "1.2.3.4:5"),
        ("kv_rank", -1),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_by_name_on_one_line(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}=.*$") as caught:
        options(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::"])
def test_a_wildcard_address_is_refused_because_consumers_cannot_connect_to_it(wildcard):
    with pytest.raises(ConfigError, match=r"kv_ip=.*wildcard"):
        options(kv_ip=wildcard)


def test_a_rank_lies_below_the_parallel_size():
    assert options(kv_rank=1).kv_rank == 1
    with pytest.raises(ConfigError, match="kv_rank=2 is out of range for kv_parallel_size=2"):
        options(kv_rank=2)


def test_a_role_without_its_peer_is_refused():
    assert options("kv_both", kv_parallel_size=1).kv_parallel_size == 1
    for role in ("kv_producer", "kv_consumer"):
        with pytest.raises(ConfigError, match=f"kv_parallel_size=1 leaves {role} without a peer"):
            options(role, kv_parallel_size=1)


# Producers


def test_a_consumer_asks_the_producer_at_kv_ip_and_kv_port_unless_told_otherwise():
    assert options("kv_consumer", kv_port=7).producers == ("127.0.0.1:7",)
    assert options("kv_consumer", kv_ip="::1").producers == ("[::1]:14579",)
    assert options("kv_consumer", producers=["a:1", "[::1]:2"]).producers == ("a:1", "[::1]:2")
    assert options("kv_both").producers == ()


def test_port_zero_is_the_systems_choice_for_a_producer_and_nothing_for_a_lone_consumer():
    assert options(kv_port=0).kv_port == 0
    assert options("kv_consumer", kv_port=0, producers=["a:1"]).producers == ("a:1",)
    with pytest.raises(ConfigError, match="kv_port=0 leaves kv_consumer without a producer"):
        options("kv_consumer", kv_port=0)


@pytest.mark.parametrize("producers", ["a:1", ["a"], ["a:0"], ["a:65536"], ["a:b"], [":1"], [7], ["::1:5"], {"a": 1}])
def test_producers_are_a_list_of_host_and_port(producers):
    with pytest.raises(ConfigError, match=r"^producers"):
        options("kv_consumer", producers=producers)


def test_contradictions_about_producers_are_refused():
    with pytest.raises(ConfigError, match="producers and producers_file"):
        options("kv_consumer", producers=["a:1"], producers_file="f")
    with pytest.raises(ConfigError, match="producers names a:1 more than once"):
        options("kv_consumer", producers=["a:1", "a:1"])
    with pytest.raises(ConfigError, match="producers_file is set, but a kv_producer"):
        options(producers_file="f")


def test_split_address_reads_names_and_both_kinds_of_ip():
    assert split_address("host:5") == ("host", 5)
    assert split_address("127.0.0.1:65535") == ("127.0.0.1", 65535)
    assert split_address("[fe80::1]:5") == ("fe80::1", 5)


def test_the_list_of_producers_follows_its_file(tmp_path):
    file = tmp_path / "producers"
    file.write_text("# the first\na:1\n\n b:2  # the second\n[::1]:3\na:1\n")
    producers = Producers(options("kv_consumer", producers_file=str(file)))
    assert producers.current() == ("a:1", "b:2", "[::1]:3")
    file.write_text("c:4\n")
    assert producers.current() == ("c:4",)


def test_a_file_that_goes_wrong_leaves_the_last_list_in_force_and_says_so_once(tmp_path, caplog):
    file = tmp_path / "producers"
    file.write_text("a:1\n")
    producers = Producers(options("kv_consumer", producers_file=str(file)))
    with caplog.at_level(logging.WARNING, "kvsdk.config"):
        file.write_text("a:1\nnonsense\n")
        assert producers.current() == producers.current() == ("a:1",)
        assert len(caplog.records) == 1
        assert "line 2" in caplog.text
        assert "nonsense" in caplog.text
        os.remove(file)
        assert producers.current() == producers.current() == ("a:1",)
        assert len(caplog.records) == 2
    file.write_text("b:2\n")
    assert producers.current() == ("b:2",)


def test_a_file_that_is_wrong_from_the_start_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"producers_file=.*cannot be read"):
        Producers(options("kv_consumer", producers_file=str(tmp_path / "none")))


# Keys


def test_curve_keys_come_complete_for_the_role_or_not_at_all():
    own, server, clients = {"curve_secret_key": "s"}, {"curve_server_key": "p"}, {"curve_client_keys": "d"}
    assert options(**own, **clients).curve_client_keys == "d"
    assert options("kv_consumer", **own, **server).curve_server_key == "p"
    assert options("kv_both", **own, **server, **clients).curve_secret_key == "s"
    for role, given, named in (
        ("kv_producer", own, "curve_client_keys is not set"),
        ("kv_consumer", server, "curve_secret_key is not set"),
        ("kv_both", own | clients, "curve_server_key is not set"),
        ("kv_producer", own | clients | server, "curve_server_key is set, but a kv_producer"),
    ):
        with pytest.raises(ConfigError, match=named):
            options(role, **given)


def test_a_producer_open_to_others_without_keys_is_warned_of_once(caplog):
    config._warn_open.cache_clear()
    with caplog.at_level(logging.WARNING, "kvsdk.config"):
        options(kv_ip="127.0.0.2")
        options("kv_consumer", kv_ip="192.0.2.1")
        options(kv_ip="192.0.2.1", curve_secret_key="s", curve_client_keys="d")
        assert not caplog.records
        options(kv_ip="192.0.2.1")
        options(kv_ip="192.0.2.1")
    assert [record.getMessage().split(" is ")[0] for record in caplog.records] == ["kv_ip=192.0.2.1"]


# The old JSON


def test_the_json_of_vllms_examples_is_moved_into_the_extra_config_for_new_vllm():
    assert transfer_config(OLD_JSON, known_fields=config.NEWEST_VLLM_FIELDS) == {
        "kv_connector": "PyNcclConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"kv_rank": 0, "kv_parallel_size": 2, "kv_buffer_size": 5e9},
        "kv_load_failure_policy": "recompute",
    }


def test_the_json_of_vllms_examples_stays_as_it_is_for_old_vllm():
    assert transfer_config(OLD_JSON, known_fields=OLD_FIELDS) == json.loads(OLD_JSON) | {
        "kv_load_failure_policy": "recompute"
    }


@pytest.mark.parametrize("known_fields", [config.NEWEST_VLLM_FIELDS, OLD_FIELDS])
def test_what_it_gives_reads_back_as_the_same_options_and_does_not_change_again(known_fields):
    moved = transfer_config(OLD_JSON, known_fields=known_fields)
    assert transfer_config(json.dumps(moved), known_fields=known_fields) == moved
    parsed = parse_options(moved)
    assert (parsed.kv_rank, parsed.kv_parallel_size, parsed.kv_buffer_size) == (0, 2, 5 * 10**9)


def test_own_options_may_stand_at_the_top_and_vllms_in_the_extra_config():
    given = {
        "kv_connector": "PyNcclConnector",
        "lease": 5,
        "kv_connector_extra_config": {"kv_role": "kv_both", "pipe": "gloo"},
        "kv_load_failure_policy": "fail",
    }
    assert transfer_config(given, known_fields=config.NEWEST_VLLM_FIELDS) == {
        "kv_connector": "PyNcclConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lease": 5, "pipe": "gloo"},
        "kv_load_failure_policy": "fail",
    }
    assert given["kv_connector_extra_config"] == {"kv_role": "kv_both", "pipe": "gloo"}


def test_an_unknown_connectors_fields_move_but_its_options_are_its_own():
    given = {"kv_connector": "TheirConnector", "kv_role": "kv_both", "kv_rank": 0, "path": "/tmp", "lease": "long"}
    assert transfer_config(given, known_fields=config.NEWEST_VLLM_FIELDS) == {
        "kv_connector": "TheirConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"kv_rank": 0, "path": "/tmp", "lease": "long"},
        "kv_load_failure_policy": "recompute",
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not valid JSON.*line 1, column 2"),
        ('{"kv_buffer_size": NaN}', "NaN"),
        ("[]", "is a list"),
        ("[" * 100_000, "nested too deeply"),
        ("{}", "kv_connector=None"),
        ('{"kv_connector": "PyNcclConnector"}', "kv_role is not set"),
        ('{"kv_connector": "PyNcclConnector", "kv_role": "kv_prod"}', "kv_role='kv_prod'"),
        ('{"kv_connector": "PyNcclConnector", "kv_role": "kv_both", "kv_prot": 1}', "'kv_prot'.*'kv_port'"),
        (
            '{"kv_connector": "PyNcclConnector", "kv_role": "kv_both", "kv_port": 1, "kv_port": 2}',
            "kv_port is given twice",
        ),
        (
            '{"kv_connector": "PyNcclConnector", "kv_role": "kv_both", "lease": 1,'
            ' "kv_connector_extra_config": {"lease": 2}}',
            "lease is 1, but 2",
        ),
        ('{"kv_connector": "X", "kv_rank": 1, "kv_connector_extra_config": {"kv_rank": 0}}', "kv_rank is 1, but 0"),
        ('{"kv_connector": "PyNcclConnector", "kv_role": "kv_producer", "kv_parallel_size": 1}', "without a peer"),
        ('{"kv_connector": "X", "kv_connector_extra_config": 3}', "kv_connector_extra_config is an integer"),
    ],
)
def test_the_command_names_a_mistake_on_one_line_and_exits_with_2(text, named, capsys):
    assert config.main([text]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kvsdk config: ")
    assert err.count("\n") == 1
    with pytest.raises(ConfigError, match=named):
        transfer_config(text, known_fields=config.NEWEST_VLLM_FIELDS)


def test_the_command_prints_one_line_of_json(capsys):
    assert config.main([OLD_JSON]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert json.loads(out) == transfer_config(OLD_JSON)


# Connectors of other packages

FILES = '{"kv_connector": "FileConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"folder": "/var"}}'


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package with a connector on Python's path; `FileConnector` is its entry point."""

    def make(source: str = "class FileConnector:\n    option_names = frozenset({'folder'})\n") -> None:
        info = tmp_path / "file_connector-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: file-connector\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[kvsdk.connectors]\nFileConnector = file_connector:FileConnector\n")
        (tmp_path / "file_connector.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    yield make
    sys.modules.pop("file_connector", None)


def test_the_entry_point_group_is_the_one_that_vllm_finds_connectors_by():
    from kvsdk.vllm import connectors

    assert (connectors.GROUP, connectors.__name__) == (config.CONNECTOR_GROUP, config.CONNECTORS_MODULE)
    assert connectors.SHIPPED.keys() == config.OWN_CONNECTORS.keys()


def test_an_installed_connectors_options_are_checked_as_kvsdks_are(install):
    install()
    checked = transfer_config(FILES, known_fields=config.NEWEST_VLLM_FIELDS)
    assert checked["kv_connector_extra_config"] == {"folder": "/var"}
    for extra, named in (
        (
            {"foldr": "/var"},
            "unknown option 'foldr' in kv_connector_extra_config; the nearest known option is 'folder'",
        ),
        ({"folder": "/var", "load_timeout": 0}, "load_timeout=0 is out of range"),
    ):
        with pytest.raises(ConfigError, match=named):
            transfer_config(json.loads(FILES) | {"kv_connector_extra_config": extra})
    with pytest.raises(ConfigError, match="kv_role is not set"):
        transfer_config({"kv_connector": "FileConnector", "folder": "/var"})


def test_an_installed_connectors_options_may_stand_at_the_top_too(install):
    install()
    given = {"kv_connector": "FileConnector", "kv_role": "kv_both", "folder": "/var"}
    assert transfer_config(given, known_fields=config.NEWEST_VLLM_FIELDS)["kv_connector_extra_config"] == {
        "folder": "/var"
    }
    with pytest.raises(ConfigError, match=r"unknown option 'foldr'; the nearest known option is 'folder'"):
        transfer_config(given | {"foldr": 1})


@pytest.mark.parametrize(
    ("source", "reason"),
    [("raise OSError('no\\ndisk')", "OSError: no disk"), ("FileConnector = int", "AttributeError: .*option_names")],
)
def test_an_installed_connector_that_cannot_be_loaded_is_a_mistake_on_one_line(install, source, reason, capsys):
    install(source)
    assert config.main([FILES]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(f"FileConnector cannot be loaded from file_connector:FileConnector: {reason}", err)


def test_what_a_package_prints_when_it_is_imported_is_not_in_the_json(install, capsys):
    install("print('hello')\nclass FileConnector:\n    option_names = frozenset({'folder'})\n")
    assert config.main([FILES]) == 0
    out, err = capsys.readouterr()
    assert err == "hello\n"
    assert json.loads(out)["kv_connector"] == "FileConnector"


def test_a_connector_by_path_is_checked_where_it_can_be_loaded(install, caplog):
    by_path = {"kv_connector_module_path": "kvsdk.vllm.connectors", "kv_role": "kv_both", "foldr": "/var"}
    unchecked = transfer_config(by_path | {"kv_connector": "file_connector:FileConnector"})
    assert unchecked["kv_connector_extra_config"] == {"foldr": "/var"}
    assert "No module named 'file_connector'): its options were not checked" in caplog.text
    install()
    with pytest.raises(ConfigError, match="unknown option 'foldr'"):
        transfer_config(by_path | {"kv_connector": "file_connector:FileConnector"})


def test_an_unknown_connector_may_be_vllms_own_and_gets_a_line_that_names_the_nearest():
    command = [sys.executable, "-m", "kvsdk.cli", "config", '{"kv_connector": "PyNclConnector", "kv_rol": "kv_both"}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert json.loads(done.stdout)["kv_connector_extra_config"] == {"kv_rol": "kv_both"}
    assert done.stderr == (
        "PyNclConnector is neither kvsdk's nor an installed package's connector: its options were not checked; "
        "the nearest known connector is 'PyNcclConnector'\n"
    )


def test_nothing_is_said_of_a_class_of_vllms_own_kind(caplog):
    given = {"kv_connector": "PyNcclConnector", "kv_connector_module_path": "theirs", "leas": 1}
    assert transfer_config(given, known_fields=config.NEWEST_VLLM_FIELDS)["kv_connector_extra_config"] == {"leas": 1}
    assert not caplog.records


# vLLM


def test_the_fields_of_vllm_are_read_from_its_source():
    source = "class Other:\n    no: int\nclass KVTransferConfig:\n    a: str\n    b: int = 3\n    c = 4\n"
    assert config._class_fields(source, "KVTransferConfig") == {"a", "b"}
    with pytest.raises(LookupError):
        config._class_fields(source, "Gone")


def test_without_vllm_the_newest_fields_are_assumed_and_no_object_can_be_made(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert config.installed_fields() == config.NEWEST_VLLM_FIELDS
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        kvsdk.kv_transfer_config(OLD_JSON)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
@pytest.mark.filterwarnings("ignore")
def test_the_installed_vllm_accepts_the_old_json():
    made = kvsdk.kv_transfer_config(OLD_JSON)
    assert {field.name for field in dataclasses.fields(made)} == config.installed_fields()
    assert (made.kv_connector, made.kv_role, made.kv_load_failure_policy) == (
        "PyNcclConnector",
        "kv_producer",
        "recompute",
    )
    assert parse_options(made).kv_buffer_size == 5 * 10**9
    with pytest.raises(ConfigError, match=r"vLLM refuses.*kv_load_failure_policy"):
        kvsdk.kv_transfer_config(json.loads(OLD_JSON) | {"kv_load_failure_policy": "hope"})


# Documentation


def test_the_table_has_one_row_for_each_option_with_its_default():
    rows = [line.split(" | ") for line in options_table().splitlines()[2:]]
    fields = {field.name: field for field in dataclasses.fields(Options) if field.name != "extra"}
    assert [row[0].strip("| `") for row in rows] == list(fields)
    for row, field in zip(rows, fields.values(), strict=True):
        assert row[2] == ("none" if field.default in (None, "", ()) else f"`{json.dumps(field.default)}`")
        assert len(row) == 4
        assert row[3].endswith(". |")
