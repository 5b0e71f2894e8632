"""Many runs side by side: means over seeds, and paired tests between methods on the same rows.

Runs are compared inside a *setting*: the same model on the same tasks in the same order. Inside it,
a line is one recipe with one method. Lines are ranked only if every run scored the same rows in the
same way; otherwise the comparison says why not.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accrete.eval.matrix import METRIC_NAMES
from accrete.eval.paired import PairedTest, paired_tests
from accrete.eval.run_record import RunRecord

SCORING_KEYS = (
    "data.template",
    "data.instructions",
    "data.eval_split",
    "data.max_eval_examples",
    "data.max_source_tokens",
    "data.max_target_tokens",
    "eval.mode",
    "eval.decode_misses",
)
"""Settings that change what a score means."""


PER_TASK = "per_task"
"""The method that trains every task alone: the reference for intransigence."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A metric over seeds."""

    mean: float | None
    sd: float | None
    """Sample standard deviation; None for fewer than two seeds."""
    num: int
    """Runs that have the metric."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One recipe with one method in a setting."""

    recipe: str
    method: str
    seeds: list[int | None]
    runs: list[str]
    metrics: dict[str, Summary]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The runs of one model on one order of tasks."""

    model: str
    tasks: tuple[str, ...]
    lines: list[Line]
    """Best average performance first if `ranked`, else by name."""
    ranked: bool
    tests: list[PairedTest]
    notes: list[str]
    """Why something was left out or not ranked; intransigence, where it can be told."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything `accrete compare` prints."""

    settings: list[Setting]
    notes: list[str] = field(default_factory=list)


def compare_runs(dirs: Iterable[Path]) -> Comparison:
    """Read run folders and compare what can be compared.

    Raises:
        RunFolderError: A folder holds no run.
    """
    unique = {path.resolve(): path for path in dirs}
    records = [RunRecord(path) for path in unique.values()]
    groups: dict[tuple[str, tuple[str, ...]], list[RunRecord]] = {}
    for record in records:
        groups.setdefault((record.model, record.tasks), []).append(record)
    notes = []
    if len(groups) > 1:
        notes.append(
            f"The runs belong to {len(groups)} settings (model and task order). Each has its own "
            "table, and no method is ranked across them: other tasks or another model would decide."
        )
    settings = [_setting(model, tasks, group) for (model, tasks), group in groups.items()]
    return Comparison(settings=settings, notes=notes)


def _setting(model: str, tasks: tuple[str, ...], records: Sequence[RunRecord]) -> Setting:
    notes: list[str] = []
    usable = _finished(records, notes)
    usable = _unrepeated(usable, notes)
    refusals = _differences(usable)
    lines: dict[tuple[str, str], list[RunRecord]] = {}
    for record in usable:
        lines.setdefault((record.name, record.method), []).append(record)
    table = [_line(recipe, method, group) for (recipe, method), group in lines.items()]
    ranked = not refusals and len(table) > 1
    tests: list[PairedTest] = []
    if ranked:
        table.sort(key=lambda line: -(line.metrics["average_performance"].mean or 0.0))
        labels = _labels(table)
        tests = paired_tests(
            [lines[line.recipe, line.method] for line in table], labels, tasks, notes
        )
    else:
        table.sort(key=lambda line: (line.recipe, line.method))
    if not refusals:
        notes += _intransigence(table)
    notes += [f"Not ranked: {reason}" for reason in refusals]
    notes += [problem for record in records for problem in record.problems]
    return Setting(model=model, tasks=tasks, lines=table, ranked=ranked, tests=tests, notes=notes)


def _finished(records: Sequence[RunRecord], notes: list[str]) -> list[RunRecord]:
    kept = []
    for record in records:
        if record.finished:
            kept.append(record)
            continue
        stages = len(record.matrix.rows) if record.matrix else 0
        notes.append(
            f"{record.path} is left out: {stages} of its {len(record.tasks)} stages are scored. "
            f"Finish it with `accrete resume {record.path}`."
        )
    return kept


