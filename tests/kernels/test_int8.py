"""Products in whole numbers with eight-bit weights, against NumPy's and for all instruction sets."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from flextron.kernels import build
from flextron.kernels.decoder import NativeStep, Weights
from flextron.kernels.panels import Panels
from flextron.kernels.quantization import quantize_rows
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec
from tests.kernels.test_decoder import PAGE, compiled, per_layer
from tests.random_decoders import ragged_specs, random_decoder, rounded, rounded_decoder
from tests.trained import trained_model

LARGEST = 127 * 128  # multiple of a token's scale


def drawn(seed: int, tokens: int, inputs: int, outputs: int, extreme: bool) -> tuple[Tensor, Tensor]:
    """Whole numbers of tokens, (tokens, inputs), with large ones among them, and of weights, (outputs, inputs)."""
    generator = torch.Generator().manual_seed(seed)

    def whole(most: int, *shape: int) -> Tensor:
        if extreme:
            return most * (2 * torch.randint(0, 2, shape, generator=generator) - 1)
        return torch.randint(-most, most + 1, shape, generator=generator)

    x, large = whole(127, tokens, inputs), whole(LARGEST, tokens, inputs)
    is_large = torch.rand(tokens, inputs, generator=generator) < 0.03
    return torch.where(is_large, large, x), whole(127, outputs, inputs).to(torch.int8)


def exact(x: Tensor, weights: Tensor) -> np.ndarray:
    """Sums in whole numbers, as the nearest floats."""
    sums = x.numpy().astype(np.int64) @ weights.numpy().astype(np.int64).T
    assert np.abs(sums).max(initial=0) < 2**31
    return sums.astype(np.float32)


@compiled
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.one_of(st.integers(1, 20), st.integers(32, 70)),
    inputs=st.integers(1, 150),
    outputs=st.integers(1, 150),
    left=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    extreme=st.booleans(),
    threads=st.integers(1, 3),
)
def test_sums_are_exact(
    seed: int, tokens: int, inputs: int, outputs: int, left: tuple[int, int], extreme: bool, threads: int
) -> None:
    """Also of leading inputs and outputs of a larger matrix."""
    x, weights = drawn(seed, tokens, inputs + left[0], outputs + left[1], extreme)
    ones = torch.ones(len(weights))
    own = x[:, :inputs]
    got = Panels(weights, ones).multiply(own.float(), outputs, torch.ones(tokens), threads)
    assert np.array_equal(got.numpy(), exact(own, weights[:outputs, :inputs]))


@compiled
@pytest.mark.parametrize("sign", [-1, 1])
def test_sums_of_the_largest_numbers_do_not_overflow(sign: int) -> None:
    inputs = 60_000
    x, weights = torch.full((1, inputs), 127 * sign), torch.full((17, inputs), 127, dtype=torch.int8)
    got = Panels(weights, torch.ones(17)).multiply(x.float(), scales_N=torch.ones(1))
    assert np.array_equal(got.numpy(), exact(x, weights))


INSTRUCTIONS = {
    "x86-64": ((), ["-march=x86-64"]),
    "avx2": (("avx2", "fma"), ["-march=x86-64-v3"]),
    "avx-vnni": (("avx2", "fma", "avx_vnni"), ["-march=x86-64-v3", "-mavxvnni"]),
    "avx512-vnni": (("avx512_vnni", "avx512bw", "avx512vl"), ["-march=cascadelake"]),
    "amx": (("avx512_vnni", "avx512bw", "avx512vl", "amx_int8"), ["-march=cascadelake", "-mamx-tile", "-mamx-int8"]),
}


@pytest.fixture(scope="module", params=list(INSTRUCTIONS))
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels for some instructions."""
    needs, flags = INSTRUCTIONS[request.param]
    cpu = Path("/proc/cpuinfo")
    has = (
        next((line.split() for line in cpu.read_text().splitlines() if line.startswith("flags")), [])
        if cpu.exists()
        else []
    )
    if not has or shutil.which("c++") is None:
        pytest.skip("needs a compiler on x86-64")
    if not set(needs) <= set(has):
        pytest.skip(f"this processor has no {request.param}")
    directory = tmp_path_factory.mktemp(request.param)
    source, made = directory / "own.cpp", directory / "own.so"
    arguments = (
        "const float* x, long n, long size, const float* t, const void* p, long quads, const float* s, long o, float* y"
    )
    source.write_text(
        f'#include "int8.h"\nextern "C" void multiply({arguments}) '
        "{ multiply_tokens(x, n, size, t, p, quads, s, o, y, 1); }\n"
    )
    include = f"-I{build._SOURCES}"
    compile_flags = ["-std=c++17", "-O2", "-ffast-math", "-fopenmp", "-fPIC", "-c"]
    subprocess.run(["c++", *flags, include, *compile_flags, str(source), "-o", f"{made}.o"], check=True)
    subprocess.run(["c++", "-fopenmp", "-shared", f"{made}.o", "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 576, 100), (7, 150, 48), (13, 33, 17), (70, 390, 200)])
def test_all_instructions_give_the_same_sums(
    library: ctypes.CDLL, tokens: int, inputs: int, outputs: int, extreme: bool
) -> None:
    x, weights = drawn(7, tokens, inputs, outputs, extreme)
    panels = Panels(weights, torch.ones(outputs))
    numbers, out, ones = x.float(), torch.empty(tokens, outputs), torch.ones(tokens)
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.multiply.argtypes = (pointer, number, number, pointer, pointer, number, pointer, number, pointer)
    library.multiply(
        numbers.data_ptr(),
        tokens,
        inputs,
        ones.data_ptr(),
        panels._panels.data_ptr(),
        panels._panels.shape[1],
        panels._scales.data_ptr(),
        outputs,
        out.data_ptr(),
    )
    assert np.array_equal(out.numpy(), exact(x, weights))


@compiled
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 9),
    inputs=st.integers(1, 300),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]),
    outliers=st.sampled_from([1.0, 30.0, 1000.0]),
)
def test_tokens_are_at_most_half_a_step_off(seed: int, tokens: int, inputs: int, size: float, outliers: float) -> None:
    """Products with ones and zeros show what tokens were rounded to: multiples that leave most numbers many steps."""
    generator = torch.Generator().manual_seed(seed)
    x = size * torch.randn(tokens, inputs, generator=generator)
    x = torch.where(torch.rand(tokens, inputs, generator=generator) < 0.02, outliers * x, x)
    got = Panels(torch.eye(inputs, dtype=torch.int8), torch.ones(inputs)).multiply(x)
    reach = torch.minimum(x.abs().amax(1), 4 * x.square().mean(1).sqrt())
    assert ((got - x).abs() <= reach[:, None] / 254 * 1.001 + 1e-6 * x.abs()).all()


