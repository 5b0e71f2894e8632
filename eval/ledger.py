"""What each stage took: time, tokens and memory, summed up from a run's events.

A run that was cut off and resumed has several lives. Steps, tokens and scores count once; time is
that of all lives, with what was lost and done again: the seconds in an event are its life's alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
    events = list(events)
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
    for index, seconds in _training_seconds(events).items():
        stages[index].train_seconds = seconds
    losses = _add_steps(stages, steps)
    _add_scores(stages, scores)
    return Ledger(stages=[stages[t] for t in sorted(stages)], losses=losses)


def run_seconds(events: Iterable[Mapping[str, Any]]) -> float | None:
    """Time at work of all lives of a finished run, without the pauses between them.

    None while it is under way, and where the times of an earlier life were not recorded.
    """
    lives: list[list[Mapping[str, Any]]] = [[]]
    done: set[tuple[Any, ...]] = set()
    for event in events:
        # A run cut off before its first checkpoint says no `resumed`, but does these again.
        what = tuple(event.get(key) for key in ("event", "stage", "task", "moment"))
        if event["event"] in ("run_started", "resumed") or what in done:
            lives.append([])
            done.clear()
        if event["event"] in ("stage_started", "scored"):
            done.add(what)
        lives[-1].append(event)
    lives = [life for life in lives if life]
    if not lives or not any(_is_end(event) for event in lives[-1]):
        return None
    spent = [_life_seconds(life) for life in lives]
    known = [seconds for seconds in spent if seconds is not None]
    return sum(known) if len(known) == len(spent) else None


def _is_end(event: Mapping[str, Any]) -> bool:
    return bool(event["event"] == "run_finished")


def _life_seconds(life: Sequence[Mapping[str, Any]]) -> float | None:
    said = [_number(event, "seconds") for event in life if _is_end(event)]
    if said and said[-1] is not None:
        return said[-1]
    first, last = _number(life[0], "time"), _number(life[-1], "time")
    return None if first is None or last is None else max(0.0, last - first)


def _training_seconds(events: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Seconds of training by stage, of all lives.

    A life that trained to the end says how long it took; one that was cut off is timed from its
    start of the stage to the last that is known of it.
    """
    totals: dict[int, float] = {}
    life = _Training()
    for event in events:
        kind, index, seconds = event["event"], event.get("stage"), _number(event, "train_seconds")
        begins = kind == "stage_started" or (kind == "resumed" and event.get("step") is not None)
        if begins or kind in ("run_started", "resumed"):
            life.close(totals)
            life = _Training(stage=index if begins else None, began=_number(event, "time"))
        elif kind == "consolidated" and seconds is not None:
            if isinstance(index, int) and index >= 0:
                totals[index] = totals.get(index, 0.0) + seconds
            life = _Training()
        elif index == life.stage and kind in ("step", "checkpoint"):
            # The checkpoint of a finished task, without a step, comes after its consolidation.
            life.last = _number(event, "time") if event.get("step") is not None else life.last
    life.close(totals)
    return totals


@dataclass(kw_only=True)
class _Training:
    """A stage being trained in one life of the run."""

    stage: Any = None
    began: float | None = None
    last: float | None = None

    def close(self, totals: dict[int, float]) -> None:
        """Add what is known of it: it ended without saying its seconds."""
        if not isinstance(self.stage, int) or self.stage < 0:
            return
        if self.began is not None and self.last is not None:
            spent = max(0.0, self.last - self.began)
            totals[self.stage] = totals.get(self.stage, 0.0) + spent


def _apply(stage: StageCost, event: Mapping[str, Any]) -> None:
    """Take in an event that is neither a step nor a score."""
    kind, seconds = event["event"], _number(event, "seconds")
    if kind == "stage_started":
        stage.state = "training"
        stage.planned_steps = _count(event, "steps")
        stage.rows = _count(event, "rows")
    elif kind == "consolidated":
        stage.state = "scoring"
        stage.consolidate_seconds = _sum(stage.consolidate_seconds, seconds)
        stage.state_bytes = _count(event, "state_bytes")
    elif kind == "checkpoint" and seconds is not None:
        stage.checkpoint_seconds = _sum(stage.checkpoint_seconds, seconds)
    elif kind == "stage_finished":
        stage.state = "finished"
        stage.score_seconds = _number(event, "score_seconds")


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
        if stage.steps:
            stage.train_seconds = max(stage.train_seconds or 0.0, stage.step_seconds)
    return losses


def _add_scores(
    stages: Mapping[int, StageCost], scores: Mapping[tuple[int, str, str], float]
) -> None:
    """Scoring times: what the tasks took, where `stage_finished` does not know of more.

    After a resume it knows the tasks that were scored since then, not those kept from before.
    """
    sums: dict[int, float] = {}
    for (index, _, _), seconds in scores.items():
        sums[index] = sums.get(index, 0.0) + seconds
    for index, total in sums.items():
        stages[index].score_seconds = max(stages[index].score_seconds or 0.0, total)


def _sum(total: float | None, more: float | None) -> float | None:
    return total if more is None else (total or 0.0) + more


def _number(event: Mapping[str, Any], name: str) -> float | None:
    value = event.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _count(event: Mapping[str, Any], name: str) -> int | None:
    value = _number(event, name)
    return None if value is None else int(value)
