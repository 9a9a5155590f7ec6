"""Options: what an operator may set, how it is read, and the old JSON of vLLM's examples for any release of vLLM.

Three kinds of place hold an option: a field of vLLM's `KVTransferConfig` (which lost `kv_rank`, `kv_parallel_size`,
`kv_ip` and `kv_buffer_size` in 0.32), `kv_connector_extra_config`, and, for `kvsdk config` alone, the top level of
the JSON. All are checked in one place, `parse_options`, before anything is opened, so that a mistake is one line at
boot.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import importlib.metadata
import importlib.util
import ipaddress
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvsdk.errors import ConfigError

log = logging.getLogger("kvsdk.config")

ROLES = ("kv_producer", "kv_consumer", "kv_both")
PIPES = ("auto", "peer", "shm", "gloo", "nccl")

_LMCACHE_SETTINGS = frozenset(
    """
app_id audit_actual_remote_url blend_check_layers blend_min_tokens blend_recompute_ratios blend_special_str
blend_thresholds blocking_timeout_secs cache_policy chunk_size chunk_statistics_auto_exit_target_unique_chunks
chunk_statistics_auto_exit_timeout_hours chunk_statistics_auto_start_statistics chunk_statistics_strategy
controller_pull_url controller_reply_url enable_async_loading enable_blending enable_chunk_statistics
enable_controller enable_hidden_state_cache enable_kv_events enable_lazy_memory_allocator enable_p2p enable_pd
enable_scheduler_bypass_lookup external_lookup_client extra_config gds_backend gds_buffer_size gds_path
gds_path_sharding hidden_state_layers hidden_states_retrieve_mode hit_miss_ratio internal_api_server_enabled
internal_api_server_host internal_api_server_include_index_list internal_api_server_port_start
internal_api_server_socket_path_prefix lazy_memory_expand_trigger_ratio lazy_memory_initial_ratio
lazy_memory_safe_size lazy_memory_step_ratio lmcache_instance_id lmcache_worker_heartbeat_delay_time
lmcache_worker_heartbeat_time lmcache_worker_ids lmcache_worker_ports local_cpu local_cpu_use_hugepages local_disk
local_disk_path_sharding lookup_server_worker_ids lookup_timeout_ms maru_path maru_pool_size
max_hidden_state_cpu_size max_local_cpu_size max_local_disk_size min_retrieve_tokens mp_host mp_port nixl_backends
nixl_buffer_device nixl_buffer_size numa_mode p2p_host p2p_init_ports p2p_lookup_ports pd_allocation_timeout_sec
pd_backend_mode pd_bidirectional pd_buffer_device pd_buffer_size pd_condition_poll_interval_sec pd_max_prefill_len
pd_peer_alloc_port pd_peer_host pd_peer_init_port pd_peer_query_port pd_proxy_host pd_proxy_port pd_role
pd_shutdown_timeout_sec pd_skip_proxy_notification pin_check_interval_sec pin_timeout_sec pre_caching_hash_algorithm
priority_limit py_enable_gc remote_config_url remote_serde remote_storage_plugins remote_url reserve_local_cpu_size
retrieve_locations run_script_api_enabled runtime_plugin_locations save_decode_cache save_unfull_chunk
script_allowed_imports storage_plugins store_location transfer_channel use_gds use_gpu_connector_v3 use_layerwise
""".split()  # noqa: SIM905
)
"""What LMCache 0.5.6 reads. Most have no meaning here; whoever sets one is told so, and who misspells one as well."""

OWN_CONNECTORS: Mapping[str, frozenset[str]] = {
    "PyNcclConnector": frozenset(),
    "LMCacheConnector": frozenset(
        {*_LMCACHE_SETTINGS, *(f"lmcache.{name}" for name in _LMCACHE_SETTINGS)}
        | {f"lmcache.mp.{name}" for name in ("host", "port", "mq_timeout", "heartbeat_interval")}
    ),
}
"""Connectors of this package, with the options that each has beside those of `Options`."""

CONNECTOR_GROUP = "kvsdk.connectors"
"""Entry-point group in which other packages name their connectors, whose options are `Options` and `option_names`."""

CONNECTORS_MODULE = "kvsdk.vllm.connectors"
"""The `kv_connector_module_path` under which vLLM finds every connector of kvsdk's interface."""

