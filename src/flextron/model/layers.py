"""The decoder's building blocks: nested MLP, nested attention, and the layer of both.

Shapes: N tokens, D hidden size, F MLP neurons, H query heads, K KV heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flextron.errors import UnsupportedModelError
from flextron.model.attention import Attention
from flextron.model.batch import Batch
from flextron.model.bypass import NO_BYPASSES, Bypasses
from flextron.model.config import DecoderConfig
from flextron.model.nested import Block, Contraction, Layout
from flextron.model.norms import RMSNorm, make_norm
from flextron.model.rope import Tables, rotate
from flextron.model.token_layout import TokenLayout
from flextron.spec import LayerSpec

__all__ = ["ACTIVATIONS", "MLP", "Contraction", "Layer"]

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_fast": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def _gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """What the neurons of a gated MLP give."""
    return activation(gate) * up


class MLP(nn.Module):
    """Feed-forward block whose neurons are nested."""

    def __init__(self, config: DecoderConfig, width: int) -> None:
        """Allocate `width` neurons."""
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"activation {config.activation!r} is not supported; supported are {', '.join(ACTIVATIONS)}"
            )
        self.activation = ACTIVATIONS[config.activation]
        # compiled kernels may take its place
        self.gated: Callable[[Tensor, Tensor], Tensor] = partial(_gated, self.activation)
        self.gate = nn.Linear(config.hidden_size, width, bias=config.mlp_bias) if config.gated else None
        self.up = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down = Contraction(width, config.hidden_size, bias=config.mlp_bias)

    def neurons(self, x_ND: Tensor, blocks: tuple[Block, ...], bypasses: Bypasses = NO_BYPASSES) -> tuple[Tensor, ...]:
        """Inputs of the down projection, block by block; `x_ND` widest first."""
        ups = bypasses.expand("up", x_ND, self.up, blocks)
        if self.gate is None:
            return tuple(self.activation(u) for u in ups)
        gates = bypasses.expand("gate", x_ND, self.gate, blocks)
        return tuple(self.gated(g, u) for g, u in zip(gates, ups, strict=True))

    def project(
        self, num_tokens: int, h: Sequence[Tensor], layout: Layout | TokenLayout, bypasses: Bypasses = NO_BYPASSES
    ) -> Tensor:
        """The down projection of what `neurons` gave, in the batch's order; (N, D)."""
        return layout.unsort(bypasses.contract("down", num_tokens, h, self.down, layout.blocks))

    def forward(self, x_ND: Tensor, batch: Batch, widths: Sequence[int], layer: int | None = None) -> Tensor:
        """Run with `widths` neurons, one number a segment; (N, D). `layer` finds the bypasses, if there are any."""
        layout = batch.layout(widths)
        bypasses = batch.bypasses(layer, layout)
        h = self.neurons(layout.sort(x_ND), layout.blocks, bypasses)
        return self.project(x_ND.shape[0], h, layout, bypasses)

    def routed(self, x_ND: Tensor, widths_N: Tensor) -> Tensor:
        """Run each token with its own number of neurons; (N, D), zeros where that is 0."""
        layout = TokenLayout.of(widths_N)
        if not layout.blocks:
            return torch.zeros_like(x_ND)
        return self.project(x_ND.shape[0], self.neurons(layout.sort(x_ND), layout.blocks), layout)


