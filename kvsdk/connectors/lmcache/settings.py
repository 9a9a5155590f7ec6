"""LMCache's own settings, as its users have them: `LMCACHE_...` in the environment, `LMCACHE_CONFIG_FILE`, and
`kv_connector_extra_config` over both. LMCache itself reads the file first and lets the environment override it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from kvsdk.errors import ConfigError

logger = logging.getLogger("kvsdk.lmcache")

_PREFIX = "LMCACHE_"
_FILE = "LMCACHE_CONFIG_FILE"
_NOT_SETTINGS = frozenset({"LMCACHE_CONFIG_FILE", "LMCACHE_TRACK_USAGE", "LMCACHE_LOG_LEVEL"})
"""About the file, the telemetry and the log of LMCache's own processes."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What kvsdk uses of LMCache's settings.

    Attributes:
        multi_process: whether it is LMCache's multi-process server, and not an `lm://` one.
        host: of the server.
        port: of the server.
        chunk_size: tokens of a chunk.
        host_bytes: of a worker's host memory for chunks.
        unused: settings that were made and that kvsdk does not use, as their users wrote them.
        misspelt: mixed-case `LMCache_...` names in the environment, which nothing reads.
    """

    multi_process: bool
    host: str
    port: int
    chunk_size: int
    host_bytes: int
    unused: tuple[str, ...] = ()
    misspelt: tuple[str, ...] = ()

    def log(self) -> None:
        """Say which settings are without effect."""
        if self.unused:
            logger.info("settings of LMCache that kvsdk does not use: %s", ", ".join(self.unused))
        for name in self.misspelt:
            logger.warning("%s is read by nothing; LMCache's name for it is %s", name, name.upper())


def read_settings(extra: Mapping[str, Any], block_size: int, *, environ: Mapping[str, str] | None = None) -> Settings:
    """Reads and checks the settings.

    Args:
        extra: the connector's own options.
        block_size: tokens of a block in vLLM's cache.
        environ: the process's environment unless given.

    Raises:
        ConfigError: no server is named, or a setting is wrong; one line that names it, where it was made, and what to
            set.
    """
    environ = os.environ if environ is None else environ
    given: dict[str, tuple[str, Any]] = {}
    path = environ.get(_FILE)
    if path:
        given |= {name: (f"{name} in {path}", value) for name, value in _read_file(path).items()}
    for variable, value in environ.items():
        if variable.startswith(_PREFIX) and variable not in _NOT_SETTINGS:
            given[variable.removeprefix(_PREFIX).lower()] = (variable, value)
    for name, value in extra.items():
        # LMCache's own connector has its settings there with a prefix.
        given[name.removeprefix("lmcache.").replace("mp.", "mp_")] = (name, value)

    multi_process, host, port = _server(given)
    chunk_size = int(_number(*given.pop("chunk_size", ("chunk_size", 256)), whole=True))
    gigabytes = _number(*given.pop("max_local_cpu_size", ("max_local_cpu_size", 5.0)))
    where, serde = given.pop("remote_serde", ("remote_serde", "naive"))
    if serde not in ("naive", None):
        raise ConfigError(f"{where}={serde!r} is not supported: chunks are stored as they are; set it to naive")
    if chunk_size % block_size:
        raise ConfigError(
            f"chunk_size={chunk_size} is not a multiple of vLLM's block size of {block_size}; set chunk_size to "
            f"{-(-chunk_size // block_size) * block_size}, or vLLM's --block-size to a divisor of it"
        )
    unused = tuple(sorted(where.partition(" in ")[0] for where, _ in given.values()))
    misspelt = tuple(sorted(name for name in environ if name.startswith("LMCache_")))
    return Settings(multi_process, host, port, chunk_size, int(gigabytes * 2**30), unused, misspelt)


def _read_file(path: str) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(f"{_FILE} is set, but PyYAML is not installed; install kvsdk[lmcache]") from error
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{_FILE}={path} cannot be read: {' '.join(str(error).split())}") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{_FILE}={path} is no mapping of settings")
    return {str(name): value for name, value in (content or {}).items()}


def _server(given: dict[str, tuple[str, Any]]) -> tuple[bool, str, int]:
    """Whether it is a multi-process server, its host and port."""
    where, url = given.pop("remote_url", ("", None))
    host_at, host = given.pop("mp_host", ("", None))
    port_at, port = given.pop("mp_port", ("", None))
    if url and (host or port):
        raise ConfigError(f"{where} and {host_at or port_at} name two servers; leave one out")
    if host or port:
        where = host_at or port_at
        url = f"{host or 'tcp://localhost'}:{port or 5555}"
        url = url if "://" in url else f"tcp://{url}"
    if not url:
        raise ConfigError(
            "remote_url is not set; set LMCACHE_REMOTE_URL to lm://host:port, where `python -m lmcache.v1.server host "
            "port` listens, or to tcp://host:port, where `lmcache server` does"
        )
    try:
        parts = urlsplit(str(url))
        named, number = parts.hostname, parts.port
    except ValueError:
        named = number = None
    if not named or not number or parts.path.strip("/"):
        raise ConfigError(f"{where}={url!r} is not lm://host:port or tcp://host:port")
    if parts.scheme not in ("lm", "tcp"):
        raise ConfigError(
            f"{where}={url!r} is none of the servers that kvsdk speaks to: lm://host:port (`python -m "
            "lmcache.v1.server`) and tcp://host:port (`lmcache server`, over ZMQ)"
        )
    return parts.scheme == "tcp", named, number


def _number(where: str, value: Any, *, whole: bool = False) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or number <= 0 or (whole and number != int(number)):
        raise ConfigError(f"{where}={value!r} is out of range; set it to a {'whole ' if whole else ''}number above 0")
    return number
