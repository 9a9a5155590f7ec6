"""What the operator of a proxy may set."""

from __future__ import annotations

import dataclasses
import math
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass

from kvsdk.config import format_address, split_address
from kvsdk.errors import ConfigError

MODES = ("auto", "params", "repeat", "early")


@dataclass(frozen=True)
class ProxyConfig:
    """Options of a proxy, checked.

    Attributes:
        prefill, decode: `http://host:port` of the servers, at least one of each.
        host, port: where the proxy listens; port 0 lets the system choose one.
        mode: `params` asks the prefill server for `kv_transfer_params` and passes its answer on; `repeat` only sends
            the prompt to both, as vLLM's first examples did; `auto` asks, and repeats when there is no answer; `early`
            sends to both at once, and the decode server loads while the prefill server computes.
        prefill_kv: for `early`, each prefill server's `kv_ip:kv_port`, in the order of `prefill`.
        connect_timeout: seconds until a connection to a server is given up.
        prefill_timeout: seconds for a whole prefill.
        decode_timeout: seconds that a decode server may be silent; a reply that is not streamed is silent until its
            end.
        client_timeout: seconds that a client may take to send its body, or to take one piece of its reply.
        set_aside: seconds for which a server that could not be connected to is left alone while others can serve.
        close_timeout: seconds that running requests may take to end once the proxy was asked to stop.
        max_body_bytes: largest body of a client's request.

    Raises:
        ConfigError: naming the option, as the command line spells it, and what to change.
    """

    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    mode: str = "auto"
    prefill_kv: tuple[str, ...] = ()
    connect_timeout: float = 2.0
    prefill_timeout: float = 300.0
    decode_timeout: float = 600.0
    client_timeout: float = 60.0
    set_aside: float = 2.0
    close_timeout: float = 5.0
    max_body_bytes: int = 64 * 1024 * 1024

    def __post_init__(self) -> None:
        for name in ("prefill", "decode"):
            object.__setattr__(self, name, _servers(name, getattr(self, name)))
        if self.mode not in MODES:
            raise ConfigError(f"--mode {self.mode} is not one of {', '.join(MODES)}")
        kv = tuple(format_address(*split_address(item, what="--prefill-kv")) for item in self.prefill_kv)
        object.__setattr__(self, "prefill_kv", kv)
        if len(kv) != (len(self.prefill) if self.mode == "early" else 0):
            wanted = "as many --prefill-kv as --prefill" if self.mode == "early" else "no --prefill-kv"
            raise ConfigError(f"--mode {self.mode} takes {wanted}, not {len(kv)}")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} is not a port; set it to 0..65535")
        if self.max_body_bytes < 1:
            raise ConfigError(f"--max-body-bytes {self.max_body_bytes} is out of range; set it to at least 1")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and not (math.isfinite(value) and value > 0):
                raise ConfigError(
                    f"--{field.name.replace('_', '-')} {value} is out of range; set it to seconds above 0"
                )


def _servers(name: str, urls: Sequence[str]) -> tuple[str, ...]:
    if not urls:
        raise ConfigError(f"--{name} is not set; give at least one http://host:port")
    servers = tuple(url.rstrip("/") for url in urls)
    for url in servers:
        parts = urllib.parse.urlsplit(url)
        try:
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            valid = False
        if not valid or parts.path or parts.query or parts.fragment or parts.username is not None:
            raise ConfigError(f"--{name} {url} is not http://host:port")
        if servers.count(url) > 1:
            raise ConfigError(f"--{name} {url} is given more than once; keep one")
    return servers
