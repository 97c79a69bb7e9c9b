"""Flextron: one pretrained LLM, a nested sub-network for every latency, memory and accuracy target."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from flextron.errors import FlextronError, UnsupportedModelError
from flextron.spec import LayerSpec, SearchSpace, SubnetSpec, Target

if TYPE_CHECKING:
    from flextron.api import Completion, DenseModel, ElasticModel, Engine, FinetuneResult, convert, finetune, load
    from flextron.generation.sampling import SamplingParams
    from flextron.routing import SearchSettings
    from flextron.training.recipe import TrainRecipe
    from flextron.training.router_recipe import RouterRecipe
    from flextron.training.token_recipe import TokenRouterRecipe

__all__ = [
    "Completion",
    "DenseModel",
    "ElasticModel",
    "Engine",
    "FinetuneResult",
    "FlextronError",
    "LayerSpec",
    "RouterRecipe",
    "SamplingParams",
    "SearchSettings",
    "SearchSpace",
    "SubnetSpec",
    "Target",
    "TokenRouterRecipe",
    "TrainRecipe",
    "UnsupportedModelError",
    "convert",
    "finetune",
    "load",
]

# torch and transformers take seconds to import; specs and errors need neither
_LAZY = {
    "Completion": "flextron.api",
    "DenseModel": "flextron.api",
    "ElasticModel": "flextron.api",
    "Engine": "flextron.api",
    "FinetuneResult": "flextron.api",
    "convert": "flextron.api",
    "finetune": "flextron.api",
    "load": "flextron.api",
    "SamplingParams": "flextron.generation.sampling",
    "SearchSettings": "flextron.routing",
    "RouterRecipe": "flextron.training.router_recipe",
    "TokenRouterRecipe": "flextron.training.token_recipe",
    "TrainRecipe": "flextron.training.recipe",
}


def __getattr__(name: str) -> Any:
    """Import the heavy half of the package when it is first asked for."""
    if name == "__version__":
        return version("flextron")
    if name not in _LAZY:
        raise AttributeError(f"module 'flextron' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
