"""Losses of sub-networks of a frozen model, each measured once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from flextron.files import checked, read_json, write_json
from flextron.model.decoder import Decoder
from flextron.parallel.processes import Processes
from flextron.scoring.mean_loss import mean_loss
from flextron.spec import SubnetSpec

__all__ = ["LossMeter"]


class _LossFile(BaseModel):
    """Losses on disk."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    identity: str
    losses: dict[str, Annotated[float, Field(allow_inf_nan=False)]]


class LossMeter:
    """Measures losses once each; kept on disk, a killed run repeats its steps without measuring again.

    What was measured on another text or of other weights is dropped. Several processes measure as many sub-networks at
    once, and all hear of all losses; they ask for the same ones.
    """

    def __init__(
        self, decoder: Decoder, tokens_BT: Tensor, path: Path | None, processes: Processes | None = None
    ) -> None:
        """Read what is known.

        Args:
            decoder: the full model.
            tokens_BT: sequences on which losses are measured.
            path: a JSON file where they are kept; None keeps them in memory only.
            processes: which share the work.
        """
        self.decoder = decoder
        """What runs; a copy in shards may take its place."""
        self._tokens_BT, self._path = tokens_BT, path
        self._processes = processes or Processes.join()
        self._known: dict[str, float] = {}
        if path is not None:
            self._identity = self._processes.from_first(lambda: _identity(decoder, tokens_BT))
            self._known = self._processes.from_first(lambda: self._kept(path))

    def _kept(self, path: Path) -> dict[str, float]:
        if not path.exists():
            return {}
        kept = checked(_LossFile, read_json(path), str(path), "remove it to measure again")
        return kept.losses if kept.identity == self._identity else {}

    def __call__(self, specs: list[SubnetSpec]) -> Tensor:
        """Losses of sub-networks, in nats, float64."""
        new = [s for s in dict.fromkeys(specs) if _key(s) not in self._known]
        self._known |= zip(map(_key, new), self._measured(new), strict=True)
        if new and self._path is not None and self._processes.is_first:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {"identity": self._identity, "losses": self._known})
        return torch.tensor([self._known[_key(s)] for s in specs], dtype=torch.float64)

    def _measured(self, specs: list[SubnetSpec]) -> list[float]:
        """Losses of sub-networks, each measured by one process; all run as many, for layers are gathered by all."""
        rank, size = self._processes.rank, self._processes.size
        losses = torch.zeros(len(specs), dtype=torch.float64)
        for first in range(0, len(specs), size):
            mine = min(first + rank, len(specs) - 1)
            loss = mean_loss(self.decoder, self._tokens_BT, specs[mine])
            if mine == first + rank:
                losses[mine] = loss
        return [float(loss) for loss in self._processes.summed(losses)]


def _identity(decoder: Decoder, tokens_BT: Tensor) -> str:
    """A digest of weights and text."""
    digest = hashlib.sha256(tokens_BT.cpu().numpy().tobytes())
    for parameter in decoder.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _key(spec: SubnetSpec) -> str:
    return " ".join(f"{layer.intermediate_size}/{layer.num_groups}" for layer in spec.layers)
