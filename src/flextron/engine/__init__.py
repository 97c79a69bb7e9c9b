"""Serving: continuous batching of requests that each have their own sub-network, over a paged KV cache."""

from flextron.engine.coserving import CoServing, CoServingScheduler
from flextron.engine.engine import EngineCore, StepOutput
from flextron.engine.pooling import Pooling
from flextron.engine.ranks import follow
from flextron.engine.request import FinishReason, Network, Request
from flextron.engine.scores import Logprobs
from flextron.engine.settings import EngineSettings
from flextron.engine.speculation import Speculation

__all__ = [
    "CoServing",
    "CoServingScheduler",
    "EngineCore",
    "EngineSettings",
    "FinishReason",
    "Logprobs",
    "Network",
    "Pooling",
    "Request",
    "Speculation",
    "StepOutput",
    "follow",
]