def _unrepeated(records: Sequence[RunRecord], notes: list[str]) -> list[RunRecord]:
    """A second run with the same recipe, method and seed would make the spread look smaller."""
    kept: dict[tuple[str, str, int | None], RunRecord] = {}
    for record in records:
        key = (record.name, record.method, record.seed)
        if record.seed is not None and key in kept:
            notes.append(
                f"{record.path} is left out: it repeats recipe {record.name}, method "
                f"{record.method} and seed {record.seed} of {kept[key].path}."
            )
        else:
            kept[key if record.seed is not None else (*key[:2], -1 - len(kept))] = record
    return list(kept.values())


def _differences(records: Sequence[RunRecord]) -> list[str]:
    """Why the runs must not be ranked: what they did not score alike."""
    if len(records) < 2:
        return []
    first, reasons = records[0], []
    for key in SCORING_KEYS:
        values = {str(_setting_value(record.config, key)): record for record in records}
        if len(values) > 1:
            said = ", ".join(f"{value} in {record.path}" for value, record in values.items())
            reasons.append(f"{key} differs ({said}), so the scores do not mean the same.")
    metrics = {_metrics(record): record for record in records}
    if len(metrics) > 1:
        paths = " and ".join(str(record.path) for record in metrics.values())
        reasons.append(f"{paths} score some task by different metrics.")
    wanted = _row_ids(first)
    for record in records[1:]:
        found = _row_ids(record)
        for task in first.tasks:
            if wanted.get(task) != found.get(task) or _count(first, task) != _count(record, task):
                reasons.append(
                    f"{first.path} and {record.path} were scored on different rows of {task} "
                    f"({_said_rows(first, wanted, task)} against "
                    f"{_said_rows(record, found, task)})."
                )
                break
    return reasons


def _setting_value(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _row_ids(record: RunRecord) -> dict[str, frozenset[str]]:
    """Ids of the rows scored after the last stage, by task; empty if they were not recorded."""
    stage = record.predictions(len(record.tasks) - 1)
    return {task: frozenset(row.id for row in rows) for task, rows in stage.items()}


def _count(record: RunRecord, task: str) -> int | None:
    return record.counts[record.tasks.index(task)]


def _said_rows(record: RunRecord, ids: Mapping[str, frozenset[str]], task: str) -> str:
    count = len(ids[task]) if task in ids else _count(record, task)
    return "rows not recorded" if count is None else f"{count} rows"


def _metrics(record: RunRecord) -> tuple[str, ...]:
    """The metric of each task, where the recipe says it."""
    tasks = record.config.get("tasks")
    found = tasks if isinstance(tasks, list) else []
    return tuple(str(task.get("metric")) for task in found if isinstance(task, Mapping))


def _line(recipe: str, method: str, records: Sequence[RunRecord]) -> Line:
    values = [record.matrix.metrics() for record in records if record.matrix is not None]
    return Line(
        recipe=recipe,
        method=method,
        seeds=[record.seed for record in records],
        runs=[str(record.path) for record in records],
        metrics={name: _summary([value[name] for value in values]) for name in METRIC_NAMES},
    )


def _intransigence(lines: Sequence[Line]) -> list[str]:
    """How far each line learns new tasks worse than tasks learned alone, if there is such a run."""
    alone = [line for line in lines if line.method == PER_TASK]
    if len(alone) != 1 or len(lines) < 2:
        return []
    best = alone[0].metrics["plasticity"].mean
    labels = dict(zip(map(id, lines), _labels(lines), strict=True))
    found = [
        f"{labels[id(line)]} {best - own:+.1f}"
        for line in lines
        if line is not alone[0]
        and best is not None
        and (own := line.metrics["plasticity"].mean) is not None
    ]
    note = f"Intransigence (plasticity of {PER_TASK} minus the line's own): {', '.join(found)}."
    newest = (
        f"{PER_TASK}: read its plasticity, where every task is scored with its own adapter. "
        "All its other metrics are of the newest task's adapter alone."
    )
    return [note, newest] if found else [newest]


def _summary(values: Sequence[float | None]) -> Summary:
    known = [value for value in values if value is not None]
    return Summary(
        mean=statistics.fmean(known) if known else None,
        sd=statistics.stdev(known) if len(known) > 1 else None,
        num=len(known),
    )


def _labels(lines: Sequence[Line]) -> list[str]:
    """The method alone where that is enough to tell the lines apart."""
    methods = [line.method for line in lines]
    if len(set(methods)) == len(methods):
        return methods
    return [f"{line.method} ({line.recipe})" for line in lines]
