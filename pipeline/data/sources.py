"""The rows of a task, streamed from wherever the recipe says.

`read_examples` and `describe_task` are the whole interface; `open_source` is what preparation uses
to see every problem instead of the first.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from accrete.pipeline.data.config import DataConfig, TaskConfig
from accrete.pipeline.data.examples import Columns, Example, Problem, RowParser, TaskInfo
from accrete.pipeline.data.files import Record, iter_records
from accrete.pipeline.data.folders import SPLIT_NAMES, Located, read_json
from accrete.pipeline.data.hub import HubRows
from accrete.pipeline.data.layouts import locate
from accrete.pipeline.data.names import canonical, listing, nearest
from accrete.pipeline.data.prompts import FAMILY_INSTRUCTIONS, TASK_DEFINITIONS
from accrete.pipeline.errors import DataError


class Rows(Protocol):
    """Where the records of one task come from."""

    columns: Columns

    def splits(self) -> tuple[str, ...]:
        """Splits that exist."""
        ...

    def records(self, split: str) -> Iterator[Record | Problem]:
        """Stream one split."""
        ...

    def identity(self, split: str, sha256: Any) -> list[str]:
        """What changes whenever the split's rows change; `sha256(path)` hashes a file."""
        ...


class FileRows:
    """Rows of local files."""

    def __init__(self, located: Located) -> None:
        self.located = located
        self.columns = located.columns

    def splits(self) -> tuple[str, ...]:
        """Splits that exist."""
        return tuple(self.located.splits)

    def records(self, split: str) -> Iterator[Record | Problem]:
        """Stream one split, file after file."""
        first, end = self.located.ranges.get(split, (0, None))
        files = (iter_records(p, self.located.field) for p in self.located.splits[split])
        yield from itertools.islice(itertools.chain.from_iterable(files), first, end)

    def identity(self, split: str, sha256: Any) -> list[str]:
        """The hash of every file. A missing file is found later, when it is read."""
        files = self.located.splits[split]
        found = [f"{p.suffix} {sha256(p) if p.is_file() else 'missing'}" for p in files]
        part = self.located.ranges.get(split)
        return found if part is None else [*found, f"rows {part[0]} to {part[1]}"]


class GeneratedRows:
    """Rows that accrete makes itself."""

    columns = Columns(id_required=True)

    def __init__(self, name: str, seed: int) -> None:
        self._name = name
        self._seed = seed

    def splits(self) -> tuple[str, ...]:
        """All splits: they are made on demand."""
        return tuple(SPLIT_NAMES)

    def records(self, split: str) -> Iterator[Record | Problem]:
        """Make one split."""
        from accrete.pipeline.data import generated

        rows = generated.generate(self._name, split, self._seed)
        for number, row in enumerate(rows, 1):
            yield Record(f"generated:{self._name}/{split}:{number}", row)

    def identity(self, split: str, sha256: Any) -> list[str]:
        """The generator's code and seed."""
        from accrete.pipeline.data import generated

        code = hashlib.sha256(Path(generated.__file__).read_bytes()).hexdigest()
        return [self._name, split, str(self._seed), code]


class Source:
    """One task: its description and its rows."""

    def __init__(self, task: TaskConfig, info: TaskInfo, rows: Rows) -> None:
        self.task = task
        self.info = info
        self.rows = rows

    def split(self, name: str) -> str:
        """The existing split that `name` means.

        Raises:
            DataError: There is none.
        """
        for spelling in (name, *SPLIT_NAMES.get(name, ())):
            if spelling in self.info.splits:
                return spelling
        raise DataError(
            f"Task {self.task.name!r} has no split {name!r}. There: {listing(self.info.splits)}."
        )

    def scan(self, split: str, limit: int | None = None) -> Iterator[Example | Problem]:
        """The rows of a split, good or bad, in the order of the files.

        Args:
            split: `train`, `dev` or `test`.
            limit: At most so many rows: the first ones, or, where the task has `per_label` for
                this split, an equal share of each label. None: every row.
        """
        parser = RowParser(self.task.name, split, self.rows.columns, self.task.label_names)
        numbers = itertools.count()
        rows = (
            record
            if isinstance(record, Problem)
            else parser.parse(record.value, record.where, next(numbers))
            for record in self.rows.records(self.split(split))
        )
        most = self.task.per_label.get(split)
        if most is None:
            return itertools.islice(rows, limit)
        # A mark for "no label" is none: it takes no share, and fills no label before reading ends.
        gold = (r for r in rows if isinstance(r, Problem) or r.references[0] != self.info.no_gold)
        first = _per_label(gold, most, self.info.labels)
        return first if limit is None else _balanced(first, limit, self.info.labels)


