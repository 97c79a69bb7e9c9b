"""What a server gets beside the model: adapters by name, and finetuning in a state directory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from flextron.api.model import ElasticModel
from flextron.api.texts import needed
from flextron.checkpoints.fingerprint import fingerprint
from flextron.errors import FlextronError
from flextron.finetuning.lora import LoraTrainers
from flextron.jobs.jobs import Jobs, JobsSettings
from flextron.routing import device_fingerprint
from flextron.serving.adapters import AdapterNames, adapter_reader

__all__ = ["missing_measurements", "named_adapters", "open_jobs"]


def missing_measurements(model: ElasticModel) -> list[str]:
    """Why requests to a model cannot name targets, or latencies, on this device; nothing if they can."""
    if model.frontier is None:
        return [
            "the model has no frontier, so requests cannot name targets; run flextron profile first, or serve --profile"
        ]
    here = device_fingerprint(model.decoder.device, model.decoder.dtype)
    if model.frontier.device == here:
        return []
    return [
        f"latencies were measured on {model.frontier.device}, not on this device and number of threads ({here}), so "
        "requests cannot name any; run flextron profile here, or serve --profile"
    ]


def named_adapters(
    model: ElasticModel, given: Sequence[str], num_ranks: int = 1, into: AdapterNames | None = None
) -> AdapterNames:
    """Adapters that the operator names.

    Args:
        model: that they are for.
        given: `NAME=DIRECTORY` each.
        num_ranks: ranks that will share the model.
        into: where they are added; by default none are there before.

    Raises:
        FlextronError: one is not of this form, its name does not fit, or there is no adapter for this model.
    """
    names = AdapterNames() if into is None else into
    read = adapter_reader(model.decoder, has_weights=num_ranks == 1)
    for entry in given:
        name, sign, directory = entry.partition("=")
        if not sign or not directory:
            raise FlextronError(f"the adapter {entry!r} is not of the form NAME=DIRECTORY")
        names.add(name, Path(directory).expanduser(), read)
    return names


def open_jobs(
    model: ElasticModel,
    directory: Path,
    adapters: AdapterNames,
    *,
    name: str,
    source: str,
    settings: JobsSettings | None = None,
) -> Jobs:
    """Finetuning jobs of a model, to be closed by the caller.

    Args:
        model: that is served, and that jobs train beside.
        directory: directory of their state.
        adapters: told of what they make.
        name: under which the model is served.
        source: name of the model, for what reads adapters elsewhere.
        settings: limits.

    Raises:
        FlextronError: as for `Jobs`, or the model has no tokenizer.
    """
    return Jobs(
        directory.expanduser(),
        model=name,
        # a thread of its own reads examples, and tokenizers are not safe to share
        tokenizer=copy.deepcopy(needed(model.tokenizer)),
        context=model.decoder.config.max_position_embeddings,
        vocab_size=model.decoder.config.vocab_size,
        make_trainer=LoraTrainers(model.decoder, source),
        fingerprint=fingerprint(model.decoder),
        on_adapter=adapters.add_checkpoint,
        on_deleted=adapters.remove_checkpoint,
        settings=settings,
    )
