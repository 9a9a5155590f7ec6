"""The in-process store connector passes the suite."""

import pytest

from kvsdk.testing.capabilities import IN_PROCESS_STORE as capabilities
from kvsdk.testing.in_process import StoreConnector as connector
from kvsdk.testing.suite import *  # noqa: F403

pytestmark = pytest.mark.compat

__all__ = ["capabilities", "connector"]
