"""Sizes and choices of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from flextron.engine.speculation import Speculation
from flextron.errors import FlextronError
from flextron.kernels.decoder import Weights

__all__ = ["EngineSettings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """Sizes of the engine."""

    max_num_seqs: int = 64
    """Requests that run at once."""
    max_num_batched_tokens: int = 256
    """Tokens of an iteration: decode tokens of all running requests, the rest for prompts."""
    kv_cache_gb: float = 1.0
    """Memory of keys and values, 10^9 bytes."""
    page_size: int = 16
    """Tokens of a page."""
    prefix_caching: bool = True
    """Whether requests share the pages of equal beginnings."""
    native: bool | None = None
    """Whether to run the compiled CPU iteration; by default where it can."""
    weights: Weights = "float32"
    """Precision of the matrices; `int8` keeps a copy of eight bits and reads a quarter of the bytes, `int4` one of four
    bits (head, `o` and `down`: eight) and reads about a fifth. Both run in the compiled CPU iteration only. Matrices of
    eight bits meet tokens that are rounded one by one, in whole numbers: with `int8` and without adapters, scores do
    not depend on what else runs."""
    screens_head: bool = True
    """Whether greedy answers find the next token with a copy of the float32 head in eight bits, a quarter of its bytes.
    All tokens that may be the likeliest are then scored exactly, so the answer is the same."""
    adapts_threads: bool = True
    """Whether the compiled iteration runs on fewer threads while other processes hold cores, if that is faster. The
    last digits of logits depend on the number of threads."""
    speculation: Speculation | None = None
    """Whether narrow sub-networks draft tokens that wider ones check."""
    tensor_parallel: int = 1
    """Ranks that share the model, each with a part of every sub-network and `kv_cache_gb` of its own. They run
    PyTorch's operators, each on a GPU or on a part of the processor's cores."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.weights not in get_args(Weights):
            raise FlextronError(f"weights must be one of {', '.join(get_args(Weights))}, not {self.weights!r}")
        if self.tensor_parallel < 1:
            raise FlextronError(f"tensor_parallel must be at least 1, not {self.tensor_parallel}")
        drafts = "float32" if self.speculation is None else self.speculation.weights
        if self.tensor_parallel > 1 and (self.native or self.weights != "float32" or drafts != "float32"):
            raise FlextronError(
                "several ranks run PyTorch's operators on float32 weights; leave out int8, int4 and native, or run on "
                "one rank"
            )
        if self.max_num_seqs < 1 or self.page_size < 1 or not self.kv_cache_gb > 0:
            raise FlextronError("max_num_seqs, page_size and kv_cache_gb must be above 0")
        if self.kv_cache_gb > 1e6:
            raise FlextronError(f"kv_cache_gb is in gigabytes and must be at most 1e6, not {self.kv_cache_gb:g}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise FlextronError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running request gets its token"
            )
