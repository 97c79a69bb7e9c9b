"""What each choice of each layer is likely to cost in loss, from one backward pass and one sweep over the layers.

For a small change e of the residual stream, the expected rise of the loss is ½ E[(gᵀ e)²], with g the gradient of the
log-likelihood of tokens drawn from the model itself (the Fisher information, which knows how much the rest of the
network cares). The e of every choice is computed exactly, one half layer at a time, on the full network's activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from flextron.files import checked
from flextron.losses.vocabulary import cross_entropy
from flextron.model.attention import CausalAttention
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.model.layers import Layer
from flextron.model.rope import rotary_tables
from flextron.spec import SearchSpace, SubnetSpec
from flextron.spec.subnet import MAX_LAYERS

__all__ = ["Sensitivity", "fisher_gradients", "measure_sensitivity"]

_CHUNK = 128
"""Tokens whose probabilities are computed at once."""


_Width = Annotated[str, Field(pattern=r"^[0-9]{1,8}$")]
_Cost = Annotated[float, Field(allow_inf_nan=False)]
_Tables = Annotated[list[dict[_Width, _Cost]], Field(min_length=1, max_length=MAX_LAYERS)]


class _SensitivityFile(BaseModel):
    """The JSON form of sensitivities."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    mlp: _Tables
    attention: _Tables


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """Expected rise of the loss, in nats, if one half layer alone has another width; width 0 is the skipped half."""

    mlp: tuple[dict[int, float], ...]
    """Sensitivities of each layer by MLP width."""
    attention: tuple[dict[int, float], ...]
    """Sensitivities of each layer by attention groups."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; the widths become string keys."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Read the JSON form.

        Raises:
            FlextronError: keys are missing, or have values of the wrong type or size.
        """
        found = checked(_SensitivityFile, data, "the record of sensitivities", "remove it to measure again")
        mlp, attention = (
            tuple({int(width): cost for width, cost in table.items()} for table in tables)
            for tables in (found.mlp, found.attention)
        )
        return cls(mlp=mlp, attention=attention)

    @classmethod
    def mean(cls, parts: Sequence[Sensitivity]) -> Sensitivity:
        """The mean of what was measured on equally long texts."""

        def of(tables: Iterable[dict[int, float]]) -> dict[int, float]:
            several = list(tables)
            return {width: sum(table[width] for table in several) / len(several) for width in several[0]}

        return cls(
            mlp=tuple(of(tables) for tables in zip(*(part.mlp for part in parts), strict=True)),
            attention=tuple(of(tables) for tables in zip(*(part.attention for part in parts), strict=True)),
        )

    def terms(self, spec: SubnetSpec) -> tuple[float, float, float]:
        """Sums over the layers: of narrowed MLPs, of narrowed attention, and of skipped layers."""
        mlp = attention = skipped = 0.0
        for i, layer in enumerate(spec.layers):
            m, a = self.mlp[i][layer.intermediate_size], self.attention[i][layer.num_groups]
            if layer.is_skipped:
                skipped += m + a
            else:
                mlp, attention = mlp + m, attention + a
        return mlp, attention, skipped

    def with_price_of_change(self, spec: SubnetSpec, price: float) -> Sensitivity:
        """The same, and `price` nats for each half layer whose width is not that of `spec`."""
        return Sensitivity(
            mlp=tuple(
                {width: cost + price * (width != layer.intermediate_size) for width, cost in table.items()}
                for table, layer in zip(self.mlp, spec.layers, strict=True)
            ),
            attention=tuple(
                {groups: cost + price * (groups != layer.num_groups) for groups, cost in table.items()}
                for table, layer in zip(self.attention, spec.layers, strict=True)
            ),
        )


def fisher_gradients(
    decoder: Decoder, h_ND: Tensor, stream: list[Tensor], generator: torch.Generator, num_draws: int = 1
) -> list[tuple[Tensor, ...]]:
    """For each draw of targets from the model itself, the gradient of their summed loss by each tensor of the stream.

    Args:
        decoder: the model.
        h_ND: its final hidden states, computed from the stream.
        stream: what to differentiate by.
        generator: generator of the draws, on the CPU.
        num_draws: each takes one backward pass.
    """
    targets_RN = _own_targets(decoder, h_ND, generator, num_draws)
    draws = []
    for r, targets_N in enumerate(targets_RN):
        loss = cross_entropy(h_ND, decoder.head_weight.detach(), targets_N, decoder.config.logits_cap) * len(h_ND)
        draws.append(torch.autograd.grad(loss, stream, retain_graph=r + 1 < num_draws))
    return draws


