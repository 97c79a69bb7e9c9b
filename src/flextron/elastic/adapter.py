"""An elastic adapter: an elastification as low-rank updates and norm gains beside frozen weights.

The adapter is what training adds to the permuted original: to each linear a product of rank r, to each norm a
difference. Merged into the weights it costs nothing at run time; taken off again, it leaves the teacher.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flextron.elastic.sketch import sketch
from flextron.errors import FlextronError
from flextron.model.adapter import Adapter
from flextron.model.bypass import Lora
from flextron.model.decoder import Decoder
from flextron.model.layers import Contraction

__all__ = ["ElasticAdapter", "norm_parameters", "sharing"]


def norm_parameters(decoder: Decoder) -> dict[str, nn.Parameter]:
    """Gains (and biases) of all norms, by parameter name."""
    norms = (nn.RMSNorm, nn.LayerNorm)
    return {
        f"{name}.{key}": parameter
        for name, module in decoder.named_modules()
        if isinstance(module, norms)
        for key, parameter in module.named_parameters()
    }


def sharing(decoder: Decoder) -> Decoder:
    """A decoder with norms of its own, in float32, and the very same linears and tables otherwise.

    They are shared as modules: what takes the place of a parameter in the one does so in the other.
    """
    kinds = (nn.Linear, nn.Embedding, Contraction)
    shared = {id(module): module for module in decoder.modules() if isinstance(module, kinds)}
    out = copy.deepcopy(decoder, shared)
    for parameter in norm_parameters(out).values():
        parameter.data = parameter.data.float()
    return out


@dataclass(frozen=True, kw_only=True, slots=True)
class ElasticAdapter:
    """What an elastification adds to the permuted original."""

    lora: Adapter
    """Low-rank updates beside the linears."""
    norms: dict[str, Tensor]
    """Differences of the norms' parameters, by name."""
    base_sketch: Tensor
    """Sketch of the weights beside which it stands, see `flextron.elastic.sketch`."""

    @classmethod
    def fresh(cls, decoder: Decoder, rank: int, alpha: float) -> ElasticAdapter:
        """One that changes nothing yet; A is drawn from PyTorch's generator.

        Raises:
            FlextronError: the rank is not positive.
        """
        lora = Adapter.lora(decoder.config, rank=rank, alpha=alpha)
        norms = {name: torch.zeros_like(p) for name, p in norm_parameters(decoder).items()}
        return cls(lora=lora, norms={n: norm.detach() for n, norm in norms.items()}, base_sketch=sketch(decoder))

    @property
    def rank(self) -> int:
        """Rank of the low-rank updates."""
        return next(bypass.rank for _, _, bypass in self._updates())

    @property
    def alpha(self) -> float:
        """The updates are multiplied by alpha / rank."""
        bypass = next(bypass for _, _, bypass in self._updates())
        return bypass.scale * bypass.rank

    def _updates(self) -> Iterator[tuple[int, str, Lora]]:
        for i in self.lora.adapted_layers:
            for target, bypass in self.lora.at(i).items():
                assert isinstance(bypass, Lora)
                yield i, target, bypass

    @torch.no_grad()
    def add_to(self, decoder: Decoder, sign: float = 1.0) -> None:
        """Merge into the decoder's weights, in place; with `sign` -1, take off what was merged.

        Raises:
            FlextronError: the decoder has other shapes.
        """
        if decoder.widths != self.lora.widths or decoder.config != self.lora.config:
            raise FlextronError("the elastic adapter is for a model of another shape; load it with its own base")
        for i, target, bypass in self._updates():
            linear = _linear(decoder, i, target)
            a, b = (t.detach().to(linear.weight) for t in (bypass.a, bypass.b))
            left, right = (a, b) if isinstance(linear, Contraction) else (b, a)
            linear.weight.addmm_(left, right.t(), alpha=sign * bypass.scale)
        for name, parameter in norm_parameters(decoder).items():
            parameter.add_(self.norms[name].to(parameter), alpha=sign)

    @torch.no_grad()
    def set_norms(self, student: Decoder, base: Decoder) -> None:
        """Give a student, in place, the norms that the base has with this adapter."""
        before = norm_parameters(base)
        for name, parameter in norm_parameters(student).items():
            parameter.copy_(before[name] + self.norms[name].to(before[name]))

    def with_norms_of(self, student: Decoder, base: Decoder) -> ElasticAdapter:
        """The same updates, with the differences between a student's norms and the base's."""
        before = norm_parameters(base)
        norms = {n: (p.detach() - before[n].detach()).cpu() for n, p in norm_parameters(student).items()}
        return ElasticAdapter(lora=self.lora, norms=norms, base_sketch=self.base_sketch)


def _linear(decoder: Decoder, layer: int, target: str) -> nn.Linear | Contraction:
    half = "attention" if target in ("q", "k", "v", "o") else "mlp"
    found = decoder.get_submodule(f"layers.{layer}.{half}.{target}")
    assert isinstance(found, nn.Linear | Contraction)
    return found
