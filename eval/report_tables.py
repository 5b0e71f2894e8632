"""The report's tables: heatmap, metric cards, stages, and what was kept of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accrete.eval.ledger import StageCost
from accrete.eval.matrix import AccuracyMatrix, Array
from accrete.eval.run_record import PredictedRow
from accrete.eval.stats import Interval, metric_intervals

LOST_EXAMPLES = 3
_INTERVAL_NOISE = 0.05


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the heatmap."""

    state: str
    """`scored`, `missing` (the stage ended without it), `pending` (the stage has not been scored
    yet), `zero_shot` (before its own stage) or `unseen`."""
    score: float | None = None
    change: float | None = None
    """Against the task's own stage, in points."""
    own: bool = False
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class HeatRow:
    """One row of the heatmap."""

    label: str
    number: int | None
    cells: list[Cell]
    mean: float | None
    """Average performance so far."""


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """The matrix as a table."""

    heads: list[tuple[str, int | None]]
    """Task and rows it is scored on."""
    rows: list[HeatRow]


@dataclass(frozen=True, kw_only=True)
class MetricCard:
    """One metric with its meaning."""

    name: str
    title: str
    value: float | None
    unit: str
    interval: Interval | None
    meaning: str
    missing: str
    """Why there is no value."""


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """The metrics as they stood after one stage."""

    number: int
    task: str
    values: dict[str, float | None]
    intervals: dict[str, Interval | None]


@dataclass(frozen=True, kw_only=True)
class TaskRetention:
    """What became of a task's rows between its own stage and the last one."""

    task: str
    kept: int
    lost: int
    gained: int
    wrong: int
    examples: list[tuple[str, str | None, str | None]]
    """Some lost rows: id, answer then, answer now."""


_CARDS = (
    ("average_performance", "Average performance", "%",
     "Mean score over all tasks seen, as the model stands now. The number papers print first."),
    ("backward_transfer", "Backward transfer", "points",
     "How earlier tasks have changed since each was learned. Below zero: forgotten."),
    ("forgetting", "Forgetting", "points",
     "How far earlier tasks have fallen from their best score. Lower is better."),
    ("forward_transfer", "Forward transfer", "points",
     "What earlier tasks give a task before it is trained, against the untrained model."),
    ("plasticity", "Plasticity", "%",
     "Mean score right after each task's own training: can the model still learn?"),
    ("incremental_accuracy", "Incremental accuracy", "%",
     "Average performance, averaged over all stages: the whole course, not only its end."),
)  # fmt: skip


def verdict(
    matrix: AccuracyMatrix | None, tasks: Sequence[str], stages: Sequence[StageCost]
) -> str:
    """The run in one sentence."""
    if matrix is None or not matrix.rows:
        running = next((s for s in stages if s.state != "waiting"), None)
        if running is None:
            return "Nothing is scored yet."
        return f"Nothing is scored yet; stage {running.stage + 1} of {len(tasks)} is under way."
    values, seen = matrix.metrics(), len(matrix.rows)
    average, change = values["average_performance"], values["backward_transfer"]
    of = f"all {seen}" if seen == len(tasks) else f"{seen} of {len(tasks)}"
    if average is None:
        return f"After {of} tasks some scores are missing, so there is no average."
    said = f"After {of} tasks the model scores {average:.1f}% on average"
    if seen == 1:
        return f"After the first of {len(tasks)} tasks the model scores {average:.1f}% on it."
    if change is None:
        return said + "."
    if abs(change) < _INTERVAL_NOISE:
        return f"{said}; the earlier tasks stand where they stood when learned."
    what = "lost" if change < 0 else "gained"
    return f"{said}; earlier tasks have {what} {abs(change):.1f} points since they were learned."


