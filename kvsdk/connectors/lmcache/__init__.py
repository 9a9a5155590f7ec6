"""`LMCacheConnector`: finished chunks of prompts, kept in an LMCache server and shared by any number of vLLM servers.

A prompt's KV is stored in chunks of `chunk_size` tokens, named by their content, and found by prompt prefix. Chunks are
fetched into host memory and checked there before vLLM is promised anything: see `docs/lmcache.md`.
"""

from kvsdk.config import OWN_CONNECTORS
from kvsdk.connector.interface import Connector
from kvsdk.connectors.lmcache.scheduler import LMCacheScheduler
from kvsdk.connectors.lmcache.worker import LMCacheWorker


class LMCacheConnector(Connector):
    """See the module; settings are in `docs/lmcache.md`."""

    scheduler_half = LMCacheScheduler
    worker_half = LMCacheWorker
    option_names = OWN_CONNECTORS["LMCacheConnector"]


__all__ = ["LMCacheConnector", "LMCacheScheduler", "LMCacheWorker"]
