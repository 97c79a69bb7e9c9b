"""Elastic models for the tests of exports: tiny random ones of every family, with or without measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from flextron.elastic import ElasticInfo
from flextron.model.cost import num_parameters
from flextron.model.decoder import Decoder
from flextron.routing import Frontier, FrontierPoint
from flextron.spec import SearchSpace, SubnetSpec
from tests.checkpoints.families_cases import decoder_of, hf_config_of, random_from


@dataclass
class RandomSource:
    """What an export needs."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    hf_config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    info: ElasticInfo
    frontier: Frontier | None


def random_source(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 3
) -> RandomSource:
    """A random model of a config."""
    model = random_from(config, seed)
    decoder = decoder_of(model)
    own = decoder.config
    space = SearchSpace(
        num_hidden_layers=own.num_hidden_layers,
        intermediate_sizes=(own.intermediate_size,),
        num_groups=tuple(range(1, own.num_groups + 1)),
    )
    info = ElasticInfo(space=space, layer_scores=(1.0,) * own.num_hidden_layers, provenance={"source": "owner/model"})
    return RandomSource(decoder, tokenizer, hf_config_of(model), None, info, None)


def measured(source: RandomSource, *specs: SubnetSpec) -> Frontier:
    """A frontier with made-up measurements: the wider, the slower and the better."""
    config = source.decoder.config
    sizes = {spec: num_parameters(config, spec) for spec in (config.full_spec, *specs)}
    full = sizes[config.full_spec]
    points = [
        FrontierPoint(
            spec=spec,
            kind="uniform" if spec.is_uniform else "guided",
            params=size,
            mem_bytes=4 * size,
            latency_ms=10 * size / full,
            latency=size / full,
            loss=3 + (1 - size / full),
        )
        for spec, size in sizes.items()
    ]
    return Frontier.of("a-cpu-2-threads-float32", "a text", points)
