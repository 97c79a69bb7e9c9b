"""Iterations of many sequences over a paged KV cache by PyTorch's operators, in CUDA graphs where there is a GPU."""

from flextron.paged.spans import Span
from flextron.paged.step import PagedStep

__all__ = ["PagedStep", "Span"]
