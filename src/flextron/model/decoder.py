"""The one decoder that trains, serves and finetunes every family: embeddings, layers, final norm, head.

It runs a `Batch`, whose segments each name a sub-network, and touches only the weights that those sub-networks have.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flextron.model.attention import Attention, CausalAttention
from flextron.model.batch import Batch
from flextron.model.config import DecoderConfig
from flextron.model.layers import Layer
from flextron.model.norms import make_norm
from flextron.model.outer import Outer
from flextron.model.rope import rotary_tables
from flextron.spec import SubnetSpec

__all__ = ["Decoder", "capped"]


def capped(x: Tensor, cap: float | None) -> Tensor:
    """Cap · tanh(x / cap), which x is for small numbers (Gemma 2); x itself without a cap."""
    return x if cap is None else (x / cap).tanh_().mul_(cap) if not x.requires_grad else (x / cap).tanh() * cap


@lru_cache(maxsize=16)
def _rounded(scale: float, dtype: torch.dtype) -> float:
    """A number rounded as the weights are, which is what Gemma was trained with."""
    return float(torch.tensor(scale, dtype=dtype))


class Decoder(nn.Module):
    """A causal language model whose layers hold given widths (by default, the config's full ones)."""

    def __init__(self, config: DecoderConfig, widths: SubnetSpec | None = None) -> None:
        """Allocate parameters; use `torch.device("meta")` to allocate none.

        Args:
            config: shape and family traits.
            widths: widths that the layers hold; an extracted sub-network holds less than the config's.
        """
        super().__init__()
        self.config = config
        self.widths = widths or config.full_spec
        self.gradient_checkpointing = False
        self.num_ranks = 1
        """Processes that share its weights; more than 1 for a shard (`flextron.parallel.tensor`)."""
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.rope is None:
            self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, widths) for widths in self.widths.layers)
        self.final_norm = make_norm(config, config.logits_scale)
        if not config.tie_word_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The output embedding, (vocabulary, hidden size)."""
        return self.embedding.weight if self.config.tie_word_embeddings else self.head.weight

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return self.embedding.weight.dtype

    def held(self, spec: SubnetSpec) -> SubnetSpec:
        """Widths of what this process runs of a sub-network: all of it, unless the decoder is a shard."""
        return spec

    def embed(self, batch: Batch) -> Tensor:
        """What enters the first layer, (N, hidden size)."""
        x_ND: Tensor = self.embedding(batch.tokens_N)
        if batch.outer:
            x_ND = x_ND.clone()
            for rows, outer in batch.outer:
                x_ND[rows] = outer.embedded(batch.tokens_N[rows], x_ND[rows])
        if self.config.embedding_scale != 1:
            x_ND = x_ND * _rounded(self.config.embedding_scale, x_ND.dtype)
        return x_ND if self.config.rope is not None else x_ND + self.positions(batch.positions_N)

    def forward(self, batch: Batch, attention: Attention | None = None) -> Tensor:
        """Final hidden states, normalised, of every token.

        Args:
            batch: tokens and the sub-network of each segment, nested in `widths`.
            attention: backend; whole sequences from position 0 by default.

        Returns:
            (N, hidden size).
        """
        attention = attention or CausalAttention(self.config)
        x_ND = self.embed(batch)
        ropes = rotary_tables(self.config, batch.positions_N, x_ND.dtype)
        for i, layer in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_ND = checkpoint(layer, x_ND, batch, i, ropes[i], attention, use_reentrant=False)
            else:
                x_ND = layer(x_ND, batch, i, ropes[i], attention)
        out: Tensor = self.final_norm(x_ND)
        return out

    def logits(self, hidden_ND: Tensor, outer: Outer | None = None) -> Tensor:
        """Scores over the vocabulary, (N, vocabulary), of final hidden states.

        Args:
            hidden_ND: the hidden states.
            outer: what their tokens' adapter has beside the head, if anything.
        """
        head = self.head_weight
        scores_NV = F.linear(hidden_ND, head) if outer is None else outer.scores(hidden_ND, head)
        return capped(scores_NV, self.config.logits_cap)