def _per_label(
    rows: Iterator[Example | Problem], most: int, labels: tuple[str, ...] | None
) -> Iterator[Example | Problem]:
    """The first `most` rows of each label; ends early where the labels are known."""
    seen = Counter[str]()
    full = 0
    for row in rows:
        if isinstance(row, Problem):
            yield row
            continue
        label = row.references[0]
        if seen[label] == most:
            continue
        seen[label] += 1
        full += seen[label] == most
        yield row
        if full == len(labels or ()) > 0:
            return


def _balanced(
    rows: Iterator[Example | Problem], limit: int, labels: tuple[str, ...] | None
) -> Iterator[Example | Problem]:
    """At most `limit` rows, their labels within one of each other where there are rows enough.

    A row too many takes the place of the last row of the label with the most. So no label need be
    known beforehand, what a rare label leaves goes to the others, and `limit` rows are held.
    """
    kept: dict[str, list[tuple[int, Example]]] = {label: [] for label in labels or ()}
    held = 0
    for number, row in enumerate(rows):
        if isinstance(row, Problem):
            yield row
            continue
        mine = kept.setdefault(row.references[0], [])
        if held == limit:
            fullest = max(reversed(kept.values()), key=len)  # an odd row stays with the first
            if len(fullest) <= len(mine) + 1:
                continue
            fullest.pop()
            held -= 1
        mine.append((number, row))
        held += 1
        sizes = [len(rows_of_label) for rows_of_label in kept.values()]
        if labels and held == limit and max(sizes) <= min(sizes) + 1:
            break  # no row to come would change it
    chosen = itertools.chain.from_iterable(kept.values())
    yield from (row for _, row in sorted(chosen, key=lambda item: item[0]))


def open_source(task: TaskConfig, data: DataConfig, seed: int = 0) -> Source:
    """Find a task; reads no rows.

    Raises:
        DataError: It cannot be found or described.
    """
    if task.files is not None or data.format == "files":
        return _files(task, data)
    if data.format == "hub":
        return _hub(task, data)
    if data.format == "generated":
        return _generated(task, data, seed)
    located = locate(task, data)
    return Source(task, _info(task, data, located, tuple(located.splits)), FileRows(located))


def describe_task(task: TaskConfig, data: DataConfig) -> TaskInfo:
    """What is known about a task beside its rows; the recipe's explicit fields win.

    Raises:
        DataError: The task cannot be found.
    """
    return open_source(task, data).info


def read_examples(
    task: TaskConfig, data: DataConfig, split: str, seed: int = 0
) -> Iterator[Example]:
    """Stream the rows of one split.

    Args:
        task: The task.
        data: Where it lies.
        split: `train`, `dev` or `test`.
        seed: Seed of generated tasks.

    Raises:
        DataError: At the first bad row; names file and line.
    """
    for item in open_source(task, data, seed).scan(split):
        if isinstance(item, Problem):
            raise DataError(f"Task {task.name!r}: {item}")
        yield item


def _info(
    task: TaskConfig, data: DataConfig, located: Located, splits: tuple[str, ...]
) -> TaskInfo:
    """Join the recipe's fields with what the format says."""
    family = task.family or located.family
    instruction = task.instruction
    if instruction is None and data.instructions is not None:
        instruction = _published(Path(data.instructions), family, located.dataset)
    if instruction is None and data.template == "sapt" and located.format != "sapt":
        names = (canonical(task.name), canonical(located.dataset))
        instruction = next((TASK_DEFINITIONS[n] for n in names if n in TASK_DEFINITIONS), None)
    if instruction is None:
        instruction = located.instruction
    if instruction is None and family is not None:
        same = [f for f in FAMILY_INSTRUCTIONS if canonical(f) == canonical(family)]
        instruction = FAMILY_INSTRUCTIONS[same[0]] if same else None
    labels = task.labels or task.label_names or located.labels
    return TaskInfo(
        dataset=located.dataset,
        instruction=instruction,
        labels=tuple(labels) if labels else None,
        family=family,
        metric=task.metric or located.metric or "exact_match",
        splits=splits,
        raw=located.raw,
        no_gold=located.no_gold,
        examples=_worked_examples(task, data, located),
    )