NEWEST_VLLM_FIELDS = frozenset(
    {
        "kv_connector",
        "engine_id",
        "kv_buffer_device",
        "kv_role",
        "kv_port",
        "kv_connector_extra_config",
        "kv_connector_module_path",
        "enable_permute_local_kv",
        "kv_load_failure_policy",
    }
)
"""Fields of `KVTransferConfig` in vLLM 0.33, used where no vLLM is installed."""


def _option(default: Any, kind: str, doc: str, **limits: Any) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind, "doc": doc, **limits})


@dataclass(frozen=True)
class Options:
    """Every option of a connector of this package, checked; see `options_table` for defaults, ranges and meanings.

    `parse_options` makes these. `extra` holds, unchecked, what a connector of another package declared for itself.
    """

    kv_role: str = _option("", "choice", "What this server does with KV; must be set.", choices=ROLES)
    kv_rank: int | None = _option(
        None, "int", "Rank of this server among `kv_parallel_size`, as in vLLM's old examples.", low=0
    )
    kv_parallel_size: int = _option(
        2, "int", "Servers that hand KV over, as in vLLM's old examples; others may join whatever it says.", low=1
    )
    kv_ip: str = _option(
        "127.0.0.1", "host", "Address that a producer binds and that its consumers connect to; not a wildcard."
    )
    kv_port: int = _option(
        14579,
        "int",
        "Port that a producer binds; 0 lets the system choose one. Every other port is ephemeral.",
        low=0,
        high=65535,
    )
    kv_buffer_size: int = _option(
        1_000_000_000,
        "bytes",
        "Bytes of KV that a producer's worker keeps; past it the oldest unclaimed offers go.",
        low=1,
    )
    engine_id: str | None = _option(None, "str", "Name of this server in logs and messages; vLLM sets one.")
    producers: tuple[str, ...] = _option(
        (), "addresses", "Each producer that a consumer asks; a `kv_consumer` asks `kv_ip:kv_port` unless set."
    )
    producers_file: str | None = _option(
        None, "str", "File with one `host:port` a line in place of `producers`; read again when it changes."
    )
    lease: float = _option(30.0, "seconds", "How long an offer or a claim lasts without word from its holder.")
    lookup_timeout: float = _option(1.0, "seconds", "How long a request waits for producers' answers.")
    lookup_wait: float = _option(
        0.0, "seconds", "How long a prompt that no producer has is asked for again, before it is computed.", low=0
    )
    announce_wait: float = _option(
        30.0, "seconds", "How long a transfer that a proxy announced to both servers may take to begin.", low=0
    )
    heartbeat: float = _option(
        1.0, "seconds", "Between two signs of life of a producer; a consumer does not ask one that has missed three."
    )
    load_timeout: float = _option(30.0, "seconds", "How long a request's blocks may take to arrive, or to be saved.")
    close_timeout: float = _option(5.0, "seconds", "How long closing may take.")
    pipe: str = _option(
        "auto",
        "choice",
        "What carries the bytes. `peer` reads the other worker's memory in place. `auto` is `peer` within a host where "
        "the system allows it; else NCCL between GPUs; and between CPUs `shm`, shared memory, within a host and gloo "
        "across hosts.",
        choices=PIPES,
    )
    verify: bool = _option(True, "bool", "Whether a block counts as loaded only when its digest matches.")
    staging_bytes: int | None = _option(
        None,
        "bytes",
        "Bytes of the staging memory of a pair of workers, on each side: three messages. 256 MiB on GPUs and 64 MiB on "
        "CPUs unless set; a pair that reads memory in place has none.",
        low=1,
    )
    nccl_max_ctas: int = _option(
        16, "int", "Channels of a pair's NCCL communicator; each costs GPU memory.", low=1, high=32
    )
    max_sms: int = _option(
        64, "int", "SMs of a GPU that a copy or a digest of blocks may take from the model meanwhile.", low=1, high=1024
    )
    model_id: str | None = _option(None, "str", "Name of the weights; servers with different ones refuse each other.")
    curve_secret_key: str | None = _option(
        None, "str", "File with this server's own CURVE certificate, secret key included, in ZMQ's format."
    )
    curve_server_key: str | None = _option(
        None, "str", "File with the public CURVE certificate that all producers present; a consumer needs it."
    )
    curve_client_keys: str | None = _option(
        None, "str", "Directory with the public CURVE certificates of the consumers that a producer lets in."
    )
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def produces(self) -> bool:
        """Whether this server keeps KV for others."""
        return self.kv_role in ("kv_producer", "kv_both")

    @property
    def consumes(self) -> bool:
        """Whether this server loads KV from others."""
        return self.kv_role in ("kv_consumer", "kv_both")


