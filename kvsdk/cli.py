"""The `kvsdk` command. Each subcommand lives in its own module, which is imported when that subcommand runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import kvsdk

# name -> (module with a `main(argv) -> int | None`, sentence for the help page)
COMMANDS = {
    "config": ("kvsdk.config", "print the --kv-transfer-config JSON that the installed vLLM accepts"),
    "proxy": ("kvsdk.proxy", "send each prompt to a prefill server and then to a decode server"),
    "demo": ("kvsdk.demo", "hand prompts from one vLLM server to another on this machine and compare the tokens"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `kvsdk COMMAND ...` and return its exit status; `argv` is without the program's name (default: sys.argv)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="kvsdk", description="KV connectors for vLLM.")
    parser.add_argument("--version", action="version", version=f"kvsdk {kvsdk.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, sentence) in COMMANDS.items():
        # The command's own parser answers --help, so this one must let it through.
        subparsers.add_parser(name, help=sentence, add_help=False)
    command, rest = parser.parse_args(argv[:1]).command, argv[1:]
    return importlib.import_module(COMMANDS[command][0]).main(rest) or 0


if __name__ == "__main__":
    sys.exit(main())
