"""Records of one local file, streamed, each with its file and line.

JSON is read and decoded here. The reader of `datasets` infers one schema per 10 MB block, fails
hours into a stream when a later block differs, and cannot name the line; and through it a .zst file
that was cut off looks like a whole one (seen with datasets 5.2 and zstandard 0.25).
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from accrete.pipeline.data.examples import Problem
from accrete.pipeline.errors import DataError

PACKED = (".gz", ".zst")
LINES = (".jsonl", ".ndjson")
ARRAYS = (".json",)
TABLES = (".parquet", ".pq")

_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Record:
    """One decoded row and where it stands."""

    where: str
    value: object


def suffix(path: Path) -> str:
    """The ending that says what a file holds, without the ending of its compression."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in PACKED else path.suffix.lower()


def iter_records(path: Path, field: str | None = None) -> Iterator[Record | Problem]:
    """Stream the records of one file.

    Args:
        path: JSON lines (.jsonl, .ndjson) or JSON (.json), plain, .gz or .zst; or Parquet.
        field: For a JSON object: its key that holds the array of rows.

    Yields:
        Records, and a `Problem` for each line or file that cannot be read.
    """
    if not path.is_file():
        yield Problem(str(path), "there is no such file")
        return
    ending = suffix(path)
    if ending in TABLES:
        records = _table(path)
    elif ending in LINES:
        records = _lines(path)
    elif ending in ARRAYS:
        records = _document(path, field)
    else:
        allowed = ", ".join(LINES + ARRAYS + TABLES)
        yield Problem(str(path), f"unknown kind of file; allowed: {allowed}, with .gz or .zst")
        return
    empty = True
    try:
        for record in records:
            empty = False
            yield record
    except Exception as error:  # decompressors and parsers share no base class
        yield _unreadable(path, error)
        return
    if empty:
        yield Problem(str(path), "the file is empty: it has no rows")


def read_fields(path: Path, *fields: str) -> list[object]:
    """Some values of the JSON object in a file; None for a key that it does not have.

    Raises:
        DataError: The file cannot be read, or is not JSON up to such a key; names the line.
    """
    decode = json.JSONDecoder().raw_decode
    try:
        text = _text(path)
        places = [_find(text, field) for field in fields]
        return [None if place is None else decode(text, place)[0] for place in places]
    except Exception as error:  # decompressors and parsers share no base class
        raise DataError(str(_unreadable(path, error))) from None


def _open(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked."""
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix.lower() != ".zst":
        return path.open("rb")
    import pyarrow as pa

    # Unlike `zstandard`, it notices that the end of a frame is missing.
    return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression="zstd")))


def _lines(path: Path) -> Iterator[Record | Problem]:
    with _open(path) as packed, io.TextIOWrapper(packed, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield Record(f"{path}:{number}", json.loads(line))
            except json.JSONDecodeError as error:
                yield Problem(f"{path}:{number}", f"bad JSON: {error.msg} at column {error.colno}")


def _table(path: Path) -> Iterator[Record | Problem]:
    import datasets
    import pyarrow.parquet as pq

    if not pq.read_metadata(path).num_rows:
        return  # `datasets` says of such a file that "BatchSize must be greater than 0"
    # data_files are glob patterns: a bracket in a folder name must not be one.
    escaped = re.sub(r"([*?\[])", r"[\1]", str(path))
    # A stream caches nothing, yet leaves a lock file per data file in its cache folder.
    with tempfile.TemporaryDirectory(prefix="accrete-") as scratch:
        rows = datasets.load_dataset(
            "parquet", data_files=[escaped], split="train", streaming=True, cache_dir=scratch
        )
        for number, row in enumerate(rows, 1):
            yield Record(f"{path}:row {number}", row)


def _text(path: Path) -> str:
    with _open(path) as content:
        return content.read().decode("utf-8-sig")


def _document(path: Path, field: str | None) -> Iterator[Record | Problem]:
    text = _text(path)
    start = _skip(text, 0)
    if text[start : start + 1] == "{" and field is None:
        yield from _lines(path)  # JSON lines under the name .json, as some tools write
        return
    found = _find(text, field) if field is not None else start
    if found is None:
        yield Problem(f"{path}:1", f"the object has no key {field!r}")
    elif text[found : found + 1] != "[":
        if text.strip():
            yield Problem(f"{path}:{_line(text, found)}", "expected an array of rows, '['")
    else:
        yield from _array(path, text, found)


def _array(path: Path, text: str, start: int) -> Iterator[Record]:
    """Elements of the array at `start`, one at a time, with the line each begins on."""
    decode = json.JSONDecoder().raw_decode
    at, counted, line = _skip(text, start + 1), 0, 1
    while text[at : at + 1] != "]":
        line += text.count("\n", counted, at)
        counted = at
        value, at = decode(text, at)
        yield Record(f"{path}:{line}", value)
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)


def _find(text: str, field: str) -> int | None:
    """Position of the value of `field` in the object that `text` is."""
    decode = json.JSONDecoder().raw_decode
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        raise json.JSONDecodeError(f"Expecting an object with key {field!r}", text, at)
    at = _skip(text, at + 1)
    while text[at : at + 1] != "}":
        key, at = decode(text, at)
        at = _skip(text, at)
        if text[at : at + 1] != ":":
            raise json.JSONDecodeError("Expecting ':'", text, at)
        at = _skip(text, at + 1)
        if key == field:
            return at
        at = _skip(text, decode(text, at)[1])
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "}":
            raise json.JSONDecodeError("Expecting ',' or '}'", text, at)
    return None


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _unreadable(path: Path, error: Exception) -> Problem:
    """A reading error with its line, if there is one, and without its stack of causes."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, json.JSONDecodeError):
        return Problem(f"{path}:{cause.lineno}", f"bad JSON: {cause.msg} at column {cause.colno}")
    if isinstance(cause, UnicodeDecodeError):
        return Problem(f"{path}:{_undecodable(path)}", f"not UTF-8 text: {cause.reason}")
    return Problem(str(path), f"cannot be read: {type(cause).__name__}: {cause}".rstrip(": "))


def _undecodable(path: Path) -> int:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1
