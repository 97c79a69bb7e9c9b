"""Tensor parallelism: a decoder and its adapters on several ranks, each with an equal share of every sub-network.

The weights are cut as Megatron-LM cuts them (arXiv 1909.08053): q, k, v, gate and up along their outputs, o and down
along their inputs, hence always along the nested dimension. Each half of a layer reads the same input on all ranks and
ends with a sum over them (one all-reduce forward); the gradient by its input is summed likewise (one backward). Along
the nested dimension, neuron or attention group j goes to rank j mod W with all its rows. So a rank's own ones are in
nested order again, the leading w of the model are the leading w / W of every rank, and a shard is nothing but a decoder
with narrower widths: batches, caches and chunked finetuning run on it, with specs of `TensorParallel.spec`.

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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from flextron.errors import FlextronError
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.bypass import Bypass, Ia3, Lora, Shape
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.model.layers import Layer
from flextron.spec import LayerSpec, SubnetSpec

__all__ = ["TensorParallel"]

_OUT_OF_NESTED = ("o", "down")
"""Linears whose inputs are nested; the outputs of the others are."""


class TensorParallel:
    """The ranks of a process group that share a decoder. All of them make the same calls in the same order."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Take the ranks.

        Args:
            group: initialised process group, of a backend for the decoder's device; by default the world.
        """
        self._group = group
        self.rank = dist.get_rank(group)
        """Rank of this process, from 0."""
        self.size = dist.get_world_size(group)
        """W."""

    def spec(self, spec: SubnetSpec) -> SubnetSpec:
        """A rank's share of a sub-network.

        Raises:
            FlextronError: the ranks cannot share a width equally.
        """
        for i, layer in enumerate(spec.layers):
            for what, width in (("MLP neurons", layer.intermediate_size), ("attention groups", layer.num_groups)):
                if width % self.size:
                    raise FlextronError(
                        f"{self.size} ranks cannot share the {width} {what} of layer {i} equally; "
                        f"choose widths that are multiples of {self.size}, or use fewer ranks"
                    )
        sizes, groups = ([w // self.size for w in widths] for widths in (spec.intermediate_sizes, spec.num_groups))
        return SubnetSpec.of(sizes, groups)

    def decoder(self, decoder: Decoder) -> Decoder:
        """This rank's shard of a decoder, frozen; with the shares of spec and adapters it returns what the whole does.

        Args:
            decoder: the whole; parameters that are not cut are shared with it, not copied.

        Raises:
            FlextronError: the ranks cannot share the decoder's widths equally, or a norm of all its heads.
        """
        if decoder.config.qk_norm == "width" and self.size > 1:
            raise FlextronError(
                f"{decoder.config.family} normalises the queries of all heads as one, which ranks that share them "
                "cannot; use one rank"
            )
        rows_each = _rows_each(decoder.config)
        with torch.device("meta"):
            out = _Shard(decoder.config, self.spec(decoder.widths), self)
        held, state = out.state_dict(), {}
        for name, tensor in decoder.state_dict().items():
            target, kind = name.split(".")[-2:]
            if target in rows_each and not (target in _OUT_OF_NESTED and kind == "bias"):
                tensor = self._own(tensor, rows_each[target])
            if name in held:
                state[name] = tensor
        out.load_state_dict(state, assign=True)
        return out.requires_grad_(False).eval()

    def adapter(self, adapter: Adapter) -> Adapter:
        """A copy of this rank's share of an adapter.

        Args:
            adapter: the whole, the same on every rank: a fresh one must be drawn with the same seed.

        Raises:
            FlextronError: the ranks cannot share its widths equally, or it has bypasses other than LoRA and IA3.
        """
        adapter.check_inner("shared by ranks")
        return self._mapped(adapter, self.spec(adapter.widths), self._own)

    def gather(self, adapter: Adapter) -> Adapter:
        """The whole adapter, on every rank, of the shares that `adapter` made; to be stored or served elsewhere."""
        widths = adapter.widths
        sizes, groups = ([w * self.size for w in own] for own in (widths.intermediate_sizes, widths.num_groups))
        return self._mapped(adapter, SubnetSpec.of(sizes, groups), self._joined)

    @torch.no_grad()
    def sum_gradients(self, adapter: Adapter) -> None:
        """Complete the gradients of the parameters that every rank holds whole, in one all-reduce.

        Call it once before each step of the optimizer, after all backward passes of the step.

        Args:
            adapter: a share that `adapter` made.
        """
        partial = [p.grad for p in _whole_parameters(adapter) if p.grad is not None]
        if not partial:
            return
        flat = self.summed(torch.cat([g.flatten() for g in partial]))
        for gradient, total in zip(partial, flat.split([g.numel() for g in partial]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def summed(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, on every rank: one all-reduce."""
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group)
        return total

    def _own(self, whole: Tensor, rows_each: int) -> Tensor:
        """This rank's neurons or groups of the first dimension, of `rows_each` rows each."""
        by_rank: Tensor = whole.unflatten(0, (-1, self.size, rows_each))
        return by_rank[:, self.rank].flatten(0, 1).contiguous()

    def _joined(self, own: Tensor, rows_each: int) -> Tensor:
        """The inverse of `_own`."""
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous(), group=self._group)
        return torch.stack([p.unflatten(0, (-1, rows_each)) for p in parts], 1).flatten(0, 2)

    def _mapped(self, adapter: Adapter, widths: SubnetSpec, change: Callable[[Tensor, int], Tensor]) -> Adapter:
        """A copy whose cut parameters are changed."""
        rows_each = _rows_each(adapter.config)

        def make(layer: int, target: str, shape: Shape) -> Bypass | None:
            if target not in adapter.at(layer):
                return None
            out = copy.deepcopy(adapter.at(layer)[target])
            if (name := _cut_parameter(target, out)) is not None and target in rows_each:
                setattr(out, name, nn.Parameter(change(getattr(out, name).detach(), rows_each[target])))
            return out

        return Adapter(adapter.config, widths, make)


