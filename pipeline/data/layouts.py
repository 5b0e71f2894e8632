"""The folder layouts that users of this field already have on disk.

Every layout ends in the same thing, a `Located`: the files of each split and what the layout itself
says about the task.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accrete.pipeline.data.config import DataConfig, Format, TaskConfig
from accrete.pipeline.data.examples import Columns
from accrete.pipeline.data.files import read_fields
from accrete.pipeline.data.folders import (
    LAYOUTS,
    SPLIT_NAMES,
    Located,
    detect,
    instruction_files,
    is_superni,
    pick,
    pick_folder,
    read_json,
    splits_in,
    tasl_root,
)
from accrete.pipeline.data.names import canonical, listing
from accrete.pipeline.errors import DataError

HELD_OUT = 50
"""Natural Instructions does not divide a task. As in CITB, its first 50 instances are the test
rows, the next 50 the dev rows, and the rest is trained on."""

_SAPT_LABELS = {"qqp": ("no", "yes")}
"""Where SAPT's labels.json (True, False) is not what its rows say."""


def locate(task: TaskConfig, data: DataConfig) -> Located:
    """Find a task under `data.root`.

    Raises:
        DataError: No such folder, an unknown or ambiguous layout, or an unknown task.
    """
    if data.root is None:
        raise DataError(
            f"Task {task.name!r}: no rows given. Set data.root to a folder of tasks, or give the "
            "task `files:`, or set data.format to hub or generated."
        )
    root = Path(data.root).expanduser()
    if not root.is_dir():
        raise DataError(f"data.root: there is no folder {data.root}.")
    layout = detect(root) if data.format == "auto" else data.format
    return _FINDERS[layout](root, task, data)


def _labels(folder: Path) -> tuple[str, ...] | None:
    """The option list beside the splits, in its own order; None if there is none."""
    path = folder / "labels.json"
    if not path.is_file():
        return None
    labels = read_json(path)
    if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
        raise DataError(f"{path}: must hold a list of texts, the options of the task.")
    return tuple(labels) or None


def _manifest(path: Path) -> list[dict[str, Any]]:
    """The task entries of a compact collection."""
    manifest = read_json(path)
    entries = manifest.get("tasks") if isinstance(manifest, dict) else None
    needed = {"benchmark", "task", "family", "labels", "instruction", "metric", "splits"}
    for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
        missing = sorted(needed - set(entry)) if isinstance(entry, dict) else sorted(needed)
        if missing:
            raise DataError(
                f"{path}: not the manifest of a compact collection: tasks[{number}] lacks "
                f"{', '.join(missing)}. Set data.format if the folder is something else."
            )
    return entries or []


def _compact(root: Path, task: TaskConfig, data: DataConfig) -> Located:
    entries = _manifest(root / "MANIFEST.json")
    if data.benchmark is not None:
        known = [str(e["benchmark"]) for e in entries]
        entries = [
            e for e in entries if canonical(str(e["benchmark"])) == canonical(data.benchmark)
        ]
        if not entries:
            raise DataError(
                f"data.benchmark: there is no {data.benchmark!r} in {root}. "
                f"There: {listing(known)}."
            )
    name = pick(task, [str(e["task"]) for e in entries], root)
    hits = [e for e in entries if e["task"] == name]
    if len(hits) > 1:
        raise DataError(
            f"Task {task.name!r}: {name!r} is in several benchmarks of {root}: "
            f"{listing([str(e['benchmark']) for e in hits])}. Set data.benchmark to one of them."
        )
    entry = hits[0]
    folder = root / str(entry["benchmark"]) / name
    return Located(
        format="compact",
        dataset=name,
        splits={s: (folder / f"{s}.jsonl.gz",) for s in SPLIT_NAMES if s in entry["splits"]},
        columns=Columns(id_required=True),
        family=entry["family"],
        labels=tuple(entry["labels"]) if entry["labels"] else None,
        instruction=entry["instruction"],
        metric="rouge_l" if str(entry["metric"]).upper().startswith("ROUGE") else "exact_match",
    )


