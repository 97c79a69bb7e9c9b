"""What a request runs in: an adapter by the model's name, and a sub-network.

The sub-network is named by a suffix of the model's name (`name@0.6`), or by the key `flextron` of the body.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flextron.api import ElasticModel
from flextron.errors import FlextronError
from flextron.routing.token_router import PricedRouter
from flextron.serving.adapters import AdapterNames, NamedAdapter, is_word
from flextron.serving.errors import bad_request, not_found
from flextron.serving.ladder import fractions, narrowed, rungs
from flextron.spec import SubnetSpec, Target

__all__ = ["Catalog", "Choice", "TargetBody"]

_FRACTION = re.compile(r"\d{1,3}(\.\d{0,17})?|\.\d{1,17}")


class TargetBody(BaseModel):
    """The key `flextron` of a body: the fields of `flextron.Target`, and two more."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

    latency: float | None = None
    latency_ms: float | None = None
    params: int | None = None
    memory_gb: float | None = None
    max_loss_increase: float | None = None
    context: int | None = None
    router: Literal["token"] | None = None
    min_latency_target: Annotated[float, Field(gt=0, le=1)] | None = None
    """How narrow the sub-network may become while the server is busy; 1 allows nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The adapter and the sub-network of a request."""

    model_id: str
    """The model's name as the client gave it."""
    adapter: NamedAdapter | None
    """The adapter; None for the model as it is."""
    spec: SubnetSpec
    router: PricedRouter | None
    asked: Target | None
    """The target that the client named; None for the full sub-network."""
    target: Target | None
    """The target that the request got: the same, or a narrower one while the server is busy."""
    params: int
    least: float | None = None
    """The narrowest latency target that it may get while the server is busy; None if it keeps its sub-network."""
    first_target: Target | None = None
    """The target with which the answer began, if it became narrower on the way."""
    has_changed: bool = False
    """Whether it became narrower on the way."""

    @property
    def was_narrowed(self) -> bool:
        """Whether it got less than it asked for."""
        return self.target != self.asked

    @property
    def label(self) -> str:
        """Label of the target in metrics. It has few values, because clients must not be able to create series."""
        if self.target is None:
            return "full"
        value = f"={self.target.value:.2f}" if self.target.axis == "latency" else ""
        return f"{self.target.axis}{value}" + ("+token" if self.router else "")

    def report(self) -> dict[str, Any]:
        """What an answer says about it."""
        both = {"asked": self._written(self.asked), "target": self._written(self.target)}
        if self.has_changed:
            both["first_target"] = self._written(self.first_target)
        name = None if self.adapter is None else self.adapter.name
        return {"spec": self.spec.to_dict(), "params": self.params, **both, "adapter": name}

    def _written(self, target: Target | None) -> dict[str, Any] | None:
        if target is None:
            return None
        return {target.axis: getattr(target, target.axis)} | ({"router": "token"} if self.router else {})


