"""How a token router trains: every knob, with its default, as one validated value."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["TokenRouterRecipe"]


class TokenRouterRecipe(BaseModel):
    """Warm start and joint stage of the token router. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(8, gt=0)
    """Sequences that run at once, in both stages."""
    warm_tokens: int = Field(8192, gt=0)
    """Tokens whose costs are measured for each target; their hidden states of all layers are held in memory."""
    num_draws: int = Field(4, gt=0)
    """Draws of targets over which each token's cost is averaged; each takes one backward pass."""
    warm_epochs: int = Field(8, gt=0)
    """Passes over the measured tokens; the router of the best is taken."""
    warm_batch_tokens: int = Field(256, gt=0)
    """Tokens of a step of the regression."""
    warm_lr: float = Field(1e-2, gt=0)
    """Peak learning rate of the regression; falls to 0 by a cosine."""
    warm_heldout_fraction: float = Field(0.1, gt=0, lt=1)
    """Part of the measured tokens by which the best epoch is told."""
    joint_steps: int = Field(100, ge=0)
    """Optimizer steps through the real loss; 0 leaves the warm start."""
    targets_per_batch: int = Field(2, gt=0)
    """Targets among which the sequences of a joint step are dealt."""
    router_lr: float = Field(1e-3, gt=0)
    """Peak learning rate of the router in the joint stage; falls to 0 by a cosine."""
    model_lr: float = Field(0.0, ge=0, le=1e-3)
    """Peak learning rate of the model in the joint stage; 0 freezes it. Embeddings and head never train."""
    tau_start: float = Field(1.0, gt=0)
    """Temperature of the Gumbel-softmax at first."""
    tau_end: float = Field(0.05, gt=0)
    """Temperature at the end; geometric in between."""
    logit_scale_start: float = Field(1.0, gt=0)
    """Factor of the logits against the Gumbel noise at first."""
    logit_scale_end: float = Field(10.0, gt=0)
    """Factor at the end; geometric in between."""
    latency_weight: float = Field(1.0, ge=0)
    """Weight of |average cost / target - 1| against the KL."""
    dead_zone: float = Field(0.01, ge=0)
    """Relative deviation from the target that costs nothing."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient, in both stages."""
    heldout_blocks: int = Field(16, gt=0)
    """Blocks at the end of the text for calibration and comparison; neither stage trains on them."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of draws, order of tokens, targets and noise; the router's initialisation has its own."""
