"""Bad input is named with file and line; good input comes through every format."""

from __future__ import annotations

import gzip
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_samples import WriteRows, rows_of

from accrete.pipeline.data.config import ColumnsConfig, DataConfig, TaskConfig
from accrete.pipeline.data.examples import Columns, Problem, RowParser
from accrete.pipeline.data.files import Record, iter_records, read_fields
from accrete.pipeline.data.sources import describe_task, open_source, read_examples
from accrete.pipeline.errors import DataError

ROWS = rows_of(10)


def task_of(*files: str, **fields: Any) -> TaskConfig:
    return TaskConfig(name="t", files={"train": list(files)}, **fields)


def problems(root: Path, *files: str, **fields: Any) -> list[str]:
    source = open_source(task_of(*files, **fields), DataConfig(root=str(root)))
    return [str(item) for item in source.scan("train") if isinstance(item, Problem)]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet", "a [1]/b*.jsonl"]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, write_rows: WriteRows, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".json"):
        path.write_text(json.dumps(ROWS, indent=2))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        write_rows(path, ROWS)
    task = task_of(name, columns=ColumnsConfig(id="id"))
    found = list(read_examples(task, DataConfig(root=str(tmp_path)), "train"))
    assert [(e.id, e.input, e.references) for e in found] == [
        (r["id"], r["input"], (r["output"],)) for r in ROWS
    ]


def test_json_array_rows_carry_the_line_they_begin_on(tmp_path: Path) -> None:
    text = json.dumps(ROWS, indent=2)
    (tmp_path / "a.json").write_text(text)
    lines = text.split("\n")
    begins = [i for i, line in enumerate(lines, 1) if line == "  {"]
    records = list(iter_records(tmp_path / "a.json"))
    assert [r.where for r in records] == [f"{tmp_path / 'a.json'}:{i}" for i in begins]


def test_json_lines_under_the_name_json(tmp_path: Path, write_rows: WriteRows) -> None:
    path = write_rows(tmp_path / "a.json", ROWS)
    assert [r.value for r in iter_records(path) if isinstance(r, Record)] == ROWS


def test_line_separator_characters_and_crlf_do_not_split_rows(tmp_path: Path) -> None:
    rows = [{"input": "a\u2028b\u0085c", "output": "x"}, {"input": "d", "output": "y"}]
    text = "\ufeff" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    assert [r.value for r in iter_records(tmp_path / "a.jsonl") if isinstance(r, Record)] == rows


def test_globs_and_lists_read_in_sorted_order(tmp_path: Path, write_rows: WriteRows) -> None:
    write_rows(tmp_path / "b-2.jsonl", ROWS[4:])
    write_rows(tmp_path / "b-1.jsonl", ROWS[:4])
    found = list(read_examples(task_of("b-*.jsonl"), DataConfig(root=str(tmp_path)), "train"))
    assert [e.input for e in found] == [r["input"] for r in ROWS]
    assert found[0].id == "t-train-0"


def test_cut_line_is_named_and_the_others_are_read(tmp_path: Path, write_rows: WriteRows) -> None:
    lines = [json.dumps(r) for r in ROWS]
    lines[5] = lines[5][:20]
    write_rows(tmp_path / "a.jsonl", lines)
    (said,) = problems(tmp_path, "a.jsonl")
    assert said.startswith(f"{tmp_path}/a.jsonl:6: bad JSON")


def test_blank_lines_are_skipped_without_shifting_line_numbers(
    tmp_path: Path, write_rows: WriteRows
) -> None:
    lines = [json.dumps(r) for r in ROWS]
    write_rows(tmp_path / "a.jsonl", [lines[0], "", "   ", lines[1], "{}"])
    data = DataConfig(root=str(tmp_path))
    source = open_source(task_of("a.jsonl"), data)
    items = list(source.scan("train"))
    assert len(items) == 3
    assert str(items[2]).startswith(f"{tmp_path}/a.jsonl:5: field 'input' is missing")


