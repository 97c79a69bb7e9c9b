"""The input-adaptive router: an MLP width for each token and layer, by hidden state and target (Flextron, section 3.3).

It works around a static sub-network, which sets attention, skipped layers and the time to meet, and moves MLP width to
the tokens and layers that need it. For each layer a small MLP predicts the logarithm of what each narrower width costs
in loss, in a unit of its own; a logit is minus that cost, and 0 for the full width. The choice is the largest logit
after the time has been paid for, at a price that calibration sets for each target: one Lagrange multiplier for all
layers, so that a millisecond buys as much wherever it is spent.

Shapes: N tokens, D hidden size, C choices of width, E size of the target's embedding, U units of a layer's router.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from flextron.errors import FlextronError, shown
from flextron.files import checked
from flextron.model.config import DecoderConfig
from flextron.routing.latency import LatencyTable
from flextron.spec import SearchSpace, SubnetSpec
from flextron.spec.subnet import MAX_WIDTH

__all__ = ["PricedRouter", "TokenRouter"]

_LARGEST = 20.0
"""Largest logarithm of a predicted cost: beyond it, float32 has better uses."""


_Target = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Width = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,7}$")]


class _RouterFile(BaseModel):
    """What is not a tensor, in JSON form."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    space: dict[str, Any]
    hidden_size: Annotated[int, Field(ge=1, le=MAX_WIDTH)]
    mlp_costs: dict[_Width, _Number]
    prices: list[Annotated[tuple[_Target, _Number], Field(strict=False)]]
    specs: list[Annotated[tuple[_Target, dict[str, Any]], Field(strict=False)]]
    num_units: Annotated[int, Field(ge=1, le=2**14)]
    embedding_size: Annotated[int, Field(ge=1, le=2**14)]


