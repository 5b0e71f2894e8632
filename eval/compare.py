"""Many runs side by side: means over seeds, and paired tests between methods on the same rows.

Runs are compared inside a *setting*: the same model on the same tasks in the same order. Inside it,
a line is one recipe with one method and the same settings of training and scoring. Lines are ranked
only if every run scored the same rows in the same way; otherwise the comparison says why not.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accrete.eval.matrix import METRIC_NAMES
from accrete.eval.paired import PairedTest, paired_tests
from accrete.eval.run_record import RunRecord
from accrete.eval.run_settings import (
    UNKNOWN,
    Settings,
    scoring_settings,
    telling,
    training_settings,
)

PER_TASK = "per_task"
"""The method that trains every task alone: the reference for intransigence."""

_COUNTS = (
    "rows",
    "mean_prompt_tokens",
    "max_prompt_tokens",
    "mean_answer_tokens",
    "label_counts",
)
"""What prepared.json counts in the scored rows of a task."""


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
    """One recipe with one method and its settings, at several seeds."""

    recipe: str
    method: str
    settings: dict[str, str]
    """What tells it from the other lines of its recipe and method."""
    label: str
    """A name that no other line of the table has; the method alone where that is enough."""
    seeds: list[int | None]
    runs: list[str]
    metrics: dict[str, Summary]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The runs of one model on one order of tasks."""

    model: str
    """Builder, hub id or folder name; the whole path where two folders have one name."""
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
        groups.setdefault((record.model_id, record.tasks), []).append(record)
    notes = []
    if len(groups) > 1:
        notes.append(
            f"The runs belong to {len(groups)} settings (model and task order). Each has its own "
            "table, and no method is ranked across them: other tasks or another model would decide."
        )
    names = _model_names(records)
    settings = [_setting(names[model], tasks, group) for (model, tasks), group in groups.items()]
    return Comparison(settings=settings, notes=notes)


def _model_names(records: Iterable[RunRecord]) -> dict[str, str]:
    """Model id -> the name to show: short unless another model has the same."""
    short = {record.model_id: record.model for record in records}
    shared = Counter(short.values())
    return {model: name if shared[name] == 1 else model for model, name in short.items()}


_Key = tuple[str, str, frozenset[tuple[str, str]]]
"""Recipe, method and settings: what the runs of one line have in common."""


def _setting(model: str, tasks: tuple[str, ...], records: Sequence[RunRecord]) -> Setting:
    notes: list[str] = []
    finished = _finished(records, notes)
    # Where everything prepared is the same, a setting spelt in another way makes no difference.
    prompts = not _prepared_alike(finished)
    lines = _unrepeated(finished, prompts, notes)
    usable = [record for group in lines.values() for record in group]
    refusals = _differences(usable, prompts)
    table = [(line, lines[key]) for key, line in _lines(lines).items()]
    ranked = not refusals and len(table) > 1
    tests: list[PairedTest] = []
    if ranked:
        table.sort(key=lambda entry: -(entry[0].metrics["average_performance"].mean or 0.0))
        groups, labels = [group for _, group in table], [line.label for line, _ in table]
        tests = paired_tests(groups, labels, tasks, notes)
    else:
        table.sort(key=lambda entry: (entry[0].recipe, entry[0].method, entry[0].label))
    named = [line for line, _ in table]
    if not refusals:
        notes += _intransigence(named)
    notes += [f"Not ranked: {reason}" for reason in refusals]
    notes += [problem for record in records for problem in record.problems]
    return Setting(model=model, tasks=tasks, lines=named, ranked=ranked, tests=tests, notes=notes)


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


def _unrepeated(
    records: Sequence[RunRecord], prompts: bool, notes: list[str]
) -> dict[_Key, list[RunRecord]]:
    """The runs of each line; a second run at a seed would make the spread look smaller."""
    lines: dict[_Key, list[RunRecord]] = {}
    for record in records:
        group = lines.setdefault(_key(record, prompts), [])
        same = [kept for kept in group if record.seed is not None and kept.seed == record.seed]
        if same:
            notes.append(
                f"{record.path} is left out: it repeats recipe {record.name}, method "
                f"{record.method} and seed {record.seed} of {same[0].path}, with the same settings."
            )
        else:
            group.append(record)
    return lines


def _key(record: RunRecord, prompts: bool) -> _Key:
    settings = _settings(record, prompts)
    return record.name, record.method, frozenset(settings.items())


def _settings(record: RunRecord, prompts: bool) -> Settings:
    """What decides a run's result; empty where it has no recipe."""
    if not record.config:
        return {}
    learned = training_settings(record.config, rows=prompts)
    scored = scoring_settings(record.config, prompts=prompts)
    return learned | scored | {"branch": record.branched or "none"}


