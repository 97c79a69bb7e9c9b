"""The two models of the suite."""

from __future__ import annotations

from functools import cache

from benchmarks import smollm2
from flextron.api import load
from flextron.model.decoder import Decoder
from flextron.workflows.tiny import tiny_model

__all__ = ["smollm2_decoder", "tiny_decoder"]


@cache
def smollm2_decoder() -> Decoder:
    """SmolLM2-135M, made once."""
    return smollm2.decoder()


@cache
def tiny_decoder() -> Decoder:
    """The model that comes with the package, made once."""
    return load(tiny_model()).decoder.eval().requires_grad_(False)
