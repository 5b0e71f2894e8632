from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run

from accrete.eval import report as reports
from accrete.eval.charts import LOSS_POINTS, loss_chart, task_curve
from accrete.eval.ledger import LossPoint, read_ledger
from accrete.eval.matrix import AccuracyMatrix
from accrete.eval.report import refresh_report, report_content, write_report
from accrete.eval.report_settings import flatten, group_settings
from accrete.eval.run_record import RunRecord
from accrete.pipeline.errors import RunFolderError
from accrete.pipeline.interruption import InterruptionError

CELLS = [[[1, 1, 1, 0]], [[1, 0, 0, 1], [1, 1, 0, 1]]]


def embedded(report: Path) -> dict[str, Any]:
    text = report.read_text()
    found = re.search(
        r'<script type="application/json" id="accrete-run">(.*?)</script>', text, re.S
    )
    assert found is not None
    content: dict[str, Any] = json.loads(found.group(1))
    return content


@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_goes_on_without_its_report_but_not_after_a_signal(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stopped: bool,
) -> None:
    run = write_run(tmp_path / "run", CELLS)

    def fail(record: RunRecord) -> dict[str, Any]:
        raise InterruptionError("SIGTERM") if stopped else ValueError("odd")

    monkeypatch.setattr(reports, "report_content", fail)
    if stopped:
        with pytest.raises(InterruptionError):
            refresh_report(run)
        return
    refresh_report(run)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {run}: the report could not be written: ValueError('odd').")
    assert not (run / "report.html").exists()


def test_a_finished_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CELLS)
    report = write_report(run)
    assert report == run / "report.html"
    text = html.unescape(report.read_text())
    assert "After all 2 tasks the model scores 62.5% on average" in text
    assert "earlier tasks have lost 25.0 points" in text
    data = embedded(report)
    assert data["matrix"]["matrix"] == [[75.0], [50.0, 75.0]]
    assert data["matrix"]["metrics"]["backward_transfer"] == -25.0
    interval = data["intervals"]["average_performance"]
    assert interval["low"] < 62.5 < interval["high"]


def test_kept_and_lost_rows_are_counted(tmp_path: Path) -> None:
    content = report_content(RunRecord(write_run(tmp_path / "run", CELLS)))
    (row,) = content["retention"]
    assert (row.task, row.kept, row.lost, row.gained, row.wrong) == ("a", 1, 2, 1, 0)
    assert [example[0] for example in row.examples] == ["a-1", "a-2"]


def test_the_report_is_written_anew_and_leaves_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CELLS)
    before = {path.name for path in run.iterdir()}
    write_report(run)
    write_report(run)
    assert {path.name for path in run.iterdir()} == before | {"report.html"}


def test_an_unfinished_run_shows_what_is_to_come(tmp_path: Path) -> None:
    events = [
        {"event": "run_started", "plan": [{"task": "a"}, {"task": "b"}, {"task": "c"}]},
        {"event": "stage_started", "stage": 1, "task": "b", "steps": 9, "rows": 4},
    ]
    run = write_run(tmp_path / "run", CELLS[:1], tasks=("a", "b", "c"), events=events)
    content = report_content(RunRecord(run))
    states = [[cell.state for cell in row.cells] for row in content["heatmap"].rows]
    assert states == [
        ["scored", "unseen", "unseen"],
        ["pending", "pending", "unseen"],
        ["pending", "pending", "pending"],
    ]
    assert content["status"] == "1 of 3 stages scored"
    assert content["heatmap"].rows[1].cells[0].title == "Not scored yet: this stage is training"
    assert write_report(run).is_file()


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "events.jsonl").write_text(
        json.dumps({"event": "run_started", "tasks": ["a", "b"]})
        + "\n"
        + json.dumps({"event": "step", "stage": 0, "task": "a", "step": 1, "loss": 2.0})
        + '\n{"event": "st'  # cut off by a crash
    )
    text = write_report(run).read_text()
    assert "stage 1 of 2 is under way" in text
    assert "not scored yet" in text


@pytest.mark.parametrize("keep", ["run.json", "recipe.yaml", "events.jsonl", "matrix.json"])
def test_any_one_file_is_enough(tmp_path: Path, keep: str) -> None:
    run = write_run(tmp_path / "run", CELLS, events=[{"event": "run_started"}])
    for path in list(run.iterdir()):
        if path.is_file() and path.name != keep:
            path.unlink()
    assert write_report(run).stat().st_size > 5_000


