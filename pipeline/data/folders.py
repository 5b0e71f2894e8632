"""Looking through a folder of tasks: which layout it is, and which folder a task means."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accrete.pipeline.data.config import DataConfig, Format, Metric, TaskConfig
from accrete.pipeline.data.examples import Columns
from accrete.pipeline.data.files import PACKED
from accrete.pipeline.data.names import canonical, listing, matching, nearest
from accrete.pipeline.errors import DataError

SPLIT_NAMES = {
    "train": ("train",),
    "dev": ("dev", "valid", "validation", "eval"),
    "test": ("test",),
}
"""How the layouts spell our splits."""

LAYOUTS = """\
  compact   MANIFEST.json; <benchmark>/<task>/{train,dev,test}.jsonl.gz
  olora     [CL_Benchmark/]<FAMILY>/<task>/{train,dev,test}.json with rows {label, sentence}; \
labels.json
  sapt      <group>/<task>/{train,dev,test}.json with {Definition, Instances: [...]}
  superni   as sapt, tasks named task<number>_...
  natural_instructions   [data/][tasks/]task<number>_*.json with {Definition, Instances: [...]}, \
all splits in one
  tasl      {train,dev,test}/<task>*.json with rows {id, input, output}
  trace     <task>/{train,eval,test}.json with rows {prompt, answer}"""


@dataclass(frozen=True, kw_only=True)
class Located:
    """A task found on disk."""

    format: Format
    dataset: str
    splits: dict[str, tuple[Path, ...]]
    columns: Columns = field(default_factory=Columns)
    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    """Split -> its first row and the one behind its last, where one file holds all splits."""
    field: str | None = None
    """Key of the rows in a JSON object."""
    family: str | None = None
    labels: tuple[str, ...] | None = None
    instruction: str | None = None
    metric: Metric | None = None
    raw: bool = False
    no_gold: str | None = None
    examples: tuple[tuple[str, str], ...] = ()
    """Worked examples (input, output) that the layout gives beside the rows."""


def detect(root: Path) -> Format:
    """The layout of a folder, by its files.

    Raises:
        DataError: None fits, or several do.
    """
    if (root / "MANIFEST.json").is_file():
        return "compact"
    if tasl_root(root) is not None:
        return "tasl"
    if instruction_files(root):
        return "natural_instructions"
    found = sorted({layout for layout, _ in task_folders(root)})
    if found == ["sapt", "superni"]:
        return "sapt"
    if len(found) == 1:
        return found[0]
    inside = listing([p.name + ("/" if p.is_dir() else "") for p in root.iterdir()], 12)
    said = f"its files fit several layouts ({', '.join(found)})" if found else "no layout fits"
    raise DataError(
        f"data.root {root}: {said}. Found in it: {inside}.\nRecognised layouts:\n{LAYOUTS}\n"
        "Set data.format, or list the files of each task under `files:`."
    )


def task_folders(root: Path) -> Iterator[tuple[Format, Path]]:
    """Folders at most three levels down that hold splits, with their layout."""
    for folder, names, files in os.walk(root):
        path = Path(folder)
        names.sort()
        if len(path.relative_to(root).parts) == 3:
            names.clear()
        names[:] = [n for n in names if not n.startswith(".")]
        splits = splits_in(path, files)
        layout = _sniff(path, next(iter(splits.values()))[0]) if splits else None
        if layout is not None:
            yield layout, path


def splits_in(folder: Path, names: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Our split -> its file, for the JSON files of one folder."""
    found: dict[str, tuple[Path, ...]] = {}
    for split, spellings in SPLIT_NAMES.items():
        for spelling in spellings:
            pattern = rf"{spelling}\.jsonl?({'|'.join(map(re.escape, PACKED))})?"
            hits = sorted(n for n in names if re.fullmatch(pattern, n, re.IGNORECASE))
            if hits and split not in found:
                found[split] = (folder / hits[0],)
    return found


