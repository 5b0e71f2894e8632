"""Where a run stands and how long it will take, worked out from its events alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from accrete.pipeline.records import Event

RECENT_STEPS = 50
"""Speed is the mean over so many steps."""


@dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """What the plan in `run_started` says about one stage."""

    task: str
    steps: int
    rows_eval: int


@dataclass(frozen=True)
class Eta:
    """Remaining time of the whole run."""

    seconds: float
    whole: bool
    """False: scoring still lies ahead and was never measured, so it takes longer than this."""


class Progress:
    """Position, speed, scores and remaining time of a run; fed with every event in order."""

    def __init__(self) -> None:
        self.plan: list[PlannedTask] = []
        self.forward_transfer = False
        self.stage = 0
        self.step = 0
        self.loss: float | None = None
        self._scores: dict[int, dict[str, float]] = {}
        self._scored: set[tuple[int, str]] = set()
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT_STEPS)
        self._step_time = _Mean()
        self._row_time = _Mean()
        self._task_row_time: dict[str, float] = {}
        self._consolidation_time = _Mean()

    def update(self, event: Mapping[str, Any]) -> None:
        """Take in the next event."""
        match event["event"]:
            case Event.RUN_STARTED:
                self.plan = [
                    PlannedTask(task=t["task"], steps=t["steps"], rows_eval=t["rows_eval"])
                    for t in event["plan"]
                ]
                self.forward_transfer = bool(event.get("forward_transfer", False))
            case Event.STAGE_STARTED:
                self.stage, self.step, self.loss = event["stage"], 0, None
                self._recent.clear()
            case Event.RESUMED:
                self.stage = event["stage"]
                # A resume at a task boundary has no step: the stage is trained.
                self.step = self.stage_steps if event["step"] is None else event["step"]
                self._recent.clear()
            case Event.STEP:
                self._take_step(event)
            case Event.CONSOLIDATED:
                self._consolidation_time.add(event.get("seconds", 0.0), 1)
            case Event.SCORED:
                self._take_score(event)

    def _take_step(self, event: Mapping[str, Any]) -> None:
        self.stage, self.step, self.loss = event["stage"], event["step"], event["loss"]
        seconds = event.get("seconds")
        if seconds is None:
            return
        if len(self._recent) == 1:
            # The first step after a start also pays for allocations and is not typical.
            self._recent.clear()
        self._recent.append((seconds, event.get("tokens") or 0))
        self._step_time.add(seconds, 1)

    def _take_score(self, event: Mapping[str, Any]) -> None:
        stage, task = event["stage"], event["task"]
        self._scored.add((stage, task))
        # The next task is scored as well, for forward transfer: not a cell of the matrix.
        if task in self.tasks[: stage + 1]:
            self._scores.setdefault(stage, {})[task] = event["score"]
        rows = event.get("rows") or 0
        if rows and event.get("seconds") is not None:
            self._row_time.add(event["seconds"], rows)
            self._task_row_time[event["task"]] = event["seconds"] / rows

    @property
    def tasks(self) -> list[str]:
        """Names of the sequence's tasks, in order."""
        return [planned.task for planned in self.plan]

    def row(self, stage: int) -> dict[str, float]:
        """Scores after a stage by task, in the order of the sequence: a row of the matrix."""
        found = self._scores.get(stage, {})
        return {task: found[task] for task in self.tasks if task in found}

    def best_before(self, stage: int, task: str) -> float | None:
        """The best score that a task had after an earlier stage."""
        earlier = [row[task] for t, row in self._scores.items() if t < stage and task in row]
        return max(earlier, default=None)

    @property
    def stage_steps(self) -> int:
        """Planned steps of the present stage."""
        return self.plan[self.stage].steps if self.stage < len(self.plan) else 0

    @property
    def steps_done(self) -> int:
        """Steps taken over the whole sequence."""
        return sum(planned.steps for planned in self.plan[: self.stage]) + self.step

    @property
    def steps_total(self) -> int:
        """Planned steps of the whole sequence."""
        return sum(planned.steps for planned in self.plan)

    @property
    def step_seconds(self) -> float | None:
        """Seconds per optimizer step, lately."""
        if not self._recent:
            return self._step_time.value
        return sum(seconds for seconds, _ in self._recent) / len(self._recent)

    @property
    def tokens_per_s(self) -> float | None:
        """Trained tokens per second over all ranks, lately."""
        seconds = sum(seconds for seconds, _ in self._recent)
        tokens = sum(tokens for _, tokens in self._recent)
        return tokens / seconds if seconds > 0 and tokens > 0 else None

    @property
    def task_eta(self) -> float | None:
        """Seconds until the present task is trained."""
        per_step = self.step_seconds
        return None if per_step is None else max(0, self.stage_steps - self.step) * per_step

    @property
    def run_eta(self) -> Eta | None:
        """Remaining time of the run: training, consolidation and scoring of all stages to come."""
        here, typical = self.task_eta, self._step_time.value
        if here is None or typical is None:
            return None
        seconds = here + sum(planned.steps for planned in self.plan[self.stage + 1 :]) * typical
        seconds += (len(self.plan) - self.stage) * (self._consolidation_time.value or 0.0)
        mean_row = self._row_time.value
        whole = True
        for planned in self._scorings_ahead():
            per_row = self._task_row_time.get(planned.task, mean_row)
            if per_row is None:
                whole = False
                break
            seconds += planned.rows_eval * per_row
        return Eta(seconds, whole)

    def _scorings_ahead(self) -> Iterable[PlannedTask]:
        ahead = 1 if self.forward_transfer else 0
        for stage in range(self.stage, len(self.plan)):
            for planned in self.plan[: stage + 1 + ahead]:
                if (stage, planned.task) not in self._scored:
                    yield planned


class _Mean:
    """A running mean, None while it is empty."""

    def __init__(self) -> None:
        self._total = 0.0
        self._weight = 0.0

    def add(self, total: float, weight: float) -> None:
        self._total += total
        self._weight += weight

    @property
    def value(self) -> float | None:
        return self._total / self._weight if self._weight else None


def format_duration(seconds: float) -> str:
    """`45s`, `6m`, `5h40m`, `3d4h`."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02d}m"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days}d{hours}h"


def format_count(count: float) -> str:
    """`812`, `12.4k`, `3.1M`."""
    if count < 1000:
        return f"{count:.0f}"
    if count < 1_000_000:
        return f"{count / 1000:.1f}k"
    return f"{count / 1_000_000:.1f}M"