@pytest.mark.parametrize(
    ("step", "said"), [(7, "Resumed in stage 2, step 7."), (None, "Resumed after stage 2.")]
)
def test_where_a_run_went_on(tmp_path: Path, step: int | None, said: str) -> None:
    """Behind a finished stage, as in every branch, there is no step."""
    run = write_run(tmp_path / "run", CELLS)
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "resumed", "stage": 1, "step": step}) + "\n")
    assert said in report_content(RunRecord(run))["warnings"]


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    """The rank that failed first is the cause; the others follow from it."""
    run = write_run(tmp_path / "run", CELLS[:1], tasks=("a", "b"))
    assert RunRecord(run).failure is None
    (run / "logs").mkdir()
    for rank, (message, time) in enumerate((("broken pipe", 7.0), ("out of <memory>", 6.0))):
        said = {"message": message, "time": time, "expected": rank == 0}
        (run / f"logs/error-{rank}.json").write_text(json.dumps(said))
    (run / "logs/error-2.json").write_text("[]")
    why = "The newest attempt ended early: out of <memory> (logs/rank-1.log)"
    assert report_content(RunRecord(run))["warnings"] == [why]
    assert html.escape(why) in write_report(run).read_text()


def test_warnings_come_in_the_order_of_events(tmp_path: Path) -> None:
    events = [{"event": "resumed", "stage": 0, "step": 3}, {"event": "warning", "message": "w"}]
    run = write_run(tmp_path / "run", CELLS, events=events)
    assert report_content(RunRecord(run))["warnings"] == ["Resumed in stage 1, step 3.", "w"]


def test_events_alone_know_the_name_and_nothing_is_made_up(tmp_path: Path) -> None:
    """The fields are those that `run_started` has; there is no row without a name."""
    run = tmp_path / "folder"
    run.mkdir()
    started = {"event": "run_started", "name": "demo", "plan": [{"task": "a"}]}
    (run / "events.jsonl").write_text(json.dumps(started) + "\n")
    record = RunRecord(run)
    assert (record.name, record.tasks) == ("demo", ("a",))
    assert report_content(record)["also_recorded"] == []


def test_damaged_files_become_warnings(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CELLS)
    (run / "run.json").write_text("{")
    (run / "recipe.yaml").write_text("a: [")
    (run / "stages/1/predictions.jsonl").write_text("{}\n")
    (run / "events.jsonl").write_text("no event\n{}\n")
    content = report_content(RunRecord(run))
    for name in ("run.json", "recipe.yaml", "predictions.jsonl", "events.jsonl"):
        assert any(name in text for text in content["warnings"]), name
    assert write_report(run).is_file()