def _sniff(folder: Path, file: Path) -> Format | None:
    """The layout that the first keys of a file betray."""
    if file.suffix != ".json":
        return None
    with file.open(encoding="utf-8-sig", errors="replace") as text:
        head = text.read(65536).lstrip()
    keys = set(re.findall(r'"([^"\\]{1,40})"\s*:', head))
    if head.startswith("{") and keys & {"Definition", "Instances"}:
        return "superni" if is_superni(folder.name) else "sapt"
    if head.startswith("[") and {"sentence", "label"} <= keys:
        return "olora"
    if head.startswith("[") and {"prompt", "answer"} <= keys:
        return "trace"
    return None


def is_superni(name: str) -> bool:
    """Whether a folder is named as a SuperNI task."""
    return re.match(r"task\d+(_|$)", name) is not None


def pick(task: TaskConfig, names: Sequence[str], root: Path) -> str:
    """The one of `names` that the task means.

    Raises:
        DataError: None or several fit.
    """
    wanted = task.dataset or task.name
    hits = sorted(set(matching(wanted, names)))
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise DataError(
            f"Task {task.name!r}: {wanted!r} may mean {', '.join(hits)} in {root}. "
            "Set the task's `dataset` to one of them."
        )
    hint = nearest(wanted, names)
    raise DataError(
        f"Task {task.name!r}: there is no task {wanted!r} in {root}."
        + (f" Did you mean {hint!r}?" if hint else "")
        + f" There: {listing(names)}."
    )


def pick_folder(root: Path, task: TaskConfig, data: DataConfig, *layouts: Format) -> Path:
    """The task's folder among those of the given layouts."""
    folders = [path for layout, path in task_folders(root) if layout in layouts]
    if data.benchmark is not None:
        wanted = canonical(data.benchmark)
        kept = [p for p in folders if wanted in map(canonical, p.relative_to(root).parts[:-1])]
        # O-LoRA's folder is one collection, and so is a part of SAPT's that is given alone.
        if not kept and (wanted == canonical(root.name) or _one_collection(wanted, layouts)):
            kept = folders
        if not kept:
            groups = [part for p in folders for part in p.relative_to(root).parts[:-1]]
            raise DataError(
                f"data.benchmark: there is no {data.benchmark!r} in {root}. "
                f"There: {listing(groups)}."
            )
        folders = kept
    if not folders:
        raise DataError(
            f"data.root {root} holds no task in the layout {' or '.join(layouts)}.\n"
            f"Recognised layouts:\n{LAYOUTS}"
        )
    name = pick(task, [p.name for p in folders], root)
    hits = [p for p in folders if p.name == name]
    if len(hits) > 1 and task.family is not None:
        hits = [p for p in hits if canonical(p.parent.name) == canonical(task.family)] or hits
    if len(hits) > 1:
        raise DataError(
            f"Task {task.name!r}: {name!r} stands in several folders: "
            f"{', '.join(str(p.relative_to(root)) for p in hits)}. Set data.benchmark to the one."
        )
    return hits[0]


def _one_collection(wanted: str, layouts: Sequence[Format]) -> bool:
    return "olora" in layouts and wanted in ("standard", "long")


def instruction_files(root: Path) -> list[Path]:
    """The task files of Natural Instructions: all rows of a task in one file, no splits."""
    for folder in (root, root / "tasks", root / "data" / "tasks"):
        files = sorted(p for p in folder.glob("task*.json") if is_superni(p.stem))
        if files:
            with files[0].open(encoding="utf-8-sig", errors="replace") as text:
                head = text.read(65536)
            return files if '"Definition"' in head else []
    return []


def tasl_root(root: Path) -> Path | None:
    """The folder that holds train/ and test/ full of JSON files of {id, input, output}."""
    for folder in (root, *sorted(p for p in root.iterdir() if p.is_dir())):
        files = sorted((folder / "train").glob("*.json"))
        if files and (folder / "test").is_dir():
            with files[0].open(encoding="utf-8-sig", errors="replace") as text:
                head = text.read(65536)
            if all(f'"{key}"' in head for key in ("input", "output")):
                return folder
    return None


def read_json(path: Path) -> object:
    """A small JSON file.

    Raises:
        DataError: It is not JSON; names the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