class Catalog:
    """Names of models and what they stand for."""

    def __init__(
        self,
        model: ElasticModel,
        name: str,
        min_latency_target: float | None = None,
        adapters: AdapterNames | None = None,
    ) -> None:
        """Take the model and its name.

        Args:
            model: what is served.
            name: its name.
            min_latency_target: how narrow requests may become that do not say it themselves; None for not at all.
            adapters: names of adapters, which may change at any time; None for no adapter.

        Raises:
            FlextronError: the name cannot stand before a target.
        """
        if not is_word(name):
            raise FlextronError(f"the name {name!r} must be a word without @; choose one with --name")
        self._model, self.name, self._least = model, name, min_latency_target
        self._adapters = adapters or AdapterNames()
        if self._adapters.get(name) is not None:
            raise FlextronError(f"the model and an adapter are both called {name!r}; give each a name of its own")
        self.rungs: tuple[float, ...] = ()
        """A few latency targets that can be reached here, falling."""
        self.refresh()
        # one object a target, because the engine tells routers apart by identity
        self._routed: dict[float | None, tuple[SubnetSpec, PricedRouter]] = {}

    def refresh(self) -> None:
        """Learn of latencies that were measured since."""
        self.rungs = rungs(self._fractions())

    def choose(self, model_id: str, body: TargetBody | None = None, cap: float = 1.0) -> Choice:
        """What a request runs in.

        Args:
            model_id: the model's name as the client gave it.
            body: the key `flextron`.
            cap: the widest latency target for requests that allow a narrower one.

        Raises:
            ApiError: the model is unknown, both places name different targets, or nothing is within the target.
        """
        adapter, suffix = self._parts(model_id)
        try:
            asked = _target(body)
            if suffix is not None:
                named = Target(latency=suffix)
                if asked is not None and asked != named:
                    raise bad_request(f"{model_id!r} and the key flextron name different targets; give one", "flextron")
                asked = named
            is_routed = body is not None and body.router is not None
            least = self._allowed(asked, body)
            target = self._within(asked, cap, least)
            spec, router = self._sub_network(target, is_routed)
        except FlextronError as error:
            raise bad_request(str(error), "model" if body is None else "flextron") from error
        params = self._model.num_parameters(spec)
        return Choice(
            model_id=model_id,
            adapter=adapter,
            spec=spec,
            router=router,
            asked=asked,
            target=target,
            params=params,
            least=least,
        )

    def narrower(self, choice: Choice, cap: float) -> Choice | None:
        """What a running request goes on in within the cap; None if it stays as it is.

        It reads keys and values that its present sub-network has kept, so it gets at most that one's KV groups.
        """
        target = self._within(choice.target, cap, choice.least)
        if target is None or target == choice.target:
            return None
        spec = self._model.best(target).spec.with_groups_of(choice.spec)
        first = choice.first_target if choice.has_changed else choice.target
        params = self._model.num_parameters(spec)
        return replace(choice, spec=spec, target=target, params=params, first_target=first, has_changed=True)

    def _allowed(self, asked: Target | None, body: TargetBody | None) -> float | None:
        """How narrow a request may become; None where its target is not one that can be narrowed."""
        allowed = None if body is None else body.min_latency_target
        is_fixed = (body is not None and body.router is not None) or (asked is not None and asked.latency is None)
        if is_fixed and allowed is not None:
            raise FlextronError("min_latency_target goes with a latency target and no router; leave it out")
        return None if is_fixed else self._least if allowed is None else allowed

    def _within(self, target: Target | None, cap: float, least: float | None) -> Target | None:
        """A target within the cap, where it may become narrower."""
        if least is None:
            return target
        wanted = 1.0 if target is None or target.latency is None else target.latency
        within = narrowed(wanted, cap, least, self.rungs)
        return Target(latency=within) if within < wanted else target

    def _sub_network(self, target: Target | None, is_routed: bool) -> tuple[SubnetSpec, PricedRouter | None]:
        if is_routed:
            if target is None:
                raise FlextronError("a token router needs a latency target; give latency")
            if target.latency not in self._routed:
                self._routed[target.latency] = self._model.routed(target)
            return self._routed[target.latency]
        return (self._model.space.full if target is None else self._model.best(target).spec), None

    def _parts(self, model_id: str) -> tuple[NamedAdapter | None, float | None]:
        """The adapter, and the latency fraction that a model's name ends with."""
        name, at, fraction = model_id.rpartition("@")
        if not at:
            name = model_id
        adapter = self._adapters.get(name)
        if (name != self.name and adapter is None) or (at and not _FRACTION.fullmatch(fraction)):
            raise not_found(model_id)
        return adapter, float(fraction) if at else None

    def adapters(self) -> list[NamedAdapter]:
        """All adapters that exist now."""
        return self._adapters.all()

    def ids(self) -> list[str]:
        """The model's name, alone and with some targets that can be reached here."""
        return [self.name, *(f"{self.name}@{fraction:g}" for fraction in self._fractions())]

    def _fractions(self) -> list[float]:
        """Latency targets that can be reached here, falling."""
        if self._model.frontier is None:
            return []
        try:
            self._model.select(latency=1.0)
        except FlextronError:  # measured on another device
            return []
        return fractions(p.latency for p in self._model.frontier.best())


def _target(asked: TargetBody | None) -> Target | None:
    """The body's target; None if it names none."""
    limits = {} if asked is None else asked.model_dump(exclude={"router", "min_latency_target"}, exclude_none=True)
    return Target(**limits) if limits.keys() - {"context"} else None
