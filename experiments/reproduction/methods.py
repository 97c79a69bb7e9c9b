"""What is compared: each method as a run that trains a model and says how well its sub-networks predict.

All post-training starts from the same base, takes the same number of tokens in the same order, trains embeddings too,
and uses the same rate and schedule. The peers follow their papers in what they train and with which loss:

- MatFormer (Devvrit et al., 2023): four widths of the feed-forward layers in every step; next-token loss.
- SortedNet (Valipour et al., 2023): four random nested sub-networks in every step; next-token loss.
- Minitron (Muralidharan et al., 2024): pruned to one size by activations, then distilled with the forward KL; a run of
  all tokens for each size.

The elastic methods run every sequence in four sub-networks, so a size gets as many tokens as a Minitron-type run of its
own; results say both how much text a method took and how many tokens went through the student.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from experiments.reproduction.choosing import (
    better_router,
    choose_mixed,
    choose_uniform,
    routed_specs,
    search_specs,
    train_router,
)
from experiments.reproduction.scales import uniform_widths
from experiments.reproduction.setting import Setting, Work
from experiments.reproduction.store import ROUTER
from flextron.elastic import extract
from flextron.model.decoder import Decoder
from flextron.routing.latency import LatencyTable
from flextron.routing.routers import StaticRouter
from flextron.routing.token_calibration import score_routed
from flextron.routing.token_router import TokenRouter
from flextron.spec import SearchSpace, SubnetSpec
from flextron.texts.blocks import TokenBlocks
from flextron.training.router_joint import JointRouting
from flextron.training.router_recipe import RouterRecipe
from flextron.training.token_recipe import TokenRouterRecipe
from flextron.training.token_routing import train_token_router

__all__ = [
    "ABLATIONS",
    "ROUTER_ABLATIONS",
    "Run",
    "ablation",
    "base",
    "continued",
    "flextron",
    "matformer",
    "minitron",
    "sortednet",
]

Run = tuple[Decoder, dict[str, Any]]
"""A trained model and the facts that go into its result."""

_LANGUAGE_MODELLING = {"kl_weight": 0.0, "hidden_weight": 0.0, "lm_weight": 1.0}
_HANDOVER = 0.5
"""Rate at which the elastic stage ends and the joint one begins, over the peak: one schedule over both."""


def _elastic_recipe(s: Setting) -> dict[str, Any]:
    """Flextron's: distilled from the frozen base; every sequence runs in four sub-networks, one of them full."""
    return {
        "kl_weight": 1.0,
        "lm_weight": s.scale.lm_weight,
        "hidden_weight": 0.0,
        "subnets_per_batch": 4,
        "sandwich": True,
        "full_probability": 0.0,
        "anneal_fraction": 0.0,
        "random_probability": 0.1,
    }


def _facts(work: Work, points: list[dict[str, Any]], method: str) -> dict[str, Any]:
    return {"method": method, **work.to_dict(), "points": points}


def base(s: Setting, name: str, widths: SubnetSpec | None = None, size: float = 1.0) -> Run:
    """The base, or a smaller variant of the given widths, trained end to end."""
    work = Work()
    decoder = s.scratch(widths or s.config.full_spec)
    num_steps = s.scale.tokens // (s.scale.batch_size * s.scale.context)
    recipe = s.recipe(
        num_steps, pretraining=True, subnets_per_batch=1, full_probability=1.0, weight_decay=0.05, **_LANGUAGE_MODELLING
    )
    s.train(name, decoder, recipe, work)
    return decoder, _facts(work, s.points(decoder, {size: decoder.widths}), "base" if widths is None else "end to end")


def continued(s: Setting, name: str) -> Run:
    """The base alone, trained on with the post-training tokens: how much of a gain is that of more tokens."""
    work = Work()
    decoder = s.base()
    recipe = s.recipe(s.scale.elastic_steps, subnets_per_batch=1, full_probability=1.0, **_LANGUAGE_MODELLING)
    s.train(name, decoder, recipe, work)
    return decoder, _facts(work, s.points(decoder, {1.0: decoder.widths}), "base, trained on")


def _elastic(
    s: Setting,
    name: str,
    num_steps: int,
    work: Work,
    *,
    permuted: bool = True,
    handover: float = _HANDOVER,
    **changes: Any,
) -> tuple[Decoder, SearchSpace]:
    """Flextron's first stages: rank and permute, then elastic training of sub-networks near the compared sizes."""
    ranked, inner = s.ranked_base("reconstruction")
    decoder = ranked if permuted else s.base()
    space = s.space(skip=inner[: s.scale.num_skippable])
    recipe = s.recipe(
        num_steps, **_elastic_recipe(s) | {"sizes": (1.0, *s.scale.sizes), "min_lr_ratio": handover} | changes
    )
    s.train(name, decoder, recipe, work, stage="elastic", teacher=s.base(), space=space)
    return decoder, space


def _router(s: Setting, decoder: Decoder, space: SearchSpace) -> tuple[StaticRouter, dict[str, float]]:
    """A static router for the frozen model, and how good its surrogate was."""
    return train_router(decoder, space, s.data.search_BT.to(s.device), seed=s.seed, effort=s.scale.num_candidates)


