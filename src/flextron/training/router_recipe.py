"""How a static router trains: every knob, with its default, as one validated value."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["RouterRecipe"]


class RouterRecipe(BaseModel):
    """How the static router is trained. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_measured: int = Field(192, gt=0, le=10**6)
    """Sub-networks whose loss is measured for the surrogate."""
    per_round: int = Field(8, gt=0)
    """Sub-networks that are measured between two turns of the router."""
    random_fraction: float = Field(0.25, ge=0, lt=1)
    """Part of them that is drawn at random, so that the surrogate knows more than where the router goes."""
    warm_steps: int = Field(150, ge=0)
    """Steps in which the router first imitates the additive loss model's optima; 0 starts at random."""
    warm_lr: float = Field(2e-2, gt=0)
    """Learning rate of those."""
    surrogate_steps: int = Field(40, gt=0)
    """Steps of the surrogate in each round, on all that was measured."""
    surrogate_lr: float = Field(3e-3, gt=0)
    """Its learning rate."""
    max_error: float = Field(0.3, gt=0)
    """The router steps only after rounds in which the surrogate's mean error on the new sub-networks, in the logarithm
    of the rise in loss, was below this."""
    router_steps: int = Field(20, gt=0)
    """Steps of the router in each such round."""
    num_targets: int = Field(32, gt=0)
    """Targets of a router step."""
    lr: float = Field(1e-2, gt=0)
    """The router's learning rate."""
    tau: tuple[float, float] = (1.0, 0.05)
    """Temperature of the Gumbel softmax, first and last; falls geometrically."""
    scale: tuple[float, float] = (1.0, 10.0)
    """Factor of the logits, first and last; rises linearly."""
    latency_weight: float = Field(60.0, gt=0)
    """Weight of the latency loss."""
    dead_zone: float = Field(0.01, ge=0)
    """Relative deviation from the target latency that costs nothing."""
    min_target: float = Field(0.0, ge=0, lt=1)
    """Smallest target that is drawn; never below what the space reaches."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of targets, noise and initial weights."""
