"""Pictures show the whole title, whatever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from flextron.routing import FrontierPoint
from flextron.spec import SubnetSpec
from flextron.workflows.figure import draw_kinds

POINT = FrontierPoint(
    spec=SubnetSpec.of([8], [1]), kind="router", params=1, mem_bytes=4, latency_ms=1.0, latency=1.0, loss=1.0
)


@pytest.mark.parametrize(
    "title",
    [
        "tiny on a machine",
        "SmolLM2-135M-Instruct.Q8_0.gguf on amd-epyc-9634-84-core-processor-and-more-2-threads-float32",
        "W" * 150,
        "prices in $ and in $^2, {braces} and \\backslashes",
    ],
)
def test_the_title_is_whole(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    save = Figure.savefig

    def watched(self: Figure, *args: Any, **options: Any) -> None:
        save(self, *args, **options)
        (text,) = (t for t in self.texts if t.get_text())
        box = text.get_window_extent()
        seen.append((text.get_text(), box.x0, box.x1, box.y1, self.bbox.width, self.bbox.height))

    monkeypatch.setattr(Figure, "savefig", watched)
    draw_kinds([POINT], tmp_path / "picture.png", title=title)
    ((text, left, right, top, width, height),) = seen
    assert "".join(text.replace(r"\$", "$").split()) == "".join(title.split())
    assert left >= 0
    assert right <= width
    assert top <= height
    assert (tmp_path / "picture.png").stat().st_size > 1000