@torch.no_grad()
def _own_targets(decoder: Decoder, h_ND: Tensor, generator: torch.Generator, num_draws: int) -> Tensor:
    """Next tokens drawn from the model itself; only a chunk's probabilities are held at a time."""
    drawn = []
    for h in h_ND.split(_CHUNK):
        p = torch.softmax(decoder.logits(h).float(), -1).cpu()
        drawn.append(torch.stack([torch.multinomial(p, 1, generator=generator)[:, 0] for _ in range(num_draws)]))
    return torch.cat(drawn, 1).to(h_ND.device)


def measure_sensitivity(
    decoder: Decoder, tokens_BT: Tensor, space: SearchSpace, *, around: SubnetSpec | None = None, seed: int = 0
) -> Sensitivity:
    """Measure on calibration sequences.

    A full model is near its own optimum: only the second order counts. A sub-network is not, so `around` one the first
    order counts, too, and the gradient is that of the text's next tokens. Its choices then cost nothing, others may
    cost less than that.

    Args:
        decoder: the full model.
        tokens_BT: a few sequences; memory is that of a training step on them.
        space: the choices.
        around: sub-network of which one half layer at a time is changed; by default the full one.
        seed: seed of the full model's drawn targets.
    """
    tokens_BT = tokens_BT.to(decoder.device)
    spec = around or space.full
    batch = Batch.padded(tokens_BT, spec)
    halves = _Halves(decoder, batch)
    with torch.enable_grad():
        x = decoder.embed(batch).detach().requires_grad_()
        stream = [x]  # the residual stream before and after each half layer
        for i, layer in enumerate(spec.layers):
            # a skipped half adds nothing, but what it would add is asked for
            after = x + halves.attention(i, x, layer.num_groups)
            x = after + halves.mlp(i, x, after, layer.intermediate_size)
            stream += [after, x]
        h_ND = decoder.final_norm(x)
        if around is None:
            (gradients,) = fisher_gradients(decoder, h_ND, stream[1:], torch.Generator().manual_seed(seed))
        else:
            gradients = _text_gradients(decoder, h_ND, tokens_BT, stream[1:])
    return _sweep(halves, space, spec, [s.detach() for s in stream], gradients, first_order=around is not None)


def _text_gradients(decoder: Decoder, h_ND: Tensor, tokens_BT: Tensor, stream: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradient of the mean loss of the next tokens, times N, by each tensor of the stream."""
    h_BTD = h_ND.unflatten(0, tuple(tokens_BT.shape))
    predicting, targets = h_BTD[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()
    loss = cross_entropy(predicting, decoder.head_weight.detach(), targets, decoder.config.logits_cap)
    return torch.autograd.grad(loss * len(h_ND), stream)


class _Halves:
    """What a half layer of a given width adds to the residual stream; width 0 adds nothing."""

    def __init__(self, decoder: Decoder, batch: Batch) -> None:
        self._layers, self._batch = decoder.layers, batch
        self._ropes = rotary_tables(decoder.config, batch.positions_N, decoder.dtype)
        self._core = CausalAttention(decoder.config)

    def attention(self, i: int, x_ND: Tensor, num_groups: int) -> Tensor:
        layer = self._layers[i]
        assert isinstance(layer, Layer)
        if num_groups == 0:
            return torch.zeros_like(x_ND)
        return layer.attend(x_ND, self._batch, [num_groups], i, self._ropes[i], self._core)

    def mlp(self, i: int, x_ND: Tensor, after_ND: Tensor, intermediate_size: int) -> Tensor:
        layer = self._layers[i]
        assert isinstance(layer, Layer)
        if intermediate_size == 0:
            return torch.zeros_like(x_ND)
        return layer.feed_forward(x_ND if layer.parallel else after_ND, self._batch, [intermediate_size])


@torch.no_grad()
def _sweep(
    halves: _Halves,
    space: SearchSpace,
    spec: SubnetSpec,
    stream: list[Tensor],
    gradients: tuple[Tensor, ...],
    *,
    first_order: bool,
) -> Sensitivity:
    mlp, attention = [], []

    def cost(change_ND: Tensor, gradient_ND: Tensor) -> float:
        change_N = (change_ND.float() * gradient_ND.float()).sum(-1)
        second = 0.5 * float(change_N.square().mean())
        return second + float(change_N.mean()) if first_order else second

    for i, layer in enumerate(spec.layers):
        before, middle, after = stream[2 * i : 2 * i + 3]
        g_middle, g_after = gradients[2 * i : 2 * i + 2]
        costs = {g: cost(before + halves.attention(i, before, g) - middle, g_middle) for g in (0, *space.num_groups)}
        attention.append(costs | {layer.num_groups: 0.0})
        costs = {
            w: cost(middle + halves.mlp(i, before, middle, w) - after, g_after) for w in (0, *space.intermediate_sizes)
        }
        mlp.append(costs | {layer.intermediate_size: 0.0})
    return Sensitivity(mlp=tuple(mlp), attention=tuple(attention))
