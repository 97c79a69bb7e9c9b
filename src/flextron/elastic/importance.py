"""Which neurons, attention groups and layers matter most, measured on calibration text (Flextron, section 3.1).

One pass, layer by layer: the hidden states of all calibration tokens are kept, each layer is measured and then applied,
so the memory is that of one layer's statistics. Two orders exist. `activation` is the published one: mean magnitude of
a neuron, mean norm of a head's output. `reconstruction` asks what the layer's output would lose: it removes them one
by one, each time the one whose removal (given those already gone) changes the block's output least, and so sees what
magnitudes cannot: outgoing weights, and neurons that stand in for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flextron.model.attention import CausalAttention
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.model.layers import Contraction, Layer, SelfAttention
from flextron.model.rope import rotary_tables

__all__ = ["Importance", "Method", "rank"]

Method = Literal["activation", "reconstruction"]
_CHUNK_SEQUENCES = 1
_CHUNK_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """Orders by falling importance, and how much each layer does."""

    method: Method
    num_tokens: int
    """Calibration tokens that were measured."""
    neurons: tuple[Tensor, ...]
    """MLP neurons of each layer, most important first; int64, (F,)."""
    groups: tuple[Tensor, ...]
    """Attention groups of each layer, most important first; int64, (G,)."""
    layer_scores: tuple[float, ...]
    """1 - cosine similarity of each layer's input and output; near 0 if the layer does little."""

    @property
    def layers_by_importance(self) -> tuple[int, ...]:
        """Layers, the least important first."""
        return tuple(sorted(range(len(self.layer_scores)), key=lambda i: self.layer_scores[i]))


def removal_order(quadratic_UU: Tensor) -> Tensor:
    """Greedy backward elimination: neurons or groups in the order in which they may go, cheapest first.

    Args:
        quadratic_UU: (U, U) for U neurons or groups; removing the set S costs the sum of its entries over S × S.

    Returns:
        (U,) int64.
    """
    cost = quadratic_UU.diagonal().to(torch.float64, copy=True)
    order = torch.empty(len(cost), dtype=torch.long)
    for step in range(len(cost)):
        cheapest = int(cost.argmin())
        order[step] = cheapest
        cost.add_(quadratic_UU[cheapest], alpha=2)
        cost[cheapest] = torch.inf
    return order


class _MLPScore:
    """Statistics of the down projection's input; one object serves the layers in turn.

    Its matrix is the largest block of ranking. Allocated anew for each layer, it often would not fit into what the
    last one left behind, and the heap would grow.
    """

    def __init__(self, width: int, method: Method, device: torch.device) -> None:
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._gram: Tensor | None = None
        if method == "reconstruction":
            self._gram = torch.zeros(width, width, device=device)

    def add(self, h_NF: Tensor) -> None:
        self._sum += h_NF.abs().sum(0, dtype=torch.float32).double().cpu()
        if self._gram is not None:
            self._gram.addmm_(h_NF.t().float(), h_NF.float())

    def take_order(self, down: Contraction) -> Tensor:
        """The order for what was added, which is forgotten."""
        if self._gram is None:
            order = self._sum.argsort(descending=True)
        else:
            w_FD = down.weight.float()
            for gram, rows in zip(self._gram.split(_CHUNK_ROWS), w_FD.split(_CHUNK_ROWS), strict=True):
                gram.mul_(rows @ w_FD.t())
            order = removal_order(self._gram.cpu()).flip(0)
            self._gram.zero_()
        self._sum.zero_()
        return order


class _GroupScore:
    """Statistics of the output projection's input, per attention group."""

    def __init__(self, attention: SelfAttention, num_groups: int, method: Method) -> None:
        self._weight_GdD = attention.o.weight.unflatten(0, (num_groups, -1))
        self._method = method
        self._sum = torch.zeros(num_groups, dtype=torch.float64)
        self._quadratic = torch.zeros(num_groups, num_groups, dtype=torch.float64)

    def add(self, heads_NR: Tensor, head_dim: int) -> None:
        groups = len(self._sum)
        norms_NH = heads_NR.unflatten(1, (-1, head_dim)).float().norm(dim=-1)
        self._sum += norms_NH.unflatten(1, (groups, -1)).sum((0, 2)).double().cpu()
        if self._method == "reconstruction":
            out = torch.einsum("ngd,gde->gne", heads_NR.unflatten(1, (groups, -1)), self._weight_GdD).flatten(1)
            self._quadratic += (out.float() @ out.t().float()).double().cpu()

    def order(self) -> Tensor:
        if self._method == "activation":
            return self._sum.argsort(descending=True)
        return removal_order(self._quadratic).flip(0)


@torch.no_grad()
def rank(decoder: Decoder, tokens_BT: Tensor, method: Method = "reconstruction") -> Importance:
    """Measure importance on calibration sequences.

    Args:
        decoder: the full pretrained model.
        tokens_BT: B sequences of T token ids.
        method: see the module's docstring.
    """
    chunks = [Batch.padded(c.to(decoder.device), decoder.widths) for c in tokens_BT.split(_CHUNK_SEQUENCES)]
    hidden = [decoder.embed(batch) for batch in chunks]
    mlp_score = _MLPScore(decoder.config.intermediate_size, method, decoder.device)
    neurons, groups, scores = [], [], []
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        order_neurons, order_groups, score = _rank_layer(decoder, i, layer, chunks, hidden, mlp_score, method)
        neurons.append(order_neurons)
        groups.append(order_groups)
        scores.append(score)
    return Importance(
        method=method,
        num_tokens=tokens_BT.numel(),
        neurons=tuple(neurons),
        groups=tuple(groups),
        layer_scores=tuple(scores),
    )


def _rank_layer(
    decoder: Decoder,
    i: int,
    layer: Layer,
    chunks: Sequence[Batch],
    hidden: list[Tensor],
    mlp_score: _MLPScore,
    method: Method,
) -> tuple[Tensor, Tensor, float]:
    """Orders and score of one layer; overwrites `hidden` with the layer's outputs.

    In place: a new tensor kept among short-lived ones would pin the memory that those leave behind.
    """
    config = decoder.config
    core = CausalAttention(config)
    group_score = _GroupScore(layer.attention, config.num_groups, method)
    cosine = 0.0
    for batch, x in zip(chunks, hidden, strict=True):
        rope = rotary_tables(config, batch.positions_N, x.dtype)[i]
        (heads,) = layer.attention.heads(layer.attention_norm(x), batch, [config.num_groups], i, rope, core)
        group_score.add(heads, config.head_dim)
        after = x + layer.joining(layer.attention.project([heads], batch, [config.num_groups]), "attention")
        layout = batch.layout([config.intermediate_size])
        (h,) = layer.mlp.neurons(layer.mlp_norm(x if config.parallel_residual else after), layout.blocks)
        mlp_score.add(h)
        y = after + layer.joining(layer.mlp.project(len(x), (h,), layout), "mlp")
        cosine += float(torch.cosine_similarity(x.float(), y.float(), dim=-1).sum())
        x.copy_(y)
    return mlp_score.take_order(layer.mlp.down), group_score.order(), 1 - cosine / sum(len(x) for x in hidden)
