"""Text in: documents from files, directories, globs or a dataset on the hub, one at a time.

Notable: nothing is read ahead, so a source may be larger than memory (a text file is one document, though). Compressed
files go through pyarrow, which `datasets` brings along, as do Parquet files. The field that holds the text is settled
by the first record of a file and then expected in all of them, so a file never mixes two fields silently.
"""

from __future__ import annotations

import glob
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from flextron.errors import FlextronError, shown

__all__ = ["read_documents"]

_TEXT_FIELDS = ("text", "content", "completion", "document", "article", "body")
_PLAIN = (".txt", ".md")
_JSON = (".jsonl", ".json")
_SUFFIXES = (*(s + z for s in (*_PLAIN, *_JSON) for z in ("", ".zst")), ".parquet")
_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[^:@/]+))?(@(?P<split>[^:@/]+))?", re.ASCII)
_CHUNK = 1 << 16
_BETWEEN_ITEMS = re.compile(r"\s*[\[,]?\s*")


def read_documents(source: str, *, text_field: str | None = None) -> Iterator[str]:
    """Stream the documents of a source, empty ones dropped.

    Args:
        source: a file, a directory (searched recursively, in sorted order) or a glob of `.txt` and `.md` (one document
            a file), `.jsonl` and `.json` (one a record: a line, or an item of one array), each also with `.zst`, and
            `.parquet` (one a row); or else a dataset on the hub, `owner/name[:config][@split]`, split `train` if not
            given.
        text_field: the field that holds the text of a record; by default the first present of `text`, `content`,
            `completion`, `document`, `article` and `body`, or else the only field that is a string.

    Raises:
        FlextronError: at once if nothing lies at the source or nothing there can be read; while iterating if a file is
            malformed or not UTF-8, or a record has no text field.
    """
    files = _find_files(source)
    if files is not None:
        return _non_empty(text for path in files for text in _read_file(path, text_field))
    match = _HUB_ID.fullmatch(source)
    if match is None or source.endswith(_SUFFIXES):
        raise FlextronError(
            f"nothing lies at {source!r}; give an existing file, directory or glob, or a dataset as"
            " owner/name[:config][@split]"
        )
    records = _hub_records(source, match["name"], match["config"], match["split"] or "train")
    return _non_empty(_texts(records, text_field))


def _non_empty(documents: Iterable[str]) -> Iterator[str]:
    return (document for document in documents if document.strip())


def _find_files(source: str) -> list[Path] | None:
    """The files that a source names, sorted; None if it names nothing on this machine."""
    path = Path(source).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file())
    elif glob.has_magic(source):
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    else:
        return None
    readable = [p for p in found if p.name.endswith(_SUFFIXES)]
    if not readable:
        raise FlextronError(f"{source!r} holds no file that can be read; supported are {', '.join(_SUFFIXES)}")
    return readable


