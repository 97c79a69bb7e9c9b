"""Uniform sub-networks go on to ONNX Runtime and OpenVINO by their own exporters, and compute the same there.

`make test-optimum` makes an environment with optimum-onnx and optimum-intel, which want an older transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.trained import trained_model

pytestmark = [pytest.mark.slow, pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


def onnx(path: Path) -> Any:
    runtime = pytest.importorskip("optimum.onnxruntime")
    return runtime.ORTModelForCausalLM.from_pretrained(path, export=True)


def openvino(path: Path) -> Any:
    intel = pytest.importorskip("optimum.intel")
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    return intel.OVModelForCausalLM.from_pretrained(path, export=True, ov_config=exact)


@pytest.mark.parametrize("load", [onnx, openvino])
@pytest.mark.parametrize(("num_groups", "skip"), [(4, []), (4, [1]), (2, [])])
def test_logits_and_greedy_tokens(load: Any, num_groups: int, skip: list[int], tmp_path: Path) -> None:
    if load is onnx and num_groups < 4:
        pytest.skip("optimum-onnx takes the head size to be hidden size / heads")
    model = trained_model()
    spec = model.space.uniform(intermediate_size=128, num_groups=num_groups, skip=skip)
    model.export(tmp_path, spec=spec, format="hf", precision="float32", overwrite=True)
    stock, other = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), load(tmp_path)
    ids = torch.tensor([[5, 9, 2, 11, 33, 7]])
    with torch.no_grad():
        wanted = stock(ids).logits
    found = torch.as_tensor(other(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-4
    options = {"max_new_tokens": 16, "do_sample": False}
    assert other.generate(ids, **options).tolist() == stock.generate(ids, **options).tolist()
