"""The Python API of the package, thin over the floors below."""

from flextron.api.checkpoint import load
from flextron.api.convert import convert
from flextron.api.dense import DenseModel
from flextron.api.engine import Completion, Engine
from flextron.api.finetuning import FinetuneResult, finetune
from flextron.api.model import ElasticModel
from flextron.api.texts import Texts, evaluation_text, training_text

__all__ = [
    "Completion",
    "DenseModel",
    "ElasticModel",
    "Engine",
    "FinetuneResult",
    "Texts",
    "convert",
    "evaluation_text",
    "finetune",
    "load",
    "training_text",
]