_FIELDS = {field.name: field for field in dataclasses.fields(Options) if field.name != "extra"}

# What vLLM's KVTransferConfig itself fills in (0.26 to 0.31 hold all of these, later releases fewer). A field with
# this value cannot be told from one that nobody set, so that it never contradicts the extra config.
_VLLM_DEFAULTS = {
    "kv_role": None,
    "kv_rank": None,
    "kv_parallel_size": 1,
    "kv_ip": "127.0.0.1",
    "kv_port": 14579,
    "kv_buffer_size": 1e9,
    "engine_id": None,
}


def parse_options(
    config: Mapping[str, Any] | object,
    *,
    extra: Mapping[str, Any] | None = None,
    also: Collection[str] = frozenset(),
) -> Options:
    """Reads and checks every option. Opens no file and no socket.

    Args:
        config: vLLM's `KVTransferConfig` of any release, or a mapping with the same names.
        extra: its `kv_connector_extra_config`; read from `config` unless given.
        also: names that the connector declares for itself; what the extra config says of them ends in `Options.extra`.

    Raises:
        ConfigError: an option is unknown, of the wrong type, out of range, contradicts another or lacks one that it
        needs.
            One line that names the option and says what to change.
    """
    if extra is None:
        extra = _get(config, "kv_connector_extra_config")
    extra = {} if extra is None else extra
    if not isinstance(extra, Mapping):
        raise ConfigError(f"kv_connector_extra_config is {_type_name(extra)}; make it an object of options")
    for name in extra:
        if name not in _FIELDS and name not in also:
            nearest = _nearest(name, {*_FIELDS, *also})
            raise ConfigError(f"unknown option {name!r} in kv_connector_extra_config{nearest}")

    given: dict[str, Any] = {}
    for name, vllm_default in _VLLM_DEFAULTS.items():
        value = _get(config, name)
        if value is not None and not _same(value, vllm_default):
            given[name] = value
    for name, value in extra.items():
        if name in also and name not in _FIELDS:
            continue
        if name in given and not _same(given[name], value):
            raise ConfigError(
                f"{name} is {given[name]!r}, but {value!r} in kv_connector_extra_config; keep one of them"
            )
        if value is not None:
            given[name] = value

    checked = {name: _check(_FIELDS[name], value) for name, value in given.items()}
    checked["extra"] = {name: extra[name] for name in extra if name in also and name not in _FIELDS}
    return _check_together(Options(**checked))


