"""What an adapter may have beside the embedding and the head: low-rank updates, or matrices of its own.

They lie outside the layers, so every sub-network reads them whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flextron.model.bypass import Bypass

__all__ = ["EmbeddingUpdate", "Outer"]


class EmbeddingUpdate(nn.Module):
    """Low-rank adaptation of an embedding: (x + scale · A[token] Bᵀ) · factors."""

    def __init__(self, a_Vr: Tensor, b_Dr: Tensor, scale: float, factors_D: Tensor | None = None) -> None:
        """Take the parameters; `factors_D` is DoRA's."""
        super().__init__()
        self.scale = scale
        self.a, self.b = nn.Parameter(a_Vr), nn.Parameter(b_Dr)
        self.factors = None if factors_D is None else nn.Parameter(factors_D)

    def forward(self, tokens_N: Tensor, x_ND: Tensor) -> Tensor:
        """The embeddings of tokens, of which `x_ND` are the frozen ones."""
        x_ND = torch.addmm(x_ND, self.a[tokens_N].to(x_ND.dtype), self.b.to(x_ND.dtype).t(), alpha=self.scale)
        return x_ND if self.factors is None else x_ND * self.factors.to(x_ND.dtype)


class Outer(nn.Module):
    """Parts of an adapter beside the embedding and the head."""

    def __init__(
        self,
        *,
        embedding_VD: Tensor | None = None,
        update: EmbeddingUpdate | None = None,
        head_VD: Tensor | None = None,
        bypass: Bypass | None = None,
    ) -> None:
        """Take the parts.

        Args:
            embedding_VD: stands in the place of the model's embedding.
            update: beside either.
            head_VD: stands in the place of the model's head.
            bypass: beside either.
        """
        super().__init__()
        self.embedding = None if embedding_VD is None else nn.Parameter(embedding_VD)
        self.update = update
        self.head = None if head_VD is None else nn.Parameter(head_VD)
        self.bypass = bypass

    def embedded(self, tokens_N: Tensor, x_ND: Tensor) -> Tensor:
        """Embeddings of tokens, of which `x_ND` are the model's own."""
        if self.embedding is not None:
            x_ND = F.embedding(tokens_N, self.embedding).to(x_ND.dtype)
        return x_ND if self.update is None else self.update(tokens_N, x_ND)

    def scores(self, hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
        """Scores over the vocabulary before they are capped, (N, V); `head_VD` is the model's own head."""
        own_VD = head_VD if self.head is None else self.head.to(hidden_ND.dtype)
        scores_NV = F.linear(hidden_ND, own_VD)
        if self.bypass is None:
            return scores_NV
        whole = slice(None)
        return self.bypass.add(scores_NV, self.bypass.read(hidden_ND, whole), whole)
