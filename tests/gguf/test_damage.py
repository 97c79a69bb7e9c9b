"""Damaged GGUF files end in one sentence each: no traceback, no hang, no absurd allocation."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest
import torch

from flextron.checkpoints.weights import load_decoder
from flextron.errors import FlextronError
from flextron.gguf.checkpoint import open_gguf
from tests.checkpoints.families_cases import our_logits
from tests.gguf.damage import BASES, base, damaged, encoded

MOST_SECONDS = 2.0
MOST_BYTES = 10**9


def use(path: Path) -> str:
    """Load, encode, decode, and compute; what was refused, or "" for nothing."""
    try:
        found = open_gguf(path)
        decoder = load_decoder(found)
        if found.tokenizer is not None:
            found.tokenizer.decode(found.tokenizer("a fox\n\N{SNOWMAN}").input_ids)
        with torch.no_grad():
            our_logits(decoder, torch.tensor([[0, 1]]))
    except FlextronError as error:
        return str(error)
    return ""


def peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(folder: Path, seeds: range) -> int:
    """How many of the files were refused."""
    bases = {case: base(case) for case in BASES}
    path, refused, before = folder / "damaged.gguf", 0, peak()
    for seed in seeds:
        path.write_bytes(damaged(bases, seed))
        begun = time.process_time()
        try:
            said = use(path)
        except BaseException as error:  # a panic of the tokenizers' library is no Exception
            raise AssertionError(f"seed {seed} ends in {type(error).__name__}: {error}") from error
        assert time.process_time() - begun < MOST_SECONDS, f"seed {seed} hangs"
        assert peak() - before < MOST_BYTES, f"seed {seed} takes {(peak() - before) / 1e9:.1f} GB"
        assert len(said) < 1000, f"seed {seed} says {said}"
        refused += bool(said)
    return refused


@pytest.mark.parametrize("case", BASES)
def test_the_sound_files_are_read(case: str, tmp_path: Path) -> None:
    (tmp_path / "sound.gguf").write_bytes(encoded(base(case)))
    assert use(tmp_path / "sound.gguf") == ""


def test_some_damaged_files(tmp_path: Path) -> None:
    assert run(tmp_path, range(400)) > 200


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_damaged_files(tmp_path: Path) -> None:
    assert run(tmp_path, range(10**6, 10**6 + 25_000)) > 12_000