class SelfAttention(nn.Module):
    """Causal self-attention whose groups (a KV head with its query heads) are nested."""

    def __init__(self, config: DecoderConfig, num_groups: int) -> None:
        """Allocate `num_groups` groups."""
        super().__init__()
        self._config = config
        rows, kv_rows = num_groups * config.query_rows_per_group, config.kv_rows(num_groups)
        self.q = nn.Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.k = nn.Linear(config.hidden_size, kv_rows, bias=config.qkv_bias)
        self.v = nn.Linear(config.hidden_size, kv_rows, bias=config.qkv_bias)
        self.o = Contraction(rows, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            is_whole = config.qk_norm == "width"
            self.q_norm = RMSNorm(rows if is_whole else config.head_dim, config.norm_eps, config.norm_offset)
            self.k_norm = RMSNorm(kv_rows if is_whole else config.head_dim, config.norm_eps, config.norm_offset)

    def _kv_blocks(self, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        """Blocks of KV rows; with a single KV head it is whole in the first block and absent from the others."""
        if self._config.is_multi_query:
            return (Block(blocks[0].num_tokens, 0, self._config.head_dim),)
        return tuple(b.scaled(self._config.head_dim) for b in blocks)

    def heads(
        self,
        x_ND: Tensor,
        batch: Batch,
        widths: Sequence[int],
        layer: int,
        rope: Tables | None,
        attention: Attention,
    ) -> list[Tensor]:
        """Outputs of all heads, (tokens, rows), one entry a segment in the batch's order; empty rows at width 0."""
        layout = batch.layout(widths)
        x, bypasses = layout.sort(x_ND), batch.bypasses(layer, layout)
        q_blocks = tuple(b.scaled(self._config.query_rows_per_group) for b in layout.blocks)
        kv_blocks = self._kv_blocks(layout.blocks)
        q = bypasses.expand("q", x, self.q, q_blocks)
        k = bypasses.expand("k", x, self.k, kv_blocks)
        v = bypasses.expand("v", x, self.v, kv_blocks)
        if layout.is_single:
            return [self._attend(q[0], k[0], v[0], batch, layer, 0, rope, attention)]
        out: dict[int, Tensor] = {}
        start = 0
        ends = tuple(accumulate(layout.sizes))
        for j in layout.order:
            size, width = layout.sizes[j], widths[j]
            if width == 0:
                out[j] = x.new_zeros(size, 0)
                continue
            rows = slice(start, start + size)
            own_q, own_k, own_v = (_gather(layout.blocks, blocks, rows, width) for blocks in (q, k, v))
            own = slice(ends[j] - size, ends[j])
            tables = None if rope is None else (rope[0][own], rope[1][own])
            out[j] = self._attend(own_q, own_k, own_v, batch, layer, j, tables, attention)
            start += size
        return [out[j] for j in range(len(widths))]

    def _attend(
        self,
        q_NR: Tensor,
        k_NR: Tensor,
        v_NR: Tensor,
        batch: Batch,
        layer: int,
        segment: int,
        tables: Tables | None,
        attention: Attention,
    ) -> Tensor:
        """Outputs of one segment's heads, from their projections; (tokens, rows)."""
        shape = (q_NR.shape[0], -1, self._config.head_dim)
        if self._config.qk_norm == "width":
            q_NR, k_NR = self.q_norm(q_NR), self.k_norm(k_NR)
        q_NHd, k_NKd = q_NR.view(shape), k_NR.view(shape)
        if self._config.qk_norm == "head":
            q_NHd, k_NKd = self.q_norm(q_NHd), self.k_norm(k_NKd)
        if (scale := self._config.query_scale(layer)) != 1:
            q_NHd = q_NHd * scale
        if tables is not None:
            num_heads = (q_NHd.shape[1], k_NKd.shape[1])
            q_NHd, k_NKd = rotate(torch.cat((q_NHd, k_NKd), 1), tables).split(num_heads, 1)
        lengths = batch.segments[segment].lengths
        mixed = attention(layer, segment, q_NHd, k_NKd, v_NR.view(shape), lengths)
        return mixed.flatten(1)

    def project(self, heads: Sequence[Tensor], batch: Batch, widths: Sequence[int], layer: int | None = None) -> Tensor:
        """The output projection of what `heads` gave; (N, D). `layer` finds the bypasses, if there are any."""
        layout = batch.layout(widths)
        bypasses = batch.bypasses(layer, layout)
        blocks = tuple(b.scaled(self._config.query_rows_per_group) for b in layout.blocks)
        if layout.is_single:
            return bypasses.contract("o", heads[0].shape[0], heads, self.o, blocks)
        ordered = [heads[j] for j in layout.order]
        h = [_join([s[:, b.start : b.stop] for s in ordered if s.shape[1] >= b.stop], dim=0) for b in blocks]
        return layout.unsort(bypasses.contract("o", sum(layout.sizes), h, self.o, blocks))

    def forward(
        self,
        x_ND: Tensor,
        batch: Batch,
        widths: Sequence[int],
        layer: int,
        rope: Tables | None,
        attention: Attention,
    ) -> Tensor:
        """Run with `widths` groups, one number a segment; (N, D)."""
        return self.project(self.heads(x_ND, batch, widths, layer, rope, attention), batch, widths, layer)


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate without copying a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _gather(blocks: Sequence[Block], tensors: Sequence[Tensor], rows: slice, width: int) -> Tensor:
    """One segment's rows of the blocks that its width reaches, side by side; the first block is always reached.

    Shared KV heads have but one tensor, that of the first block.
    """
    return _join(
        [t[rows] for i, (b, t) in enumerate(zip(blocks, tensors, strict=False)) if i == 0 or b.stop <= width], dim=1
    )


class Layer(nn.Module):
    """One decoder layer: attention and MLP, one after the other or in parallel, either of them possibly skipped."""

    def __init__(self, config: DecoderConfig, widths: LayerSpec) -> None:
        """Allocate the given widths."""
        super().__init__()
        self.parallel = config.parallel_residual
        self._scale = config.residual_scale
        if widths.num_groups:
            self.attention_norm = make_norm(config) if config.pre_norm else nn.Identity()
            self.attention = SelfAttention(config, widths.num_groups)
            self.attention_post_norm = make_norm(config) if config.post_norm else nn.Identity()
        if widths.intermediate_size:
            self.mlp_norm = make_norm(config) if config.pre_norm else nn.Identity()
            self.mlp = MLP(config, widths.intermediate_size)
            self.mlp_post_norm = make_norm(config) if config.post_norm else nn.Identity()

    def read(self, x_ND: Tensor) -> Tensor:
        """The input of a half; ranks that share a layer read it together."""
        return x_ND

    def complete(self, y_ND: Tensor, batch: Batch, layer: int | None, target: str) -> Tensor:
        """The output of a half, of its last linear `target`; ranks that share a layer add their terms up."""
        return y_ND

    def joining(self, y_ND: Tensor, half: Literal["attention", "mlp"]) -> Tensor:
        """What the residual stream gets of a half's output; (N, D)."""
        y_ND = (self.attention_post_norm if half == "attention" else self.mlp_post_norm)(y_ND)
        return y_ND if self._scale == 1 else y_ND * self._scale

    def attend(
        self,
        x_ND: Tensor,
        batch: Batch,
        num_groups: Sequence[int],
        layer: int,
        rope: Tables | None,
        attention: Attention,
    ) -> Tensor:
        """What the attention adds to `x_ND`, with `num_groups` groups a segment; (N, D)."""
        x_ND = self.read(self.attention_norm(x_ND))
        y_ND = self.complete(self.attention(x_ND, batch, num_groups, layer, rope, attention), batch, layer, "o")
        return self.joining(y_ND, "attention")

    def feed_forward(self, x_ND: Tensor, batch: Batch, widths: Sequence[int], layer: int | None = None) -> Tensor:
        """What the MLP adds, from its input, with `widths` neurons a segment; (N, D)."""
        y_ND = self.complete(self.mlp(self.read(self.mlp_norm(x_ND)), batch, widths, layer), batch, layer, "down")
        return self.joining(y_ND, "mlp")

    def routed_feed_forward(self, x_ND: Tensor, batch: Batch, widths: Sequence[int], layer: int) -> Tensor:
        """What the MLP adds if tokens of routed segments choose their own widths; (N, D)."""
        x_ND = self.mlp_norm(x_ND)
        widths_N, gates_N = batch.token_widths(layer, x_ND, widths)
        y_ND = self.joining(self.mlp.routed(x_ND, widths_N), "mlp")
        return y_ND if gates_N is None else y_ND * gates_N[:, None]

    def forward(self, x_ND: Tensor, batch: Batch, layer: int, rope: Tables | None, attention: Attention) -> Tensor:
        """Run each segment in its own widths; (N, D)."""
        groups = [s.spec.layers[layer].num_groups for s in batch.segments]
        neurons = [s.spec.layers[layer].intermediate_size for s in batch.segments]
        mlp_input = x_ND
        if any(groups):
            x_ND = x_ND + batch.gated(self.attend(x_ND, batch, groups, layer, rope, attention), layer, 0)
        if any(neurons):
            if not self.parallel:
                mlp_input = x_ND
            if batch.is_routed:
                y_ND = self.routed_feed_forward(mlp_input, batch, neurons, layer)
            else:
                y_ND = self.feed_forward(mlp_input, batch, neurons, layer)
            x_ND = x_ND + batch.gated(y_ND, layer, 1)
        return x_ND