class TokenRouter(nn.Module):
    """Routers of all layers, and the prices that calibration found."""

    unit: Tensor
    """Loss, in nats, that a logit of -1 stands for; a scalar."""
    input_rms_L: Tensor
    """Size of each layer's inputs: root of their mean square, over which the first linear maps read them. One number
    a layer, for the inputs are normalised token by token already."""
    costs_C: Tensor
    widths_C: Tensor
    mask_LC: Tensor

    def __init__(
        self,
        space: SearchSpace,
        hidden_size: int,
        mlp_costs: Mapping[int, float],
        *,
        num_units: int = 64,
        embedding_size: int = 16,
    ) -> None:
        """Allocate, untrained and without prices.

        Args:
            space: its MLP widths are the choices, and 0 in layers that may be skipped.
            hidden_size: hidden size of the model.
            mlp_costs: what each width costs in one layer, as a fraction of the full network's decode step.
            num_units: hidden units of each layer's router.
            embedding_size: size of the target's embedding, which all layers share.

        Raises:
            FlextronError: a width has no cost.
        """
        super().__init__()
        if set(mlp_costs) != set(space.intermediate_sizes):
            raise FlextronError(
                f"costs are for the widths {shown(sorted(mlp_costs))}, the space has "
                f"{shown(list(space.intermediate_sizes))}; measure a latency table of this model"
            )
        self.space, self.hidden_size = space, hidden_size
        self.mlp_costs = {w: float(mlp_costs[w]) for w in space.intermediate_sizes}
        self.widths = (0, *space.intermediate_sizes)
        self.prices: dict[float, float] = {}
        """Prices by target, in logits for the time of a whole full step."""
        self.specs: dict[float, SubnetSpec] = {}
        """The static sub-networks around which it was calibrated, by target."""
        self._sizes = {"num_units": num_units, "embedding_size": embedding_size}
        self.embedding = nn.Linear(1, embedding_size)
        self.first = nn.ModuleList(
            nn.Linear(hidden_size + embedding_size, num_units) for _ in range(space.num_hidden_layers)
        )
        self.second = nn.ModuleList(nn.Linear(num_units, len(self.widths) - 1) for _ in range(space.num_hidden_layers))
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("input_rms_L", torch.ones(space.num_hidden_layers))
        self.register_buffer("costs_C", torch.tensor([0.0, *self.mlp_costs.values()]), persistent=False)
        self.register_buffer("widths_C", torch.tensor(self.widths), persistent=False)
        skips = torch.zeros(space.num_hidden_layers, len(self.widths))
        skips[[i for i in range(space.num_hidden_layers) if i not in space.skippable_layers], 0] = -torch.inf
        self.register_buffer("mask_LC", skips, persistent=False)

    @classmethod
    def for_table(cls, space: SearchSpace, hidden_size: int, table: LatencyTable, **sizes: int) -> TokenRouter:
        """Allocate for the costs of a latency table; `sizes` as for the constructor."""
        full_ms = table.predict_ms(space.full)
        return cls(space, hidden_size, {w: ms / full_ms for w, ms in table.mlp_ms.items()}, **sizes)

    def parts(self, layer: int, target: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of a layer's two linear maps, with the target's share of the input in the first bias."""
        first, second = self.first[layer], self.second[layer]
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        # the distance to the full network: zero means no change, whatever the embedding has learned
        embedded = F.leaky_relu(self.embedding(self.unit.new_full((1,), 1 - target)))
        bias = first.bias + first.weight[:, self.hidden_size :] @ embedded
        w_UD = first.weight[:, : self.hidden_size] / self.input_rms_L[layer]
        return w_UD, bias, second.weight, second.bias - self.unit.log()

    def log_costs(self, layer: int, x_ND: Tensor, target: float) -> Tensor:
        """Logarithm of each narrower width's predicted cost in loss, over the unit; (N, C - 1)."""
        return _log_costs(x_ND, *self.parts(layer, target))

    def logits(self, layer: int, x_ND: Tensor, target: float) -> Tensor:
        """Scores of all choices before the price, (N, C); -inf where a layer may not be skipped.

        Args:
            layer: index.
            x_ND: what the layer's MLP reads, normalised; any dtype.
            target: fraction of the full network's decode time.
        """
        costs = self.log_costs(layer, x_ND, target).clamp(max=_LARGEST).exp()
        return F.pad(-costs, (0, 1)) + self.mask_LC[layer]

    def price(self, target: float) -> float:
        """The calibrated price at a target, interpolated between its neighbours.

        Raises:
            FlextronError: there are no prices, or the target lies outside those calibrated.
        """
        if not self.prices:
            raise FlextronError("the token router has no prices yet; calibrate or train it first")
        targets = sorted(self.prices)
        if not targets[0] <= target <= targets[-1]:
            raise FlextronError(
                f"the token router is calibrated for targets from {targets[0]:g} to {targets[-1]:g}, not {target:g}; "
                "choose one in between, or calibrate it for more"
            )
        right = min(bisect_right(targets, target), len(targets) - 1)
        a, b = targets[max(right - 1, 0)], targets[right]
        share = 0.0 if a == b else (target - a) / (b - a)
        return (1 - share) * self.prices[a] + share * self.prices[b]

    def at(self, target: float, price: float | None = None) -> PricedRouter:
        """The router for one target, to be given to segments.

        Args:
            target: fraction of the full network's decode time.
            price: in place of the calibrated one.

        Raises:
            FlextronError: the target is not in (0, 1], or there is no price for it.
        """
        if not 0 < target <= 1:
            raise FlextronError(f"a target is a fraction of the full latency in (0, 1], not {target}")
        return PricedRouter(self, target, self.price(target) if price is None else price)

    def static_spec(self, target: float) -> SubnetSpec:
        """The sub-network around which tokens are routed at a calibrated target: its attention, its skipped layers.

        Raises:
            FlextronError: the router was not calibrated at this target; names those at which it was.
        """
        for calibrated, spec in self.specs.items():
            if abs(calibrated - target) < 1e-6:
                return spec
        listed = ", ".join(f"{t:g}" for t in sorted(self.specs)) or "none"
        raise FlextronError(
            f"the token router is calibrated for the targets {listed}, not {target:g}; choose one of them"
        )

    def check(self, config: DecoderConfig, spec: SubnetSpec) -> None:
        """Raise unless this router is made for such a model and can work around this sub-network.

        Raises:
            FlextronError: names what differs.
        """
        own = (self.space.num_hidden_layers, self.hidden_size, self.widths[-1])
        theirs = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
        if own != theirs:
            raise FlextronError(
                f"the token router is for (layers, hidden size, MLP width) {own}, the model has {theirs}; "
                "train a router for this model"
            )
        self.space.check(spec)

    def to_dict(self) -> dict[str, Any]:
        """What is not a tensor, in JSON form."""
        return {
            "space": self.space.to_dict(),
            "hidden_size": self.hidden_size,
            "mlp_costs": {str(w): cost for w, cost in self.mlp_costs.items()},
            "prices": [[target, self.prices[target]] for target in sorted(self.prices)],
            "specs": [[target, self.specs[target].to_dict()] for target in sorted(self.specs)],
            **self._sizes,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TokenRouter:
        """Rebuild from `to_dict` and `state_dict`.

        Raises:
            FlextronError: keys or tensors are missing, unknown or of other types, sizes or shapes.
        """
        found = checked(_RouterFile, data, "the token router", "train it again with route --token")
        try:
            space = SearchSpace.from_dict(found.space)
            specs = {target: SubnetSpec.from_dict(spec) for target, spec in found.specs}
            for spec in specs.values():
                space.check(spec)
        except FlextronError as error:
            raise FlextronError(
                f"the token router is malformed ({error}); train it again with route --token"
            ) from error
        costs = {int(width): cost for width, cost in found.mlp_costs.items()}
        sizes = {"num_units": found.num_units, "embedding_size": found.embedding_size}
        other = "the token router's tensors are of another model or search space; train it again with route --token"
        # before anything is allocated: the file has as much as the sizes ask for
        first = (found.num_units, found.hidden_size + found.embedding_size)
        if any(_shape(tensors, f"first.{i}.weight") != first for i in (0, space.num_hidden_layers - 1)):
            raise FlextronError(other)
        router = cls(space, found.hidden_size, costs, **sizes)
        try:
            router.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise FlextronError(other) from error
        router.prices, router.specs = dict(found.prices), specs
        return router.eval()


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return tuple(tensors[name].shape) if name in tensors else ()


def _log_costs(x_ND: Tensor, w_UD: Tensor, b_U: Tensor, w_CU: Tensor, b_C: Tensor) -> Tensor:
    """A layer's two linear maps."""
    return F.linear(F.leaky_relu(F.linear(x_ND.to(w_UD.dtype), w_UD, b_U)), w_CU, b_C)


def _with_full(w_UD: Tensor, b_U: Tensor, w_CU: Tensor, b_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer's parts, copied, with the full width as one more choice, whose cost is always exp(-inf) = 0."""
    return w_UD.clone().contiguous(), b_U.clone(), F.pad(w_CU, (0, 0, 0, 1)), F.pad(b_C, (0, 1), value=-torch.inf)


class PricedRouter:
    """A router at one target and price: the choice that segments carry (see `model.batch.TokenChoice`).

    It holds a copy of the router's numbers, taken when it is made, with target and price folded into the biases.
    """

    @torch.no_grad()
    def __init__(self, router: TokenRouter, target: float, price: float) -> None:
        """Take the router's numbers; `price` is in logits for the time of a whole full step."""
        self.target, self.price = target, price
        self._router = router
        self._parts = [_with_full(*router.parts(i, target)) for i in range(len(router.first))]
        self._offsets_LC = (router.mask_LC - price * router.costs_C).unbind()
        self._widths_C = router.widths_C.clone()

    def __call__(self, layer: int, x_ND: Tensor) -> tuple[Tensor, None]:
        """See `TokenChoice`; a decode step has microseconds for it, so few operations."""
        costs_NC = _log_costs(x_ND.detach(), *self._parts[layer]).exp()
        return self._widths_C[(self._offsets_LC[layer] - costs_NC).argmax(-1)], None

    def check(self, config: DecoderConfig, spec: SubnetSpec) -> None:
        """See `TokenRouter.check`."""
        self._router.check(config, spec)
