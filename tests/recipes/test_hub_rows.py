"""The hub entries of recipes/sources/hub.yaml read rows that have the columns they name.

The hub itself is not asked: local folders in its layout stand in for the data sets.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.data.config import DataConfig, TaskConfig
from accrete.pipeline.data.prompts import frame_for
from accrete.pipeline.data.sources import describe_task, read_examples

RECIPE = load_recipe("long_sequence/order4", ["data.format=hub", "tasks.amazon.dataset=a/b"])
TASKS = [task for task in RECIPE.config.tasks if task.name != "amazon"]


def write_split(path: Path, task: TaskConfig, rows_per_label: int) -> None:
    """Rows sorted by label, as some of the real sets are."""
    inputs = task.columns.input
    columns = [inputs] if isinstance(inputs, str) else inputs
    labels = range(len(task.label_names or ()))
    rows = [
        {**{c: f"{c} {i}" for c in columns}, task.columns.output: label}
        for label in labels
        for i in range(rows_per_label)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_rows_are_read(task: TaskConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    theirs = task.splits or {"train": "train", "test": "test"}
    for split in theirs.values():
        # datasets knows `validation_matched` from its metadata, which a bare folder lacks.
        write_split(folder / f"{split.removesuffix('_matched')}.jsonl", task, 5)
    splits = {ours: split.removesuffix("_matched") for ours, split in theirs.items()}
    local = replace(
        task,
        dataset=str(folder),
        config=None,
        revision=None,
        splits=splits,
        per_label=dict.fromkeys(task.per_label, 2),
    )
    data = RECIPE.config.data
    names = task.label_names or []
    for split in ("train", "test"):
        rows = list(read_examples(local, data, split))
        each = 2 if split in task.per_label else 5
        assert [row.references for row in rows] == [(n,) for n in names for _ in range(each)]
    info = describe_task(local, data)
    assert set(info.labels or ()) == set(names)
    prompt = str(frame_for("olora", info).render(rows[0].input))
    assert prompt.startswith(f"Task:{task.family}\n")
    assert f"Option: {', '.join(info.labels or ())} \n" in prompt
    sapt = DataConfig(format="hub", template="sapt")
    assert describe_task(local, sapt).instruction is not None


def test_amazon_from_files_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command in docs/recipes.md and sources/hub.yaml, from the recipe to the prompt."""
    monkeypatch.chdir(tmp_path)
    labels = ("very negative", "negative", "neutral", "positive", "very positive")
    rows = [{"title": "t", "text": "x", "label": label} for label in labels for _ in range(4)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [
        "data.format=hub",
        "tasks.amazon.files={train: a.jsonl, test: a.jsonl}",
        "tasks.amazon.columns={input: [title, text], output: label}",
    ]
    config = load_recipe("standard_cl/order1", changes).config
    amazon = next(task for task in config.tasks if task.name == "amazon")
    monkeypatch.chdir("/")  # a run may be resumed from elsewhere
    info = describe_task(amazon, config.data)
    assert (info.family, info.labels) == ("SC", labels)
    found = list(read_examples(amazon, config.data, "train"))
    assert [row.references[0] for row in found] == [row["label"] for row in rows]
    prompt = str(frame_for(config.data.template, info).render(found[0].input))
    assert prompt.startswith("Task:SC\nDataset:amazon\n")
    assert prompt.endswith(f"\nOption: {', '.join(labels)} \ntitle: t\ntext: x\nAnswer:")
