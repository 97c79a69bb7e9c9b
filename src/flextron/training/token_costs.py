"""What each MLP width would cost each token: the labels from which the token router learns before anything else.

`routing/sensitivity.py` averages the same second-order cost ½ (gᵀe)² over tokens; here it is kept token by token,
around a static sub-network. Its expectation over targets drawn from the model is the expected rise of the loss.

Shapes: N tokens, D hidden size, C choices of width (0 and the space's), R draws of targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flextron.model.attention import CausalAttention
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.model.layers import Layer
from flextron.model.rope import rotary_tables
from flextron.routing.sensitivity import fisher_gradients
from flextron.spec import SearchSpace, SubnetSpec

__all__ = ["TokenCosts", "token_costs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCosts:
    """One layer's inputs and labels."""

    x_ND: Tensor
    """What the MLP reads, normalised."""
    costs_NC: Tensor
    """Expected rise of the loss, in nats, against the full width, for each narrower choice (C - 1 of them)."""


@dataclass(frozen=True, slots=True)
class _Half:
    """One layer's MLP in the pass: its input before normalisation, and the residual stream after it."""

    layer: Layer
    read_ND: Tensor
    after_ND: Tensor


def _pass(decoder: Decoder, batch: Batch, spec: SubnetSpec) -> tuple[dict[int, _Half], Tensor]:
    """The static sub-network's MLPs by layer, and its final hidden states."""
    ropes = rotary_tables(decoder.config, batch.positions_N, decoder.dtype)
    core = CausalAttention(decoder.config)
    x_ND = decoder.embed(batch).detach().requires_grad_()
    halves = {}
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        widths = spec.layers[i]
        read_ND = x_ND
        if widths.num_groups:
            x_ND = x_ND + layer.attend(x_ND, batch, [widths.num_groups], i, ropes[i], core)
        if widths.intermediate_size:
            read_ND = read_ND if layer.parallel else x_ND
            x_ND = x_ND + layer.feed_forward(read_ND, batch, [widths.intermediate_size])
            halves[i] = _Half(layer, read_ND, x_ND)
    return halves, decoder.final_norm(x_ND)


def token_costs(
    decoder: Decoder,
    tokens_BT: Tensor,
    spec: SubnetSpec,
    space: SearchSpace,
    *,
    num_draws: int,
    generator: torch.Generator,
) -> dict[int, TokenCosts]:
    """Measure on sequences.

    Args:
        decoder: the model; its parameters get no gradient.
        tokens_BT: sequences; memory is that of a training step on them.
        spec: static sub-network in which they run.
        space: its MLP widths are the choices.
        num_draws: draws of targets that are averaged; the labels' noise falls with their root.
        generator: generator of the draws, on the CPU.

    Returns:
        By layer, for those whose MLP the spec does not skip.
    """
    batch = Batch.padded(tokens_BT.to(decoder.device), spec)
    with torch.enable_grad():
        halves, h_ND = _pass(decoder, batch, spec)
        draws = fisher_gradients(decoder, h_ND, [half.after_ND for half in halves.values()], generator, num_draws)
    out = {}
    with torch.no_grad():
        for (i, half), *gradients in zip(halves.items(), *draws, strict=True):
            g_RND = torch.stack(gradients).float()
            full_ND = half.layer.feed_forward(half.read_ND, batch, [space.intermediate_sizes[-1]])
            costs = []
            for width in (0, *space.intermediate_sizes[:-1]):
                change_ND = half.layer.feed_forward(half.read_ND, batch, [width]) - full_ND if width else full_ND.neg()
                costs.append(0.5 * (g_RND * change_ND.float()).sum(-1).square().mean(0))
            x_ND = half.layer.mlp_norm(half.read_ND)
            out[i] = TokenCosts(x_ND=x_ND.detach(), costs_NC=torch.stack(costs, -1))
    return out