def _worked_examples(
    task: TaskConfig, data: DataConfig, located: Located
) -> tuple[tuple[str, str], ...]:
    """The first `data.examples` of the task's own examples."""
    there = len(located.examples)
    if there < data.examples:
        raise DataError(
            f"Task {task.name!r}: data.examples is {data.examples}, but the task has {there} "
            f"worked examples (layout {located.format}; sapt, superni and natural_instructions "
            f"have `Positive Examples`). Allowed: 0 to {there}; set data.examples."
        )
    return located.examples[: data.examples]


def _published(path: Path, family: str | None, dataset: str) -> str | None:
    """The zero-shot instruction of a family in a published instruction file."""
    if not path.is_file():
        raise DataError(f"data.instructions: there is no file {path}.")
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: data.instructions must hold an object: family -> instruction.")
    for name in (family, dataset):
        for key, value in content.items():
            if name is None or canonical(key) != canonical(name):
                continue
            if isinstance(value, str):
                return value
            for entry in value if isinstance(value, list) else []:
                if isinstance(entry, Mapping) and entry.get("instruction_type") == "zero-shot":
                    return str(entry.get("instruction", ""))
            raise DataError(
                f"{path}: {key!r} must be a text or a list with an entry "
                '{"instruction_type": "zero-shot", "instruction": "..."}.'
            )
    return None


def _files(task: TaskConfig, data: DataConfig) -> Source:
    """A task whose recipe lists its files."""
    if not task.files:
        raise DataError(
            f"Task {task.name!r}: data.format is files but the task lists none. Give it "
            "`files: {train: train.jsonl, test: test.jsonl}`."
        )
    root = Path(data.root).expanduser() if data.root else Path()
    splits = {
        split: tuple(p for pattern in _many(patterns) for p in _expand(task, root, pattern))
        for split, patterns in task.files.items()
    }
    columns = Columns(
        input=task.columns.input,
        output=task.columns.output,
        id=task.columns.id,
        id_required=task.columns.id is not None,
    )
    located = Located(
        format="files", dataset=task.dataset or task.name, splits=splits, columns=columns
    )
    return Source(task, _info(task, data, located, tuple(splits)), FileRows(located))


def _many(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _expand(task: TaskConfig, root: Path, pattern: str) -> list[Path]:
    """Files that a name or a glob means, sorted."""
    path = Path(pattern).expanduser()
    full = str(path if path.is_absolute() else root / path)
    if os.path.isfile(full):
        return [Path(full)]
    hits = sorted(p for p in glob.glob(full, recursive=True) if os.path.isfile(p))
    if hits:
        return [Path(p) for p in hits]
    parent = Path(full).parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    hint = nearest(Path(full).name, names)
    raise DataError(
        f"Task {task.name!r}: there is no file {full}."
        + (f" Did you mean {hint!r}?" if hint else "")
        + (f" In its folder: {listing(names)}." if parent.is_dir() else " Its folder is missing.")
    )


def _hub(task: TaskConfig, data: DataConfig) -> Source:
    """A data set of the Hugging Face hub."""
    rows = HubRows(task)
    # Collections such as GLUE have their data sets as configurations.
    config = task.config if task.config != "default" else None
    dataset = config or (task.dataset or task.name).split("/")[-1]
    located = Located(format="hub", dataset=dataset, splits={})
    info = _info(task, data, located, rows.splits())
    if info.labels is None and (names := rows.class_names()) is not None:
        task = dataclasses.replace(task, label_names=names)
        info = _info(task, data, located, rows.splits())
    return Source(task, info, rows)


def _generated(task: TaskConfig, data: DataConfig, seed: int) -> Source:
    """A task of accrete's own small language."""
    from accrete.pipeline.data import generated

    name = task.dataset or task.name
    said: Mapping[str, Any] = generated.describe(name)
    located = Located(
        format="generated",
        dataset=name,
        splits={},
        instruction=said["instruction"],
        labels=tuple(said["labels"]) if said["labels"] else None,
        family=said["family"],
    )
    rows = GeneratedRows(name, seed)
    return Source(task, _info(task, data, located, rows.splits()), rows)
