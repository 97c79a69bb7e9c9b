"""An elastic checkpoint on disk: a Hugging Face checkpoint of the full model, and `elastic.json` beside it.

Stock `transformers` loads the directory as the full model and ignores the rest. Writing is atomic.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flextron.checkpoints.origin import write_origin
from flextron.checkpoints.weights import write_checkpoint
from flextron.errors import FlextronError
from flextron.files import checked, new_directory, new_file, read_json, write_json
from flextron.model.decoder import Decoder
from flextron.spec import SearchSpace

__all__ = ["FORMAT_VERSION", "ElasticInfo", "read_elastic", "read_tensors", "write_elastic", "write_tensors"]

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ElasticInfo:
    """What makes a checkpoint elastic."""

    space: SearchSpace
    """The sub-networks that it holds."""
    layer_scores: tuple[float, ...]
    """Importance of each layer, see `Importance`."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Its history: source, importance method, calibration tokens, package versions, date."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The resolved training recipe and what it measured; empty before training."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with the format's version."""
        return {
            "format_version": FORMAT_VERSION,
            "search_space": self.space.to_dict(),
            "layer_scores": list(self.layer_scores),
            "provenance": dict(self.provenance),
            "recipe": dict(self.recipe),
        }


class _Provenance(BaseModel):
    """The entries that are read again; there are others."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    source: str = ""
    elastify: dict[str, Any] = {}


class _Recipe(BaseModel):
    """The entries that are read again; there are others, and none before training."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    num_tokens: Annotated[int, Field(ge=0, le=2**63)] = 0


class _ElasticFile(BaseModel):
    """`elastic.json`."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)]
    search_space: dict[str, Any]
    layer_scores: list[Annotated[float, Field(allow_inf_nan=False)]]
    provenance: _Provenance
    recipe: _Recipe


def provenance(source: str, **facts: Any) -> dict[str, Any]:
    """Source and facts, stamped with date and versions."""
    versions = {name: version(name) for name in ("flextron", "torch", "transformers")}
    return {"source": source, **facts, "date": time.strftime("%Y-%m-%d", time.gmtime()), "versions": versions}


def read_elastic(directory: Path) -> ElasticInfo:
    """Read `elastic.json`.

    Raises:
        FlextronError: it is missing, damaged, or of a newer format.
    """
    if not (directory / "elastic.json").exists():
        raise FlextronError(f"{directory} is not an elastic checkpoint (no elastic.json); make one with convert")
    path = directory / "elastic.json"
    data = read_json(path)
    if isinstance(data, dict) and type(newer := data.get("format_version")) is int and newer > FORMAT_VERSION:
        raise FlextronError(
            f"{directory} has a newer format than this version reads ({FORMAT_VERSION}); update flextron"
        )
    found = checked(_ElasticFile, data, str(path), "make the checkpoint again with convert")
    space = SearchSpace.from_dict(found.search_space)
    if len(found.layer_scores) != space.num_hidden_layers:
        raise FlextronError(
            f"{path} has layer_scores of {len(found.layer_scores)} layers, its search space {space.num_hidden_layers}; "
            "make the checkpoint again with convert"
        )
    return ElasticInfo(
        space=space,
        layer_scores=tuple(found.layer_scores),
        provenance=data["provenance"],
        recipe=data["recipe"],
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file in one move.

    Raises:
        FlextronError: the disk is full.
    """
    with new_file(path) as temporary:
        save_file(dict(tensors), temporary)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FlextronError: it is corrupt or truncated.
    """
    if not path.is_file():
        raise FlextronError(f"{path} is not a regular file; make it again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise FlextronError(f"{path} is corrupt or truncated ({error}); make it again") from error


def write_elastic(
    directory: Path,
    decoder: Decoder,
    info: ElasticInfo,
    *,
    hf_config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    generation_config: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the whole checkpoint.

    Args:
        directory: made here.
        decoder: the full, permuted model.
        info: goes into `elastic.json`.
        hf_config: config of the original checkpoint.
        tokenizer: written beside, where there is one.
        generation_config: written too, if there is one.
        extra: further JSON files by relative path (latency tables, frontier).
        tensors: further safetensors files by name (routers).
        overwrite: replace an existing directory, in one step.

    Raises:
        FlextronError: the directory exists and is not to be overwritten.
    """
    with new_directory(directory, overwrite=overwrite) as temporary:
        write_checkpoint(
            decoder, temporary, hf_config=hf_config, tokenizer=tokenizer, generation_config=generation_config
        )
        write_json(temporary / "elastic.json", info.to_dict())
        write_origin(temporary, decoder.config.origin)
        for name, data in (extra or {}).items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            write_json(temporary / name, data)
        for name, weights in (tensors or {}).items():
            write_tensors(temporary / name, weights)
