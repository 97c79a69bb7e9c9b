"""Finished runs on disk: a directory each, with its result and its weights, that appears in one move.

A run's result holds all settings of its experiment, but only those that the run depends on must agree for it to count:
pretraining outlives a change of the post-training settings.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flextron.errors import FlextronError
from flextron.files import new_directory, read_json, write_json
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.routing.routers import StaticRouter
from flextron.routing.token_router import TokenRouter
from flextron.spec import SearchSpace, SubnetSpec

__all__ = ["ROUTER", "Store", "dependencies"]

ROUTER = "router"
"""Fact of a run that holds its router's tensors."""
_PRETRAINING = ("shapes", "tokens", "vocab_size", "context", "batch_size", "lr", "width_step", "precision")
_POST_TRAINING = (
    "elastic_batch_size",
    "elastic_lr",
    "num_calibration_tokens",
    "num_search_tokens",
    "num_candidates",
    "sizes",
    "ablation_size",
    "joint_fraction",
    "narrowest_mlp",
    "narrowest_attention",
    "num_skippable",
    "lm_weight",
)
"""Settings of a scale; of those that are by family, only the run's own family counts."""


def dependencies(name: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an experiment's settings that one run depends on: no post-training for what is trained end to end."""
    family, scale = identity["family"], identity["scale"]
    end_to_end = name == "base" or name.startswith("variant-")
    chosen = {field: scale.get(field) for field in (_PRETRAINING if end_to_end else _PRETRAINING + _POST_TRAINING)}
    by_family = {field: v[family] if isinstance(v, Mapping) else v for field, v in chosen.items()}
    return {"family": family, "seed": identity["seed"], "data": identity["data"]} | by_family


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """The runs of one family and seed."""

    path: Path
    identity: dict[str, Any]
    """All settings: scale, data, family, seed."""

    def dependencies(self, name: str) -> dict[str, Any]:
        """Those that a run depends on."""
        return dependencies(name, self.identity)

    def state(self, name: str, stage: str = "train") -> Path:
        """Where the unfinished training of a run keeps its resumable state."""
        return self.path / f"{name}.run" / stage

    def result(self, name: str) -> dict[str, Any] | None:
        """The result of a finished run; None if it has not finished.

        Raises:
            FlextronError: it ran with other settings than it would now.
        """
        if not (self.path / name).exists():
            return None
        record: dict[str, Any] = read_json(self.path / name / "result.json")
        then, now = dependencies(name, record["identity"]), self.dependencies(name)
        changed = [f"{key} {then[key]} instead of {value}" for key, value in now.items() if then[key] != value]
        if changed:
            raise FlextronError(
                f"{self.path / name} ran with {', '.join(changed)}; move it away (or pass --again, which deletes it)"
            )
        return record

    def discard_outdated(self, name: str) -> None:
        """Delete a finished run that ran with other settings than it would now."""
        try:
            self.result(name)
        except FlextronError:
            shutil.rmtree(self.path / name)

    def once(self, name: str, run: Callable[[], tuple[Decoder, dict[str, Any]]]) -> dict[str, Any]:
        """The result of a run, which runs only if it has not finished before."""
        found = self.result(name)
        if found is not None:
            return found
        decoder, facts = run()
        routers = facts.pop(ROUTER, {})
        record = {"name": name, **facts, "widths": decoder.widths.to_dict(), "identity": self.identity}
        with new_directory(self.path / name) as temporary:
            save_file(
                {n: p.detach().cpu().contiguous() for n, p in decoder.named_parameters()},
                temporary / "model.safetensors",
            )
            if routers:
                save_file(
                    {n: t.detach().cpu().contiguous() for n, t in routers.items()}, temporary / "router.safetensors"
                )
            write_json(temporary / "result.json", record)
        shutil.rmtree(self.path / f"{name}.run", ignore_errors=True)
        return record

    def router(self, name: str, space: SearchSpace) -> StaticRouter:
        """A finished run's static router."""
        return StaticRouter.from_tensors(space, load_file(self.path / name / "router.safetensors"))

    def token_router(self, name: str) -> TokenRouter | None:
        """A finished run's token router; None if it has not finished."""
        record = self.result(name)
        if record is None:
            return None
        return TokenRouter.from_dict(record["token_router"], load_file(self.path / name / "router.safetensors"))

    def decoder(self, name: str, config: DecoderConfig) -> Decoder:
        """A finished run's model, frozen, on the CPU."""
        record = self.result(name)
        if record is None:
            raise FlextronError(f"{self.path / name} has not finished; run the experiment first")
        with torch.device("meta"):
            decoder = Decoder(config, SubnetSpec.from_dict(record["widths"]))
        decoder.load_state_dict(load_file(self.path / name / "model.safetensors"), assign=True)
        return decoder.eval().requires_grad_(False)
