"""The settings of an adapter that are read: types, bounds, and patterns that end."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from flextron.checkpoints.peft.config import check_adapter_config
from flextron.errors import FlextronError

GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"peft_type": []}, "peft_type"),
        ({"lora_alpha": []}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": 1e30}, "lora_alpha"),
        ({"alpha_pattern": 1}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"alpha_pattern": {"(([a-z._0-9])+)+X": 1}}, "too complex a regular expression"),
        ({"alpha_pattern": {"(a|b)*X": 1}}, "too complex"),
        ({"alpha_pattern": {".*.*.*.*X": 1}}, "too complex"),
        ({"alpha_pattern": {"(?=a)a": 1}}, "too complex"),
        ({"alpha_pattern": {"x" * 10_000: 1}}, "at most 200"),
        ({"use_rslora": "yes"}, "use_rslora"),
    ],
)
def test_entries_that_cannot_be_read_are_named(entry: dict[str, Any], named: str) -> None:
    with pytest.raises(FlextronError, match=named):
        check_adapter_config(GOOD | entry, "adapter_config.json")


@pytest.mark.parametrize("document", [[], "x", None])
def test_a_config_that_is_no_object(document: Any) -> None:
    with pytest.raises(FlextronError, match=r"adapter_config\.json is malformed"):
        check_adapter_config(document, "adapter_config.json")


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", "model.layers.0.self_attn.q_proj", "^model.layers.0.mlp.up_proj", r"layers\.(1|2)\.self_attn\.q_proj",
     r"layers\.[0-9]+\.mlp\..*_proj", r".*\.q_proj"],
)  # fmt: skip
def test_patterns_that_people_write_are_taken_and_quick(pattern: str) -> None:
    data = GOOD | {"alpha_pattern": {pattern: 4.0}}
    assert check_adapter_config(data, "adapter_config.json") == data
    start = time.perf_counter()
    re.match(rf"(.*\.)?({pattern})$", "model.layers." * 20)
    assert time.perf_counter() - start < 0.1
