"""What the views make of a run's events."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from accrete.pipeline import sinks
from accrete.pipeline.config.run import LogConfig
from accrete.pipeline.console import fitting_matrix
from accrete.pipeline.errors import ConfigError
from accrete.pipeline.progress import Progress, format_count, format_duration
from accrete.pipeline.records import Event, Recorder
from accrete.pipeline.sinks import ConsoleSink, TensorBoardSink

TASKS = ("dbpedia", "amazon", "yahoo")
SCORES = {0: [90.0], 1: [70.0, 80.0], 2: [88.0, 79.0, 60.0]}


def plan() -> list[dict[str, Any]]:
    return [{"task": t, "steps": 20, "rows_train": 160, "rows_eval": 50} for t in TASKS]


def emit_run(emit: Callable[..., None], *, transfer: bool = False, until: int = 3) -> None:
    """A run of three tasks: steps of 0.5 s and 1000 tokens, 0.02 s per scored row."""
    emit(
        Event.RUN_STARTED,
        name="demo",
        method="ewc_lora",
        world=2,
        device="cpu",
        forward_transfer=transfer,
        plan=plan(),
    )
    for stage, task in list(enumerate(TASKS))[:until]:
        emit(Event.STAGE_STARTED, stage=stage, task=task, steps=20, rows=160)
        for step in range(1, 21):
            emit_step(emit, stage, step)
        emit(Event.CONSOLIDATED, stage=stage, task=task, seconds=3.0)
        for index, score in enumerate(SCORES[stage]):
            emit_score(emit, stage, TASKS[index], score)
        if transfer and stage + 1 < len(TASKS):
            emit_score(emit, stage, TASKS[stage + 1], 99.0)
        emit(Event.STAGE_FINISHED, stage=stage, task=task, row=SCORES[stage], score_seconds=1.0)
    if until == 3:
        emit(Event.RUN_FINISHED, seconds=45.0)


def emit_step(emit: Callable[..., None], stage: int, step: int) -> None:
    emit(
        Event.STEP,
        stage=stage,
        task=TASKS[stage],
        step=step,
        loss=1.0 / step,
        lr=0.1,
        tokens=1000,
        seconds=0.5,
    )


def emit_score(emit: Callable[..., None], stage: int, task: str, score: float) -> None:
    emit(Event.SCORED, stage=stage, task=task, score=score, rows=50, seconds=1.0, moment="after")


def shown(mode: str, *, terminal: bool = False, every: int = 10) -> tuple[ConsoleSink, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    config = LogConfig(console=mode, every_steps=every)  # type: ignore[arg-type]
    return ConsoleSink(config, console), out


def test_plain_lines() -> None:
    sink, out = shown("auto")
    with Recorder(None, [sink]) as recorder:
        emit_run(recorder.emit)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[0] == "demo: 3 tasks, 60 steps, method ewc_lora, 2 processes on cpu"
    steps = [line for line in lines if line.startswith("task ")]
    assert len(steps) == 3 * 3  # step 1, 10 and 20 of each task
    # 10 steps here and 40 later at 0.5 s, no scoring and no consolidation measured yet.
    assert steps[1] == (
        "task 1/3 dbpedia  step 10/20  loss 0.100  2.0k tok/s  eta task 5s  run 25s + scoring"
    )
    # 30 steps, two consolidations of 3 s and 2 + 3 scorings of 50 rows.
    assert steps[4] == ("task 2/3 amazon  step 10/20  loss 0.100  2.0k tok/s  eta task 5s  run 26s")
    text = out.getvalue()
    assert "\x1b" not in text
    assert "finished in 45s" in text


def test_stage_table_flags_the_forgotten() -> None:
    sink, out = shown("plain")
    with Recorder(None, [sink]) as recorder:
        emit_run(recorder.emit, transfer=True)
    tables = out.getvalue().split("after task ")[1:]
    second = [line.split() for line in tables[1].splitlines()]
    assert ["dbpedia", "70.0", "90.0", "-20.0", "forgotten"] in second
    assert ["amazon", "80.0", "new"] in second
    third = [line.split() for line in tables[2].splitlines()]
    # Measured against the best, not the latest; a point or two is no forgetting.
    assert ["dbpedia", "88.0", "90.0", "-2.0"] in third
    assert ["amazon", "79.0", "80.0", "-1.0"] in third
    matrix = [line.split() for line in out.getvalue().split("(percent)")[1].splitlines()]
    assert ["yahoo", "88.0", "79.0", "60.0"] in matrix
    # Scores of tasks that were not yet trained are no cells.
    assert "99.0" not in out.getvalue()


def test_a_name_is_no_markup() -> None:
    """An odd name must not cost the rest of the display."""
    sink, out = shown("plain")
    with Recorder(None, [sink]) as recorder:
        names = ("[bold]a", "b[/c]")
        tasks = [{**task, "task": name} for task, name in zip(plan(), names, strict=False)]
        recorder.emit(Event.RUN_STARTED, plan=tasks)
        for stage, name in enumerate(names):
            emit_score(recorder.emit, stage, name, 50.0)
            recorder.emit(Event.STAGE_FINISHED, stage=stage)
        recorder.emit(Event.RUN_FINISHED, seconds=1.0)
    assert "after task 1/2 [bold]a" in out.getvalue()
    assert "after task 2/2 b[/c]" in out.getvalue()
    assert "finished in 1s" in out.getvalue()


@pytest.mark.parametrize(
    ("tasks", "width", "head", "last"),
    [
        (["one", "two"], 80, "after one two", "two 100.0 99.0"),
        (["a long name"] * 8, 80, "after 1 2 3 4", "8 a long name 100.0 99.0 98.0"),
        (["a long name"] * 15, 200, "after 1 2 3 4", "15 a long name 100.0 99.0 98.0"),
        (["a very long name"] * 15, 80, "after 1 2 3 4", "15 a very long … 100 99 98"),
    ],
)
def test_the_matrix_fits_the_terminal(tasks: list[str], width: int, head: str, last: str) -> None:
    """Cut numbers would be wrong ones: names and decimals go first."""
    console = Console(file=io.StringIO(), width=width)
    rows = [[100.0 - i for i in range(t + 1)] for t in range(len(tasks))]
    with console.capture() as capture:
        console.print(fitting_matrix(console, tasks, rows))
    text = capture.get().split("(percent)")[1]
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    assert lines[0].startswith(head)
    assert lines[-1].startswith(last)
    assert len(lines) == 2 + len(tasks)
    assert all(str(100 - i) in lines[-1] for i in range(len(tasks)))


def test_quiet_shows_warnings_alone() -> None:
    sink, out = shown("quiet")
    with Recorder(None, [sink]) as recorder:
        emit_run(recorder.emit)
        recorder.emit(Event.WARNING, message="[red]careful[/red]")
    assert out.getvalue() == "warning: [red]careful[/red]\n"


def test_live_display_in_a_terminal() -> None:
    sink, out = shown("auto", terminal=True)
    with Recorder(None, [sink]) as recorder:
        emit_run(recorder.emit, until=1)
        for step in range(1, 6):
            emit_step(recorder.emit, 1, step)
        recorder.emit(Event.WARNING, message="careful")
    text = out.getvalue()
    assert "task 2/3 amazon" in text
    assert "5/20  loss 0.200  2.0k tok/s  0.5 s/step  eta 8s" in text
    assert "25/60  eta" in text
    assert "warning: careful" in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_a_resumed_console_knows_the_past() -> None:
    first: list[dict[str, Any]] = []
    emit_run(lambda event, **fields: first.append({"event": event, **fields}), until=2)
    sink, out = shown("plain", every=1)
    for event in first:
        sink.restore(event)
    assert out.getvalue() == ""
    sink.write({"event": Event.RESUMED, "stage": 1, "step": None, "world": 2})
    sink.write({"event": Event.STAGE_STARTED, "stage": 2, "task": "yahoo", "steps": 20})
    emit_step(lambda event, **fields: sink.write({"event": event, **fields}), 2, 1)
    for index, score in enumerate(SCORES[2]):
        emit_score(lambda event, **f: sink.write({"event": event, **f}), 2, TASKS[index], score)
    sink.write({"event": Event.STAGE_FINISHED, "stage": 2})
    lines = out.getvalue().splitlines()
    assert lines[0] == "resumed at task 2/3 amazon, its end"
    # 19 steps, one consolidation, three scorings, all measured before the resume.
    assert lines[1].endswith("eta task 10s  run 16s")
    assert ["dbpedia", "88.0", "90.0", "-2.0"] in [line.split() for line in lines]


def test_eta_counts_forward_transfer_scorings() -> None:
    def eta(transfer: bool) -> float:
        progress = Progress()
        emit_run(
            lambda event, **fields: progress.update({"event": event, **fields}),
            transfer=transfer,
            until=1,
        )
        progress.update({"event": Event.STAGE_STARTED, "stage": 1, "task": "amazon"})
        found = progress.run_eta
        assert found is not None
        assert found.whole
        return found.seconds

    plain = 2 * 20 * 0.5 + 2 * 3.0 + (2 + 3) * 1.0
    assert eta(False) == pytest.approx(plain)
    # After stage 1 the third task is scored as well; after the last stage there is none ahead.
    assert eta(True) == pytest.approx(plain + 1.0)


def test_progress_before_the_first_step_promises_nothing() -> None:
    progress = Progress()
    assert progress.run_eta is None
    assert progress.task_eta is None
    progress.update({"event": Event.RUN_STARTED, "plan": plan()})
    assert progress.run_eta is None
    assert progress.steps_total == 60


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.4, "0s"), (59.4, "59s"), (59.6, "1m"), (350, "6m"), (3599, "1h00m")),
        *((20400, "5h40m"), (86399, "1d0h"), (273600, "3d4h")),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_counts() -> None:
    assert [format_count(n) for n in (812, 12_380, 3_100_000)] == ["812", "12.4k", "3.1M"]


def read_scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Tag, step and value of every scalar, read from the record framing by hand."""
    from tensorboard.compat.proto.event_pb2 import Event as Record

    [file] = folder.glob("events.out.tfevents.*")
    data, offset, found = file.read_bytes(), 0, []
    while offset < len(data):
        (length,) = struct.unpack_from("<Q", data, offset)
        record = Record.FromString(data[offset + 12 : offset + 12 + length])
        found += [(v.tag, record.step, v.simple_value) for v in record.summary.value]
        offset += 12 + length + 4
    return found


def test_tensorboard_counts_steps_over_the_sequence(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    events, folder = tmp_path / "events.jsonl", tmp_path / "tb"
    with Recorder(events, [TensorBoardSink(folder)]) as recorder:
        emit_run(recorder.emit, until=2)
    # A resume writes the whole history anew, and no step twice.
    with Recorder(events, [TensorBoardSink(folder)]) as recorder:
        emit_step(recorder.emit, 1, 20)
        emit_step(recorder.emit, 2, 1)
    found = read_scalars(folder)
    losses = [(step, value) for tag, step, value in found if tag == "train/loss"]
    assert [step for step, _ in losses] == list(range(1, 42))
    assert losses[20] == (21, 1.0)
    amazon = [(step, value) for tag, step, value in found if tag == "eval/amazon"]
    assert amazon == [(40, 80.0)]
    assert {tag for tag, *_ in found} == {
        *("train/loss", "train/lr", "train/tokens", "train/seconds"),
        *("eval/dbpedia", "eval/amazon"),
    }


def test_missing_tensorboard_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'accrete\[tensorboard\]'"):
        TensorBoardSink(tmp_path)
