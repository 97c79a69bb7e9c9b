"""What each choice of each layer is likely to cost in loss, from one backward pass and one sweep over the layers.

For a small change e of the residual stream, the expected rise of the loss is ½ E[(gᵀ e)²], with g the gradient of the
log-likelihood of tokens drawn from the model itself (the Fisher information, which knows how much the rest of the
network cares). The e of every choice is computed exactly, one half layer at a time, on the full network's activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from flextron.files import checked
from flextron.model.attention import CausalAttention
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.model.layers import Layer
from flextron.model.losses import cross_entropy
from flextron.model.rope import Tables, rotary_tables
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
    """Expected rise of the loss, in nats, if one half layer alone is narrowed; width 0 is the skipped half."""

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


def measure_sensitivity(decoder: Decoder, tokens_BT: Tensor, space: SearchSpace, *, seed: int = 0) -> Sensitivity:
    """Measure on calibration sequences.

    Args:
        decoder: the full model.
        tokens_BT: a few sequences; memory is that of a training step on them.
        space: the choices.
        seed: seed of the drawn targets.
    """
    batch = Batch.padded(tokens_BT.to(decoder.device), decoder.widths)
    ropes = rotary_tables(decoder.config, batch.positions_N, decoder.dtype)
    core = CausalAttention(decoder.config)
    with torch.enable_grad():
        x = decoder.embed(batch).detach().requires_grad_()
        stream = [x]  # the residual stream before and after each half layer
        for i, layer in enumerate(decoder.layers):
            assert isinstance(layer, Layer)
            after = x + layer.attend(x, batch, [space.num_groups[-1]], i, ropes[i], core)
            x = after + layer.feed_forward(x if layer.parallel else after, batch, [space.intermediate_sizes[-1]])
            stream += [after, x]
        h = decoder.final_norm(x)
        (gradients,) = fisher_gradients(decoder, h, stream[1:], torch.Generator().manual_seed(seed))
    return _sweep(decoder, batch, space, [s.detach() for s in stream], gradients, ropes, core)


@torch.no_grad()
def _sweep(
    decoder: Decoder,
    batch: Batch,
    space: SearchSpace,
    stream: list[Tensor],
    gradients: tuple[Tensor, ...],
    ropes: Sequence[Tables | None],
    core: CausalAttention,
) -> Sensitivity:
    mlp, attention = [], []

    def cost(change_ND: Tensor, gradient_ND: Tensor) -> float:
        return 0.5 * float((change_ND.float() * gradient_ND.float()).sum(-1).square().mean())

    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        before, middle, after = stream[2 * i : 2 * i + 3]
        g_middle, g_after = gradients[2 * i : 2 * i + 2]
        costs = {space.num_groups[-1]: 0.0, 0: cost(before - middle, g_middle)}
        for g in space.num_groups[:-1]:
            costs[g] = cost(before + layer.attend(before, batch, [g], i, ropes[i], core) - middle, g_middle)
        attention.append(costs)
        costs = {space.intermediate_sizes[-1]: 0.0, 0: cost(middle - after, g_after)}
        for w in space.intermediate_sizes[:-1]:
            out = middle + layer.feed_forward(before if layer.parallel else middle, batch, [w])
            costs[w] = cost(out - after, g_after)
        mlp.append(costs)
    return Sensitivity(mlp=tuple(mlp), attention=tuple(attention))
