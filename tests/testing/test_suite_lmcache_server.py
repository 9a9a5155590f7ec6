"""LMCacheConnector passes the suite over LMCache's own server, `python -m lmcache.v1.server`."""

import pytest
import test_suite_lmcache as over_lm
from support.lmcache_servers import LMServer, needs_lmcache
from test_suite_lmcache import capabilities, connector, damage, options

from kvsdk.testing.suite import *  # noqa: F403

pytestmark = needs_lmcache


@pytest.fixture(scope="module", autouse=True)
def lm_server():
    with LMServer() as server:
        over_lm.server_port = server.port
        yield


__all__ = ["capabilities", "connector", "damage", "lm_server", "options"]
