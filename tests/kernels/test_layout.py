"""Structs, orders and constants of the C++ sources that differ from Python's: loading says so."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flextron.errors import FlextronError
from flextron.kernels import build, layout
from flextron.kernels.build import load_library
from flextron.kernels.layout import Source

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

CSRC = Path(build.__file__).with_name("csrc")


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the headers, with sources that have nothing but the layout and compile at once."""
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    for name in ("decoder", "training"):
        text = (CSRC / f"{name}.cpp").read_text()
        function = text[text.index("const char* flextron_layout") :].split("\n}\n")[0]
        before = text.split('extern "C" {')[0] if name == "training" else '#include "decoder_layout.h"\n'
        (copy / f"{name}.cpp").write_text(f'{before}\nextern "C" {{\n{function}\n}}\n}}\n')
    monkeypatch.setattr(build, "_SOURCES", copy)
    monkeypatch.setattr(build, "_COMPILE", ("-std=c++17", "-O0", "-fopenmp", "-fPIC", "-c"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FLEXTRON_NATIVE", raising=False)
    load_library.cache_clear()
    yield copy
    load_library.cache_clear()


@pytest.mark.parametrize("name", ["decoder", "training"])
def test_the_sources_have_pythons_layout(name: Source) -> None:
    assert isinstance(load_library(name), ctypes.CDLL)


@pytest.mark.parametrize(
    ("name", "header", "old", "new", "said"),
    [
        ("decoder", "decoder.h", "hidden_size, head_dim,", "head_dim, hidden_size,", "struct Shape"),
        (
            "decoder",
            "decoder.h",
            "    float norm_eps, embedding_scale,",
            "    double norm_eps;\n    float embedding_scale,",
            "struct Shape",
        ),
        ("decoder", "decoder.h", "    int64_t rank;", "    int32_t rank;", "struct Bypass"),
        ("decoder", "decoder.h", "kSilu, kGelu,", "kGelu, kSilu,", "enum Activation"),
        ("decoder", "decoder.h", "kFloat32, kInt8, kInt4,", "kFloat32, kInt8, kInt4, kInt2,", "enum Weights"),
        ("decoder", "lora.h", "kQ, kK, kV, kO,", "kQ, kO, kK, kV,", "enum Target"),
        ("decoder", "int4.h", "kGroup = 32", "kGroup = 64", "constant group"),
        ("training", "flash_attention.h", "    int64_t out_stride;", "", "struct Gradients"),
    ],
)
def test_a_source_that_differs_is_refused(
    sources: Path, name: Source, header: str, old: str, new: str, said: str
) -> None:
    text = (sources / header).read_text()
    assert text.count(old) == 1
    (sources / header).write_text(text.replace(old, new))
    if "out_stride" in old:
        path = sources / "training.cpp"
        path.write_text(path.read_text().replace(" FIELD(Gradients, out_stride),", ""))
        (sources / header).write_text((sources / header).read_text().replace("g.out_stride", "0"))
    with pytest.raises(FlextronError, match=rf"kernels of `{name}` do not fit.*{said} .*install flextron again"):
        load_library(name)


def test_a_mirror_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(ctypes.Structure):
        _fields_ = layout.Tokens._fields_[:-1]

    Short.__name__ = "Tokens"
    monkeypatch.setattr(layout, "Tokens", Short)
    with pytest.raises(FlextronError, match="struct Tokens"):
        load_library("decoder")


def test_a_library_without_its_layout_is_refused(sources: Path) -> None:
    (sources / "training.cpp").write_text('extern "C" int nothing() { return 0; }')
    with pytest.raises(FlextronError, match="they have 'nothing'"):
        load_library("training")
