"""A closed-form start for elastic training: every output projection solved for all its prefixes at once.

Some sub-networks are run side by side with the full model, layer by layer. At each half layer the output projection W
is replaced by the minimiser of

    Σ_s α_s ‖ W[:, :w_s] h_s - (t - x_s) ‖²  +  ridge,

with h_s the projection's input and x_s the residual stream in sub-network s, w_s its width there, and t the residual
stream that the original has after that half layer. So each prefix learns to stand in for what it lacks *and* to correct
what earlier layers left wrong. It is one linear system per half layer, because every sub-network's prefix is a block of
the same matrix; the full model is among the sub-networks, and the ridge pulls towards the original weights. Minutes of
gradient descent do less (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flextron.model.attention import CausalAttention
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.model.layers import Contraction, Layer, rotary_tables
from flextron.spec import SubnetSpec

__all__ = ["reconstruct"]

_CHUNK_SEQUENCES = 8


class _NormalEquations:
    """Σ_s α_s over prefixes, accumulated token chunk by token chunk."""

    def __init__(self, linear: Contraction) -> None:
        size, out = linear.weight.shape
        self._linear = linear
        self._gram_FF = torch.zeros(size, size, device=linear.weight.device)
        self._cross_FD = torch.zeros(size, out, device=linear.weight.device)

    def add(self, h_Nw: Tensor, target_ND: Tensor, weight: float) -> None:
        """Add one sub-network's tokens; its width is that of `h_Nw`."""
        width = h_Nw.shape[1]
        if self._linear.bias is not None:
            target_ND = target_ND - self._linear.bias
        self._gram_FF[:width, :width].addmm_(h_Nw.t(), h_Nw, alpha=weight)
        self._cross_FD[:width].addmm_(h_Nw.t(), target_ND, alpha=weight)

    def solve(self, ridge: float) -> None:
        """Put the minimiser in place of the weight; `ridge` is relative to the mean square of an input."""
        gram, cross = self._gram_FF.double(), self._cross_FD.double()
        strength = ridge * gram.diagonal().mean()
        gram.diagonal().add_(strength)
        old = self._linear.weight.double()
        factor = torch.linalg.cholesky(gram)
        self._linear.weight.copy_(torch.cholesky_solve(cross + strength * old, factor))


@torch.no_grad()
def reconstruct(
    decoder: Decoder,
    tokens_BT: Tensor,
    specs: Sequence[SubnetSpec],
    *,
    full_weight: float = 1.0,
    ridge: float = 0.03,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Solve all output projections (attention and MLP) for the given sub-networks and the full one, in place.

    Args:
        decoder: the full, permuted model.
        tokens_BT: calibration sequences.
        specs: sub-networks to fit, besides the full one.
        full_weight: weight of the full model, over the sum of the others'.
        ridge: pull towards the old weights, relative to the inputs' mean square.
        on_progress: called with layers done and in all.
    """
    full = decoder.widths
    chunks = [Batch.padded(c.to(decoder.device), full) for c in tokens_BT.split(_CHUNK_SEQUENCES)]
    embedded = [decoder.embed(batch) for batch in chunks]
    teacher = [x.clone() for x in embedded]
    runs = [full, *specs]
    alphas = [full_weight, *([1 / len(specs)] * len(specs))]
    streams = [[x.clone() for x in embedded] for _ in runs]
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        _solve_layer(decoder, i, layer, chunks, teacher, streams, runs, alphas, ridge)
        if on_progress is not None:
            on_progress(i + 1, len(decoder.layers))


def _solve_layer(
    decoder: Decoder,
    i: int,
    layer: Layer,
    chunks: Sequence[Batch],
    teacher: list[Tensor],
    streams: list[list[Tensor]],
    runs: Sequence[SubnetSpec],
    alphas: Sequence[float],
    ridge: float,
) -> None:
    """One layer: teacher first (with the old weights), then attention and MLP, each accumulated, solved and applied."""
    core = CausalAttention(decoder.config)
    tables = [rotary_tables(decoder.config, b.positions_N, decoder.dtype) for b in chunks]
    full = runs[0].layers[i]
    middle, after = [], []
    for c, batch in enumerate(chunks):
        x = teacher[c]
        m = x + layer.attend(x, batch, [full.num_groups], i, tables[c], core)
        middle.append(m)
        after.append(m + layer.feed_forward(x if layer.parallel else m, batch, [full.intermediate_size]))
    before = [list(stream) for stream in streams]

    equations = _NormalEquations(layer.attention.o)
    heads: dict[tuple[int, int], Tensor] = {}
    for s, run in enumerate(runs):
        groups = run.layers[i].num_groups
        for c, batch in enumerate(chunks if groups else ()):
            x = streams[s][c]
            (h,) = layer.attention.heads(layer.attention_norm(x), batch, [groups], i, tables[c], core)
            equations.add(h, middle[c] - x, alphas[s])
            heads[s, c] = h
    equations.solve(ridge)
    for (s, c), h in heads.items():
        streams[s][c] = streams[s][c] + layer.attention.project([h], chunks[c], [runs[s].layers[i].num_groups])
    heads.clear()

    equations = _NormalEquations(layer.mlp.down)
    for s, run in enumerate(runs):
        width = run.layers[i].intermediate_size
        for c, batch in enumerate(chunks if width else ()):
            x = layer.mlp_norm(before[s][c] if layer.parallel else streams[s][c])
            (h,) = layer.mlp.neurons(x, batch.layout([width]).blocks)
            equations.add(h, after[c] - streams[s][c], alphas[s])
            heads[s, c] = h
    equations.solve(ridge)
    for (s, c), h in heads.items():
        layout = chunks[c].layout([runs[s].layers[i].intermediate_size])
        streams[s][c] = streams[s][c] + layer.mlp.project(len(h), (h,), layout)
    teacher[:] = after
