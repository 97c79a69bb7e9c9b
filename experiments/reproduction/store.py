"""Finished runs on disk: a directory each, with its result and its weights, that appears in one move."""

from __future__ import annotations

import shutil
from collections.abc import Callable
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

__all__ = ["ROUTER", "Store"]

ROUTER = "router"
"""Fact of a run that holds its router's tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """The runs of one family and seed."""

    path: Path
    identity: dict[str, Any]
    """What all of them have in common: scale, data, family, seed. Runs of another experiment are refused."""

    def state(self, name: str, stage: str = "train") -> Path:
        """Where the unfinished training of a run keeps its resumable state."""
        return self.path / f"{name}.run" / stage

    def result(self, name: str) -> dict[str, Any] | None:
        """The result of a finished run; None if it has not finished.

        Raises:
            FlextronError: it is of another experiment.
        """
        if not (self.path / name).exists():
            return None
        record: dict[str, Any] = read_json(self.path / name / "result.json")
        if record["identity"] != self.identity:
            raise FlextronError(f"{self.path / name} is of another experiment; choose another output directory")
        return record

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
