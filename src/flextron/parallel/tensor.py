"""Tensor parallelism: a decoder and its adapters on several ranks, each with an equal share of every sub-network.

The weights are cut as Megatron-LM cuts them (arXiv 1909.08053): q, k, v, gate and up along their outputs, o and down
along their inputs, hence always along the nested dimension. Each half of a layer reads the same input on all ranks and
ends with a sum over them (one all-reduce forward); the gradient by its input is summed likewise (one backward). Which
neurons and attention groups a rank holds is told in `flextron.parallel.shares`: some of every prefix, so that a rank's
own ones are nested again. A shard takes the sub-networks of the whole model and runs its part of each. So all that
chooses, compares and skips by widths does the same on all ranks, also where a rank holds nothing of a narrow half.

Bypasses follow their linears (FlexLLM's dependent parallelization, arXiv 2402.18789). What lies along the nested
dimension is cut as the weight is; the rest is whole on every rank. LoRA adds s · (x A) Bᵀ:

| beside              | A   | B   | x A                     | output                     | gradient complete | partial |
|---------------------|-----|-----|-------------------------|----------------------------|-------------------|---------|
| q, k, v, gate, up   | all | cut | all of it on every rank | the rank's part            | B                 | A       |
| o, down             | cut | all | a term of the sum       | a term of the half's sum   | A                 | B       |

Beside o and down, the low-rank sum is never formed: Σ (x_r A_r) Bᵀ = (Σ x_r A_r) Bᵀ, so each rank adds its term to its
term of the frozen product, and the half's one all-reduce sums both. Beside the others, what the bypass sends back to x
joins the frozen product's gradient before the half's one all-reduce. IA3's factors of a nested dimension are cut; its
factors of a half's output scale the rank's term, and those of a half's input scale what all ranks read. So a bypass
adds no collective to a forward or backward pass, nor a byte to one.

What remains are the gradients of parameters that every rank holds whole: each rank has a term. They are no work per
token: `sum_gradients` sums them all in one flat all-reduce an optimizer step. Cutting these parameters along the LoRA
rank instead would need no such sum, but a collective for x A in every linear, pass and chunk.

With a single KV head (multi-query), k and v and their bypasses are whole on every rank: query heads are cut.

Not cut: embeddings, norms, head. Not supported: token routers, training of the frozen weights, the compiled iteration.

Shapes: N tokens, D hidden size, W ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from flextron.errors import FlextronError
from flextron.model.adapter import Adapter
from flextron.model.attention import Attention
from flextron.model.batch import Batch
from flextron.model.bypass import Dora
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.model.layers import Layer
from flextron.model.rope import Tables
from flextron.parallel.shares import Share, cut_parameters, whole_parameters
from flextron.spec import LayerSpec, SubnetSpec

__all__ = ["TensorParallel"]


class TensorParallel:
    """The ranks of a process group that share a decoder. All of them make the same calls in the same order."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Take the ranks.

        Args:
            group: initialised process group, of a backend for the decoder's device; by default the world.
        """
        self._group = group
        self.share = Share(dist.get_rank(group), dist.get_world_size(group))
        """What this process holds."""

    @property
    def rank(self) -> int:
        """Rank of this process, from 0."""
        return self.share.rank

    @property
    def size(self) -> int:
        """W."""
        return self.share.size

    def decoder(self, decoder: Decoder) -> Decoder:
        """This rank's shard of a decoder, frozen; with its shares of adapters it returns what the whole does.

        Args:
            decoder: the whole; parameters that are not cut are shared with it, not copied.

        Raises:
            FlextronError: a rank would hold nothing of a layer, or a norm is over all its heads.
        """
        return self.shard(decoder.config, decoder.widths, dict(self.share.parameters(decoder)))

    def shard(self, config: DecoderConfig, widths: SubnetSpec, parameters: Mapping[str, Tensor]) -> Decoder:
        """This rank's shard, of parameters that `Share.parameters` gave.

        Args:
            config: the whole's.
            widths: the whole's.
            parameters: what the rank holds, by name; not copied.
        """
        with torch.device("meta"):
            out = _Shard(config, widths, self)
        out.load_state_dict(parameters, assign=True)
        return out.requires_grad_(False).eval()

    def adapter(self, adapter: Adapter) -> Adapter:
        """A copy of this rank's share of an adapter.

        Args:
            adapter: the whole, the same on every rank: a fresh one must be drawn with the same seed.

        Raises:
            FlextronError: it has bypasses other than LoRA, IA3 and DoRA.
        """
        return self.share.adapter(adapter)

    def gather(self, adapter: Adapter) -> Adapter:
        """The whole adapter, on every rank, of the shares that `adapter` made; to be stored or served elsewhere.

        Args:
            adapter: a share, of LoRA and IA3.

        Raises:
            FlextronError: it has DoRA.
        """
        out = copy.deepcopy(adapter)
        for layer, target, name, rows in cut_parameters(adapter):
            widths, bypass = adapter.widths.layers[layer], out.at(layer)[target]
            if isinstance(bypass, Dora):
                raise FlextronError("shares of DoRA are served, not put together; keep the whole adapter")
            num_units = widths.num_groups if target in ("q", "k", "v", "o") else widths.intermediate_size
            whole = self._joined(getattr(bypass, name).detach(), layer, num_units, rows)
            setattr(bypass, name, nn.Parameter(whole))
        return out

    @torch.no_grad()
    def sum_gradients(self, adapter: Adapter) -> None:
        """Complete the gradients of the parameters that every rank holds whole, in one all-reduce.

        Call it once before each step of the optimizer, after all backward passes of the step.

        Args:
            adapter: a share that `adapter` made.
        """
        # a rank without a part of a narrow half has no term, where the others have one
        partial = [torch.zeros_like(p) if p.grad is None else p.grad for p in whole_parameters(adapter)]
        if not partial:
            return
        flat = self.summed(torch.cat([g.flatten() for g in partial]))
        totals = flat.split([g.numel() for g in partial])
        for p, gradient, total in zip(whole_parameters(adapter), partial, totals, strict=True):
            p.grad = total.view_as(gradient)

    def summed(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, on every rank: one all-reduce."""
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group)
        return total

    def _joined(self, own: Tensor, layer: int, num_units: int, rows: int) -> Tensor:
        """What the ranks hold of a parameter along a nested dimension, together."""
        whole = own.new_empty(num_units * rows, *own.shape[1:])
        for rank in range(self.size):
            share = Share(rank, self.size)
            shape = (share.width(num_units, layer) * rows, *own.shape[1:])
            part = own.contiguous() if rank == self.rank else own.new_empty(shape)
            dist.broadcast(part, group=self._group, group_src=rank)
            share.put(part, whole, layer, rows)
        return whole


