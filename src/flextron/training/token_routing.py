"""Training of the token router, in two stages (Flextron, section 3.3).

First its layers learn, by regression on the frozen model, what each width would cost each token. That alone makes a
sensible router, for the price turns costs into choices. Then it trains through the real loss: a sampled choice runs,
a straight-through gate on its output carries the gradient, and a latency loss holds the average cost at the target's.
The second stage is kept only where it helped on text that neither stage has seen. Everything is a function of the
recipe's seed. One process, one device.

Shapes: N tokens, D hidden size, C choices of width (0 and the space's).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flextron.errors import FlextronError, shown
from flextron.losses.vocabulary import forward_kl
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.progress import OnStep
from flextron.routing.latency import LatencyTable
from flextron.routing.token_calibration import calibrate
from flextron.routing.token_router import TokenRouter
from flextron.spec import SubnetSpec
from flextron.texts.blocks import TokenBlocks
from flextron.training.token_joint import JointStage
from flextron.training.token_recipe import TokenRouterRecipe
from flextron.training.token_warm_start import warm_start

__all__ = ["TokenRouterResult", "routed_kl", "train_token_router"]

_CHUNK_SEQUENCES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRouterResult:
    """What training did; all measured on the held-out blocks, at equal average cost."""

    static_kl: dict[float, float]
    """Forward KL of the static sub-networks to the teacher, in nats a token, by target."""
    warm_kl: dict[float, float]
    """The same, token-routed after the warm start."""
    routed_kl: dict[float, float]
    """The same, of the router that was kept."""
    cost_ratio: dict[float, float]
    """Average cost of the kept router over the static sub-network's, by target."""
    kept: str
    """The stage whose router was kept: `warm` or `joint`."""
    warm_history: list[dict[str, float]] = field(default_factory=list)
    """The regression's loss on training and held-out tokens, for each epoch."""
    joint_history: list[dict[str, float]] = field(default_factory=list)
    """Losses and cost of each joint step."""


@torch.no_grad()
def routed_kl(
    decoder: Decoder, teacher: Decoder, tokens_BT: Tensor, spec: SubnetSpec, router: TokenRouter | None, target: float
) -> float:
    """Mean forward KL to the teacher, in nats a token.

    Args:
        decoder: the model.
        teacher: the frozen original.
        tokens_BT: sequences of tokens.
        spec: the static sub-network.
        router: routes tokens around it, at its calibrated price; None runs the static one.
        target: target of the router.
    """
    choice = None if router is None else router.at(target)
    total = 0.0
    for chunk in tokens_BT.to(decoder.device).split(_CHUNK_SEQUENCES):
        h_ND, teacher_h_ND = decoder(Batch.padded(chunk, spec, choice)), teacher(Batch.padded(chunk, teacher.widths))
        total += float(
            forward_kl(h_ND, decoder.head_weight, teacher_h_ND, teacher.head_weight, cap=decoder.config.logits_cap)
        ) * len(chunk)
    return total / len(tokens_BT)


