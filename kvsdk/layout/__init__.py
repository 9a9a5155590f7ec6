"""Where each block's bytes lie in a worker's KV cache, and plans that move blocks between two layouts: pure data."""

from kvsdk.layout.cache import CacheLayout, LayerLayout, check_same, layout_of
from kvsdk.layout.plans import LayerPlan, Plan, byte_runs, plan_copy, staging_layout

__all__ = [
    "CacheLayout",
    "LayerLayout",
    "LayerPlan",
    "Plan",
    "byte_runs",
    "check_same",
    "layout_of",
    "plan_copy",
    "staging_layout",
]