@compiled
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 17), inputs=st.integers(1, 300), outputs=st.integers(1, 90))
def test_products_are_within_what_rounding_gives(seed: int, tokens: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(tokens, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    numbers, scales = quantize_rows(weight)
    ours = numbers.double() * scales.double()[:, None]
    steps = torch.minimum(x.abs().amax(1), 4 * x.square().mean(1).sqrt()).double() / 127
    bound = 0.5 * steps[:, None] * ours.abs().sum(1) * 1.001 + 1e-5 * (x.double().abs() @ ours.abs().t())
    assert ((Panels.of(weight).multiply(x) - x.double() @ ours.t()).abs() <= bound).all()


@compiled
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_zeros_and_numbers_that_are_none(wrong: float) -> None:
    panels = Panels.of(torch.randn(20, 40))
    x = torch.zeros(3, 40)
    x[1, 5] = wrong
    got = panels.multiply(x)
    assert not got[0].any()
    assert not got[2].any()
    assert not got[1].isfinite().any()


def scores(native: NativeStep, decoder: Decoder, sequences: list[Tensor], specs: list[SubnetSpec]) -> list[Tensor]:
    """Scores after each token of sequences that run in one iteration."""
    config = decoder.config
    lengths = [len(s) for s in sequences]
    owners = [i for i, n in enumerate(lengths) for _ in range(n)]
    units = config.num_hidden_layers * config.num_groups
    pages = -(-max(lengths) // PAGE)
    tables = torch.arange(len(lengths) * pages * units, dtype=torch.int32).view(len(lengths), pages, units)
    out = native(
        torch.cat(sequences),
        torch.cat([torch.arange(n) for n in lengths]),
        per_layer([[layer.intermediate_size for layer in specs[i].layers] for i in owners]),
        per_layer([[layer.num_groups for layer in specs[i].layers] for i in owners]),
        [tables[i] for i in owners],
        per_layer([[config.num_groups * layer for layer in range(config.num_hidden_layers)] for _ in owners]),
        torch.full((tables.numel(), 2, PAGE, config.head_dim), float("nan")),
        range(len(owners)),
    )
    return list(out.split(lengths))


@compiled
@pytest.mark.parametrize("name", ["llama", "llama-mqa", "neox", "gemma3", "olmo2"])
def test_scores_do_not_depend_on_other_sequences_or_threads(name: str) -> None:
    decoder = random_decoder(name)
    native, threads = NativeStep(decoder, PAGE, "int8"), torch.get_num_threads()
    specs = ragged_specs(decoder.config, 6)
    torch.manual_seed(2)
    sequences = [torch.randint(decoder.config.vocab_size, (n,)) for n in (1, 9, 1, 4, 40, 2)]
    alone = [scores(native, decoder, [t], [s])[0] for t, s in zip(sequences, specs, strict=True)]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for own, beside in zip(alone, scores(native, decoder, sequences, specs), strict=True):
                assert torch.equal(own, beside)
    finally:
        torch.set_num_threads(threads)


@compiled
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_perplexity_is_that_of_the_rounded_weights(weights: Weights) -> None:
    decoder = trained_model().decoder
    reference, head = rounded_decoder(decoder, weights), rounded(decoder.head_weight, "int8")
    native, full = NativeStep(decoder, PAGE, weights), decoder.config.full_spec
    torch.manual_seed(0)
    losses: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    for _ in range(4):
        tokens = sampled(decoder, 64)
        own = scores(native, decoder, [tokens], [full])[0]
        theirs = reference(Batch.ragged([tokens], [full])) @ head.t()
        for name, logits in (("ours", own), ("theirs", theirs)):
            losses[name].append(cross_entropy(logits[:-1], tokens[1:]))
    ours, theirs = (math.exp(float(torch.stack(losses[name]).mean())) for name in ("ours", "theirs"))
    assert ours == pytest.approx(theirs, rel=0.005)


@torch.no_grad()
def sampled(decoder: Decoder, length: int) -> Tensor:
    """Tokens as the model draws them."""
    tokens = torch.randint(decoder.config.vocab_size, (1,))
    while len(tokens) < length:
        hidden = decoder(Batch.ragged([tokens], [decoder.config.full_spec]))
        tokens = torch.cat([tokens, torch.multinomial(decoder.logits(hidden[-1:]).softmax(-1)[0], 1)])
    return tokens
