"""The first rows of each label, and limits that labels share."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from data_samples import WriteRows

from accrete.pipeline.data.config import ColumnsConfig, DataConfig, TaskConfig
from accrete.pipeline.data.examples import Example, Problem
from accrete.pipeline.data.sources import open_source, read_examples
from accrete.pipeline.errors import DataError


def test_rows_per_label(tmp_path: Path) -> None:
    """A file sorted by label, as large sets are; reading ends where every label is full."""
    rows = [{"input": f"t{i}", "output": "abc"[i // 10]} for i in range(30)]
    lines = [*map(json.dumps, rows), "{broken"]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    task = TaskConfig(
        name="t",
        files={"train": "train.jsonl", "test": "train.jsonl"},
        columns=ColumnsConfig(),
        labels=["a", "b", "c"],
        per_label={"train": 2},
    )
    data = DataConfig(root=str(tmp_path))
    found = [row.input for row in read_examples(task, data, "train")]
    assert found == ["t0", "t1", "t10", "t11", "t20", "t21"]
    with pytest.raises(DataError, match="bad JSON"):
        list(read_examples(task, data, "test"))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("sizes", "limit", "wanted"),
    [
        ({"a": 20, "b": 20}, 10, {"a": 5, "b": 5}),
        ({"a": 20, "b": 20, "c": 20}, 10, {"a": 4, "b": 3, "c": 3}),
        ({"a": 20, "b": 2, "c": 20}, 12, {"a": 5, "b": 2, "c": 5}),  # b has no more
        ({"a": 20, "b": 20}, 1, {"a": 1}),
        ({"a": 20, "b": 4}, 12, {"a": 8, "b": 4}),  # no limit binds: 8 by per_label
        ({"a": 20, "b": 20}, 100, {"a": 8, "b": 8}),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_limit_is_shared_by_the_labels(
    tmp_path: Path,
    write_rows: WriteRows,
    sizes: dict[str, int],
    limit: int,
    wanted: dict[str, int],
    known: bool,
    mixed: bool,
) -> None:
    rows = [
        {"id": f"{label}{i}", "input": "x", "output": label}
        for label, size in sizes.items()
        for i in range(size)
    ]
    if mixed:
        random.Random(0).shuffle(rows)
    write_rows(tmp_path / "train.jsonl", rows)
    task = TaskConfig(
        name="t",
        files={"train": "train.jsonl", "test": "train.jsonl"},
        columns=ColumnsConfig(id="id"),
        labels=list(sizes) if known else None,
        per_label={"train": 8},
    )
    source = open_source(task, DataConfig(root=str(tmp_path)))
    found = [row for row in source.scan("train", limit) if isinstance(row, Example)]
    counts = Counter(row.references[0] for row in found)
    assert sorted(counts.values()) == sorted(wanted.values())
    assert mixed or counts == wanted
    # The first rows of each label, in the order of the file.
    first = {x: [r["id"] for r in rows if r["output"] == x][: counts[x]] for x in sizes}
    assert [row.id for row in found] == [r["id"] for r in rows if r["id"] in first[r["output"]]]
    # Without per_label it is the first rows, whatever their labels.
    plain = [row.id for row in source.scan("test", limit) if isinstance(row, Example)]
    assert plain == [r["id"] for r in rows[:limit]]


def test_a_shared_limit_reads_no_further_than_it_must(tmp_path: Path) -> None:
    rows = [{"input": f"t{i}", "output": "ab"[i // 10 % 2]} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join([*map(json.dumps, rows), "{broken"]))
    task = TaskConfig(
        name="t", files={"train": "train.jsonl"}, labels=["a", "b"], per_label={"train": 100}
    )
    source = open_source(task, DataConfig(root=str(tmp_path)))
    found = list(source.scan("train", 6))
    assert [row.input for row in found if isinstance(row, Example)] == [
        *("t0", "t1", "t2", "t10", "t11", "t12"),
    ]
    assert any(isinstance(row, Problem) for row in source.scan("train", 60))


@pytest.mark.parametrize("limit", [None, 6])
def test_rows_without_gold_are_no_label(tmp_path: Path, limit: int | None) -> None:
    """O-LoRA's MNLI marks them by `-`: counted as a label they would end the reading too early."""
    folder = tmp_path / "NLI" / "MNLI"
    folder.mkdir(parents=True)
    labels = ["neutral", "entailment", "contradiction"]
    rows = [{"sentence": "x", "label": label} for label in ("-", *labels) for _ in range(4)]
    for split in ("train", "test"):
        (folder / f"{split}.json").write_text(json.dumps(rows))
    (folder / "labels.json").write_text(json.dumps(labels))
    task = TaskConfig(name="mnli", per_label={"test": 2})
    source = open_source(task, DataConfig(root=str(tmp_path)))
    found = [row for row in source.scan("test", limit) if isinstance(row, Example)]
    assert [row.references[0] for row in found] == [label for label in labels for _ in range(2)]