def _joint(
    s: Setting,
    name: str,
    decoder: Decoder,
    router: StaticRouter,
    work: Work,
    *,
    router_lr: float = 1e-3,
    **changes: Any,
) -> None:
    """Flextron's last stage: model and router finetuned together, at the compared sizes and the full one."""
    rate = _HANDOVER * s.scale.elastic_lr[s.family]
    values = _elastic_recipe(s) | {"lr": rate, "router_lr": router_lr, "warmup_fraction": 0.0} | changes
    table = LatencyTable.of_parameters(s.config, router.space)
    routing = JointRouting(
        router=router,
        table=table,
        recipe=RouterRecipe(seed=s.seed),
        targets=(1.0, *(budget / table.full_ms for budget in s.budgets.values())),
        full_probability=0.0,
    )
    recipe = s.recipe(s.scale.joint_steps, **values)
    s.train(name, decoder, recipe, work, stage="joint", teacher=s.base(), space=router.space, routing=routing)
    router.eval().requires_grad_(False)


def _routed_again(s: Setting, decoder: Decoder, router: StaticRouter) -> tuple[StaticRouter, dict[str, float]]:
    """The better of two routers on held-back search windows: the one finetuned along, and one of the finished model.

    The first one's answers were found when the model was young; the second takes no training tokens either.
    """
    again, quality = _router(s, decoder, router.space)
    routers = (router, again.to(s.device))
    return better_router(decoder, routers, s.data.search_BT.to(s.device), s.budgets), quality


def flextron_elastic(s: Setting, name: str) -> Run:
    """The elastic stage and the router of the frozen model; what the last stage starts from."""
    work = Work()
    decoder, space = _elastic(s, name, s.scale.elastic_steps - s.scale.joint_steps, work)
    router, quality = _router(s, decoder, space)
    points = s.points(decoder, {1.0: space.full, **routed_specs(decoder, router, s.budgets)})
    facts = _facts(work, points, "Flextron, before joint finetuning")
    return decoder, facts | {"space": space.to_dict(), "surrogate": quality, ROUTER: router.state_dict()}


def flextron(s: Setting, name: str) -> Run:
    """All stages; goes on from `flextron-elastic`."""
    before = s.store.result("flextron-elastic") or {}
    work = Work(**{key: before[key] for key in Work.FIELDS})
    decoder = s.store.decoder("flextron-elastic", s.config).to(s.device)
    space = SearchSpace.from_dict(before["space"])
    router = s.store.router("flextron-elastic", space).to(s.device)
    _joint(s, name, decoder, router, work)
    kept, quality = _routed_again(s, decoder, router)
    points = s.points(decoder, {1.0: space.full, **routed_specs(decoder, kept, s.budgets)})
    facts = {"space": space.to_dict(), "surrogate": quality, "routed_again": kept is not router}
    return decoder, _facts(work, points, "Flextron") | facts | {ROUTER: kept.state_dict()}


def no_surrogate(s: Setting, name: str) -> Run:
    """The router learns by the model's gradients alone, in the joint stage, from random weights."""
    before = s.store.result("flextron-elastic") or {}
    work = Work(**{key: before[key] for key in Work.FIELDS})
    decoder = s.store.decoder("flextron-elastic", s.config).to(s.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)
        router = StaticRouter(SearchSpace.from_dict(before["space"])).to(s.device)
    _joint(s, name, decoder, router, work, router_lr=1e-2)
    size = s.scale.ablation_size
    specs = routed_specs(decoder, router, s.budgets)
    return decoder, _facts(work, s.points(decoder, {size: specs[size]}), "Flextron, no-surrogate")