class _Shard(Decoder):
    """A rank's share of a decoder, which takes the sub-networks of the whole."""

    def __init__(self, config: DecoderConfig, widths: SubnetSpec, ranks: TensorParallel) -> None:
        super().__init__(config, ranks.share.spec(widths))
        self.widths = widths
        self.num_ranks = ranks.size
        self._share = ranks.share
        self.layers = nn.ModuleList(
            _ShardLayer(config, own, ranks, i) for i, own in enumerate(ranks.share.spec(widths).layers)
        )

    def held(self, spec: SubnetSpec) -> SubnetSpec:
        """See `Decoder`."""
        return self._share.spec(spec)


class _ShardLayer(Layer):
    """A layer between whose halves all ranks hold the same; its widths are those of the whole."""

    def __init__(self, config: DecoderConfig, widths: LayerSpec, ranks: TensorParallel, index: int) -> None:
        super().__init__(config, widths)
        self._ranks, self._index = ranks, index
        if ranks.share.first(index):  # a sum has its bias once
            for half, name in (("attention", "o"), ("mlp", "down")):
                if half in self._modules:
                    getattr(getattr(self, half), name).bias = None

    def read(self, x_ND: Tensor) -> Tensor:
        """See `Layer`."""
        return _read(x_ND, self._ranks)

    def attend(
        self,
        x_ND: Tensor,
        batch: Batch,
        num_groups: Sequence[int],
        layer: int,
        rope: Tables | None,
        attention: Attention,
    ) -> Tensor:
        """See `Layer`; where the rank has no heads, its term is zeros, without a gradient."""
        own = self._own(num_groups)
        if any(own):
            return super().attend(x_ND, batch, own, layer, rope, attention)
        return self.joining(self.complete(torch.zeros_like(x_ND), batch, layer, "o"), "attention")

    def feed_forward(self, x_ND: Tensor, batch: Batch, widths: Sequence[int], layer: int | None = None) -> Tensor:
        """See `Layer`."""
        own = self._own(widths)
        if any(own):
            return super().feed_forward(x_ND, batch, own, layer)
        return self.joining(self.complete(torch.zeros_like(x_ND), batch, layer, "down"), "mlp")

    def _own(self, widths: Sequence[int]) -> list[int]:
        return [self._ranks.share.width(w, self._index) for w in widths]

    def routed_feed_forward(self, x_ND: Tensor, batch: Batch, widths: Sequence[int], layer: int) -> Tensor:
        """Refuse."""
        raise FlextronError("token routers cannot run under tensor parallelism; give the requests fixed sub-networks")

    def complete(self, y_ND: Tensor, batch: Batch, layer: int | None, target: str) -> Tensor:
        """The sum of the ranks' terms, where anything reads it."""
        if not batch.needs(target):
            return y_ND  # its value is meaningless or known already, and the sum's gradient is that of each term
        y_ND = _sum(y_ND, self._ranks)
        batch.keep_product(layer, target, y_ND)
        return y_ND


class _Read(torch.autograd.Function):
    """The same tensor for the parts of all ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorParallel) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.ranks.summed(grads[0]), None


class _Sum(torch.autograd.Function):
    """The sum of all ranks' terms; its gradient is that of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorParallel) -> Tensor:
        return ranks.summed(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def _read(x: Tensor, ranks: TensorParallel) -> Tensor:
    return _Read.apply(x, ranks)  # type: ignore[no-untyped-call,no-any-return]


def _sum(x: Tensor, ranks: TensorParallel) -> Tensor:
    return _Sum.apply(x, ranks)  # type: ignore[no-untyped-call,no-any-return]
