"""A sub-network as a stock Hugging Face directory, with a model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flextron.checkpoints.weights import write_checkpoint
from flextron.export.card import subnet_card
from flextron.export.format import Order
from flextron.export.source import Source
from flextron.export.widen import least_uniform
from flextron.families.config import FAMILIES
from flextron.families.stock import check_stock
from flextron.files import new_directory
from flextron.generation.defaults import generation_defaults
from flextron.model.config import DecoderConfig
from flextron.model.cost import num_parameters
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["DIRECTORY_PRECISIONS", "HuggingFace", "generation_config_of", "write_card"]

DIRECTORY_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(PATH), AutoTokenizer.from_pretrained(PATH)
"""


@dataclass(frozen=True, slots=True)
class HuggingFace:
    """The format `hf`: equal widths in all layers, as each family's own `config.json` says them."""

    name: str = "hf"
    suffix: str = ""
    precisions: tuple[str, ...] = tuple(DIRECTORY_PRECISIONS)

    def widths(self, config: DecoderConfig, spec: SubnetSpec) -> SubnetSpec:
        """The sub-network's own.

        Raises:
            FlextronError: no `config.json` of the family says them.
        """
        check_stock(config, spec)
        return spec

    def padded(self, config: DecoderConfig, spec: SubnetSpec) -> SubnetSpec:
        """The narrowest equal widths that the family's `config.json` says."""
        return least_uniform(config, spec, lambda widths: check_stock(config, widths))

    def notes(self, config: DecoderConfig) -> tuple[str, ...]:
        """Nothing is lost."""
        return ()

    def write(self, decoder: Decoder, source: Source, order: Order) -> str:
        """Write the directory; returns the name of the `transformers` class."""
        with new_directory(order.path, overwrite=order.overwrite) as temporary:
            write_checkpoint(
                decoder.to(DIRECTORY_PRECISIONS[order.precision]),
                temporary,
                hf_config=source.hf_config,
                tokenizer=source.tokenizer,
                generation_config=generation_config_of(source),
            )
            write_card(temporary, source, order, library="transformers", usage=_USAGE)
        return FAMILIES[decoder.config.family].architecture


def generation_config_of(source: Source) -> dict[str, Any]:
    """The model's `generation_config.json`; where it has none, one that names its special tokens."""
    if source.generation_config is not None:
        return dict(source.generation_config)
    ends = list(generation_defaults(None, source.hf_config, source.tokenizer).ends)
    found = {
        "bos_token_id": source.hf_config.get("bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": None if source.tokenizer is None else source.tokenizer.pad_token_id,
    }
    return {name: value for name, value in found.items() if value is not None}


def write_card(directory: Path, source: Source, order: Order, *, library: str, usage: str) -> None:
    """Put the model card beside the weights."""
    card = subnet_card(
        source.info,
        order.spec,
        num_parameters=num_parameters(source.decoder.config, order.spec),
        frontier=source.frontier,
        library=library,
        usage=usage,
        notes=order.notes,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
