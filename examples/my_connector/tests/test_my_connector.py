import pathlib

from my_connector import FileConnector

from kvsdk.testing import Capabilities
from kvsdk.testing.suite import *  # noqa: F403

connector = FileConnector
capabilities = Capabilities(
    saves=True,
    finds_by_prompt=True,
    partial_tail=True,
    shared_prefixes=True,
    block_errors=True,
    verifies=True,
    tensor_parallel=True,
    dynamic_peers=True,
    survives_restart=True,
    restores=True,
)


def options(place):
    return {"folder": place.folder}


def damage(place):
    """Flip a bit of the block that was stored last: the suite's tests of `verifies` and `block_errors` ask for it."""
    stats = {file: file.stat() for file in pathlib.Path(place.folder).glob("*/*")}
    # Files that were written within a few milliseconds may have the same time; inode numbers go up.
    newest = max(stats, key=lambda file: (stats[file].st_mtime_ns, stats[file].st_ino))
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
