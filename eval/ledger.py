"""What each stage took: time, tokens and memory, summed up from a run's events."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class StageCost:
    """One stage's bill. None: the events do not say."""

    stage: int
    task: str
    state: str = "waiting"
    """`waiting`, `training`, `scoring` or `finished`."""
    rows: int | None = None
    planned_steps: int | None = None
    steps: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    train_seconds: float | None = None
    score_seconds: float | None = None
    consolidate_seconds: float | None = None
    checkpoint_seconds: float | None = None
    state_bytes: int | None = None
    """Bytes that the method carries to the next task."""

    @property
    def tokens_per_second(self) -> float | None:
        """Training throughput: tokens of all ranks over the seconds of the steps."""
        return self.tokens / self.step_seconds if self.tokens and self.step_seconds else None


@dataclass(kw_only=True)
class LossPoint:
    """The loss of one training step."""

    stage: int
    step: int
    loss: float


@dataclass(kw_only=True)
class Ledger:
    """The bill of a run and its training losses."""

    stages: list[StageCost]
    losses: list[LossPoint] = field(default_factory=list)

    def total(self, name: str) -> float | None:
        """Sum of a field over the stages that have it; None if none has."""
        values = [getattr(stage, name) for stage in self.stages]
        known = [value for value in values if value is not None]
        return sum(known) if known else None


def read_ledger(tasks: Iterable[str], events: Iterable[Mapping[str, Any]]) -> Ledger:
    """Add up `events`; a step or score that a resume repeated counts once, as last recorded."""
    stages = {t: StageCost(stage=t, task=task) for t, task in enumerate(tasks)}
    steps: dict[tuple[int, int], Mapping[str, Any]] = {}
    scores: dict[tuple[int, str, str], float] = {}
    for event in events:
        index = event.get("stage")
        if not isinstance(index, int) or index < 0:
            continue
        stage = stages.setdefault(index, StageCost(stage=index, task=str(event.get("task", "?"))))
        moment = str(event.get("moment", "after"))
        if event["event"] == "step":
            steps[index, int(event.get("step", 0))] = event
            stage.state = "training"
        elif event["event"] == "scored":
            scores[index, str(event.get("task")), moment] = _number(event, "seconds") or 0.0
            stage.state = "scoring" if moment == "after" else stage.state
        else:
            _apply(stage, event)
    losses = _add_steps(stages, steps)
    _add_scores(stages, scores)
    return Ledger(stages=[stages[t] for t in sorted(stages)], losses=losses)


def _apply(stage: StageCost, event: Mapping[str, Any]) -> None:
    """Take in an event that is neither a step nor a score."""
    kind, seconds = event["event"], _number(event, "seconds")
    if kind == "stage_started":
        stage.state = "training"
        stage.planned_steps = _count(event, "steps")
        stage.rows = _count(event, "rows")
    elif kind == "consolidated":
        stage.state = "scoring"
        stage.consolidate_seconds = seconds
    elif kind == "checkpoint" and seconds is not None:
        stage.checkpoint_seconds = (stage.checkpoint_seconds or 0.0) + seconds
    elif kind == "stage_finished":
        stage.state = "finished"
        stage.score_seconds = _number(event, "score_seconds")
    if kind in ("consolidated", "stage_finished"):
        stage.train_seconds = _number(event, "train_seconds") or stage.train_seconds
        for name in ("state_bytes", "method_state_bytes"):
            stage.state_bytes = _count(event, name) or stage.state_bytes
        consolidate = _number(event, "consolidate_seconds")
        stage.consolidate_seconds = consolidate or stage.consolidate_seconds


def _add_steps(
    stages: Mapping[int, StageCost], steps: Mapping[tuple[int, int], Mapping[str, Any]]
) -> list[LossPoint]:
    losses = []
    for (index, step), event in sorted(steps.items(), key=lambda item: item[0]):
        stage = stages[index]
        stage.steps += 1
        stage.tokens += _count(event, "tokens") or 0
        stage.step_seconds += _number(event, "seconds") or 0.0
        loss = _number(event, "loss")
        if loss is not None:
            losses.append(LossPoint(stage=index, step=step, loss=loss))
    for stage in stages.values():
        if stage.train_seconds is None and stage.steps:
            stage.train_seconds = stage.step_seconds
    return losses


def _add_scores(
    stages: Mapping[int, StageCost], scores: Mapping[tuple[int, str, str], float]
) -> None:
    """Fill in scoring times that `stage_finished` did not give."""
    sums: dict[int, float] = {}
    for (index, _, _), seconds in scores.items():
        sums[index] = sums.get(index, 0.0) + seconds
    for index, total in sums.items():
        if stages[index].score_seconds is None:
            stages[index].score_seconds = total


def _number(event: Mapping[str, Any], name: str) -> float | None:
    value = event.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _count(event: Mapping[str, Any], name: str) -> int | None:
    value = _number(event, name)
    return None if value is None else int(value)
