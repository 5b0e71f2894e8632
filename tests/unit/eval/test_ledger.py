"""Times of a run that was cut off and resumed: all of its lives, however they ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run

from accrete.eval.ledger import read_ledger, run_seconds
from accrete.eval.report import report_content, write_report
from accrete.eval.run_record import RunRecord

Events = list[dict[str, Any]]


def steps(first: int, last: int, began: float, seconds: float = 10.0) -> Events:
    """Steps of stage 0, one after the other from `began` on."""
    return [
        {
            "event": "step",
            "stage": 0,
            "step": number,
            "time": began + seconds * (k + 1),
            "seconds": seconds,
            "tokens": 100,
        }
        for k, number in enumerate(range(first, last + 1))
    ]


def scored(task: str, time: float, seconds: float) -> dict[str, Any]:
    return {
        "event": "scored",
        "stage": 0,
        "task": task,
        "moment": "after" if task == "a" else "before",
        "time": time,
        "seconds": seconds,
    }


def resumed_run() -> Events:
    """600 steps of 10 s: 570 before a pause of a day, the last 30 after it."""
    day = 100_000.0
    return [
        {"event": "run_started", "time": 0.0, "tasks": ["a", "b"]},
        {"event": "stage_started", "stage": 0, "task": "a", "time": 5.0, "steps": 600},
        *steps(1, 570, began=5.0),
        {"event": "checkpoint", "stage": 0, "step": 570, "time": 5706.0, "seconds": 1.0},
        {"event": "resumed", "stage": 0, "step": 570, "time": day},
        *steps(571, 600, began=day),
        {"event": "checkpoint", "stage": 0, "step": None, "time": day + 350, "seconds": 1.0},
        {
            "event": "consolidated",
            "stage": 0,
            "time": day + 350,
            "train_seconds": 310.0,
            "seconds": 40.0,
        },
        scored("a", day + 400, 50.0),
        {"event": "resumed", "stage": 0, "step": None, "time": 2 * day},
        scored("b", 2 * day + 7, 7.0),
        {"event": "stage_finished", "stage": 0, "time": 2 * day + 8, "score_seconds": 7.5},
        {"event": "run_finished", "time": 2 * day + 8, "seconds": 9.0},
    ]


def test_training_and_scoring_are_those_of_all_lives() -> None:
    (stage, _) = read_ledger(["a", "b"], resumed_run()).stages
    assert (stage.steps, stage.tokens, stage.step_seconds) == (600, 60_000, 6000.0)
    assert stage.train_seconds == pytest.approx((5706 - 5) + 310)
    assert stage.score_seconds == 57.0
    assert stage.consolidate_seconds == 40.0


def test_a_run_in_one_piece_says_its_times_itself() -> None:
    """Time stamps and sums are not used where the events know better."""
    began = [{"event": "stage_started", "stage": 0, "task": "a", "time": 0.0}]
    ended = [
        {"event": "consolidated", "stage": 0, "time": 99.0, "train_seconds": 33.0},
        scored("a", 120.0, 19.0),
        {"event": "stage_finished", "stage": 0, "time": 121.0, "score_seconds": 20.0},
    ]
    (stage,) = read_ledger(["a"], began + steps(1, 3, began=1.0) + ended).stages
    assert (stage.train_seconds, stage.score_seconds) == (33.0, 20.0)


def test_without_time_stamps_training_takes_at_least_its_steps() -> None:
    events = [{k: v for k, v in event.items() if k != "time"} for event in resumed_run()]
    (stage, _) = read_ledger(["a", "b"], events).stages
    assert stage.train_seconds == 6000.0
    assert run_seconds(events) is None  # nothing says how long the first lives were


def test_a_score_repeated_after_a_resume_counts_once() -> None:
    events = resumed_run()
    events.insert(-2, scored("a", 200_006.0, 49.0))
    (stage, _) = read_ledger(["a", "b"], events).stages
    assert stage.score_seconds == 56.0


def test_the_run_took_what_its_lives_took() -> None:
    events = resumed_run()
    # Three lives: to the checkpoint, to the first score, and what the last one says of itself.
    assert run_seconds(events) == pytest.approx(5706 + 400 + 9)
    assert run_seconds(events[:-1]) is None  # not finished
    assert run_seconds([events[0], events[-1]]) == 9.0


def test_a_run_begun_again_without_a_checkpoint_has_two_lives() -> None:
    """Nothing says `resumed` where there was nothing to go on from."""
    started = {"event": "stage_started", "stage": 0, "task": "a"}
    events = [
        {"event": "run_started", "time": 0.0},
        {**started, "time": 1.0},
        *steps(1, 4, began=1.0),
        {**started, "time": 1000.0},
        *steps(5, 6, began=1040.0),
        {"event": "consolidated", "stage": 0, "time": 1061.0, "train_seconds": 60.5},
        {"event": "run_finished", "time": 1070.0, "seconds": 71.0},
    ]
    (stage,) = read_ledger(["a"], events).stages
    assert stage.train_seconds == pytest.approx(40 + 60.5)
    assert run_seconds(events) == pytest.approx(41 + 71)


def test_the_untrained_model_scored_again_is_of_the_second_life() -> None:
    """It comes before the stage; the pause before it is no time at work."""
    untrained = {**scored("b", 8.0, 7.0), "stage": -1, "moment": "untrained"}
    started = {"event": "stage_started", "stage": 0, "task": "a"}
    events = [
        {"event": "run_started", "time": 0.0},
        untrained,
        {**started, "time": 9.0},
        *steps(1, 4, began=10.0),
        {**untrained, "time": 100_000.0},
        {**started, "time": 100_001.0},
        {"event": "run_finished", "time": 100_060.0, "seconds": 67.0},
    ]
    assert run_seconds(events) == pytest.approx(50 + 67)


def test_the_report_shows_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [[[1, 0]], [[1, 0], [1, 1]]], events=resumed_run())
    content = report_content(RunRecord(run))
    assert content["run_seconds"] == pytest.approx(6115)
    assert content["data"]["stages"][0]["train_seconds"] == pytest.approx(6011)
    text = write_report(run).read_text()
    assert "took <b>1 h 41 m</b>" in text
    assert "<td>1 h 40 m</td>" in text  # training of the first stage
