"""`kvsdk demo`, and what it is made of: `kvsdk.demo.models` makes small models, `kvsdk.demo.servers` starts servers.

The tests use both as well. Importing this package loads neither.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """`kvsdk demo`; see `kvsdk.demo.run.main`."""
    from kvsdk.demo.run import main

    return main(argv)
