"""The guides' Python runs against a server."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from flextron import ElasticModel
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.lora import LoraTrainers
from tests.server.running import Running
from tests.server.tuning import tuning

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
GUIDE, FINETUNING = GUIDES / "serving.md", GUIDES / "finetuning.md"


def snippets(guide: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", guide.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


SNIPPETS = snippets(GUIDE)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_guide(
    chat_server: Running, model: ElasticModel, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model.save("tiny")
    code = SNIPPETS[number].replace("http://127.0.0.1:8000", chat_server.url).replace("smollm2", "tiny")
    space: dict[str, object] = {"__name__": "__main__"}
    # the future of this file is not the snippet's
    exec(compile(code, str(GUIDE), "exec", dont_inherit=True), space)
    if "client" in space:
        space["client"].close()  # type: ignore[attr-defined]


def test_the_guide_to_finetuning(model: ElasticModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each snippet goes on where the last one ended; the first needs no server, and `test_readme.py` runs it alone."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "__main__"}
    model.save("tiny")
    with tuning(model, tmp_path / "state", maker=LoraTrainers(model.decoder, "tiny")) as made:
        for snippet in snippets(FINETUNING):
            code = snippet.replace("http://127.0.0.1:8000", made.server.url).replace('"smollm2"', '"tiny"')
            exec(compile(code, str(FINETUNING), "exec"), space)
        assert space["job"].status == "succeeded"
        assert space["answer"].flextron["adapter"] == space["job"].fine_tuned_model
        space["client"].close()


def test_the_hyperparameters_are_told() -> None:
    text = FINETUNING.read_text(encoding="utf-8")
    assert all(f"`{field.name}`" in text for field in fields(Hyperparameters))


def test_the_table_of_metrics_is_complete(chat_server: Running) -> None:
    told = set(re.findall(r"`((?:vllm|flextron):\w+)`", GUIDE.read_text(encoding="utf-8")))
    families = chat_server.service.metrics.registry.collect()
    counters = {f"{f.name}_total" if f.type == "counter" else f.name for f in families}
    assert told == counters
