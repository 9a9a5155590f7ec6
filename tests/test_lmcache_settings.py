"""LMCache's settings are read as its users expect, and those without effect are named."""

import importlib.metadata
import logging

import pytest

from kvsdk.config import OWN_CONNECTORS, transfer_config
from kvsdk.connectors.lmcache import LMCacheConnector
from kvsdk.connectors.lmcache.mp_client import require_lmcache
from kvsdk.connectors.lmcache.settings import read_settings
from kvsdk.errors import ConfigError

URL = "lm://localhost:65432"


def read(extra=None, block_size=16, **environ):
    return read_settings(extra or {}, block_size, environ=environ)


def test_the_environment_of_vllms_example_is_understood():
    found = read(LMCACHE_REMOTE_URL=URL, LMCACHE_CHUNK_SIZE="128", LMCACHE_MAX_LOCAL_CPU_SIZE="0.5")
    assert (found.host, found.port, found.chunk_size, found.host_bytes) == ("localhost", 65432, 128, 2**29)
    assert (found.unused, found.misspelt) == ((), ())


@pytest.mark.parametrize(
    ("extra", "host", "port"),
    [
        ({"remote_url": "tcp://localhost:6555"}, "localhost", 6555),
        ({"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": 6555}, "127.0.0.1", 6555),
        ({"lmcache.mp.host": "127.0.0.1"}, "127.0.0.1", 5555),
        ({"lmcache.mp.port": "6555"}, "localhost", 6555),
    ],
)
def test_the_multi_process_server_is_named_as_its_users_do(extra, host, port):
    found = read(extra)
    assert (found.multi_process, found.host, found.port) == (True, host, port)


def test_two_servers_are_one_too_many():
    with pytest.raises(ConfigError, match=r"LMCACHE_REMOTE_URL and lmcache\.mp\.host name two servers"):
        read({"lmcache.mp.host": "localhost"}, LMCACHE_REMOTE_URL=URL)


@pytest.mark.parametrize(("version", "named"), [("0.5.3", "and 0.5.3 is installed"), (None, "which is not installed")])
def test_a_release_of_lmcache_that_does_not_fit_is_refused_by_name(monkeypatch, version, named):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(ConfigError, match=rf"reached with lmcache 0\.5\.6, {named}"):
        require_lmcache()


def test_chunks_have_256_tokens_and_host_memory_5_gib_unless_set():
    found = read(LMCACHE_REMOTE_URL=URL)
    assert (found.chunk_size, found.host_bytes) == (256, 5 * 2**30)


def test_the_environment_goes_before_the_file_and_options_before_both(tmp_path):
    file = tmp_path / "lmcache.yaml"
    file.write_text("chunk_size: 64\nremote_url: lm://file:1\nlocal_cpu: false\nremote_serde: naive\n")
    found = read(LMCACHE_CONFIG_FILE=str(file))
    assert (found.host, found.port, found.chunk_size, found.unused) == ("file", 1, 64, ("local_cpu",))
    found = read(LMCACHE_CONFIG_FILE=str(file), LMCACHE_CHUNK_SIZE="128")
    assert (found.host, found.chunk_size) == ("file", 128)
    found = read({"chunk_size": 512}, LMCACHE_CONFIG_FILE=str(file), LMCACHE_CHUNK_SIZE="128", LMCACHE_REMOTE_URL=URL)
    assert (found.host, found.chunk_size) == ("localhost", 512)


def test_settings_without_effect_are_named_in_the_log(caplog):
    caplog.set_level(logging.INFO, "kvsdk.lmcache")
    read(
        LMCACHE_REMOTE_URL=URL, LMCACHE_LOCAL_CPU="True", LMCACHE_ENABLE_P2P="1", LMCACHE_TRACK_USAGE="false",
        LMCache_CHUNK_SIZE="256", PATH="/bin",
    ).log()  # fmt: skip
    info, warning = caplog.records
    assert info.getMessage() == "settings of LMCache that kvsdk does not use: LMCACHE_ENABLE_P2P, LMCACHE_LOCAL_CPU"
    assert warning.levelno == logging.WARNING
    assert warning.getMessage() == "LMCache_CHUNK_SIZE is read by nothing; LMCache's name for it is LMCACHE_CHUNK_SIZE"


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({}, "remote_url is not set; set LMCACHE_REMOTE_URL"),
        ({"LMCACHE_REMOTE_URL": "redis://host:1"}, "LMCACHE_REMOTE_URL='redis://host:1' is none of the servers"),
        ({"LMCACHE_REMOTE_URL": "grpc://host:1"}, "LMCACHE_REMOTE_URL='grpc://host:1' is none of the servers"),
        ({"LMCACHE_REMOTE_URL": "lm://host"}, "LMCACHE_REMOTE_URL='lm://host' is not lm://host:port"),
        ({"LMCACHE_REMOTE_URL": "lm://host:port"}, "is not lm://host:port"),
        ({"LMCACHE_REMOTE_URL": "lm://host:1/path"}, "is not lm://host:port"),
        ({"LMCACHE_REMOTE_URL": URL, "LMCACHE_CHUNK_SIZE": "many"}, "LMCACHE_CHUNK_SIZE='many' is out of range"),
        ({"LMCACHE_REMOTE_URL": URL, "LMCACHE_CHUNK_SIZE": "-16"}, "LMCACHE_CHUNK_SIZE='-16' is out of range"),
        ({"LMCACHE_REMOTE_URL": URL, "LMCACHE_CHUNK_SIZE": "100"}, "chunk_size=100 is not a multiple of .* of 16"),
        ({"LMCACHE_REMOTE_URL": URL, "LMCACHE_MAX_LOCAL_CPU_SIZE": "nan"}, "LMCACHE_MAX_LOCAL_CPU_SIZE='nan'"),
        ({"LMCACHE_REMOTE_URL": URL, "LMCACHE_REMOTE_SERDE": "cachegen"}, "LMCACHE_REMOTE_SERDE='cachegen'"),
        ({"LMCACHE_CONFIG_FILE": "/no/such/file"}, "LMCACHE_CONFIG_FILE=/no/such/file cannot be read"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(environ, named):
    with pytest.raises(ConfigError, match=named):
        read(**environ)


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", b"\xff\xfe\x00"])
def test_a_file_that_holds_no_settings_is_refused_by_name(tmp_path, content):
    file = tmp_path / "lmcache.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match="LMCACHE_CONFIG_FILE="):
        read(LMCACHE_CONFIG_FILE=str(file))


def test_kvsdk_config_knows_the_options():
    assert LMCacheConnector.option_names == OWN_CONNECTORS["LMCacheConnector"]
    made = transfer_config({"kv_connector": "LMCacheConnector", "kv_role": "kv_both", "remote_url": URL})
    assert made["kv_connector_extra_config"]["remote_url"] == URL
    with pytest.raises(ConfigError, match="nearest known option is 'chunk_size'"):
        transfer_config({"kv_connector": "LMCacheConnector", "kv_role": "kv_both", "chunk_sise": 8})
