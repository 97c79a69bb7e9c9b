"""Nested products with a low-rank update beside frozen weights, where all tokens of a batch share the update.

y = x W + scale · (x A) B, by blocks as in `flextron.model.nested`. The frozen weight gets no gradient, so that the
backward pass has one large product instead of two; the products with A and B run once for all blocks and keep but
x A, which is r wide.

Shapes: N tokens, D hidden size, F nested size, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from flextron.model.bypass import Bypass, Bypasses, Linear, Lora
from flextron.model.nested import Block, autocast, contract_blocks, expand_blocks, sum_of_products

__all__ = ["SharedLora", "contract_low_rank", "expand_low_rank"]


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        w_FD: Tensor,
        bias_F: Tensor | None,
        a_Dr: Tensor,
        b_Fr: Tensor,
        scale: float,
        blocks: tuple[Block, ...],
    ) -> Any:
        z_Nr = x_ND[: blocks[0].num_tokens] @ a_Dr
        ys = expand_blocks(x_ND, w_FD, bias_F, blocks)
        for y, k in zip(ys, blocks, strict=True):
            y.addmm_(z_Nr[: k.num_tokens], b_Fr[k.start : k.stop].t(), alpha=scale)
        ctx.save_for_backward(x_ND, w_FD, a_Dr, b_Fr, z_Nr)
        ctx.scale, ctx.blocks = scale, blocks
        return ys

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_ND, w_FD, a_Dr, b_Fr, z_Nr = ctx.saved_tensors
        blocks, scale = ctx.blocks, ctx.scale
        num_tokens = blocks[0].num_tokens
        spans = [(k.num_tokens, slice(k.start, k.stop)) for k in blocks]
        dz_Nr = sum_of_products(z_Nr, [(n, g, b_Fr[rows]) for (n, rows), g in zip(spans, grads, strict=True)])
        dz_Nr *= scale
        db_Fr = torch.zeros_like(b_Fr)
        for (n, rows), g in zip(spans, grads, strict=True):
            torch.mm(g.t(), z_Nr[:n], out=db_Fr[rows])
        db_Fr *= scale
        dx_ND = None
        if ctx.needs_input_grad[0]:
            dx_ND = sum_of_products(x_ND, [(n, g, w_FD[rows]) for (n, rows), g in zip(spans, grads, strict=True)])
            dx_ND[:num_tokens].addmm_(dz_Nr, a_Dr.t())
        return dx_ND, None, None, x_ND[:num_tokens].t() @ dz_Nr, db_Fr, None, None


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        num_tokens: int,
        w_FD: Tensor,
        bias_D: Tensor | None,
        a_Fr: Tensor,
        b_Dr: Tensor,
        scale: float,
        blocks: tuple[Block, ...],
        *h: Tensor,
    ) -> Tensor:
        y_ND = contract_blocks(num_tokens, w_FD, bias_D, blocks, h)
        z_Nr = sum_of_products(
            h[0], [(len(h_k), h_k, a_Fr[k.start : k.stop]) for h_k, k in zip(h, blocks, strict=True)]
        )
        y_ND[: len(z_Nr)].addmm_(z_Nr, b_Dr.t(), alpha=scale)
        ctx.save_for_backward(w_FD, a_Fr, b_Dr, z_Nr, *h)
        ctx.scale, ctx.blocks = scale, blocks
        return y_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g_ND,) = grads
        w_FD, a_Fr, b_Dr, z_Nr, *h = ctx.saved_tensors
        own_ND = g_ND[: len(z_Nr)]
        dz_Nr = (own_ND @ b_Dr) * ctx.scale
        da_Fr = torch.zeros_like(a_Fr)
        dh = []
        for h_k, k in zip(h, ctx.blocks, strict=True):
            rows, n = slice(k.start, k.stop), k.num_tokens
            torch.mm(h_k.t(), dz_Nr[:n], out=da_Fr[rows])
            dh.append((g_ND[:n] @ w_FD[rows].t()).addmm_(dz_Nr[:n], a_Fr[rows].t()))
        db_Dr = (own_ND.t() @ z_Nr) * ctx.scale
        return None, None, None, da_Fr, db_Dr, None, None, *dh


def expand_low_rank(
    x_ND: Tensor, w_FD: Tensor, bias_F: Tensor | None, lora: Lora, blocks: tuple[Block, ...]
) -> tuple[Tensor, ...]:
    """The same as `nested.expand` of frozen weights, with the update of all tokens.

    Args:
        x_ND: tokens, widest first.
        w_FD: frozen weight whose rows are nested.
        bias_F: frozen bias, or None.
        lora: beside the weight; its B is nested as the weight's rows are.
        blocks: ascending, from `Layout`; at least one.

    Returns:
        One (num_tokens of the block, rows of the block) tensor a block.
    """
    x, w, bias, a, b = autocast(x_ND, w_FD, bias_F, lora.a, lora.b)
    return tuple(_Expand.apply(x, w, bias, a, b, lora.scale, blocks))  # type: ignore[no-untyped-call]


def contract_low_rank(
    num_tokens: int, h: Sequence[Tensor], w_FD: Tensor, bias_D: Tensor | None, lora: Lora, blocks: tuple[Block, ...]
) -> Tensor:
    """The same as `nested.contract` of frozen weights, with the update of all tokens that have a width.

    Args:
        num_tokens: N; tokens beyond the first block's (of width 0) get zeros.
        h: one (num_tokens of the block, rows of the block) tensor a block.
        w_FD: frozen weight whose rows are nested, (in, out).
        bias_D: frozen bias, or None.
        lora: beside the weight; its A is nested as the weight's rows are.
        blocks: ascending, from `Layout`; at least one.

    Returns:
        (N, D), widest tokens first.
    """
    w, bias, a, b, *own = autocast(w_FD, bias_D, lora.a, lora.b, *h)
    return _Contract.apply(num_tokens, w, bias, a, b, lora.scale, blocks, *own)  # type: ignore[no-untyped-call,no-any-return]


class SharedLora(Bypasses):
    """LoRA bypasses of one layer that all tokens of a batch share."""

    def __init__(self, bypasses: Mapping[str, Bypass]) -> None:
        """Take the bypasses by target."""
        super().__init__(())
        self._shared = bypasses

    def expand(self, target: str, x_ND: Tensor, linear: Linear, blocks: tuple[Block, ...]) -> tuple[Tensor, ...]:
        """See `Bypasses`."""
        lora = self._beside_all(target)
        if lora is None:
            return super().expand(target, x_ND, linear, blocks)
        return expand_low_rank(x_ND, linear.weight, linear.bias, lora, blocks)

    def contract(
        self, target: str, num_tokens: int, h: Sequence[Tensor], linear: Linear, blocks: tuple[Block, ...]
    ) -> Tensor:
        """See `Bypasses`."""
        lora = self._beside_all(target)
        if lora is None:
            return super().contract(target, num_tokens, h, linear, blocks)
        return contract_low_rank(num_tokens, h, linear.weight, linear.bias, lora, blocks)

    def _beside_all(self, target: str) -> Lora | None:
        return cast("Lora", self._shared[target]) if target in self._shared else None