BAD_ROWS: dict[str, tuple[list[Any], dict[str, Any], int, str]] = {
    "key absent": ([{"input": "x"}], {}, 1, "field 'output' is missing; the row has 'input'"),
    "key misspelt": ([{"Input": "x", "output": "y"}], {}, 1, "did you mean 'Input'?"),
    "null": ([ROWS[0], {"input": None, "output": "y"}], {}, 2, "field 'input' is null"),
    "input not text": ([{"input": 3, "output": "y"}], {}, 1, "must be text, this is a number"),
    "input blank": ([{"input": " \n", "output": "y"}], {}, 1, "field 'input' is blank"),
    "row not an object": ([["x", "y"]], {}, 1, "a row must be a JSON object, this is a list"),
    "output number": ([{"input": "x", "output": 1}], {}, 1, "set label_names"),
    "output object": ([{"input": "x", "output": {}}], {}, 1, "this is an object"),
    "output empty list": ([{"input": "x", "output": []}], {}, 1, "an empty list"),
    "output list of numbers": ([{"input": "x", "output": [1.5]}], {}, 1, "this is a number (1.5)"),
    "output str then list": (
        [ROWS[0], {"input": "x", "output": ["y"]}],
        {},
        2,
        "field 'output' is a list (['y']) but text in the rows before",
    ),
    "id int then str": (
        [{"id": 1, "input": "x", "output": "y"}, {"id": "b", "input": "x", "output": "y"}],
        {"columns": ColumnsConfig(id="id")},
        2,
        "field 'id' is text ('b') but a number in the rows before",
    ),
    "id absent": (
        [{"input": "x", "output": "y"}],
        {"columns": ColumnsConfig(id="key")},
        1,
        "'key'",
    ),
    "id of a wrong type": (
        [{"id": [1], "input": "x", "output": "y"}],
        {"columns": ColumnsConfig(id="id")},
        1,
        "must be text or a whole number",
    ),
    "label number too high": (
        [{"input": "x", "output": 2}],
        {"label_names": ["no", "yes"]},
        1,
        "label number 2, but label_names has 2 names (0 to 1)",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row(tmp_path: Path, write_rows: WriteRows, case: str) -> None:
    rows, fields, line, words = BAD_ROWS[case]
    write_rows(tmp_path / "a.jsonl", rows)
    (said,) = problems(tmp_path, "a.jsonl", **fields)
    assert said.startswith(f"{tmp_path}/a.jsonl:{line}: ")
    assert words in said


def test_read_examples_raises_at_the_first_bad_row(tmp_path: Path, write_rows: WriteRows) -> None:
    write_rows(tmp_path / "a.jsonl", [ROWS[0], {"input": None, "output": "y"}])
    rows = read_examples(task_of("a.jsonl"), DataConfig(root=str(tmp_path)), "train")
    assert next(rows).input == ROWS[0]["input"]
    with pytest.raises(DataError, match=r"Task 't': .*a\.jsonl:2: field 'input' is null"):
        next(rows)


@pytest.mark.parametrize("row", [{"text": "x", "output": "y"}, {"input": ["x"], "output": "y"}])
def test_second_file_with_other_columns_or_types(
    tmp_path: Path, write_rows: WriteRows, row: dict[str, Any]
) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS[:3])
    write_rows(tmp_path / "b.jsonl", [row])
    (said,) = problems(tmp_path, "a.jsonl", "b.jsonl")
    assert said.startswith(f"{tmp_path}/b.jsonl:1: field 'input'")


def test_a_key_that_appears_later_is_no_error(tmp_path: Path, write_rows: WriteRows) -> None:
    big = [{"input": "x" * 4000, "output": "y"} for _ in range(2700)]  # more than one 10 MB block
    write_rows(tmp_path / "a.jsonl", [*big, {"input": "x", "output": "y", "extra": 1}])
    assert problems(tmp_path, "a.jsonl") == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_empty_file(tmp_path: Path, write_rows: WriteRows, name: str) -> None:
    write_rows(tmp_path / name, [])
    assert problems(tmp_path, name) == [f"{tmp_path}/{name}: the file is empty: it has no rows"]


def test_empty_array(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    assert problems(tmp_path, "a.json") == [f"{tmp_path}/a.json: the file is empty: it has no rows"]


def test_missing_file_names_its_neighbours(tmp_path: Path, write_rows: WriteRows) -> None:
    write_rows(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no file .*trian\.jsonl\. Did you mean 'train\.jsonl'\?"):
        problems(tmp_path, "trian.jsonl")
    with pytest.raises(DataError, match="Its folder is missing"):
        problems(tmp_path, "gone/train.jsonl")


def test_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0]).encode()
    (tmp_path / "a.jsonl").write_bytes(good + b'\n{"input": "\xff", "output": "y"}\n')
    assert problems(tmp_path, "a.jsonl")[-1].startswith(f"{tmp_path}/a.jsonl:2: not UTF-8")


def test_damaged_compression_names_the_file(tmp_path: Path, write_rows: WriteRows) -> None:
    packed = gzip.compress("".join(json.dumps(r) + "\n" for r in ROWS).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip at all")
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        assert any(
            f"{tmp_path}/{name}: cannot be read" in said for said in problems(tmp_path, name)
        )


def test_zstd_files_are_read_to_their_end_or_refused(tmp_path: Path) -> None:
    """Cut off where a block ends, between two rows: nothing but the missing end of it shows."""
    lines = [json.dumps(r).encode() + b"\n" for r in ROWS]
    packer = zstandard.ZstdCompressor().compressobj()
    blocks = [packer.compress(x) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for x in lines]
    frame = b"".join(blocks) + packer.flush()
    skipped = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    (tmp_path / "whole.jsonl.zst").write_bytes(frame + skipped + frame)
    (tmp_path / "cut.jsonl.zst").write_bytes(b"".join(blocks[:6]))
    assert len([*iter_records(tmp_path / "whole.jsonl.zst")]) == 2 * len(ROWS)
    (said,) = problems(tmp_path, "cut.jsonl.zst")
    assert said.startswith(f"{tmp_path}/cut.jsonl.zst: cannot be read: OSError: Truncated")


@pytest.mark.parametrize("folder", ["a::b", "http:", "a [1]", "é#1%20"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_odd_folders(tmp_path: Path, write_rows: WriteRows, folder: str, name: str) -> None:
    path = write_rows(tmp_path / folder / name, ROWS)
    assert [r.value for r in iter_records(path) if isinstance(r, Record)] == ROWS


def test_parquet_without_rows(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), tmp_path / "a.parquet")
    assert problems(tmp_path, "a.parquet") == [
        f"{tmp_path}/a.parquet: the file is empty: it has no rows"
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [(date(2020, 1, 2), "a date"), (b"yes", "a bytes"), (["a", 1.5], "a number")],
)
def test_a_type_that_json_does_not_have_is_named(value: Any, words: str) -> None:
    parser = RowParser("t", "train", Columns())
    problem = parser.parse({"input": "x", "output": value}, "a.parquet:row 1", 0)
    assert isinstance(problem, Problem)
    assert f"this is {words}" in problem.what


def test_cut_array_keeps_the_rows_before_the_cut(tmp_path: Path) -> None:
    text = json.dumps(ROWS[:3], indent=1)
    (tmp_path / "a.json").write_text(text[: text.rindex('"output"')])
    items = list(iter_records(tmp_path / "a.json"))
    assert [type(i) for i in items] == [Record, Record, Problem]
    assert "a.json:" in str(items[2])
    assert "bad JSON" in str(items[2])


def test_unknown_ending(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (said,) = problems(tmp_path, "a.csv")
    assert "allowed: .jsonl, .ndjson, .json, .parquet" in said


def test_labels_by_number_and_joined_columns(tmp_path: Path, write_rows: WriteRows) -> None:
    write_rows(tmp_path / "a.jsonl", [{"q": "why?", "n": 3, "label": 1}])
    task = task_of(
        "a.jsonl",
        columns=ColumnsConfig(input=["q", "n"], output="label"),
        label_names=["no", "yes"],
    )
    data = DataConfig(root=str(tmp_path))
    (example,) = read_examples(task, data, "train")
    assert (example.input, example.references) == ("q: why?\nn: 3", ("yes",))
    assert describe_task(task, data).labels == ("no", "yes")


def test_read_fields_stops_at_the_keys(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": {"b": [1, "}"]}, "Definition": ["d"], broken')
    assert read_fields(tmp_path / "a.json", "Definition") == [["d"]]
    (tmp_path / "b.json").write_text('{"Definition": ["d"], "Instances": []}')
    assert read_fields(tmp_path / "b.json", "Instances", "Definition", "x") == [[], ["d"], None]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"Definition": [1,\n}', "a.json:2: bad JSON"),
        (b'{\n"Definition": "se\xf1al"}', "a.json:2: not UTF-8 text"),
    ],
)
def test_read_fields_names_the_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/{said}")):
        read_fields(tmp_path / "a.json", "Definition")
