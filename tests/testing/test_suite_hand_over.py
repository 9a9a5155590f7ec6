"""The in-process hand-over connector passes the suite."""

import pytest

from kvsdk.testing.capabilities import IN_PROCESS_HANDOVER as capabilities
from kvsdk.testing.in_process import HandOverConnector as connector
from kvsdk.testing.suite import *  # noqa: F403

pytestmark = pytest.mark.compat

__all__ = ["capabilities", "connector"]
