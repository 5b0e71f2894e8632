"""The remaining time of a run whose tasks differ in length, rows and passes."""

from __future__ import annotations

from typing import Any

import pytest

from accrete.pipeline.progress import Progress
from accrete.pipeline.records import Event

ROWS = 8
LENGTHS = {"short": 50.0, "long": 200.0, "middle": 100.0}
TRAIN = {"short": 160, "long": 320, "middle": 80}
STEPS = {name: count // ROWS for name, count in TRAIN.items()}
FIXED, EACH = 0.2, 1e-3
"""A step takes FIXED seconds and EACH for every token."""


def seconds_of(task: str) -> float:
    return FIXED + EACH * ROWS * LENGTHS[task]


def start(**wrong: Any) -> Progress:
    progress = Progress()
    progress.update(
        {
            "event": Event.RUN_STARTED,
            "plan": [
                {
                    "task": name,
                    "steps": STEPS[name],
                    "rows_train": TRAIN[name],
                    "rows_eval": 10,
                    "tokens": LENGTHS[name],
                    **wrong,
                }
                for name in LENGTHS
            ],
        }
    )
    return progress


def train(progress: Progress, stage: int, steps: int | None = None, first: float = 0.0) -> None:
    task = list(LENGTHS)[stage]
    progress.update({"event": Event.STAGE_STARTED, "stage": stage, "task": task})
    for step in range(STEPS[task] if steps is None else steps):
        # Batches of one task differ, too: windows are sorted by length.
        tokens = ROWS * LENGTHS[task] * (0.9, 1.1)[step % 2]
        progress.update(
            {
                "event": Event.STEP,
                "stage": stage,
                "task": task,
                "step": step + 1,
                "loss": 1.0,
                "tokens": tokens,
                "rows": ROWS,
                "seconds": FIXED + EACH * tokens + (first if step == 0 else 0.0),
            }
        )


def consolidate(progress: Progress, stage: int, before: float, after: float) -> None:
    task = list(LENGTHS)[stage]
    progress.update(
        {
            "event": Event.CONSOLIDATED,
            "stage": stage,
            "task": task,
            "train_seconds": before + STEPS[task] * seconds_of(task),
            "seconds": after,
        }
    )


def score(progress: Progress, stage: int) -> None:
    for task in list(LENGTHS)[: stage + 1]:
        progress.update(
            {
                "event": Event.SCORED,
                "stage": stage,
                "task": task,
                "score": 50.0,
                "rows": 10,
                "seconds": 0.5,
            }
        )


def eta(progress: Progress) -> float:
    found = progress.run_eta
    assert found is not None
    return found.seconds


def test_later_tasks_take_the_time_of_their_own_lengths() -> None:
    progress = start()
    train(progress, 0, first=9.0)  # the first step compiles and does not count
    later = sum(STEPS[name] * seconds_of(name) for name in ("long", "middle"))
    assert eta(progress) == pytest.approx(later, rel=1e-6)
    # Without the lengths every later step counts as one of this task.
    blind = start(tokens=0.0)
    train(blind, 0)
    assert eta(blind) == pytest.approx((40 + 10) * seconds_of("short"), rel=0.01)


def test_steps_of_one_length_are_continued_in_proportion() -> None:
    progress = start()
    progress.update({"event": Event.STAGE_STARTED, "stage": 0, "task": "short"})
    for step in range(20):
        progress.update(
            {
                "event": Event.STEP,
                "stage": 0,
                "task": "short",
                "step": step + 1,
                "loss": 1.0,
                "tokens": 400,
                "rows": ROWS,
                "seconds": 0.5,
            }
        )
    # Nothing says how much of a step does not grow with it: 4 and 2 times the tokens.
    assert eta(progress) == pytest.approx(40 * 0.5 * 4 + 10 * 0.5 * 2)


def test_passes_grow_with_rows_and_those_made_are_not_ahead() -> None:
    progress = start()
    train(progress, 0)
    consolidate(progress, 0, before=2.0, after=3.0)
    score(progress, 0)
    # 160 rows took 5 s of passes: 320 take 10 s, 80 take 2.5 s. Scoring: 2 + 3 tasks of 0.5 s.
    scoring = 5 * 0.5
    later = sum(STEPS[name] * seconds_of(name) for name in ("long", "middle"))
    progress.update({"event": Event.STAGE_STARTED, "stage": 1, "task": "long"})
    assert eta(progress) == pytest.approx(later + 10.0 + 2.5 + scoring, rel=1e-6)
    train(progress, 1, steps=10)
    # Its passes at the start (4 s) are made.
    assert eta(progress) == pytest.approx(
        later - 10 * seconds_of("long") + 6.0 + 2.5 + scoring, rel=0.01
    )
    train(progress, 1)
    consolidate(progress, 1, before=4.0, after=6.0)
    rest = STEPS["middle"] * seconds_of("middle")
    assert eta(progress) == pytest.approx(rest + 2.5 + scoring, rel=1e-6)


def test_a_stage_corrects_its_own_plan() -> None:
    progress = start()
    progress.update({"event": Event.STAGE_STARTED, "stage": 0, "task": "short", "steps": 25})
    assert progress.stage_steps == 25
    assert progress.steps_total == 25 + 40 + 10


def test_an_older_run_without_rows_and_lengths_still_has_an_eta() -> None:
    progress = Progress()
    plan = [{"task": name, "steps": 10, "rows_eval": 10} for name in LENGTHS]
    progress.update({"event": Event.RUN_STARTED, "plan": plan})
    train(progress, 0, steps=4)
    consolidate(progress, 0, before=0.0, after=3.0)
    assert eta(progress) > 20 * seconds_of("short")


def test_the_speed_is_a_mean_over_many_steps() -> None:
    progress = start()
    train(progress, 0, first=9.0)
    # Steps take turns at 0.56 and 0.64 s; the last one alone would say 0.64.
    assert progress.step_seconds == pytest.approx(0.6, abs=0.005)