def _get(config: Mapping[str, Any] | object, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _same(a: Any, b: Any) -> bool:
    # True == 1 in Python, but a boolean is never what an integer option means.
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _type_name(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def _nearest(name: Any, known: Collection[str]) -> str:
    close = difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=0.0)
    return f"; the nearest known option is {close[0]!r}" if close else ""


def _check(field: dataclasses.Field, value: Any) -> Any:
    """One option's value as the type that `Options` declares."""
    name, limits = field.name, field.metadata
    kind = limits["kind"]
    if kind == "choice":
        if value not in limits["choices"] or not isinstance(value, str):
            raise ConfigError(f"{name}={value!r} is not one of {', '.join(limits['choices'])}")
        return value
    if kind == "bool":
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r} is {_type_name(value)}; set it to true or false")
        return value
    if kind in ("str", "host"):
        if not isinstance(value, str) or not value or not value.isprintable() or value != value.strip():
            raise ConfigError(f"{name}={value!r} is not a string of printable characters without blanks around it")
        return _check_host(name, value) if kind == "host" else value
    if kind == "addresses":
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f'{name}={value!r} is {_type_name(value)}; make it a list such as ["127.0.0.1:14579"]')
        addresses = tuple(format_address(*split_address(item, what=name)) for item in value)
        for address in addresses:
            if addresses.count(address) > 1:
                raise ConfigError(f"{name} names {address} more than once; keep one")
        return addresses
    return _check_number(name, kind, value, limits.get("low"), limits.get("high"))


def _check_number(name: str, kind: str, value: Any, low: int | None, high: int | None) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name}={value!r} is {_type_name(value)}; set it to {_wanted(kind, low, high)}")
    if kind == "seconds":
        if not (math.isfinite(value) and (value > 0 or value == low)):
            raise ConfigError(f"{name}={value!r} is out of range; set it to {_wanted(kind, low, high)}")
        return float(value)
    # Bytes are often written as 5e9, which JSON reads as a float.
    whole = isinstance(value, int) or (kind == "bytes" and math.isfinite(value) and value == int(value))
    if not whole or (low is not None and value < low) or (high is not None and value > high):
        raise ConfigError(f"{name}={value!r} is out of range; set it to {_wanted(kind, low, high)}")
    return int(value)


def _wanted(kind: str, low: int | None, high: int | None) -> str:
    if kind == "seconds":
        return "a number of seconds above 0" if low is None else "a number of seconds, 0 or above"
    unit = "a whole number of bytes, such as 1e9," if kind == "bytes" else "an integer"
    return f"{unit} from {low} to {high}" if high is not None else f"{unit} of at least {low}"