def token_router(s: Setting, name: str) -> Run:
    """Tokens of the finished model routed by themselves, at the static sub-networks' average cost."""
    before = s.store.result("flextron") or {}
    decoder = s.store.decoder("flextron", s.config).to(s.device)
    space = SearchSpace.from_dict(before["space"])
    table = LatencyTable.of_parameters(s.config, space)
    specs = {
        table.predict(spec): spec for p in before["points"] if (spec := SubnetSpec.from_dict(p["spec"])) != space.full
    }
    recipe = TokenRouterRecipe(seed=s.seed, joint_steps=0)
    num_blocks = recipe.heldout_blocks + -(-recipe.warm_tokens // s.scale.context)
    blocks = TokenBlocks(tokens=s.data.train.tokens[-num_blocks:], seed=s.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)
        router = TokenRouter.for_table(space, s.config.hidden_size, table).to(s.device)
    started = time.monotonic()
    train_token_router(decoder, decoder, router, table, specs, blocks, recipe)
    work = Work(**{key: before[key] for key in Work.FIELDS})
    work.teacher_tokens += recipe.warm_tokens * recipe.num_draws * len(specs)
    work.seconds += time.monotonic() - started
    points = s.points(decoder, {p["size"]: SubnetSpec.from_dict(p["spec"]) for p in before["points"] if p["size"] < 1})
    for point in points:
        spec = SubnetSpec.from_dict(point["spec"])
        target = table.predict(spec)
        score = score_routed(decoder, s.data.validation_BT, spec, router.at(target), table)
        point |= {"static_loss": point["loss"], "loss": score.loss, "cost_over_static": score.cost.fraction / target}
    facts = _facts(work, points, "Flextron, token router")
    return decoder, facts | {"token_router": router.to_dict(), ROUTER: router.state_dict()}


def matformer(s: Setting, name: str) -> Run:
    """Prefixes of the feed-forward layers, all four sizes in every step; attention stays whole.

    Widths are equal in all layers but where that leaves a part of the budget unused: there two neighbouring ones mix.
    """
    work = Work()
    decoder, _ = s.ranked_base("activation")
    space = s.space(attention=False)
    specs = {1.0: space.full, **choose_mixed(decoder, space, s.budgets)}
    recipe = s.recipe(s.scale.elastic_steps, subnets_per_batch=4, sandwich=True, **_LANGUAGE_MODELLING)
    s.train(name, decoder, recipe, work, space=space, specs=tuple(specs.values()))
    return decoder, _facts(work, s.points(decoder, specs), "MatFormer-type")


def sortednet(s: Setting, name: str) -> Run:
    """Random nested sub-networks; those of the compared sizes are then chosen as Flextron's are."""
    work = Work()
    decoder, inner = s.ranked_base("activation")
    space = s.space(skip=inner[: s.scale.num_skippable])
    recipe = s.recipe(
        s.scale.elastic_steps,
        sampling="random",
        min_size=min(s.scale.sizes),
        anneal_fraction=0.0,
        subnets_per_batch=4,
        sandwich=True,
        **_LANGUAGE_MODELLING,
    )
    s.train(name, decoder, recipe, work, space=space)
    windows_BT = s.data.search_BT.to(s.device)
    specs = search_specs(decoder, space, windows_BT, s.budgets, seed=s.seed, effort=s.scale.num_candidates)
    return decoder, _facts(work, s.points(decoder, {1.0: space.full, **specs}), "SortedNet-type")


def minitron(s: Setting, name: str, size: float, fraction: float = 1.0) -> Run:
    """Pruned to one uniform size by activations, then distilled from the base with the forward KL alone.

    With a fraction of the post-training tokens below 1, several sizes together take what one elastic run takes.
    """
    work = Work()
    ranked, _ = s.ranked_base("activation")
    widths = uniform_widths(s.config, size, s.scale.width_step)
    decoder = extract(ranked, widths)
    recipe = s.recipe(
        s.scale.steps(fraction), subnets_per_batch=1, full_probability=1.0, kl_weight=1.0, hidden_weight=0.0
    )
    s.train(name, decoder, recipe, work, teacher=s.base(), specs=(widths,))
    method = "Minitron-type" if fraction == 1 else "Minitron-type, shared tokens"
    return decoder, _facts(work, s.points(decoder, {size: widths}), method)


def _variation(
    s: Setting, name: str, *, uniform: bool = False, joint: bool = True, permuted: bool = True, **changes: Any
) -> tuple[Decoder, dict[float, SubnetSpec], Work]:
    """Flextron with something left out, at the same number of tokens."""
    work = Work()
    num_joint = s.scale.joint_steps if joint else 0
    if uniform:
        changes = changes | {"sampling": "uniform"}
    decoder, space = _elastic(
        s,
        name,
        s.scale.elastic_steps - num_joint,
        work,
        permuted=permuted,
        handover=_HANDOVER if joint else 0.01,
        **changes,
    )
    if uniform:
        # a uniform model has nothing to route; its sizes are finetuned as they are
        specs = choose_uniform(decoder, space, s.budgets)
        rate = _HANDOVER * s.scale.elastic_lr[s.family]
        recipe = s.recipe(s.scale.joint_steps, **_elastic_recipe(s) | {"lr": rate, "warmup_fraction": 0.0})
        trained = (space.full, *specs.values())
        s.train(name, decoder, recipe, work, stage="joint", teacher=s.base(), space=space, specs=trained)
        return decoder, specs, work
    router, _ = _router(s, decoder, space)
    if joint:
        losses = {key: value for key, value in changes.items() if key.endswith("_weight")}
        _joint(s, name, decoder, router, work, **losses)
        router, _ = _routed_again(s, decoder, router)
    return decoder, routed_specs(decoder, router, s.budgets), work


ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "no-permutation": {"permuted": False},
    "no-teacher": _LANGUAGE_MODELLING,
    "uniform": {"uniform": True},
    "no-joint": {"joint": False},
}
"""What `_variation` is called with."""
ROUTER_ABLATIONS: Mapping[str, Callable[[Setting, str], Run]] = {
    "no-surrogate": no_surrogate,
    "token-router": token_router,
}
"""Those that start from Flextron's own stages."""


def ablation(s: Setting, name: str) -> Run:
    """One of `ABLATIONS`, reported at the ablations' size."""
    what = name.removeprefix("ablation-")
    decoder, specs, work = _variation(s, name, **ABLATIONS[what])
    size = s.scale.ablation_size
    return decoder, _facts(work, s.points(decoder, {size: specs[size]}), f"Flextron, {what}")