def heatmap(
    matrix: AccuracyMatrix | None,
    tasks: Sequence[str],
    counts: Sequence[int | None],
    intervals: Sequence[Sequence[Interval | None]] | None,
    stages: Sequence[StageCost],
) -> Heatmap:
    """The matrix as a table: scored stages, then those still to come."""
    rows: list[HeatRow] = []
    if matrix is not None and any(b is not None for b in matrix.untrained or ()):
        cells = [
            Cell(state="zero_shot" if b is not None else "unseen", score=b,
                 title=f"{task}, untrained model: {_percent(b)}")
            for task, b in zip(tasks, matrix.untrained or (), strict=True)
        ]  # fmt: skip
        rows.append(HeatRow(label="untrained", number=None, cells=cells, mean=None))
    for t, task in enumerate(tasks):
        if matrix is not None and t < len(matrix.rows):
            spreads = intervals[t] if intervals else [None] * (t + 1)
            cells = [_cell(matrix, t, i, counts[i], spreads) for i in range(len(tasks))]
            mean = matrix.upto(t + 1).metrics()["average_performance"]
        else:
            cells = [_unscored(tasks, t, i, stages) for i in range(len(tasks))]
            mean = None
        rows.append(HeatRow(label=task, number=t + 1, cells=cells, mean=mean))
    return Heatmap(heads=list(zip(tasks, counts, strict=True)), rows=rows)


def _cell(
    matrix: AccuracyMatrix, t: int, i: int, count: int | None, spreads: Sequence[Interval | None]
) -> Cell:
    task, stage = matrix.tasks[i], matrix.tasks[t]
    if i > t:
        score = matrix.before[i] if matrix.before and i == t + 1 else None
        if score is None:
            return Cell(state="unseen", title=f"{task} is not part of the sequence yet")
        return Cell(
            state="zero_shot", score=score, title=f"{task} before its own stage: {score:.1f}%"
        )
    score, own = matrix.rows[t][i], matrix.rows[i][i]
    if score is None:
        return Cell(state="missing", own=i == t, title=f"{task} was not scored after {stage}")
    title = f"{task} after {stage}: {score:.2f}%"
    if count is not None:
        title += f" of {count:,} rows"
    spread = spreads[i]
    if spread is not None:
        title += f" (95% interval {spread.low:.1f} to {spread.high:.1f})"
    change = None if own is None or i == t else score - own
    return Cell(state="scored", score=score, change=change, own=i == t, title=title)


def _unscored(tasks: Sequence[str], t: int, i: int, stages: Sequence[StageCost]) -> Cell:
    if i > t:
        return Cell(state="unseen", title=f"{tasks[i]} is not part of the sequence yet")
    state = stages[t].state if t < len(stages) else "waiting"
    return Cell(state="pending", own=i == t, title=f"Not scored yet: this stage is {state}")


def metric_cards(
    matrix: AccuracyMatrix | None, intervals: Mapping[str, Interval | None]
) -> list[MetricCard]:
    """The six metrics; a card without a value says why."""
    values = matrix.metrics() if matrix else {}
    stages = len(matrix.rows) if matrix else 0
    cards = []
    for name, title, unit, meaning in _CARDS:
        single = name in ("backward_transfer", "forgetting", "forward_transfer") and stages == 1
        missing = "not scored yet" if not stages else "not measured"
        cards.append(
            MetricCard(
                name=name,
                title=title,
                value=values.get(name),
                unit=unit,
                interval=intervals.get(name),
                meaning=meaning,
                missing="needs two tasks" if single else missing,
            )
        )
    return cards


def stage_rows(matrix: AccuracyMatrix, resampled: Array | None) -> list[StageRow]:
    """Metrics after each finished stage, with intervals where rows were recorded."""
    rows = []
    for t in range(len(matrix.rows)):
        intervals: dict[str, Interval | None] = {}
        if resampled is not None:
            intervals = metric_intervals(resampled[:, : t + 1, : t + 1])
        values = matrix.upto(t + 1).metrics()
        rows.append(
            StageRow(number=t + 1, task=matrix.tasks[t], values=values, intervals=intervals)
        )
    return rows


def retention(
    task: str, then: Sequence[PredictedRow], now: Sequence[PredictedRow]
) -> TaskRetention | None:
    """Compare a task's rows after its own stage with the last stage; None if rows differ."""
    if not then or [row.id for row in then] != [row.id for row in now]:
        return None
    pairs = list(zip(then, now, strict=True))
    lost = [(a, b) for a, b in pairs if a.correct and not b.correct]
    return TaskRetention(
        task=task,
        kept=sum(a.correct and b.correct for a, b in pairs),
        lost=len(lost),
        gained=sum(b.correct and not a.correct for a, b in pairs),
        wrong=sum(not a.correct and not b.correct for a, b in pairs),
        examples=[(a.id, a.prediction, b.prediction) for a, b in lost[:LOST_EXAMPLES]],
    )


def _percent(score: float | None) -> str:
    return "not measured" if score is None else f"{score:.1f}%"
