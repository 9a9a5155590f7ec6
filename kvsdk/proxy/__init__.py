"""`kvsdk proxy`: one OpenAI endpoint in front of prefill and decode servers.

Needs aiohttp, which `kvsdk[proxy]` installs; importing this package does not.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence

from kvsdk.errors import ConfigError
from kvsdk.proxy.config import MODES, ProxyConfig

__all__ = ["ProxyConfig", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """`kvsdk proxy`: serves until SIGTERM or SIGINT. Returns 0, or 2 for a mistake, named on one line."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(name)s: %(message)s")
    try:
        config = ProxyConfig(**vars(arguments))
        try:
            from kvsdk.proxy.app import serve
        except ModuleNotFoundError as error:
            if error.name != "aiohttp":
                raise
            raise ConfigError('aiohttp is not installed; install it with: pip install "kvsdk[proxy]"') from error
        asyncio.run(serve(config))
    except ConfigError as error:
        print(f"kvsdk proxy: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    default = {field.name: field.default for field in ProxyConfig.__dataclass_fields__.values()}
    parser = argparse.ArgumentParser(
        prog="kvsdk proxy",
        description="One OpenAI endpoint in front of vLLM prefill and decode servers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    servers = {"action": "append", "required": True, "metavar": "http://HOST:PORT", "default": argparse.SUPPRESS}
    parser.add_argument("--prefill", **servers, help="a prefill server; give it once for each")
    parser.add_argument("--decode", **servers, help="a decode server; give it once for each")
    parser.add_argument("--host", default=default["host"], help="address to listen on")
    parser.add_argument("--port", type=int, default=default["port"], help="port to listen on; 0 lets the system choose")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default=default["mode"],
        help="params: pass kv_transfer_params on; repeat: only send the prompt to both; auto: what the servers can do; "
        "early: send to both at once",
    )
    parser.add_argument(
        "--prefill-kv",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="for --mode early: kv_ip:kv_port of a prefill server; give it once for each, in the same order",
    )
    seconds = {"type": float, "metavar": "SECONDS"}
    for name, text in (
        ("connect_timeout", "deadline of a connection to a server"),
        ("prefill_timeout", "deadline of a prefill; past it the decode server computes the prompt itself"),
        ("decode_timeout", "longest silence of a decode server"),
        ("client_timeout", "longest wait for a client to send its body or to take a piece of its reply"),
        ("set_aside", "how long a server that cannot be connected to is left alone"),
        ("close_timeout", "how long running requests may take to end after a signal"),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", default=default[name], help=text, **seconds)
    parser.add_argument(
        "--max-body-bytes", type=int, metavar="BYTES", default=default["max_body_bytes"], help="largest request body"
    )
    return parser
