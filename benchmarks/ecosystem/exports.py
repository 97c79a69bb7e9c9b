"""Files for other programs: greedy tokens in llama.cpp, and what comes back from each format."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks import smollm2
from benchmarks.harness import Figure, largest_difference
from benchmarks.llamacpp import LlamaCpp
from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.weights import load_decoder
from flextron.export import FORMATS, Source, export
from flextron.generation.generate import SamplingParams, generate
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec
from tests.export.gguf.test_file import LATER, WRITTEN, uniform
from tests.export.sources import random_source

__all__ = ["families_in_llamacpp", "heterogeneous_gguf", "round_trips"]

_TIE = 5e-3
"""Between logits of about 2: llama.cpp looks GELU and SiLU up in tables of 16-bit numbers, once in each of 3 layers."""
GGUF, HF = FORMATS["gguf"], FORMATS["hf"]
_TEXTS = (
    "The river ran past the mill, and",
    "In 2024 the committee decided that 345 of",
    "def fibonacci(n):\n    if n < 2:\n",
    "Once upon a time",
    "The most important thing about water is",
)


def _equal(source: Source, spec: SubnetSpec, prompts: list[list[int]], num_tokens: int) -> int:
    """Prompts whose greedy tokens in llama.cpp, float32, are ours, up to a tie."""
    with tempfile.TemporaryDirectory() as folder:
        made = export(source, Path(folder) / "F32.gguf", spec, format=GGUF, precision="float32")
        with LlamaCpp(made.path) as peer:
            _, theirs = peer.serve([(prompt, num_tokens) for prompt in prompts])
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0)
    return sum(
        _is_same(source.decoder, spec, p, generate(source.decoder, [p], spec, params)[0], t)
        for p, t in zip(prompts, theirs, strict=True)
    )


@torch.no_grad()
def _is_same(decoder: Decoder, spec: SubnetSpec, prompt: list[int], ours: list[int], theirs: list[int]) -> bool:
    """Whether answers are equal, or up to a token that hardly differs from the other in its logit."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if at is None:
        return True
    logits_V = _logits(decoder, torch.tensor([prompt + ours[:at]]), spec)[0, -1]
    return float((logits_V[ours[at]] - logits_V[theirs[at]]).abs()) <= _TIE


def heterogeneous_gguf() -> Figure:
    """Heterogeneous sub-networks of SmolLM2-135M in llama.cpp, greedy, float32."""
    model, rng = smollm2.elastic(), random.Random(1)
    assert model.tokenizer is not None
    prompts = [model.tokenizer(text)["input_ids"] for text in _TEXTS]
    specs = [model.space.heterogeneous(size, rng) for size in (0.3, 0.6, 0.9)]
    equal = sum(_equal(model, spec, prompts, 32) for spec in specs)
    return Figure(
        name="heterogeneous GGUF in llama.cpp: prompts with the same 32 greedy tokens as here",
        value=equal / (len(specs) * len(prompts)),
        unit="of all",
        op="==",
        bar=1.0,
        note=f"{len(specs)} sub-networks of SmolLM2-135M, {len(prompts)} prompts each, float32",
    )


def families_in_llamacpp() -> Figure:
    """Uniform sub-networks of the later families in llama.cpp, tiny random models."""
    # Phi-3's window and its factors for long texts are beyond what llama.cpp does in a short context
    cases = [case for case in LATER if not case.startswith("phi3")]
    prompts = [[5, 9, 2, 11], [33, 1, 17], [50, 21, 8, 3, 60]]
    equal = sum(_equal(random_source(LATER[case]), uniform(case, all_groups=True), prompts, 32) for case in cases)
    return Figure(
        name="later families in llama.cpp: prompts with the same 32 greedy tokens as here",
        value=equal / (len(cases) * len(prompts)),
        unit="of all",
        op="==",
        bar=1.0,
        note=f"tiny random models: {', '.join(cases)}",
    )


@torch.no_grad()
def _logits(decoder: Decoder, tokens: torch.Tensor, spec: SubnetSpec | None = None) -> torch.Tensor:
    return decoder.logits(decoder(Batch.padded(tokens, spec or decoder.widths))).view(*tokens.shape, -1)


@torch.no_grad()
def round_trips() -> Figure:
    """Exports of every family read back, Hugging Face's by transformers, GGUF by our reader."""
    worst, count = 0.0, 0
    for case, config in WRITTEN.items():
        source, spec = random_source(config), uniform(case, all_groups=True)
        tokens = torch.randint(60, (1, 3 if case in ("mistral", "phi3") else 12))
        wanted = _logits(source.decoder, tokens, spec)
        with tempfile.TemporaryDirectory() as folder:
            export(source, Path(folder) / "hf", spec, format=HF, precision="float32")
            export(source, Path(folder) / "a.gguf", spec, format=GGUF, precision="float32")
            stock = AutoModelForCausalLM.from_pretrained(Path(folder) / "hf", attn_implementation="eager").eval()
            again = _logits(load_decoder(open_pretrained(Path(folder) / "a.gguf")), tokens)
            for found in (stock(tokens, use_cache=False).logits, again):
                worst = max(worst, largest_difference(found, wanted))
                count += 1
    return Figure(
        name="exports read back: largest relative difference of logits",
        value=worst,
        unit="relative",
        op="<=",
        bar=1e-5,
        note=f"{count} files of {len(WRITTEN)} tiny random models, float32; stock transformers, and our reader of GGUF",
    )
