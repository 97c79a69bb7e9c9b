"""Uniform sub-networks load in MLX by mlx-lm, and compute the same there.

`pip install "mlx[cpu]" mlx-lm` into an environment of its own, on Linux, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.trained import trained_model

pytestmark = [pytest.mark.slow, pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(("num_groups", "skip"), [(4, []), (4, [1]), (2, [])])
def test_logits_and_greedy_tokens(num_groups: int, skip: list[int], tmp_path: Path) -> None:
    mlx_lm: Any = pytest.importorskip("mlx_lm")
    core: Any = pytest.importorskip("mlx.core")
    model = trained_model()
    spec = model.space.uniform(intermediate_size=128, num_groups=num_groups, skip=skip)
    model.export(tmp_path, spec=spec, format="hf", precision="float32", overwrite=True)
    stock, (other, tokenizer) = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), mlx_lm.load(str(tmp_path))
    ids = [5, 9, 2, 11, 33, 7]
    with torch.no_grad():
        wanted = stock(torch.tensor([ids])).logits[0].numpy()
    found = np.array(other(core.array([ids])))[0]
    assert np.abs(found - wanted).max() / np.abs(wanted).max() <= 1e-4
    greedy = stock.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
    made = mlx_lm.stream_generate(other, tokenizer, ids, max_tokens=16)
    assert [piece.token for piece in made][: len(greedy)] == greedy
