"""Documents come out of every kind of source as they were written into it, lazily, and bad ones are named."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flextron.errors import FlextronError
from flextron.texts.documents import read_documents

TEXTS = ["One day\nthere was ü.", 'Second, with [brackets], {braces} and "quotes"', "Third"]


def write(path: Path, data: bytes) -> str:
    """Write the file, compressed where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pa.compress(data, codec="zstd", asbytes=True) if path.suffix == ".zst" else data)
    return str(path)


def as_lines(records: list[object]) -> bytes:
    """JSON Lines."""
    return "\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode()


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.zst", "a.md.zst"])
def test_a_plain_file_is_one_document(tmp_path: Path, name: str) -> None:
    """Also with the byte order mark of some editors, which is no text."""
    data = "Zwölf\n\nBoxkämpfer\n".encode()
    assert list(read_documents(write(tmp_path / name, data))) == ["Zwölf\n\nBoxkämpfer\n"]
    assert list(read_documents(write(tmp_path / name, b"\xef\xbb\xbf" + data))) == ["Zwölf\n\nBoxkämpfer\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.zst", "a.json.zst"])
@pytest.mark.parametrize("layout", ["lines", "array", "indented"])
def test_a_json_file_is_one_document_a_record(tmp_path: Path, name: str, layout: str) -> None:
    """Lines and arrays, however laid out; empty and null texts are dropped."""
    records: list[object] = [{"id": i, "text": t} for i, t in enumerate([*TEXTS, "", " \n", None])]
    data = as_lines(records) + b"\n\n" if layout == "lines" else json.dumps(records).encode()
    if layout == "indented":
        data = b"\n " + json.dumps(records, indent=3).encode()
    assert list(read_documents(write(tmp_path / name, data))) == TEXTS


