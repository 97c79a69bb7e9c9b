"""Settings of elastic training with their defaults: one validated value that is stored with the result."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["TrainRecipe"]


class TrainRecipe(BaseModel):
    """Elastic continued training. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(100_000, gt=0, le=2**50)
    """Training tokens in all, each counted once."""
    context: int = Field(256, gt=1, le=2**24)
    """Tokens of a sequence."""
    batch_size: int = Field(8, gt=0, le=2**20)
    """Sequences of an optimizer step, over all processes and accumulation steps."""
    micro_batch_size: int = Field(8, gt=0, le=2**20)
    """Sequences that run at once in one process."""
    subnets_per_batch: int = Field(2, gt=0)
    """Sub-networks among which the sequences of a micro batch are dealt; all run in one nested pass."""
    sandwich: bool = False
    """Whether each sequence runs in all sub-networks of its micro batch (the sandwich rule of slimmable networks)
    instead of being dealt to one: as many times the work for the same text, and the teacher still runs once."""
    sampling: Literal["guided", "uniform", "random"] = "guided"
    """Kind of the drawn sub-networks: the best of their size by the original's sensitivities, the same widths in all
    layers, or any heterogeneous ones."""
    sizes: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] | None = None
    """Sizes to draw, as fractions of the layers' parameters. Default: any from `min_size` to 1."""
    full_probability: float = Field(0.2, ge=0, le=1)
    """Probability of drawing the full network, so that it does not decay."""
    random_probability: float = Field(0.1, ge=0, le=1)
    """Probability of drawing any heterogeneous sub-network, rather than one guided by sensitivities."""
    min_size: float = Field(0.4, gt=0, le=1)
    """Smallest size that is drawn, as a fraction of the layers' parameters."""
    tilt: float = Field(1.0, gt=0)
    """Above 1, the drawn sizes lean to the large end."""
    anneal_fraction: float = Field(0.2, ge=0, le=1)
    """Part of the run over which the smallest size comes in."""
    lora_rank: int | None = Field(None, gt=0, le=2**16)
    """Rank of the low-rank updates that are trained, with the norms, beside frozen weights. Default: all weights
    train."""
    lora_alpha: float | None = Field(None, gt=0, le=1e6)
    """The updates are multiplied by alpha / rank. Default: the rank."""
    lr: float = Field(4e-4, gt=0, le=100)
    """Peak learning rate of AdamW."""
    router_lr: float = Field(1e-3, gt=0, le=100)
    """Peak learning rate of routers that train along with the model."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end of the cosine, over the peak."""
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    """Part of the run over which the rate rises linearly."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    train_embeddings: bool = False
    """Whether embeddings, positions and head train too; they are not nested, and expensive in a small model."""
    kl_weight: float = Field(1.0, ge=0)
    """Weight of the forward KL to the frozen original."""
    kl_fraction: float = Field(0.25, gt=0, le=1)
    """Part of the tokens, drawn again at each step, on which the KL is computed: an unbiased estimate at a fraction of
    the vocabulary's cost."""
    hidden_weight: float = Field(1.0, ge=0)
    """Weight of the distance to the teacher's final hidden states, on all tokens, in the head's metric."""
    lm_weight: float = Field(0.0, ge=0)
    """Weight of the next-token loss, on the same tokens as the KL."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of the KL."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of activations; weights and optimizer state are float32."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass, for less memory."""
    checkpoint_minutes: float = Field(5.0, gt=0)
    """Time between resumable states on disk."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of data order, sub-networks and token choice."""

    @model_validator(mode="after")
    def _some_loss(self) -> TrainRecipe:
        if not self.needs_teacher and not self.lm_weight:
            raise ValueError("kl_weight, hidden_weight and lm_weight are all 0; nothing would be trained")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss compares with the frozen original."""
        return bool(self.kl_weight or self.hidden_weight)