def _rows_each(config: DecoderConfig) -> dict[str, int]:
    """Rows of one neuron or group in a linear's nested dimension, by target; linears that are whole are left out."""
    rows = {"q": config.query_rows_per_group, "o": config.query_rows_per_group, "gate": 1, "up": 1, "down": 1}
    return rows if config.is_multi_query else rows | {"k": config.head_dim, "v": config.head_dim}


def _cut_parameter(target: str, bypass: Bypass) -> str | None:
    """The parameter of a bypass that lies along its linear's nested dimension."""
    is_input_nested = target in _OUT_OF_NESTED
    if isinstance(bypass, Lora):
        return "a" if is_input_nested else "b"
    if isinstance(bypass, Ia3):
        return "factors" if bypass.on_input == is_input_nested else None
    raise FlextronError(f"{type(bypass).__name__} cannot be cut for tensor parallelism; use LoRA or IA3")


def _whole_parameters(adapter: Adapter) -> Iterator[nn.Parameter]:
    """Those that every rank holds whole, in the same order on all."""
    nested = _rows_each(adapter.config).keys()
    for i in adapter.adapted_layers:
        for target, bypass in adapter.at(i).items():
            cut = _cut_parameter(target, bypass) if target in nested else None
            yield from (p for name, p in bypass.named_parameters() if name != cut)


class _Shard(Decoder):
    """A rank's share of a decoder."""

    def __init__(self, config: DecoderConfig, widths: SubnetSpec, ranks: TensorParallel) -> None:
        super().__init__(config, widths)
        self.num_ranks = ranks.size
        self.layers = nn.ModuleList(_ShardLayer(config, own, ranks) for own in widths.layers)


class _ShardLayer(Layer):
    """A layer between whose halves all ranks hold the same."""

    def __init__(self, config: DecoderConfig, widths: LayerSpec, ranks: TensorParallel) -> None:
        super().__init__(config, widths)
        self._ranks = ranks
        if ranks.rank:  # a sum has its bias once
            for half, name in (("attention", "o"), ("mlp", "down")):
                if half in self._modules:
                    getattr(getattr(self, half), name).bias = None

    def read(self, x_ND: Tensor) -> Tensor:
        """See `Layer`."""
        return _read(x_ND, self._ranks)

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
