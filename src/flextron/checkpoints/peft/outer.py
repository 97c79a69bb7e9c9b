"""What peft stores of the embedding and the head: low-rank updates, and whole matrices (`modules_to_save`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flextron.checkpoints.peft.layout import PREFIX
from flextron.checkpoints.peft.parts import MAGNITUDES, check_targeted, scale_of, take
from flextron.errors import FlextronError
from flextron.families.config import FAMILIES
from flextron.model.bypass import Bypass, Dora, Lora, Shape
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.model.outer import EmbeddingUpdate, Outer

__all__ = ["MERGE", "BaseNeededError", "needed_weights", "read_outer"]

MERGE = "merge it into a copy of its base model with peft's merge_and_unload, and convert that"


class BaseNeededError(FlextronError):
    """An adapter cannot be read without the weights of its base."""


def needed_weights(decoder: Decoder | None) -> Decoder:
    """The decoder, whose weights are wanted.

    Raises:
        BaseNeededError: only its config is known.
    """
    if decoder is None:
        raise BaseNeededError(
            "an adapter with DoRA, or beside embedding or head, cannot be read without its base's weights; give "
            "read_adapter the decoder, not its config"
        )
    return decoder


def read_outer(
    tensors: dict[str, Tensor],
    settings: Mapping[str, Any],
    directory: Path,
    config: DecoderConfig,
    decoder: Decoder | None,
) -> Outer | None:
    """Take the tensors beside the embedding and the head; None if there are none.

    Raises:
        FlextronError: they are another model's, incomplete, or beside an embedding that the adapter keeps a copy of and
            that is not this model's.
    """
    reader = _Reader(tensors, settings, directory, config, decoder)
    outer = Outer(
        embedding_VD=reader.own("embedding"),
        update=reader.update(),
        head_VD=reader.own("head"),
        bypass=reader.bypass(),
    )
    saved = settings.get("modules_to_save") or []
    for part, matrix in (("embedding", outer.embedding), ("head", outer.head)):
        if matrix is None and any(name.endswith(s) for name in reader.names(part) for s in saved):
            raise FlextronError(f"the adapter in {directory} lacks the {part} that its config names; save it again")
    if outer.embedding is not None and outer.head is None and config.tie_word_embeddings and not saved:
        # peft loads it into the model itself, whose head is the same tensor
        outer.head = outer.embedding
    if not any(True for _ in outer.parameters()):
        return None
    needed_weights(decoder)  # what stands beside a matrix is of no use without it
    return outer


class _Reader:
    """The tensors of one file."""

    def __init__(
        self,
        tensors: dict[str, Tensor],
        settings: Mapping[str, Any],
        directory: Path,
        config: DecoderConfig,
        decoder: Decoder | None,
    ) -> None:
        self._tensors, self._settings, self._directory = tensors, settings, directory
        self._config, self._decoder = config, decoder
        self._shape = Shape(config.vocab_size, config.hidden_size)

    def names(self, part: str) -> list[str]:
        """Names of a module, in files of any version."""
        maps = FAMILIES[self._config.family].tensors
        own = [m.hf.removesuffix(".weight") for m in maps if m.ours == (f"{part}.weight",)]
        return own + (["lm_head"] if part == "head" and "lm_head" not in own else [])

    def own(self, part: str) -> Tensor | None:
        """A matrix that stands in the place of the model's."""
        for name in self.names(part):
            if (found := take(self._tensors, [f"{PREFIX}{name}.weight"])) is not None:
                self._check(name, found[0].shape == (self._shape.inputs, self._shape.outputs))
                return found[0]
            self._check_copy(part, name)
        return None

    def _check_copy(self, part: str, name: str) -> None:
        """See that a copy of the model's own matrix, which peft keeps beside updates of it, is that."""
        found = take(self._tensors, [f"{PREFIX}{name}.base_layer.weight"])
        if found is None:
            return
        base = needed_weights(self._decoder)
        here = base.embedding.weight if part == "embedding" else base.head_weight
        if found[0].shape != here.shape or not torch.equal(found[0], here.detach().cpu().to(found[0].dtype)):
            raise FlextronError(
                f"the adapter in {self._directory} keeps a copy of {name} that differs from this model's: it was made "
                f"beside another checkpoint, or changes the model itself; {MERGE}"
            )

    def update(self) -> EmbeddingUpdate | None:
        """A low-rank update of the embedding."""
        for name in self.names("embedding"):
            found = self._low_rank(name, "lora_embedding_A", "lora_embedding_B")
            if found is None:
                continue
            a, b, scale, lengths = found
            self._check(name, (a.shape[1], b.shape[0]) == (self._shape.inputs, self._shape.outputs))
            factors = None
            if lengths is not None:
                self._check(name, lengths.shape == (self._shape.outputs,))
                changed = needed_weights(self._decoder).embedding.weight.detach().cpu().to(a) + scale * a.t() @ b.t()
                factors = lengths / torch.linalg.vector_norm(changed, dim=0)
            return EmbeddingUpdate(a.t().contiguous(), b, scale, factors)
        return None

    def bypass(self) -> Bypass | None:
        """A low-rank update of the head."""
        for name in self.names("head"):
            found = self._low_rank(name, "lora_A.weight", "lora_B.weight")
            if found is None:
                continue
            a, b, scale, lengths = found
            shape = Shape(self._shape.outputs, self._shape.inputs)
            self._check(name, (a.shape[1], b.shape[0]) == (shape.inputs, shape.outputs))
            lora = Lora(shape, a.shape[0], scale)
            lora.a, lora.b = torch.nn.Parameter(a.t().contiguous()), torch.nn.Parameter(b)
            if lengths is None:
                return lora
            self._check(name, lengths.shape == (shape.outputs,))
            dora = Dora(lora, lengths)
            dora.settle(needed_weights(self._decoder).head_weight.detach().cpu(), None)
            return dora
        return None

    def _low_rank(self, name: str, first: str, second: str) -> tuple[Tensor, Tensor, float, Tensor | None] | None:
        """A, B, what their product is multiplied by, and DoRA's lengths."""
        found = take(self._tensors, [f"{PREFIX}{name}.{key}" for key in (first, second)])
        if found is None:
            return None
        # "all-linear" leaves the head out
        targets = self._settings.get("target_modules")
        check_targeted(self._settings if targets != "all-linear" else {"target_modules": []}, name, self._directory)
        a, b = found
        self._check(name, a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1])
        lengths = take(self._tensors, [f"{PREFIX}{name}.{MAGNITUDES}"])
        return a, b, scale_of(self._settings, name, a.shape[0]), None if lengths is None else lengths[0]

    def _check(self, name: str, fits: bool) -> None:
        if not fits:
            raise FlextronError(
                f"the adapter of {name} has other sizes than the model, as after tokens were added to it; {MERGE}"
            )