def test_a_damaged_matrix_falls_back_on_the_events(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = [{"event": "run_started", "tasks": ["a", "b"]}]
    for stage, task, score, moment in (
        (-1, "b", 3.0, "untrained"),
        (0, "a", 80.0, "after"),
        (0, "b", 5.0, "after"),
        (1, "a", 40.0, "after"),
        (1, "b", 70.0, "after"),
    ):
        event = {"event": "scored", "stage": stage, "task": task, "score": score, "rows": 4}
        events.append({**event, "moment": moment})
    run = write_run(tmp_path / "run", CELLS, events=events)
    (run / "matrix.json").write_text(json.dumps({"tasks": ["a", "b"], "matrix": [[1, 2, 3]]}))
    record = RunRecord(run)
    assert record.matrix == AccuracyMatrix(("a", "b"), ((80.0,), (40.0, 70.0)))
    assert record.counts == (4, 4)
    assert any("matrix.json" in problem for problem in record.problems)


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a run folder"):
        write_report(tmp_path)
    with pytest.raises(RunFolderError, match="does not exist"):
        write_report(tmp_path / "nothing")


def test_intervals_need_rows_that_make_up_the_matrix(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CELLS)
    assert RunRecord(run).row_scores() is not None
    matrix = json.loads((run / "matrix.json").read_text())
    matrix["matrix"][1][0] += 1.0
    (run / "matrix.json").write_text(json.dumps(matrix))
    assert RunRecord(run).row_scores() is None
    assert "No intervals" in write_report(run).read_text()


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    run = write_run(tmp_path / "run", CELLS, tasks=(evil, "b"), name=evil, method=evil)
    warning = {"event": "warning", "message": evil + "\ud800"}
    (run / "events.jsonl").write_text(json.dumps(warning) + "\n")
    text = write_report(run).read_text()
    assert text.count("<script") == 1
    assert "<img" not in text
    assert embedded(run / "report.html")["name"] == evil


def test_nothing_is_fetched(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run", CELLS)).read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|//[a-z]+\.[a-z]|url\(|@import|<link rel=.stylesheet", text)


def test_ledger_counts_each_step_and_score_once() -> None:
    step = {"event": "step", "stage": 0, "task": "a", "tokens": 100, "seconds": 0.5}
    scored = {"event": "scored", "stage": 0, "task": "a", "moment": "after", "seconds": 2.0}
    events = [
        {"event": "stage_started", "stage": 0, "task": "a", "steps": 3, "rows": 12},
        {**step, "step": 1, "loss": 3.0},
        {**step, "step": 2, "loss": 2.0},
        {"event": "resumed", "stage": 0, "step": 1},
        {**step, "step": 2, "loss": 2.0},
        {**step, "step": 3, "loss": None},
        {"event": "checkpoint", "stage": 0, "step": 2, "seconds": 0.25},
        {"event": "checkpoint", "stage": 0, "step": 3, "seconds": 0.25},
        {
            "event": "consolidated",
            "stage": 0,
            "seconds": 4.0,
            "train_seconds": 1.75,
            "state_bytes": 1024,
        },
        scored,
        scored,
        {"event": "scored", "stage": -1, "task": "b", "moment": "untrained", "seconds": 9.0},
        {"event": "stage_finished", "stage": 0, "task": "a"},
        {"event": "something new"},
    ]
    ledger = read_ledger(["a", "b"], events)
    first, second = ledger.stages
    assert (first.steps, first.planned_steps, first.rows, first.tokens) == (3, 3, 12, 300)
    assert first.tokens_per_second == pytest.approx(200)
    assert (first.train_seconds, first.score_seconds) == (1.75, 2.0)
    assert (first.consolidate_seconds, first.checkpoint_seconds) == (4.0, 0.5)
    assert (first.state, first.state_bytes) == ("finished", 1024)
    assert [point.loss for point in ledger.losses] == [3.0, 2.0]
    assert (second.state, second.train_seconds) == ("waiting", None)
    assert ledger.total("score_seconds") == 2.0
    assert ledger.total("rows") == 12


def test_loss_chart_keeps_range_and_stages_when_it_thins_out() -> None:
    losses = [
        LossPoint(stage=t, step=k, loss=1.0 + (k % 2)) for t in range(2) for k in range(1, 1001)
    ]
    chart = loss_chart(losses, ["a", "b"])
    assert chart is not None
    assert chart.line.count("L") + 1 <= LOSS_POINTS + 2
    assert (chart.num_steps, chart.steps_per_point) == (2000, 6)
    assert chart.stages == [(0.0, 50.0, "a"), (50.0, 50.0, "b")]
    assert chart.top == pytest.approx(1.5 * 1.05)
    heights = [float(pair.split()[1]) for pair in re.findall(r"[\d.]+ [\d.]+", chart.band)]
    assert (min(heights), max(heights)) == (0.0, pytest.approx(100 * (1 - 1 / chart.top), abs=0.01))
    assert loss_chart([], []) is None


def test_task_curve_places_scores() -> None:
    matrix = AccuracyMatrix(("a", "b"), ((100.0,), (0.0, 50.0)), before=(None, 25.0))
    curve = task_curve(matrix, 0, None)
    assert [mark.own for mark in curve.marks] == [True, False]
    assert curve.marks[0].y < curve.marks[1].y
    assert curve.marks[0].x < curve.marks[1].x
    assert curve.before is None
    assert curve.description == "a: after a: 100.0%, after b: 0.0%"
    second = task_curve(matrix, 1, None)
    assert second.before is not None
    assert second.before.x == pytest.approx(curve.marks[0].x)


def test_settings_show_the_nearest_origin() -> None:
    config = {"seed": 1, "train": {"lr": 0.1, "betas": [0.9, 0.999]}, "tasks": [{"name": "a"}]}
    groups = group_settings(
        config, {"train": "default", "train.lr": "override", "seed": "r.yaml:3"}
    )
    rows = {row.path: (row.value, row.origin, row.is_default) for g in groups for row in g.settings}
    assert rows == {
        "seed": ("1", "r.yaml:3", False),
        "train.lr": ("0.1", "override", False),
        "train.betas": ("[0.9, 0.999]", "default", True),
        "tasks.0.name": ("a", "", False),
    }
    assert [group.name for group in groups] == ["recipe", "train", "tasks"]
    assert flatten(None) == []
