"""Serving: continuous batching of requests that each have their own sub-network, over a paged KV cache."""

from flextron.engine.coserving import CoServing, Filler
from flextron.engine.engine import EngineCore, EngineSettings, Logprobs, StepOutput
from flextron.engine.sequence import FinishReason, Network, Sequence
from flextron.engine.speculation import Speculation

__all__ = [
    "CoServing",
    "EngineCore",
    "EngineSettings",
    "Filler",
    "FinishReason",
    "Logprobs",
    "Network",
    "Sequence",
    "Speculation",
    "StepOutput",
]
