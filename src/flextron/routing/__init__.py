"""Finds the sub-network for a target: what each costs on this device, what each loses, and which one fits."""

from flextron.routing.compare import compare_frontiers
from flextron.routing.device import device_fingerprint
from flextron.routing.frontier import Frontier, FrontierPoint
from flextron.routing.latency import LatencyTable, measure_table
from flextron.routing.routers import StaticRouter
from flextron.routing.search import SearchSettings, search_frontier

__all__ = [
    "Frontier",
    "FrontierPoint",
    "LatencyTable",
    "SearchSettings",
    "StaticRouter",
    "compare_frontiers",
    "device_fingerprint",
    "measure_table",
    "search_frontier",
]
