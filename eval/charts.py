"""Geometry of the report's charts: numbers in, coordinates for inline SVG out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from accrete.eval.ledger import LossPoint
from accrete.eval.matrix import AccuracyMatrix
from accrete.eval.stats import Interval

LOSS_POINTS = 360
"""Most points of the loss curve; more steps are put together."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One score of a task in its small chart, in the chart's own units."""

    x: float
    y: float
    score: float
    label: str
    own: bool
    """Scored right after the task's own stage."""
    low: float | None
    high: float | None
    """Ends of the interval, as heights."""


@dataclass(frozen=True, kw_only=True)
class TaskCurve:
    """One task's scores over the stages."""

    task: str
    marks: list[Mark]
    before: Mark | None
    """Zero-shot score just before the task's own stage."""
    path: str
    description: str


@dataclass(frozen=True, kw_only=True)
class LossChart:
    """The training loss over all steps, on a canvas of 1000 x 100 units."""

    line: str
    band: str
    """Outline from the lowest to the highest loss of the steps put together."""
    top: float
    stages: list[tuple[float, float, str]]
    """Start and width in percent of the canvas, and the task, of each stage."""
    num_steps: int
    steps_per_point: int
    description: str


WIDTH, HEIGHT = 240.0, 110.0
LEFT, RIGHT, TOP, BOTTOM = 26.0, 8.0, 8.0, 18.0


def stage_x(stage: float, num_stages: int) -> float:
    """Horizontal place of a stage in a task's chart; -1 is before the first stage."""
    return LEFT + (stage + 1) / max(1, num_stages) * (WIDTH - LEFT - RIGHT)


def score_y(score: float) -> float:
    """Height of a score in percent in a task's chart."""
    return TOP + (1 - score / 100) * (HEIGHT - TOP - BOTTOM)


def task_curve(
    matrix: AccuracyMatrix, index: int, intervals: Sequence[Sequence[Interval | None]] | None
) -> TaskCurve:
    """The chart of task `index`; `intervals[t][i]` belongs to `matrix.rows[t][i]`."""
    num_stages = len(matrix.tasks)
    task = matrix.tasks[index]
    marks = []
    for t in range(index, len(matrix.rows)):
        score = matrix.rows[t][index]
        if score is None:
            continue
        spread = intervals[t][index] if intervals else None
        marks.append(
            Mark(
                x=stage_x(t, num_stages),
                y=score_y(score),
                score=score,
                label=f"after {matrix.tasks[t]}: {score:.1f}%",
                own=t == index,
                low=score_y(spread.low) if spread else None,
                high=score_y(spread.high) if spread else None,
            )
        )
    path = "M" + " L".join(f"{m.x:.1f} {m.y:.1f}" for m in marks) if marks else ""
    said = ", ".join(mark.label for mark in marks) or "not scored yet"
    before = _before(matrix, index)
    return TaskCurve(
        task=task, marks=marks, before=before, path=path, description=f"{task}: {said}"
    )


def _before(matrix: AccuracyMatrix, index: int) -> Mark | None:
    score = matrix.before[index] if matrix.before else None
    if score is None:
        return None
    return Mark(
        x=stage_x(index - 1, len(matrix.tasks)),
        y=score_y(score),
        score=score,
        label=f"before its own stage: {score:.1f}%",
        own=False,
        low=None,
        high=None,
    )


def loss_chart(losses: Sequence[LossPoint], tasks: Sequence[str]) -> LossChart | None:
    """The loss curve; None without steps. The scale starts at 0 and ends above the mean losses."""
    if not losses:
        return None
    per_point = max(1, math.ceil(len(losses) / LOSS_POINTS))
    buckets = _buckets(losses, per_point)
    means = [sum(values) / len(values) for _, values in buckets]
    top = max(means) * 1.05 or 1.0
    num_steps = len(losses)

    def place(position: float, loss: float) -> str:
        return f"{1000 * position / num_steps:.1f} {100 * (1 - min(loss, top) / top):.2f}"

    points = [place(x, mean) for (x, _), mean in zip(buckets, means, strict=True)]
    highest = [place(x, max(values)) for x, values in buckets]
    lowest = [place(x, min(values)) for x, values in reversed(buckets)]
    stages = _stage_spans(losses, tasks)
    return LossChart(
        line="M" + " L".join(points),
        band="M" + " L".join(highest + lowest) + " Z",
        top=top,
        stages=stages,
        num_steps=num_steps,
        steps_per_point=per_point,
        description=(
            f"Training loss over {num_steps} steps of {len(stages)} stages, "
            f"from {means[0]:.3g} to {means[-1]:.3g}"
        ),
    )


def _buckets(losses: Sequence[LossPoint], size: int) -> list[tuple[float, list[float]]]:
    """Centre and values of runs of `size` steps; a run never spans two stages."""
    buckets: list[tuple[float, list[float]]] = []
    start = 0
    while start < len(losses):
        end = start + 1
        while end < min(start + size, len(losses)) and losses[end].stage == losses[start].stage:
            end += 1
        buckets.append(((start + end) / 2, [point.loss for point in losses[start:end]]))
        start = end
    return buckets


def _stage_spans(
    losses: Sequence[LossPoint], tasks: Sequence[str]
) -> list[tuple[float, float, str]]:
    spans = []
    for stage in sorted({point.stage for point in losses}):
        steps = [k for k, point in enumerate(losses) if point.stage == stage]
        name = tasks[stage] if stage < len(tasks) else f"stage {stage + 1}"
        spans.append((100 * steps[0] / len(losses), 100 * len(steps) / len(losses), name))
    return spans
