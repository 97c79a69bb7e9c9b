"""Exported directories load in the oldest `transformers` that pyproject.toml names, with equal tokens and logits.

`make test-oldest` makes an environment with that version and names its Python in FLEXTRON_OLDEST_PYTHON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flextron.api.packaged import tiny_model
from flextron.export import FORMATS, export
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import CASES
from tests.export.gguf.test_file import WRITTEN, uniform
from tests.export.sources import random_source
from tests.tokenizers_zoo import KINDS, TEXTS, zoo_tokenizer

OLDEST = os.environ.get("FLEXTRON_OLDEST_PYTHON", "")
pytestmark = [pytest.mark.peer, pytest.mark.skipif(not OLDEST, reason="run `make test-oldest`")]

READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
out = {"version": transformers.__version__}
for path in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = [tokenizer(text)["input_ids"] for text in json.loads(sys.argv[1])]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(torch.tensor([ids[0]])).logits
    out[path] = {"ids": ids, "decoded": tokenizer.decode(ids[0]), "logits": logits[0, -1].tolist()}
    out[path]["chat"] = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
print(json.dumps(out))
"""
READ_LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
out, ids = {}, torch.tensor([json.loads(sys.argv[1])])
for path in sys.argv[2:]:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        out[path] = model(ids, use_cache=False).logits[0].tolist()
print(json.dumps(out))
"""
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
# each kind of tokenizer beside a model that has such a one: transformers 5 swaps those of some families for its own
FAMILIES = ("llama", "llama-linear", "llama-3", "qwen2", "qwen3", "gpt2", "neox")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root, out = tmp_path_factory.mktemp("oldest"), []
    for kind, case in zip(KINDS, FAMILIES, strict=True):
        tokenizer = zoo_tokenizer(kind)
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|extra|>"]})
        tokenizer.chat_template = TEMPLATE
        config = CASES[case]
        source = random_source(type(config)(**config.to_dict() | {"vocab_size": len(tokenizer)}), tokenizer)
        groups = source.decoder.config.num_groups
        export(source, root / kind, SubnetSpec.of([24, 0, 24], [groups, 0, groups]), format=FORMATS["hf"])
        out.append(root / kind)
    return out


@pytest.fixture(scope="module")
def read(directories: list[Path]) -> dict[str, Any]:
    """What the oldest version makes of them."""
    paths = [str(path) for path in directories]
    done = subprocess.run(
        [OLDEST, "-c", READ, json.dumps([*TEXTS, "two<|extra|>parts"]), *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_it_is_the_oldest_version(read: dict[str, Any]) -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    oldest = re.search(r'"transformers>=([\d.]+)"', pyproject)
    assert oldest is not None
    assert read["version"].startswith(f"{oldest[1]}.")


def test_tokens_and_logits_are_equal(read: dict[str, Any], directories: list[Path]) -> None:
    for path in directories:
        tokenizer, found = AutoTokenizer.from_pretrained(path), read[str(path)]
        ids = [tokenizer(text)["input_ids"] for text in (*TEXTS, "two<|extra|>parts")]
        assert found["ids"] == ids, path.name
        assert found["decoded"] == tokenizer.decode(ids[0])
        assert found["chat"] == "user: hi"
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(path)(torch.tensor([ids[0]])).logits[0, -1]
        torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=1e-4, atol=1e-4)


def test_the_packaged_model_loads_there() -> None:
    code = "import sys; from transformers import AutoTokenizer as A; "
    code += "print(A.from_pretrained(sys.argv[1])('a city')['input_ids'])"
    done = subprocess.run([OLDEST, "-c", code, str(tiny_model())], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == AutoTokenizer.from_pretrained(tiny_model())("a city")["input_ids"]


def test_every_family_computes_the_same_there(tmp_path: Path) -> None:
    """Exports of all families, with the settings of rotations, windows and scales that versions write differently."""
    ids = [5, 9, 2]
    for case, config in WRITTEN.items():
        export(
            random_source(config),
            tmp_path / case,
            uniform(case, all_groups=True),
            format=FORMATS["hf"],
            precision="float32",
        )
    paths = [str(tmp_path / case) for case in WRITTEN]
    command = [OLDEST, "-c", READ_LOGITS, json.dumps(ids), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for path in paths:
        stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            wanted = stock(torch.tensor([ids]), use_cache=False).logits[0]
        torch.testing.assert_close(torch.tensor(found[path]), wanted, rtol=1e-4, atol=1e-4, msg=Path(path).name)