def train_token_router(
    decoder: Decoder,
    teacher: Decoder,
    router: TokenRouter,
    table: LatencyTable,
    static_specs: Mapping[float, SubnetSpec],
    blocks: TokenBlocks,
    recipe: TokenRouterRecipe,
    *,
    on_step: OnStep | None = None,
) -> TokenRouterResult:
    """Train a token router, in place, and calibrate its prices.

    Args:
        decoder: the elastic model; trained too if the recipe has a `model_lr`.
        teacher: the frozen original, or `decoder` itself if it is not trained.
        router: made for this model and table.
        table: costs of a decode step.
        static_specs: by target (fraction of the full decode time), the sub-network around which tokens are routed.
        blocks: text; the last `heldout_blocks` serve calibration and comparison alone.
        recipe: all settings.
        on_step: called after every epoch and step with their number, how many there are in all, and the losses.

    Raises:
        FlextronError: the router is of another model, a target is not in (0, 1], there are too few blocks, the model
            is to be trained against itself, or a gradient is not finite.
    """
    _check(decoder, teacher, router, static_specs, blocks, recipe)
    held_BT = torch.from_numpy(blocks.tokens[-recipe.heldout_blocks :].astype("int64"))
    training = TokenBlocks(tokens=blocks.tokens[: -recipe.heldout_blocks], seed=blocks.seed)
    total = recipe.warm_epochs + recipe.joint_steps
    histories: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])

    def report(stage: int, losses: dict[str, float]) -> None:
        histories[stage].append(losses)
        if on_step is not None:
            on_step(len(histories[0]) + len(histories[1]), total, losses)

    def measure(routed: TokenRouter | None) -> dict[float, float]:
        return {t: routed_kl(decoder, teacher, held_BT, spec, routed, t) for t, spec in static_specs.items()}

    decoder.eval().requires_grad_(False)
    teacher.eval().requires_grad_(False)
    router.to(decoder.device).train().requires_grad_(True)
    static_kl = measure(None)
    warm_start(decoder, router, static_specs, training, recipe, on_epoch=lambda losses: report(0, losses))
    ratio = _calibrate_with_unit(router, decoder, held_BT, static_specs, table)
    warm_kl = kept_kl = measure(router)
    kept = "warm"
    if recipe.joint_steps:
        before = copy.deepcopy(router.state_dict()), router.prices, ratio
        joint = JointStage(
            decoder=decoder, teacher=teacher, router=router, table=table, static_specs=static_specs, recipe=recipe
        )
        joint.run(training, lambda losses: report(1, losses))
        ratio = calibrate(router, decoder, held_BT, static_specs, table)
        kept, kept_kl = "joint", measure(router)
        # a trained model cannot go back to the router that it no longer fits
        if not recipe.model_lr and sum(kept_kl.values()) > sum(warm_kl.values()):
            router.load_state_dict(before[0])
            router.prices, ratio = before[1:]
            kept, kept_kl = "warm", warm_kl
    router.eval().requires_grad_(False)
    router.specs = dict(static_specs)
    return TokenRouterResult(
        static_kl=static_kl,
        warm_kl=warm_kl,
        routed_kl=kept_kl,
        cost_ratio=ratio,
        kept=kept,
        warm_history=histories[0],
        joint_history=histories[1],
    )


def _calibrate_with_unit(
    router: TokenRouter,
    decoder: Decoder,
    tokens_BT: Tensor,
    static_specs: Mapping[float, SubnetSpec],
    table: LatencyTable,
) -> dict[float, float]:
    """Calibrate, and choose the unit so that at the middle target an average step of width is worth one logit."""
    ratio = calibrate(router, decoder, tokens_BT, static_specs, table)
    middle = sorted(router.prices)[len(router.prices) // 2]
    widest = max(router.mlp_costs.values()) / len(router.mlp_costs)
    worth = router.prices[middle] * widest
    if worth > 0:
        router.unit.mul_(worth)
        router.prices = {target: price / worth for target, price in router.prices.items()}
    return ratio


def _check(
    decoder: Decoder,
    teacher: Decoder,
    router: TokenRouter,
    static_specs: Mapping[float, SubnetSpec],
    blocks: TokenBlocks,
    recipe: TokenRouterRecipe,
) -> None:
    """Refuse what cannot be trained."""
    if not static_specs or not all(0 < target <= 1 for target in static_specs):
        raise FlextronError(
            "token routing needs targets in (0, 1], each with its static sub-network, not "
            f"{shown(sorted(static_specs))}"
        )
    for spec in static_specs.values():
        router.check(decoder.config, spec)
    decoder.config.check_length(blocks.context)
    if blocks.num_blocks <= recipe.heldout_blocks:
        raise FlextronError(
            f"{blocks.num_blocks} blocks leave none to train on beside {recipe.heldout_blocks} held out; "
            "give more text or lower heldout_blocks"
        )
    if recipe.model_lr and teacher is decoder:
        raise FlextronError("with a model_lr the teacher must be a model of its own; pass a copy of the original")
