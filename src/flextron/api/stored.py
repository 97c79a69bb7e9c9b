"""How an elastic model is written: whole, as an adapter of its base, or what was measured and learned alone."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flextron.api.measured import MeasuredModel
from flextron.checkpoints.origin import PermutedFrom
from flextron.elastic import write_elastic
from flextron.elastic.adapter import ElasticAdapter
from flextron.elastic.adapter_file import Bits, write_adapter
from flextron.elastic.checkpoint import write_tensors
from flextron.errors import FlextronError
from flextron.export.card import adapter_card
from flextron.files import new_file, write_json
from flextron.routing import StaticRouter
from flextron.routing.losses import KnownLosses
from flextron.routing.token_router import TokenRouter

__all__ = ["LOSSES_FILE", "ROUTERS_FILE", "TOKEN_ROUTER_FILE", "StoredModel"]

ROUTERS_FILE, TOKEN_ROUTER_FILE, LOSSES_FILE = "routers.safetensors", "token_router.json", "losses.json"


@dataclass(slots=True)
class StoredModel(MeasuredModel):
    """A measured model with what training added to it, which goes to disk beside its weights."""

    router: StaticRouter | None = None
    """Trained by `route`."""
    token_router: TokenRouter | None = None
    """Trained by `route_tokens`."""
    adapter: ElasticAdapter | None = None
    """What `train` with `lora_rank` added to the base; merged into the decoder's weights already."""

    def save(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Write the elastic checkpoint, in one step.

        Raises:
            FlextronError: the directory exists and is not to be overwritten.
        """
        extra: dict[str, Any] = {f"latency/{name}.json": table.to_dict() for name, table in self.tables.items()}
        if self.frontier is not None:
            extra["frontier.json"] = self.frontier.to_dict()
        elif self.losses is not None:
            extra[LOSSES_FILE] = self.losses.to_dict()
        if self.token_router is not None:
            extra[TOKEN_ROUTER_FILE] = self.token_router.to_dict()
        write_elastic(
            Path(directory),
            self.decoder,
            self.info,
            hf_config=self.hf_config,
            tokenizer=self.tokenizer,
            generation_config=self.generation_config,
            extra=extra,
            tensors={ROUTERS_FILE: tensors} if (tensors := self._router_tensors()) else {},
            overwrite=overwrite,
        )

    def save_adapter(self, directory: str | Path, *, bits: Bits = 16, overwrite: bool = False) -> None:
        """Write what training with `lora_rank` added to the base, without the base: `load` joins the two again.

        A frontier goes along without its latencies, which are this device's.

        Args:
            directory: made here.
            bits: bits per number of the low-rank updates, 16 or 8.
            overwrite: replace an existing directory.

        Raises:
            FlextronError: the model has no elastic adapter, or its base is not known; the directory exists.
        """
        origin = self.decoder.config.origin
        if self.adapter is None:
            raise FlextronError(
                "the model has no elastic adapter; train it with lora_rank (flextron train --lora) first"
            )
        if not isinstance(origin, PermutedFrom) or origin.permutation is None:
            raise FlextronError(
                "it is not known what the model was made from; convert the original again and train that"
            )
        extra: dict[str, Any] = {}
        losses = self.losses if self.frontier is None else KnownLosses.of(self.frontier)
        if losses is not None:
            extra[LOSSES_FILE] = losses.to_dict()
        if self.token_router is not None:
            extra[TOKEN_ROUTER_FILE] = self.token_router.to_dict()
        write_adapter(
            Path(directory),
            self.adapter,
            self.info,
            origin.permutation,
            base=origin.source,
            bits=bits,
            card=adapter_card(
                self.info,
                base=origin.source,
                rank=self.adapter.rank,
                losses=[(p.spec, p.params, p.loss) for p in losses.points] if losses is not None else [],
            ),
            extra=extra,
            tensors={ROUTERS_FILE: tensors} if (tensors := self._router_tensors()) else {},
            overwrite=overwrite,
        )

    def save_routers(self, directory: str | Path) -> None:
        """Write only the routers, into an existing elastic checkpoint."""
        path = Path(directory)
        # both are on disk before either takes its place: they belong together
        with ExitStack() as stack:
            if self.token_router is not None:
                write_json(stack.enter_context(new_file(path / TOKEN_ROUTER_FILE)), self.token_router.to_dict())
            write_tensors(stack.enter_context(new_file(path / ROUTERS_FILE)), self._router_tensors())

    def _router_tensors(self) -> dict[str, Tensor]:
        """What `routers.safetensors` holds."""
        routers = {"static": self.router, "token": self.token_router}
        return {
            f"{kind}.{name}": tensor.contiguous()
            for kind, router in routers.items()
            if router is not None
            for name, tensor in router.state_dict().items()
        }

    def save_profile(self, directory: str | Path) -> None:
        """Write only what `profile` measured, into an existing elastic checkpoint."""
        path = Path(directory)
        (path / "latency").mkdir(exist_ok=True)
        for name, table in self.tables.items():
            write_json(path / "latency" / f"{name}.json", table.to_dict())
        if self.frontier is not None:
            write_json(path / "frontier.json", self.frontier.to_dict())
