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
