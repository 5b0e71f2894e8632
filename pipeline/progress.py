"""Where a run stands and how long it will take, worked out from its events alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
    rows_train: int = 0
    """0: the run does not say."""
    tokens: float = 0.0
    """Mean tokens of a training row; 0: the run does not say."""


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
        self._step_time = _StepTime()
        self._rows_per_step = _Mean()
        self._row_time = _Mean()
        self._task_row_time: dict[str, float] = {}
        self._since_start = 0
        """Steps since this stage began or was gone on with."""
        self._stepping = 0.0
        """Seconds of this stage's steps, since it began or was gone on with."""
        self._passes: tuple[int, float, float] | None = None
        """The newest finished stage, and its seconds before the first step and after the last."""

    def update(self, event: Mapping[str, Any]) -> None:
        """Take in the next event."""
        match event["event"]:
            case Event.RUN_STARTED:
                self.plan = [
                    PlannedTask(
                        task=t["task"],
                        steps=t["steps"],
                        rows_eval=t["rows_eval"],
                        rows_train=t.get("rows_train") or 0,
                        tokens=t.get("tokens") or 0.0,
                    )
                    for t in event["plan"]
                ]
                self.forward_transfer = bool(event.get("forward_transfer", False))
            case Event.STAGE_STARTED:
                self.stage, self.step, self.loss = event["stage"], 0, None
                self._start_stepping()
                self._correct_plan(event)
            case Event.RESUMED:
                self.stage = event["stage"]
                # A resume at a task boundary has no step: the stage is trained.
                self.step = self.stage_steps if event["step"] is None else event["step"]
                self._start_stepping()
            case Event.STEP:
                self._take_step(event)
            case Event.CONSOLIDATED:
                self._take_passes(event)
            case Event.SCORED:
                self._take_score(event)

    def _take_step(self, event: Mapping[str, Any]) -> None:
        self.stage, self.step, self.loss = event["stage"], event["step"], event["loss"]
        seconds = event.get("seconds")
        if seconds is None:
            return
        tokens = event.get("tokens") or 0
        self._stepping += seconds
        self._rows_per_step.add(event.get("rows") or 0, 1)
        self._since_start += 1
        if self._since_start == 2:
            # The first step after a start also pays for allocations and is not typical.
            self._recent.clear()
            self._step_time.forget_first()
        self._recent.append((seconds, tokens))
        self._step_time.add(seconds, tokens)

    def _start_stepping(self) -> None:
        self._recent.clear()
        self._stepping, self._since_start = 0.0, 0

    def _correct_plan(self, event: Mapping[str, Any]) -> None:
        """A stage knows its steps better than the plan: replay, for one, adds to them."""
        steps = event.get("steps")
        if steps is not None and self.stage < len(self.plan):
            self.plan[self.stage] = replace(self.plan[self.stage], steps=steps)

    def _take_passes(self, event: Mapping[str, Any]) -> None:
        """Passes at the start of the stage (what training took beside its steps) and at its end."""
        before = max(0.0, event.get("train_seconds", 0.0) - self._stepping)
        self._passes = (event["stage"], before, event.get("seconds", 0.0))

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
            return self._step_seconds_of(self.stage)
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
        here = self.task_eta
        if here is None:
            return None
        seconds = here
        for place in range(self.stage, len(self.plan)):
            if place > self.stage:
                seconds += self.plan[place].steps * (self._step_seconds_of(place) or 0.0)
            seconds += self._passes_of(place)
        mean_row = self._row_time.value
        whole = True
        for planned in self._scorings_ahead():
            per_row = self._task_row_time.get(planned.task, mean_row)
            if per_row is None:
                whole = False
                break
            seconds += planned.rows_eval * per_row
        return Eta(seconds, whole)

    def _step_seconds_of(self, stage: int) -> float | None:
        """Seconds of an average step of a stage, from the lengths of its rows."""
        tokens = self.plan[stage].tokens if stage < len(self.plan) else 0.0
        return self._step_time.at(tokens * (self._rows_per_step.value or 0.0))

    def _passes_of(self, stage: int) -> float:
        """Seconds of a stage beside its steps and its scoring, from the newest one's rows."""
        if self._passes is None or self._passes[0] >= stage:
            return 0.0
        newest, before, after = self._passes
        seconds = after if stage == self.stage and self.step else before + after
        rows, known = self.plan[stage].rows_train, self.plan[newest].rows_train
        return seconds * rows / known if rows and known else seconds

    def _scorings_ahead(self) -> Iterable[PlannedTask]:
        ahead = 1 if self.forward_transfer else 0
        for stage in range(self.stage, len(self.plan)):
            for planned in self.plan[: stage + 1 + ahead]:
                if (stage, planned.task) not in self._scored:
                    yield planned


class _StepTime:
    """Seconds of a step as a + b tokens, by least squares over all steps, neither below 0."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5
        self._last = [0.0] * 5

    def add(self, seconds: float, tokens: float) -> None:
        self._last = [1.0, tokens, seconds, tokens * tokens, tokens * seconds]
        self._sums = [a + b for a, b in zip(self._sums, self._last, strict=True)]

    def forget_first(self) -> None:
        """Take the newest step out again."""
        self._sums = [a - b for a, b in zip(self._sums, self._last, strict=True)]
        self._last = [0.0] * 5

    def at(self, tokens: float) -> float | None:
        """Seconds of a step with so many tokens (0: of an average one); None without steps."""
        count, x, y, xx, xy = self._sums
        if count < 1:
            return None
        mean, middle = y / count, x / count
        if tokens <= 0 or x <= 0:
            return mean
        spread = xx - x * middle
        # Steps of like length say nothing about others: then time is taken to be linear in tokens.
        slope = mean / middle if spread < 1e-3 * xx else (xy - x * mean) / spread
        slope = min(max(slope, 0.0), mean / middle)
        return mean + slope * (tokens - middle)


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
