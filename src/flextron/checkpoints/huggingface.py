"""Opening checkpoints: a Hugging Face directory, a hub id or a `.gguf` file; no weights are read yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flextron.checkpoints.shards import check_files, find_shards
from flextron.checkpoints.text_part import text_part_of
from flextron.errors import FlextronError
from flextron.families.config import config_from_hf, parsed_config
from flextron.families.pretrained import Pretrained
from flextron.files import read_json
from flextron.generation.defaults import read_generation_config
from flextron.gguf.checkpoint import open_gguf

__all__ = ["find_directory", "open_pretrained"]


def open_pretrained(source: str | Path) -> Pretrained:
    """Find a checkpoint; reads its config, its tokenizer and the names of its tensors, no weights.

    Raises:
        FlextronError: there is none, it lacks a config or safetensors weights, or its config is not usable.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return open_gguf(path)
    path = find_directory(source, "a checkpoint directory, a .gguf file")
    check_files(path)
    if (path / "adapter_config.json").exists():
        raise FlextronError(
            f"{path} holds an adapter (adapter_config.json), with which transformers would load another model; "
            "merge it into its base model first, or remove the file"
        )
    hf_config = read_json(path / "config.json")
    part = text_part_of(hf_config)
    hf_config = hf_config if part is None else part.hf_config
    config_from_hf(hf_config)
    shards = find_shards(path)
    return Pretrained(
        name=str(source),
        hf_config=hf_config,
        tensors=shards.stream if part is None else part.stream(shards.stream),
        tokenizer=_tokenizer(path, hf_config),
        names=shards.names if part is None else part.names(shards.names),
        directory=path,
        generation_config=read_generation_config(path),
    )


def find_directory(source: str | Path, what: str) -> Path:
    """A directory on this machine, downloaded from the hub where the source is an id.

    Args:
        source: directory or hub id.
        what: the files asked for, for the message.

    Raises:
        FlextronError: there is none.
    """
    path = Path(source).expanduser()
    return path if path.is_dir() else _download(str(source), what)


def _download(hub_id: str, what: str) -> Path:
    if hub_id.startswith((".", "/", "~")) or hub_id.count("/") > 1:
        raise FlextronError(f"{hub_id} does not exist; give {what} or a hub id")
    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
        )
    except Exception as error:  # the hub client raises many kinds: no network, no such id, gated
        raise FlextronError(
            f"{hub_id} is neither a directory here nor a model that the hub gave ({type(error).__name__}); "
            "check the name and the network"
        ) from error


def _tokenizer(path: Path, hf_config: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer, where there is one; what is foreign code in its files never runs."""
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    # the config is given, so that a fault in config.json is not taken for one of the tokenizer
    config = parsed_config(hf_config)
    config._name_or_path = str(path)
    if isinstance(hf_config.get("tokenizer_class"), str):
        config.tokenizer_class = hf_config["tokenizer_class"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exceptions, and panics that are none
        said = str(error).strip().split("\n")[0][:300]
        if "trust_remote_code" in str(error):
            said = "it asks to run code of its own, which this program never does"
        raise FlextronError(f"the tokenizer in {path} cannot be read ({said}); restore its files") from error
    _check_tokenizer(tokenizer, path)
    return tokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """See that the settings that others read are of their types."""
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 0:
        raise FlextronError(f"the tokenizer in {path} has no number as model_max_length; restore tokenizer_config.json")