@settings(max_examples=40)
@given(
    records=st.lists(st.fixed_dictionaries({"text": st.text(st.characters(codec="utf-8"), max_size=30)})),
    indent=st.sampled_from([None, 1]),
    chunk=st.integers(1, 40),
)
def test_array_items_survive_any_chunking(records: list[dict[str, str]], indent: int | None, chunk: int) -> None:
    """Wherever the chunks end, the items are those that json.loads finds."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("flextron.texts.documents._CHUNK", chunk)
        source = write(Path(folder) / "a.json", json.dumps(records, indent=indent, ensure_ascii=False).encode())
        assert list(read_documents(source)) == [r["text"] for r in records if r["text"].strip()]


def test_parquet_rows(tmp_path: Path) -> None:
    """The column found by name, or the only one of strings."""
    table = pa.table({"id": [1, 2, 3, 4], "story": [*TEXTS, None], "other": [[1], [2], [3], []]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert list(read_documents(str(tmp_path / "a.parquet"))) == TEXTS
    assert list(read_documents(str(tmp_path / "a.parquet"), text_field="story")) == TEXTS
    with pytest.raises(FlextronError, match=r"no field 'nope' among \['id', 'story', 'other'\]"):
        list(read_documents(str(tmp_path / "a.parquet"), text_field="nope"))


def test_directories_and_globs_are_read_in_sorted_order(tmp_path: Path) -> None:
    """Recursively, passing over files of other kinds."""
    for name in ("b.txt", "a/z.md", "c.jsonl", "a/b/y.txt"):
        write(tmp_path / name, as_lines([{"text": name}]) if name.endswith("jsonl") else name.encode())
    write(tmp_path / "a" / "weights.bin", b"\xff\xfe")
    assert list(read_documents(str(tmp_path))) == ["a/b/y.txt", "a/z.md", "b.txt", "c.jsonl"]
    assert list(read_documents(f"{tmp_path}/**/*.txt")) == ["a/b/y.txt", "b.txt"]
    assert list(read_documents(f"{tmp_path}/a/*")) == ["a/z.md"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"content": "c", "text": "t"}, "t"),
        ({"completion": "p", "content": "c"}, "c"),
        ({"prompt": "q", "completion": "p"}, "p"),
        ({"id": 7, "anything": "x"}, "x"),
    ],
)
def test_choice_of_the_text_field(tmp_path: Path, record: dict[str, object], expected: str) -> None:
    """Well-known names first, then the only string."""
    assert list(read_documents(write(tmp_path / "a.jsonl", as_lines([record])))) == [expected]


def test_named_text_field(tmp_path: Path) -> None:
    """The user's choice goes before the well-known names."""
    source = write(tmp_path / "a.jsonl", as_lines([{"text": "t", "note": "n"}]))
    assert list(read_documents(source, text_field="note")) == ["n"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"a\.jsonl is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3: malformed JSON"),
        ("a.json", b'[{"text": "x"},\n{"text": "y"\n,,}]', r"a\.json, line 3: malformed JSON"),
        ("a.json", b'[{"text": "x"},\n{"text": "y"', r"a\.json, line 2: malformed JSON"),
        ("a.json", b'{\n "text": "x"}', r"a\.json, line 1: malformed JSON"),
        ("a.jsonl", b'{"a": "x", "b": "y"}', r"line 1: which of the fields \['a', 'b'\]"),
        ("a.jsonl", b'{"a": 1}', r"line 1: which of the fields \['a'\]"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', r"line 2: no field 'text' among \['body'\]"),
        ("a.jsonl", b'{"text": ["x"]}', r"line 1: field 'text' is a list"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: field 'text' is not valid Unicode"),
        ("a.jsonl", b'"x"', "line 1: a record must be an object"),
        ("a.parquet", b"PAR0", r"a\.parquet cannot be read as Parquet"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    """With the line and the fields where there are some."""
    with pytest.raises(FlextronError, match=message):
        list(read_documents(write(tmp_path / name, data)))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_line_numbers_hold_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Of a malformed item of an array, and of an item without text."""
    monkeypatch.setattr("flextron.texts.documents._CHUNK", chunk)
    items = ['{"text":\n"x"}'] * 20
    for bad, message in (('{"text": nil}', "line 41: malformed"), ('{"body": "y"}', "line 41: no field 'text'")):
        source = write(tmp_path / "a.json", ("[" + ",\n".join([*items, bad, *items]) + "]").encode())
        with pytest.raises(FlextronError, match=message):
            list(read_documents(source))


def test_damaged_compression_is_named(tmp_path: Path) -> None:
    """Cut off, or never compressed."""
    source = write(tmp_path / "a.txt.zst", b"".join(b"%d " % i for i in range(1000)))
    Path(source).write_bytes(Path(source).read_bytes()[:-20])
    with pytest.raises(FlextronError, match=r"a\.txt\.zst cannot be read"):
        list(read_documents(source))
    Path(source).write_bytes(b"plain text")
    with pytest.raises(FlextronError, match=r"a\.txt\.zst cannot be read"):
        list(read_documents(source))


@pytest.mark.parametrize(
    "source", ["./nowhere", "data/train.jsonl", "nowhere", "/no/such/dir", "no/*.txt", "a/b/c", ""]
)
def test_missing_sources_fail_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Before anything is iterated, and without asking the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flextron.texts.documents._hub_records", None)
    with pytest.raises(FlextronError, match=r"nothing lies at|holds no file"):
        read_documents(source)


def test_a_source_without_readable_files(tmp_path: Path) -> None:
    """Says which kinds there are."""
    source = write(tmp_path / "a.bin", b"x")
    for bad in (source, str(tmp_path), f"{tmp_path}/*"):
        with pytest.raises(FlextronError, match=r"holds no file.*\.jsonl.*\.parquet"):
            read_documents(bad)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/na.me-2:en@validation", ("owner/na.me-2", "en", "validation")),
        ("owner/name@test", ("owner/name", None, "test")),
    ],
)
def test_hub_datasets_are_streamed(
    monkeypatch: pytest.MonkeyPatch, source: str, expected: tuple[str, str | None, str]
) -> None:
    """Config and split are taken from the source."""
    import datasets

    asked: list[object] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((name, config, split))
        assert streaming
        return datasets.Dataset.from_dict({"id": [0, 1], "content": ["x", "y"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_documents(source)) == ["x", "y"]
    assert asked == [expected]


def test_a_hub_dataset_that_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is passed on in one line."""
    import datasets

    def load_dataset(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("no such dataset\nlong advice")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FlextronError, match=r"'owner/name'.*\(no such dataset\); check the path"):
        read_documents("owner/name")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.zst"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    """Ten megabytes pass through less than one and a half."""
    item = json.dumps({"text": "word " * 2000}).encode()
    data = b"[" + b",".join([item] * 1000) + b"]" if name == "a.json" else b"\n".join([item] * 1000)
    source = write(tmp_path / name, data)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_documents(source)) == 1000
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1.5e6 < len(data)
