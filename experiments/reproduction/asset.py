"""`python -m experiments.reproduction.asset --text "…"`: a small trained base.

Takes Flextron's model of the Llama-type family and seed 0 from a finished experiment and writes it as an elastic
checkpoint (bfloat16 weights, tokenizer, `elastic.json`) with a model card. Nothing is trained here. The weights are
rounded; the card gives the losses of the rounded ones, measured anew.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.reproduction.command import command_parser, run_command, scale_of
from experiments.reproduction.data import load_data
from experiments.reproduction.scales import ELASTIC_FRACTION, Scale
from experiments.reproduction.setting import Setting
from flextron.api.model import ElasticModel
from flextron.cli.console import message
from flextron.elastic import ElasticInfo
from flextron.elastic.checkpoint import provenance
from flextron.elastic.importance import rank
from flextron.errors import FlextronError
from flextron.files import new_directory
from flextron.spec import SearchSpace, SubnetSpec

__all__ = ["MOST_BYTES", "main", "write_asset"]

MOST_BYTES = 15 * 1000**2
_FAMILY, _SEED, _RUN = "llama", 0, "flextron"


def write_asset(scale: Scale, source: Path, target: Path, *, text: str, overwrite: bool = False) -> None:
    """Write the asset from a finished experiment.

    Args:
        scale: that the experiment ran at.
        source: the experiment's output directory.
        target: directory of the asset.
        text: what to call the training text in the card, with its licence.
        overwrite: replace an existing asset.

    Raises:
        FlextronError: the experiment has not finished, or the asset would exceed `MOST_BYTES`.
    """
    data = load_data(source / "data")
    setting = Setting.of(scale, _FAMILY, _SEED, data, source)
    record = setting.store.result(_RUN)
    if record is None:
        raise FlextronError(f"{source} holds no finished run {_FAMILY}-{_SEED}/{_RUN}; run the experiment first")
    decoder = setting.store.decoder(_RUN, setting.config).to(torch.bfloat16)
    sample = setting.blocks.batch(0, max(1, scale.num_calibration_tokens // scale.context))
    scores = rank(setting.store.decoder(_RUN, setting.config), sample).layer_scores
    measured = _measured(setting, decoder.float(), record)
    info = ElasticInfo(
        space=SearchSpace.from_dict(record["space"]),
        layer_scores=scores,
        provenance=provenance("experiments.reproduction", scale=scale.name, text=text),
        recipe={"num_tokens": record["tokens"], "seconds": record["seconds"], "points": measured},
    )
    model = ElasticModel(
        decoder.to(torch.bfloat16),
        data.tokenizer,
        setting.hf_config,
        info,
        {},
        router=setting.store.router(_RUN, info.space),
        token_router=setting.store.token_router("ablation-token-router"),
    )
    with new_directory(target, overwrite=overwrite) as temporary:
        model.save(temporary / "model")
        size = sum(f.stat().st_size for f in (temporary / "model").rglob("*") if f.is_file())
        if size > MOST_BYTES:
            raise FlextronError(f"the asset would be {size:,} bytes, more than {MOST_BYTES:,}; take a smaller scale")
        for file in (temporary / "model").iterdir():
            file.rename(temporary / file.name)
        (temporary / "model").rmdir()
        (temporary / "README.md").write_text(_card(setting, record, measured, text), encoding="utf-8")
    message(f"{target}: {size:,} bytes")


def _measured(setting: Setting, decoder: Any, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The compared sub-networks with the losses of the rounded weights."""
    return setting.points(decoder, {p["size"]: SubnetSpec.from_dict(p["spec"]) for p in record["points"]})


def _card(setting: Setting, record: dict[str, Any], measured: Sequence[dict[str, Any]], text: str) -> str:
    """The model card: what it is, how it was made, what it can do."""
    base = setting.store.result("base") or {}
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: flextron",
        "tags: [elastic, flextron, llama, tiny]",
        "---",
        "",
        "# A tiny elastic Llama",
        "",
        f"A Llama-type model of {measured[0]['params']:,} parameters, trained from scratch and then made elastic, so "
        "that examples and tests have a trained model at hand. It writes text that looks like its training text and "
        "knows nothing; it is no use for anything else.",
        "",
        "## How it was made",
        "",
        f"- Text: {text}.",
        f"- Tokenizer: byte-level BPE of {len(setting.data.tokenizer):,} tokens, learnt on the training text.",
        f"- Base: {base.get('tokens', 0):,} tokens of pretraining, seed {setting.seed}.",
        f"- Elastic: {record['tokens']:,} tokens ({ELASTIC_FRACTION:.2%} of the base's) of post-training, all stages.",
        f"- Command: `python -m experiments.reproduction --scale {setting.scale.name}`, then "
        "`python -m experiments.reproduction.asset`. Weights are rounded to bfloat16.",
        "",
        "## Validation loss of its sub-networks",
        "",
        "| size | block parameters | all parameters | loss, nats a token |",
        "|---|---|---|---|",
    ]
    lines += [f"| {p['size']:g} | {p['block_params']:,} | {p['params']:,} | {p['loss']:.4f} |" for p in measured]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 where something is wrong with the input."""
    parser = command_parser("experiments.reproduction.asset", __doc__, scale="cpu")
    parser.add_argument("--from", dest="source", type=Path, default=Path("out/reproduction"))
    parser.add_argument("--to", dest="target", type=Path, default=Path("src/flextron/assets"))
    parser.add_argument("--text", required=True, help="what the card says of the training text, with its licence")
    parser.add_argument("--overwrite", action="store_true")
    parsed = parser.parse_args(arguments)

    def act() -> None:
        write_asset(scale_of(parsed), parsed.source, parsed.target, text=parsed.text, overwrite=parsed.overwrite)

    return run_command(act)


if __name__ == "__main__":
    sys.exit(main())
