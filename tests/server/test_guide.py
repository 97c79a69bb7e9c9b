"""The guide's Python runs against a server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flextron import ElasticModel
from tests.server.running import Running

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "serving.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_guide(
    chat_server: Running, model: ElasticModel, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model.save("tiny")
    code = SNIPPETS[number].replace("http://127.0.0.1:8000", chat_server.url).replace("smollm2", "tiny")
    space: dict[str, object] = {"__name__": "__main__"}
    exec(compile(code, str(GUIDE), "exec"), space)
    if "client" in space:
        space["client"].close()  # type: ignore[attr-defined]


def test_the_table_of_metrics_is_complete(chat_server: Running) -> None:
    told = set(re.findall(r"`((?:vllm|flextron):\w+)`", GUIDE.read_text(encoding="utf-8")))
    families = chat_server.service.metrics.registry.collect()
    counters = {f"{f.name}_total" if f.type == "counter" else f.name for f in families}
    assert told == counters