def _read_file(path: Path, text_field: str | None) -> Iterator[str]:
    if path.name.endswith(".parquet"):
        yield from _parquet_texts(path, text_field)
        return
    with _opened(path) as binary:
        # "-sig" takes off the byte order mark that some editors write.
        stream = io.TextIOWrapper(binary, encoding="utf-8-sig")
        if path.name.removesuffix(".zst").endswith(_PLAIN):
            yield stream.read()
        elif binary.peek(_CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _texts(_array_records(stream, path), text_field)
        else:
            yield from _texts(_line_records(stream, path), text_field)


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """The file's bytes, decompressed, with what goes wrong while reading them told in the user's terms."""
    compression = "zstd" if path.name.endswith(".zst") else None
    try:
        with pa.input_stream(str(path), compression=compression) as raw:
            yield io.BufferedReader(raw, _CHUNK)
    except UnicodeDecodeError as error:
        raise FlextronError(f"{path} is not UTF-8 ({error.reason}); convert it, for example with iconv") from error
    except OSError as error:
        raise FlextronError(
            f"{path} cannot be read ({error}); check that it is whole and that you may read it"
        ) from error


def _line_records(stream: io.TextIOWrapper, path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _malformed(path, number, error) from error
            yield f"{path}, line {number}", record


def _array_records(stream: io.TextIOWrapper, path: Path) -> Iterator[tuple[str, object]]:
    """The items of one JSON array, with no more of it in memory than a chunk or the longest item."""
    decoder = json.JSONDecoder()
    text, position, line, ended = "", 0, 1, False
    while True:
        between = _BETWEEN_ITEMS.match(text, position)
        start = between.end() if between else position
        if text.startswith("]", start):
            return
        try:
            record, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            # Malformed and cut off look the same until the file has ended.
            if ended or not isinstance(error, json.JSONDecodeError):
                more_lines = error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0
                raise _malformed(path, line + more_lines, error) from error
            more = stream.read(max(_CHUNK, len(text) - position))
            line += text.count("\n", 0, position)
            text, position, ended = text[position:] + more, 0, not more
            continue
        yield f"{path}, line {line + text.count(chr(10), 0, start)}", record
        position = end


def _malformed(path: Path, line: int, error: ValueError | RecursionError) -> FlextronError:
    if isinstance(error, json.JSONDecodeError):
        reason = error.msg
    else:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
    return FlextronError(
        f"{path}, line {line}: malformed JSON ({reason}); mend it: one object a line, or one array of objects"
    )


def _parquet_texts(path: Path, text_field: str | None) -> Iterator[str]:
    try:
        with pq.ParquetFile(path) as file:
            # A row stands in for the schema, so that only the column wanted is read.
            row = {f.name: "" if _is_string(f.type) else None for f in file.schema_arrow}
            field = text_field or _find_field(row, str(path))
            _text_of(row, field, str(path))
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                yield from _texts(((str(path), record) for record in batch.to_pylist()), field)
    except UnicodeDecodeError as error:
        raise FlextronError(f"{path} holds text that is not UTF-8 ({error.reason}); write it anew") from error
    except (pa.ArrowException, OSError) as error:
        raise FlextronError(f"{path} cannot be read as Parquet ({error}); check that it is whole") from error


def _is_string(kind: pa.DataType) -> bool:
    return str(kind) in ("string", "large_string", "string_view")


def _hub_records(source: str, name: str, config: str | None, split: str) -> Iterator[tuple[str, object]]:
    import datasets  # here, since it takes seconds and files do not need it

    try:
        dataset = datasets.load_dataset(name, config, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise FlextronError(
            f"no file lies at {source!r}, and the dataset of that name cannot be opened ({reason}); check the path, or"
            " owner/name[:config][@split]"
        ) from error
    return _streamed(source, dataset)


def _streamed(source: str, dataset: Iterable[object]) -> Iterator[tuple[str, object]]:
    records, number = iter(dataset), 0
    while True:
        number += 1
        try:
            record = next(records)
        except StopIteration:
            return
        except (OSError, ValueError, RuntimeError, pa.ArrowException) as error:
            reason = str(error).partition("\n")[0]
            raise FlextronError(
                f"{source}, record {number}: it cannot be read ({reason}); try again, or use files"
            ) from error
        yield f"{source}, record {number}", record


def _texts(records: Iterable[tuple[str, object]], text_field: str | None) -> Iterator[str]:
    """The text of each (place, record)."""
    field = text_field
    for where, record in records:
        if not isinstance(record, Mapping):
            raise FlextronError(f"{where}: a record must be an object with a text field, not {type(record).__name__}")
        field = field or _find_field(record, where)
        yield _text_of(record, field, where)


def _find_field(record: Mapping[str, object], where: str) -> str:
    strings = [name for name, value in record.items() if isinstance(value, str)]
    known = [name for name in _TEXT_FIELDS if name in record]
    if known or len(strings) == 1:
        return (known or strings)[0]
    raise FlextronError(f"{where}: which of the fields {shown(list(record))} holds the text? Name it with text_field")


def _text_of(record: Mapping[str, object], field: str, where: str) -> str:
    """The field's text; a null counts as empty."""
    if field not in record:
        raise FlextronError(f"{where}: no field {field!r} among {shown(list(record))}; name another with text_field")
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise FlextronError(
            f"{where}: field {field!r} is a {type(text).__name__}, not text; name another of {shown(list(record))}"
            " with text_field"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise FlextronError(
            f"{where}: field {field!r} is not valid Unicode ({error.reason}); mend the record"
        ) from error
    return text