def _differences(records: Sequence[RunRecord], prompts: bool) -> list[str]:
    """Why the runs must not be ranked: what they did not score alike."""
    if len(records) < 2:
        return []
    reasons = _differing_settings(records, prompts)
    metrics = {_metrics(record): record for record in records}
    if len(metrics) > 1:
        paths = " and ".join(str(record.path) for record in metrics.values())
        reasons.append(f"{paths} score some task by different metrics.")
    first = records[0]
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
        else:
            reasons += _differing_prepared(first, record)
    return reasons


def _differing_settings(records: Sequence[RunRecord], prompts: bool) -> list[str]:
    settings = [scoring_settings(record.config, prompts=prompts) for record in records]
    reasons = []
    for key in dict.fromkeys(key for one in settings for key in one):
        values = {
            one.get(key, UNKNOWN): record for one, record in zip(settings, records, strict=True)
        }
        if len(values) > 1:
            said = ", ".join(f"{value} in {record.path}" for value, record in values.items())
            reasons.append(f"{key} differs ({said}), so the scores do not mean the same.")
    return reasons


def _prepared_alike(records: Sequence[RunRecord]) -> bool:
    """Whether every run was prepared to the same rows, prompts and tokens."""
    found = {
        tuple(record.prepared.get(task, {}).get("fingerprint") for task in record.tasks)
        for record in records
    }
    return len(found) == 1 and None not in found.pop()


def _differing_prepared(a: RunRecord, b: RunRecord) -> list[str]:
    """The first task whose scored rows or prompts are not the same, by what was counted in them.

    The fingerprint cannot tell: training rows are in it as well.
    """
    if a.seed != b.seed and _generates(a) and _generates(b):
        return []  # rows that accrete makes up follow the seed
    for task in a.tasks:
        x, y = (_counted(record.prepared.get(task, {})) for record in (a, b))
        for name in x:
            if name in y and x[name] != y[name]:
                return [
                    f"{a.path} and {b.path} were scored on other rows or prompts of {task} "
                    f"({name.replace('_', ' ')} {x[name]} against {y[name]})."
                ]
    return []


def _generates(record: RunRecord) -> bool:
    data = record.config.get("data")
    return isinstance(data, Mapping) and data.get("format") == "generated"


def _counted(task: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of a task's scored rows in prepared.json."""
    stats = task.get("stats")
    found = stats.get("eval") if isinstance(stats, Mapping) else None
    return {name: found[name] for name in _COUNTS if name in found} if found else {}


def _row_ids(record: RunRecord) -> dict[str, frozenset[str]]:
    """Ids of the rows scored after the last stage, by task; empty if they were not recorded."""
    stage = record.predictions(len(record.tasks) - 1)
    return {task: frozenset(row.id for row in rows) for task, rows in stage.items()}


def _count(record: RunRecord, task: str) -> int | None:
    return record.counts[record.tasks.index(task)]


def _said_rows(record: RunRecord, ids: Mapping[str, frozenset[str]], task: str) -> str:
    if task in ids:
        return f"{len(ids[task])} rows"
    count = _count(record, task)
    return "rows not recorded" if count is None else f"{count} rows, which ones is not recorded"


def _metrics(record: RunRecord) -> tuple[str, ...]:
    """The metric of each task: as it was prepared, or else as the recipe says."""
    tasks = record.config.get("tasks")
    found = tasks if isinstance(tasks, list) else []
    said = {task.get("name"): task.get("metric") for task in found if isinstance(task, Mapping)}
    return tuple(
        str(record.prepared.get(task, {}).get("metric") or said.get(task)) for task in record.tasks
    )


def _lines(groups: Mapping[_Key, Sequence[RunRecord]]) -> dict[_Key, Line]:
    """The lines, named by what tells them apart."""
    found: dict[_Key, Line] = {}
    for key, records in groups.items():
        recipe, method, _ = key
        recipes = {other for other, kind, _ in groups if kind == method}
        alike = [other for other in groups if other[:2] == key[:2]]
        settings = dict(zip(alike, _told(alike), strict=True))[key]
        parts = [recipe] * (len(recipes) > 1)
        parts += [f"{name}={value}" for name, value in settings.items()]
        label = f"{method} ({', '.join(parts)})" if parts else method
        found[key] = _line(recipe, method, settings, label, records)
    return found


def _told(keys: Sequence[_Key]) -> list[Settings]:
    """What tells lines of one recipe and method apart; one without a recipe says only that."""
    known = iter(telling([dict(settings) for _, _, settings in keys if settings]))
    return [
        (next(known) if settings else {"settings": "not recorded"}) if len(keys) > 1 else {}
        for _, _, settings in keys
    ]


def _line(
    recipe: str, method: str, settings: Settings, label: str, records: Sequence[RunRecord]
) -> Line:
    values = [record.matrix.metrics() for record in records if record.matrix is not None]
    return Line(
        recipe=recipe,
        method=method,
        settings=settings,
        label=label,
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
    found = [
        f"{line.label} {best - own:+.1f}"
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