def _olora(root: Path, task: TaskConfig, data: DataConfig) -> Located:
    folder = pick_folder(root, task, data, "olora")
    return Located(
        format="olora",
        dataset=folder.name,
        splits=splits_in(folder, os.listdir(folder)),
        columns=Columns(input="sentence", output="label", id=None),
        family=folder.parent.name,
        labels=_labels(folder),
        metric="exact_match",
        no_gold="-",
    )


def _sapt(root: Path, task: TaskConfig, data: DataConfig) -> Located:
    folder = pick_folder(root, task, data, "sapt", "superni")
    splits = splits_in(folder, os.listdir(folder))
    labels = _labels(folder)
    if canonical(folder.name) in _SAPT_LABELS and labels is not None:
        labels = _SAPT_LABELS[canonical(folder.name)]
    instruction, examples = _schema(next(iter(splits.values()))[0])
    # Published SuperNI numbers are ROUGE-L where the answer is free text.
    free = is_superni(folder.name) and (labels or task.labels) is None
    return Located(
        format="superni" if is_superni(folder.name) else "sapt",
        dataset=folder.name,
        splits=splits,
        columns=Columns(mixed_outputs=True),
        field="Instances",
        family=folder.parent.name,
        labels=labels,
        instruction=instruction,
        metric="rouge_l" if free else "exact_match",
        no_gold="-",
        examples=examples,
    )


def _natural_instructions(root: Path, task: TaskConfig, data: DataConfig) -> Located:
    files = {path.stem: path for path in instruction_files(root)}
    if not files:
        raise DataError(
            f"data.root {root}: not in the layout natural_instructions.\n"
            f"Recognised layouts:\n{LAYOUTS}"
        )
    file = files[pick(task, list(files), root)]
    instruction, examples = _schema(file)
    return Located(
        format="natural_instructions",
        dataset=file.stem,
        splits=dict.fromkeys(SPLIT_NAMES, (file,)),
        ranges={
            "test": (0, HELD_OUT),
            "dev": (HELD_OUT, 2 * HELD_OUT),
            "train": (2 * HELD_OUT, None),
        },
        columns=Columns(mixed_outputs=True),
        field="Instances",
        instruction=instruction,
        metric="rouge_l",
        examples=examples,
    )


def _schema(file: Path) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    """Instruction and worked examples of a file in the schema of Natural Instructions."""
    definition, listed = read_fields(file, "Definition", "Positive Examples")
    if isinstance(definition, list):
        definition = definition[0] if definition else None
    shown = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
    return (
        definition.strip() if isinstance(definition, str) else None,
        tuple((str(e.get("input", "")), str(e.get("output", ""))) for e in shown),
    )


def _trace(root: Path, task: TaskConfig, data: DataConfig) -> Located:
    folder = pick_folder(root, task, data, "trace")
    return Located(
        format="trace",
        dataset=folder.name,
        splits=splits_in(folder, os.listdir(folder)),
        columns=Columns(input="prompt", output="answer", id=None),
        raw=True,
    )


def _tasl(root: Path, task: TaskConfig, data: DataConfig) -> Located:
    base = root / data.benchmark if data.benchmark is not None else root
    found = tasl_root(base) if base.is_dir() else None
    if found is None:
        raise DataError(f"{base}: not in the layout tasl.\nRecognised layouts:\n{LAYOUTS}")
    name = pick(task, [p.stem for p in sorted((found / "train").glob("*.json"))], found)
    splits: dict[str, tuple[Path, ...]] = {}
    for split, spellings in SPLIT_NAMES.items():
        files = [found / s / f"{name}.json" for s in spellings]
        if hits := [f for f in files if f.is_file()]:
            splits[split] = (hits[0],)
    return Located(
        format="tasl",
        dataset=name,
        splits=splits,
        # As in SAPT, whose SuperNI rows these are.
        metric="rouge_l" if is_superni(name) and task.labels is None else None,
        raw=True,
    )


_FINDERS: dict[Format, Callable[[Path, TaskConfig, DataConfig], Located]] = {
    "compact": _compact,
    "natural_instructions": _natural_instructions,
    "olora": _olora,
    "sapt": _sapt,
    "superni": _sapt,
    "tasl": _tasl,
    "trace": _trace,
}