def _check_host(name: str, host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if any(c in host for c in ":/[] *") or not host.isascii():
            raise ConfigError(f"{name}={host!r} is not an IP address or a host name") from None
        return host
    if address.is_unspecified:
        raise ConfigError(f"{name}={host} is a wildcard; set it to an address that consumers can connect to")
    return host


def split_address(text: Any, *, what: str = "address") -> tuple[str, int]:
    """`"host:port"` or `"[ipv6]:port"` as host (without brackets) and port (1..65535).

    Raises:
        ConfigError: it is neither; the message begins with `what`.
    """
    host, colon, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not (host and colon and len(port) <= 5 and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ConfigError(f"{what}: {text!r} is not host:port with a port from 1 to 65535")
    return _check_host(what, host) if ":" not in host else host, int(port)


def format_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_together(options: Options) -> Options:
    """Refuses contradictions between options, and fills in what depends on another one."""
    role = options.kv_role
    if not role:
        raise ConfigError(f"kv_role is not set; set it to one of {', '.join(ROLES)}")
    if options.kv_parallel_size < 2 and role != "kv_both":
        raise ConfigError(f"kv_parallel_size=1 leaves {role} without a peer; set it to at least 2")
    if options.kv_rank is not None and options.kv_rank >= options.kv_parallel_size:
        raise ConfigError(
            f"kv_rank={options.kv_rank} is out of range for kv_parallel_size={options.kv_parallel_size}; "
            f"set kv_rank below {options.kv_parallel_size} or kv_parallel_size to at least {options.kv_rank + 1}"
        )
    if options.producers and options.producers_file:
        raise ConfigError("producers and producers_file contradict each other; keep one of them")
    named = "producers" if options.producers else "producers_file" if options.producers_file else None
    if named and not options.consumes:
        raise ConfigError(f"{named} is set, but a {role} asks no producer; remove {named} or set kv_role to kv_both")
    if role == "kv_consumer" and not named:
        if options.kv_port == 0:
            raise ConfigError(
                "kv_port=0 leaves kv_consumer without a producer; set it to the producer's, or set producers"
            )
        options = dataclasses.replace(options, producers=(format_address(options.kv_ip, options.kv_port),))
    _check_curve(options)
    if options.produces and options.curve_secret_key is None and not _is_loopback(options.kv_ip):
        _warn_open(options.kv_ip)
    return options


def _check_curve(options: Options) -> None:
    needed = {"curve_secret_key"}
    if options.produces:
        needed.add("curve_client_keys")
    if options.consumes:
        needed.add("curve_server_key")
    curve = ("curve_secret_key", "curve_server_key", "curve_client_keys")
    present = {name for name in curve if getattr(options, name) is not None}
    if not present:
        return
    for name in curve:
        if name in needed and name not in present:
            raise ConfigError(f"{name} is not set, but {min(present)} is; a {options.kv_role} needs both")
        if name in present and name not in needed:
            raise ConfigError(f"{name} is set, but a {options.kv_role} has no use for it; remove it")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@functools.cache
def _warn_open(host: str) -> None:
    log.warning(
        "kv_ip=%s is not a loopback address and there are no CURVE keys: whoever reaches it can read KV",
        host,
    )


class Producers:
    """The producers that a consumer asks, which may change while it serves. Safe to use from several threads.

    Args:
        options: a consumer's options.

    Raises:
        ConfigError: `producers_file` cannot be read, or a line of it is not `host:port`.
    """

    def __init__(self, options: Options):
        self._path = options.producers_file
        self._lock = threading.Lock()
        self._current = options.producers
        self._seen: tuple[int, ...] | None = None
        if self._path is not None:
            self._seen, self._current = self._read()

    def current(self) -> tuple[str, ...]:
        """The producers now, as `host:port`. A file that has become wrong leaves the last good list in force."""
        if self._path is None:
            return self._current
        with self._lock:
            seen = self._stamp()
            if seen != self._seen:
                self._seen = seen
                try:
                    self._seen, self._current = self._read()
                except ConfigError as error:
                    log.warning("%s; going on with %s", error, ", ".join(self._current) or "no producer")
                else:
                    log.info("producers_file=%s now names %s", self._path, ", ".join(self._current) or "no producer")
            return self._current

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            stat = os.stat(self._path)
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
        # The stamp is taken first: a change between the two is then seen by the next call.
        stamp = self._stamp()
        try:
            with open(self._path, encoding="utf-8") as file:
                lines = file.read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"producers_file={self._path} cannot be read: {error}") from error
        found: dict[str, None] = {}
        for number, line in enumerate(lines, 1):
            text = line.split("#", 1)[0].strip()
            if text:
                found[format_address(*split_address(text, what=f"producers_file={self._path} line {number}"))] = None
        return stamp, tuple(found)


def transfer_config(config: str | Mapping[str, Any], *, known_fields: Collection[str] | None = None) -> dict[str, Any]:
    """The KV transfer config of vLLM's examples, old or new, as the installed vLLM accepts it.

    Fields that vLLM's `KVTransferConfig` does not have move to `kv_connector_extra_config`, and
    `kv_load_failure_policy` becomes `recompute` unless given. The options of a connector of this package, or of one
    that an installed package names in the entry-point group `kvsdk.connectors`, are checked at once. Those of any other
    connector, such as vLLM's own, are not, and a warning says so.

    Args:
        config: JSON text or the object it stands for.
        known_fields: the fields that vLLM has; those of the installed vLLM unless given, or of the newest known
            release where none is installed.

    Raises:
        ConfigError: it is not JSON, names no connector, gives one option twice with different values, an option is
            wrong, or an installed package's connector cannot be loaded.
    """
    config = _load_json(config) if isinstance(config, str) else config
    if not isinstance(config, Mapping):
        raise ConfigError(f"the KV transfer config is {_type_name(config)}; make it an object such as {_EXAMPLE}")
    connector = config.get("kv_connector")
    if not isinstance(connector, str) or not connector:
        raise ConfigError(f"kv_connector={connector!r} names no connector; set it, as in {_EXAMPLE}")
    fields = installed_fields() if known_fields is None else known_fields
    extra = config.get("kv_connector_extra_config")
    extra = {} if extra is None else extra
    if not isinstance(extra, Mapping):
        raise ConfigError(f"kv_connector_extra_config is {_type_name(extra)}; make it an object of options")

    also = _option_names(connector, config.get("kv_connector_module_path"))
    kept: dict[str, Any] = {}
    moved = dict(extra)
    for name, value in config.items():
        if name == "kv_connector_extra_config":
            continue
        if also is not None and not any(name in known for known in (_FIELDS, also, fields, NEWEST_VLLM_FIELDS)):
            raise ConfigError(f"unknown option {name!r}{_nearest(name, {*_FIELDS, *also, *fields})}")
        if name in extra and not _same(extra[name], value):
            raise ConfigError(f"{name} is {value!r}, but {extra[name]!r} in kv_connector_extra_config; keep one")
        (kept if name in fields else moved)[name] = value
    if also is not None:
        # vLLM demands some of its fields at the top, such as kv_role.
        kept.update((name, moved.pop(name)) for name in [*moved] if name in _FIELDS and name in fields)
        # As an extra config, everything counts as given, even a value that happens to be vLLM's own default.
        parse_options(
            {}, extra={**{name: value for name, value in kept.items() if name in _FIELDS}, **moved}, also=also
        )
    if moved:
        kept["kv_connector_extra_config"] = moved
    kept.setdefault("kv_load_failure_policy", "recompute")
    return kept


def _option_names(connector: str, module_path: Any) -> frozenset[str] | None:
    """The options that a connector has beside those of `Options`; None where they cannot be known here, which is
    logged unless vLLM is told to load a class of its own kind.
    """
    if module_path not in (None, CONNECTORS_MODULE):
        return None
    if connector in OWN_CONNECTORS:
        return OWN_CONNECTORS[connector]
    installed = {point.name: point.value for point in importlib.metadata.entry_points(group=CONNECTOR_GROUP)}
    by_path = module_path is not None and ":" in connector
    target = connector if by_path else installed.get(connector)
    if target is None:
        (nearest,) = difflib.get_close_matches(connector, sorted({*OWN_CONNECTORS, *installed}), n=1, cutoff=0.0)
        log.warning(
            "%s is neither kvsdk's nor an installed package's connector: its options were not checked; the nearest "
            "known connector is %r",
            connector,
            nearest,
        )
        return None
    module, _, name = target.partition(":")
    try:
        return frozenset(getattr(importlib.import_module(module), name).option_names)
    except Exception as error:  # whatever another package does when it is imported
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if by_path:
            # The server may have a path that this process does not have.
            log.warning("%s cannot be loaded here (%s): its options were not checked", connector, reason)
            return None
        raise ConfigError(f"{connector} cannot be loaded from {target}: {reason}") from error


_EXAMPLE = '{"kv_connector": "PyNcclConnector", "kv_role": "kv_producer"}'


def _load_json(text: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in items:
            if name in found and not _same(found[name], value):
                raise ConfigError(f"{name} is given twice, as {found[name]!r} and {value!r}; keep one of them")
            found[name] = value
        return found

    def constant(name: str) -> Any:
        raise ConfigError(f"the KV transfer config is not valid JSON: {name} is no JSON number; write a finite one")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise ConfigError(f"the KV transfer config is not valid JSON: {where}; write it as {_EXAMPLE}") from None
    except RecursionError:
        raise ConfigError(f"the KV transfer config is nested too deeply; write it as {_EXAMPLE}") from None


def installed_fields() -> frozenset[str]:
    """The fields of the installed vLLM's `KVTransferConfig`, or of the newest known release where there is none.

    They are read from vLLM's source: importing that class imports torch and half of vLLM, which takes seconds, and
    this runs in front of every `vllm serve`.
    """
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = os.path.join(folder, "config", "kv_transfer.py")
        try:
            with open(path, encoding="utf-8") as file:
                return _class_fields(file.read(), "KVTransferConfig")
        except (OSError, SyntaxError, LookupError) as error:
            log.warning("cannot read the fields of vLLM's KVTransferConfig (%s); taking those of vLLM 0.33", error)
    return NEWEST_VLLM_FIELDS


def _class_fields(source: str, name: str) -> frozenset[str]:
    """Names of the annotated attributes of class `name` in Python `source`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            targets = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
            return frozenset(target.id for target in targets if isinstance(target, ast.Name))
    raise LookupError(f"no class {name}")


def kv_transfer_config(config: str | Mapping[str, Any]) -> Any:
    """`vllm.config.KVTransferConfig` for `LLM(..., kv_transfer_config=...)`, made as `kvsdk config` makes it.

    Imports vLLM, which takes seconds.

    Raises:
        ConfigError: see `transfer_config`; also where vLLM is not installed or refuses the result.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed here; install a release from 0.26.0 on")
    fields = transfer_config(config)

    from vllm.config.kv_transfer import KVTransferConfig

    try:
        return KVTransferConfig(**fields)
    except ValueError as error:
        raise ConfigError("vLLM refuses the KV transfer config: " + " ".join(str(error).split())) from error


def options_table() -> str:
    """Every option as a Markdown table: name, type and range, default, meaning. The documentation embeds it."""
    rows = ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in _FIELDS.items():
        kind, limits = field.metadata["kind"], field.metadata
        kinds = {"str": "string", "host": "address", "addresses": "list of `host:port`", "bool": "boolean"}
        if kind == "choice":
            text = ", ".join(f"`{choice}`" for choice in limits["choices"])
        elif kind in kinds:
            text = kinds[kind]
        elif kind == "seconds":
            text = "seconds, above 0" if "low" not in limits else "seconds, at least 0"
        else:
            unit = "bytes" if kind == "bytes" else "integer"
            low, high = limits["low"], limits.get("high")
            text = f"{unit}, at least {low}" if high is None else f"{unit}, {low} to {high}"
        default = "none" if field.default in (None, "", ()) else f"`{json.dumps(field.default)}`"
        rows.append(f"| `{name}` | {text} | {default} | {limits['doc']} |")
    return "\n".join(rows) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """`kvsdk config JSON`: prints what the installed vLLM accepts, on one line. Returns 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="kvsdk config",
        description="Print a KV transfer config, old or new, as the installed vLLM accepts it: "
        "vllm serve MODEL --kv-transfer-config \"$(kvsdk config '{...}')\"",
    )
    parser.add_argument("json", metavar="JSON", help=f"such as '{_EXAMPLE}'")
    arguments = parser.parse_args(argv)
    try:
        # What a connector's package prints when it is imported must not get into the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            made = json.dumps(transfer_config(arguments.json))
        print(made)
    except ConfigError as error:
        print(f"kvsdk config: {error}", file=sys.stderr)
        return 2
    return 0
