"""A scoring that is cut off goes on after the tasks that are scored."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import toys

from accrete.pipeline import checkpoint, scorebook, stage_runner
from accrete.pipeline.config.run import EvalConfig
from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.scoring import RowScore, TaskScore
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))


class CutError(Exception):
    pass


class Scorer:
    """Scores that follow from the model as it stands; may be cut off before its n-th call."""

    def __init__(self, cut=None, outside=None):
        self.calls = []
        self.cut = cut
        self.outside = outside or {}

    def __call__(self, view, tasks):
        if len(self.calls) == self.cut:
            raise CutError
        self.calls.append([task.name for task in tasks])
        return [self.score(view, task.name) for task in tasks]

    def score(self, view, task):
        rows = toys.ToyRows(len(task), 4, 4).all
        collator = toys.Collator(False, toys.PAD, None, toys.EOS)
        value = float(view.logits(collator.train(rows)).abs().mean()) / 10
        row = RowScore(task=task, id="1", correct=False, score=value, prediction="ü")
        return TaskScore(
            task=task, score=100 * value, rows=[row], seconds=1.0, outside=self.outside.get(task)
        )


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(scorebook, "KEPT_EVERY", 1)

    def make(name, scorer, forward_transfer=False):
        parts = toys.make_parts(
            ALONE, tmp_path / name, model="llama", zero=None, micro=4, rows=8, evaluator=scorer
        )
        parts.config = replace(parts.config, eval=EvalConfig(forward_transfer=forward_transfer))
        for task in parts.tasks:
            task.num_eval = 1
        try:
            return parts.run, StageRunner(parts).run()
        finally:
            parts.recorder.close()

    return make


def test_every_rank_takes_the_scores_that_the_first_one_finds(run, tmp_path):
    """A file system may show a file to some ranks later."""
    folder, whole = run("whole", Scorer(), forward_transfer=True)
    parts = toys.make_parts(ALONE, tmp_path / "other", model="llama", zero=None, micro=4, rows=8)
    said = []
    for chief in (True, False):
        if chief:
            parts.run = folder
        runner = StageRunner(parts)
        runner.chief = runner.book.chief = chief
        runner.book._view.gather = lambda value: said.append(value) or [said[0]]
        runner.book.read(2)
        assert [list(row) for row in runner.book.scores.rows] == whole.rows
        parts = toys.make_parts(ALONE, tmp_path / "late", model="llama", zero=None, micro=4, rows=8)
    assert said[1] is None


def test_groups_are_neighbours_with_enough_rows():
    counts = [1500, 600, 1, 2000, 5]
    assert scorebook._groups([0, 1, 2, 3, 4], counts) == [[0, 1], [2, 3], [4]]
    assert scorebook._groups([1, 2], counts) == [[1, 2]]
    assert scorebook._groups([], counts) == []


def test_it_goes_on_after_what_is_scored(run):
    folder, whole = run("whole", every := Scorer())
    assert every.calls == [["one"], ["one"], ["two"]]
    with pytest.raises(CutError):
        run("cut", Scorer(cut=2))
    again, resumed = run("cut", rest := Scorer())
    assert rest.calls == [["two"]]
    assert resumed.rows == whole.rows
    for stage in (0, 1):
        assert (
            again.stage(stage).predictions.read_text()
            == folder.stage(stage).predictions.read_text()
        )
    scored = [json.loads(line) for line in again.events.read_text().splitlines()]
    named = [(e["stage"], e["task"]) for e in scored if e["event"] == "scored"]
    assert named == [(0, "one"), (1, "one"), (1, "two")]
    assert not any(again.partial.glob("*"))


def test_a_stage_that_is_trained_anew_is_scored_anew(run, tmp_path):
    """Its checkpoint is gone: what was scored belongs to a model that is no more."""
    with pytest.raises(CutError):
        run("cut", Scorer(cut=2))
    folder = tmp_path / "cut" / "run"
    (folder / "checkpoints" / checkpoint.Position(stage=1).folder / "checkpoint.json").unlink()
    _, resumed = run("cut", again := Scorer())
    assert again.calls == [["one"], ["two"]]
    assert len(resumed.rows) == 2


def test_a_row_of_a_model_that_is_no_more_is_not_read(run, tmp_path):
    """Scored, its checkpoint lost, trained anew, and cut off before it was scored anew."""
    run("cut", Scorer())
    folder = tmp_path / "cut" / "run"
    (folder / "checkpoints" / checkpoint.Position(stage=1).folder / "checkpoint.json").unlink()
    with pytest.raises(CutError):
        run("cut", Scorer(cut=0))
    _, resumed = run("cut", again := Scorer())
    assert again.calls == [["one"], ["two"]]
    assert len(resumed.rows) == 2


def test_the_untrained_model_is_scored_once(run, monkeypatch):
    """Cut off in the first task, before any checkpoint, as by a lack of memory."""
    _, whole = run("whole", Scorer(), forward_transfer=True)

    def cut(*_, **__):
        raise CutError

    first = Scorer()
    with monkeypatch.context() as patch:
        patch.setattr(stage_runner, "train_task", cut)
        with pytest.raises(CutError):
            run("cut", first, forward_transfer=True)
    assert first.calls == [["two"]]
    folder, resumed = run("cut", again := Scorer(), forward_transfer=True)
    assert again.calls == [["one"], ["two"], ["one"], ["two"]]
    assert resumed.untrained == whole.untrained
    assert resumed.rows == whole.rows
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert [e["task"] for e in events if e.get("moment") == "untrained"] == ["two"]


def test_many_answers_outside_the_labels_give_one_warning_a_stage(run):
    folder, _ = run("odd", Scorer(outside={"one": 37.4, "two": 10.0}))
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    scored = [(e["stage"], e["task"], e["outside"]) for e in events if e["event"] == "scored"]
    assert scored == [(0, "one", 37.4), (1, "one", 37.4), (1, "two", 10.0)]
    said = [e["message"] for e in events if e["event"] == "warning"]
    assert said == [
        f"after {task}, answers that are none of the task's labels: one 37 %; "
        f"stages/{stage}/predictions.jsonl has them"
        for stage, task in enumerate(("one", "two"))
    ]
    folder, _ = run("usual", Scorer())
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert not any("outside" in e or e["event"] == "warning" for e in events)
